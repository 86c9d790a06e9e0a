"""What the examples share: where pictures go, and how several seeds become one curve with a band."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import torch as th

matplotlib.use("Agg")  # no display needed
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

IMAGES = Path(__file__).parents[1] / "docs" / "images"
BLUE, ORANGE, GREEN, RED, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#555555"

plt.style.use(Path(__file__).with_name("plots.mplstyle"))
th.set_num_threads(1)  # these networks are too small to gain from more


def parse_folder(description: str | None) -> Path:
    """
    Read the command line. A program does so first of all: a mistake there should not cost a training.

    :param description: The program's docstring, for ``--help``
    :return: The folder of the picture, which exists then
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=IMAGES, help="where to write the picture (default: docs/images)")
    folder: Path = parser.parse_args().folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--folder must be a folder, or a place for one, got {folder}: {error.strerror}")
    return folder


def plot_band(axes: Axes, x: Sequence[float], curves: Sequence[Sequence[float]], label: str, color: str) -> Line2D:
    """
    Several seeds: their median as a line, and their full range as a band.

    :param axes: Where to draw
    :param x: Shape (n,)
    :param curves: One curve for each seed, shape (n_seeds, n)
    :param label: Name in the legend
    :param color: Color of both
    :return: The line
    """
    values = np.asarray(curves)
    axes.fill_between(x, values.min(axis=0), values.max(axis=0), color=color, alpha=0.2, linewidth=0)
    return axes.plot(x, np.median(values, axis=0), color=color, label=label)[0]


def save_picture(figure: Figure, file: Path) -> None:
    """
    Write a picture, and say where it is.

    :param figure: The picture
    :param file: Its file
    """
    figure.savefig(file)
    print(f"Picture: {file}")
