"""
Draw the pictures of docs/results.md from the result files of ``results.py``.

::

    python benchmarks/figures.py                             # into docs/images
    python benchmarks/figures.py --folder my_results --output pictures

Rows without results are left out, and so is a picture without rows. Each picture carries a hash of the results.
"""

import argparse
import hashlib
import json
import math
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display needed
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from results import FOLDER, N_EVALUATIONS, ROWS, Row
from rliable import metrics
from tables import (
    IMAGES,
    OURS,
    THEIRS,
    Results,
    duration,
    estimate,
    estimate_iqm,
    interquartile_mean,
    read_row,
    scores_of,
    seconds_to_solve,
)

COLORS = {OURS: "#0072B2", THEIRS: "#E69F00"}
LABELS = {OURS: "LectureDQN", THEIRS: "SB3's DQN"}
MINIMUM_SEEDS = 3  # a band of fewer says nothing
N_RESAMPLES_OF_CURVES, N_RESAMPLES_OF_PAIRS = 2_000, 1_000
N_COLUMNS = 3

plt.style.use(Path(__file__).parents[1] / "examples" / "plots.mplstyle")

Rows = dict[str, dict[str, Results]]


def read_rows(folder: Path) -> Rows:
    """The rows for which both algorithms have enough seeds."""
    rows = {name: read_row(name, folder) for name in ROWS}
    return {name: row for name, row in rows.items() if min(map(len, row.values())) >= MINIMUM_SEEDS}


def digest_of(rows: Rows) -> str:
    """A hash of what is drawn of the results."""
    keys = ("returns", "optimal_return", "curve", "training_seconds", "error")
    drawn = {
        name: {algorithm: [[result.get(key) for key in keys] for result in results] for algorithm, results in row.items()}
        for name, row in rows.items()
    }
    return hashlib.sha256(json.dumps(drawn, sort_keys=True).encode()).hexdigest()


def title_of(name: str) -> str:
    """What stands above a row's axes."""
    row = ROWS[name]
    suffix = ", defaults" if row.settings == "defaults" else ""
    return f"{row.env}{suffix}\n{row.steps // 1000} 000 steps"


def grid(n: int, height: float) -> tuple[Figure, list[Axes]]:
    """A figure with so many axes, and a legend above them."""
    n_columns = min(n, N_COLUMNS)
    n_rows = math.ceil(n / n_columns)
    figure, axes = plt.subplots(n_rows, n_columns, figsize=(max(3.5 * n_columns, 5), height * n_rows), squeeze=False)
    for unused in axes.flat[n:]:
        unused.set_visible(False)
    return figure, list(axes.flat[:n])


def add_legend(figure: Figure, axes: Axes) -> None:
    """One legend for all axes."""
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=2)


def whole_curve(row: Row, result: dict[str, Any]) -> list[tuple[float, float]]:
    """Steps and mean return of each evaluation; a diverged run goes on with the policy that it had last."""
    points = [(steps, mean_return) for steps, _, mean_return in result["curve"]]
    last = points[-1][1] if points else float(np.mean(result["returns"]))
    return points + [(row.steps * (i + 1) / N_EVALUATIONS, last) for i in range(len(points), N_EVALUATIONS)]


def draw_learning_curves(rows: Rows) -> Figure:
    """The interquartile mean of the evaluations during training, with its 95 % interval."""
    figure, all_axes = grid(len(rows), 2.6)
    for axes, (name, by_algorithm) in zip(all_axes, rows.items(), strict=True):
        for algorithm, results in by_algorithm.items():
            curves = np.array([whole_curve(ROWS[name], result) for result in results])
            steps = np.median(curves[:, :, 0], axis=0)
            iqm = estimate(curves[:, :, 1], interquartile_mean, N_RESAMPLES_OF_CURVES)
            axes.fill_between(steps, iqm.low, iqm.high, color=COLORS[algorithm], alpha=0.2, linewidth=0)
            axes.plot(steps, iqm.estimate, color=COLORS[algorithm], label=LABELS[algorithm])
        axes.set_title(title_of(name))
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(4))
        axes.xaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda x, _: f"{x / 1000:.0f}k" if x else "0"))
    for axes in all_axes[::N_COLUMNS]:
        axes.set_ylabel("return of 20 greedy episodes")
    figure.supxlabel("environment steps", fontsize="medium")
    add_legend(figure, all_axes[0])
    return figure


def draw_iqm(rows: Rows) -> Figure:
    """The interquartile mean of the final models with its 95 % interval, and each seed as a dot."""
    figure, all_axes = grid(len(rows), 1.9)
    for axes, (name, by_algorithm) in zip(all_axes, rows.items(), strict=True):
        row = ROWS[name]
        for height, (algorithm, results) in enumerate(reversed(by_algorithm.items())):
            scores = scores_of(row, results)
            iqm = estimate_iqm(scores)
            color = COLORS[algorithm]
            axes.barh(height, iqm.high - iqm.low, left=iqm.low, height=0.6, color=color, alpha=0.35, label=LABELS[algorithm])
            axes.plot([iqm.estimate[0]] * 2, [height - 0.3, height + 0.3], color=color, linewidth=2)
            axes.plot(scores, [height] * len(scores), "o", color=color, markersize=3, alpha=0.8)
        if row.target is not None:
            axes.axvline(row.target, color="#555555", linestyle=":", linewidth=1)
        axes.set_title(title_of(name) + (", % against the optimal driver" if row.is_relative else ""))
        axes.set_yticks([])
        axes.use_sticky_edges = False
        axes.margins(x=0.06, y=0.2)
        axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(5))
    figure.supxlabel(
        "return of 100 greedy episodes: interquartile mean,\nits 95 % interval, and each seed; dotted: to reach",
        fontsize="medium",
    )
    handles, labels = all_axes[0].get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside upper center", ncols=2)
    return figure


def draw_probability_of_improvement(rows: Rows) -> Figure:
    """The probability that a run of ours is better than one of SB3's, ties counted half, with its 95 % interval."""
    figure, axes = plt.subplots(figsize=(7, 0.9 + 0.34 * len(rows)))

    def probability(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
        return np.array([metrics.probability_of_improvement(ours, theirs)])

    for height, (name, by_algorithm) in enumerate(reversed(rows.items())):
        pair = [np.array(scores_of(ROWS[name], by_algorithm[algorithm]))[:, None] for algorithm in (OURS, THEIRS)]
        result = estimate(pair, probability, N_RESAMPLES_OF_PAIRS)
        axes.barh(height, result.high - result.low, left=result.low, height=0.5, color=COLORS[OURS], alpha=0.35)
        axes.plot([result.estimate[0]] * 2, [height - 0.25, height + 0.25], color=COLORS[OURS], linewidth=2.5, clip_on=False)
    axes.axvline(0.5, color="#555555", linestyle=":", linewidth=1)
    axes.set_xlim(0, 1)
    axes.set_yticks(range(len(rows)), [title_of(name).replace("\n", ", ") for name in reversed(rows)])
    axes.set_xlabel("P(LectureDQN > SB3's DQN), ties count half,\nwith 95 % intervals")
    return figure


def draw_time_to_solve(name: str, by_algorithm: dict[str, Results]) -> Figure:
    """The share of the seeds that had solved it after so many seconds of training."""
    row = ROWS[name]
    figure, axes = plt.subplots(figsize=(6, 3.4))
    longest = max(result["training_seconds"] for results in by_algorithm.values() for result in results)
    for algorithm, results in by_algorithm.items():
        times = [seconds_to_solve(row, result) for result in results]
        solved = sorted(seconds for seconds, is_solved in times if is_solved)
        shares = [index / len(times) for index in range(len(solved) + 1)]
        median = float(np.median([seconds for seconds, _ in times]))
        label = f"{LABELS[algorithm]}, median {duration(median)}"
        axes.step([0, *solved, longest], [*shares, shares[-1]], where="post", color=COLORS[algorithm], label=label)
        if math.isfinite(median):
            axes.axvline(median, color=COLORS[algorithm], linestyle=":", linewidth=1)
    axes.set(ylim=(0, 1.02), xlabel="seconds of training", ylabel=f"seeds with an evaluation ≥ {row.solved:.0f}")
    axes.set_xlim(left=0)
    axes.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1))
    axes.set_title(title_of(name).replace("\n", ", "))
    add_legend(figure, axes)
    return figure


def draw_all(rows: Rows) -> dict[str, Figure]:
    """Every picture for which there are results, by the name of its file."""
    if not rows:
        return {}
    pictures = {
        "learning_curves": draw_learning_curves(rows),
        "iqm": draw_iqm(rows),
        "probability_of_improvement": draw_probability_of_improvement(rows),
    }
    solvable = next((name for name in rows if ROWS[name].solved is not None), None)
    if solvable is not None:
        pictures["time_to_solve"] = draw_time_to_solve(solvable, rows[solvable])
    return pictures


def main() -> None:
    """Draw and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=FOLDER, help="folder of the result files")
    parser.add_argument("--output", type=Path, default=IMAGES, help="folder of the pictures")
    arguments = parser.parse_args()
    rows = read_rows(arguments.folder)
    if not rows:
        parser.error(f"--folder must hold {MINIMUM_SEEDS} seeds of both algorithms of a row as it is, got {arguments.folder}")
    arguments.output.mkdir(parents=True, exist_ok=True)
    for name, figure in draw_all(rows).items():
        figure.savefig(arguments.output / f"{name}.png", metadata={"Source": digest_of(rows)})
        print(f"wrote {arguments.output / name}.png")


if __name__ == "__main__":
    main()
