"""What the examples share: where pictures go, and how several seeds become one curve with a band."""

import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import torch as th

matplotlib.use("Agg")  # no display needed
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, RED, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#555555"

plt.style.use(Path(__file__).with_name("plots.mplstyle"))
th.set_num_threads(1)  # these networks are too small to gain from more


def plot_band(axes: Axes, x: Sequence[float], curves: Sequence[Sequence[float]], label: str, color: str) -> None:
    """
    Several seeds: their median as a line, and their full range as a band.

    :param axes: Where to draw
    :param x: Shape (n,)
    :param curves: One curve for each seed, shape (n_seeds, n)
    :param label: Name in the legend
    :param color: Color of both
    """
    values = np.asarray(curves)
    axes.fill_between(x, values.min(axis=0), values.max(axis=0), color=color, alpha=0.2, linewidth=0)
    axes.plot(x, np.median(values, axis=0), color=color, label=label)


def save_picture(figure: Figure, name: str) -> None:
    """
    Write a picture to ``docs/images``, or to the folder given on the command line.

    :param figure: The picture
    :param name: Its file name, without the ending
    """
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1] / "docs" / "images"
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / f"{name}.png")
    print(f"Picture: {folder / name}.png")
