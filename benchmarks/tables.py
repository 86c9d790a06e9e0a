"""
Generate the tables of README.md and docs/results.md from the result files of ``results.py``.

::

    python benchmarks/tables.py                        # writes the tables of the committed results
    python benchmarks/tables.py --folder my_results    # prints the tables of others

A table stands between ``<!-- results:NAME -->`` and ``<!-- /results:NAME -->``. Interquartile means and their 95 % intervals
(stratified bootstrap over the seeds) are computed by rliable (https://arxiv.org/abs/2108.13264). A row with fewer seeds than
it asks for says how many it has.
"""

import argparse
import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from results import FOLDER, FURTHER_SEEDS, ROWS, Row, results_of, runs_of, score
from rliable.library import get_interval_estimates

from sb3_lecture_dqn.seeding import numpy_draws_from

REPOSITORY = Path(__file__).parents[1]
FILES = (REPOSITORY / "README.md", REPOSITORY / "docs" / "results.md")
IMAGES = REPOSITORY / "docs" / "images"
#: What figures.py draws, and what it shows.
PICTURES = {
    "learning_curves": "The return of the evaluations during training: interquartile mean and 95 % interval",
    "iqm": "The return of the final models: interquartile mean, 95 % interval, and each seed",
    "probability_of_improvement": "The probability that a run of LectureDQN is better than one of SB3's DQN; ties count half",
    "time_to_solve": "The share of the seeds that has reached a mean return of 200 after so many seconds of training",
}
N_RESAMPLES = 5_000
NOT_RUN = "not run yet"
OURS, THEIRS = "lecture_dqn", "dqn"
NAMES = {OURS: "`LectureDQN`", THEIRS: "SB3's DQN"}

Results = list[dict[str, Any]]


class Interval(NamedTuple):
    """An estimate with its 95 % interval; arrays of shape (n,)."""

    estimate: np.ndarray
    low: np.ndarray
    high: np.ndarray


# --- Statistics -----------------------------------------------------------------------------------------------------------


def interquartile_mean(values: np.ndarray) -> np.ndarray:
    """
    The mean of the middle half of the seeds at each point: rliable's ``aggregate_iqm``, quicker and for many points at once.

    :param values: Shape (n_seeds, n)
    :return: Shape (n,)
    """
    n_cut = len(values) // 4
    middle: np.ndarray = np.sort(values, axis=0)[n_cut : len(values) - n_cut].mean(axis=0)
    return middle


def estimate(values: np.ndarray | Sequence[np.ndarray], statistic: Callable[..., np.ndarray], n_resamples: int) -> Interval:
    """
    A statistic with its 95 % stratified bootstrap interval, the same each time.

    :param values: Shape (n_seeds, n); or one such array for each argument of the statistic
    :param statistic: What to estimate, of shape (n,)
    :param n_resamples: Number of bootstrap samples
    """
    # rliable draws from numpy's global generator, whatever random_state it is given
    with numpy_draws_from(np.random.default_rng(0)):
        points, intervals = get_interval_estimates({"": values}, statistic, reps=n_resamples)
    return Interval(points[""], *intervals[""])


@lru_cache
def estimate_iqm(scores: tuple[float, ...]) -> Interval:
    """The interquartile mean of one score for each seed."""
    return estimate(np.array(scores)[:, None], interquartile_mean, N_RESAMPLES)


def read_row(name: str, folder: Path = FOLDER) -> dict[str, Results]:
    """The results of a row, by algorithm, in the order of their seeds."""
    row = ROWS[name]
    return {algorithm: results_of(runs_of(name, row, [algorithm]), folder) for algorithm in NAMES}


def scores_of(row: Row, results: Results) -> tuple[float, ...]:
    """One score for each seed."""
    return tuple(score(row, result) for result in results)


def seconds_to_solve(row: Row, result: dict[str, Any]) -> tuple[float, bool]:
    """Seconds of training to the first evaluation that solved it, or all that it had; and whether there was one."""
    assert row.solved is not None
    for _, seconds, mean_return in result["curve"]:
        if mean_return >= row.solved:
            return seconds, True
    return math.inf if "error" in result else result["training_seconds"], False  # diverged: more would not have helped


# --- Cells ----------------------------------------------------------------------------------------------------------------


def number(value: float, digits: int = 1) -> str:
    """A number with a minus sign, not a hyphen."""
    text = f"{value:.{digits}f}"
    return text.replace("-", "−") if float(text) else f"{0:.{digits}f}"


def duration(seconds: float) -> str:
    """Whole seconds."""
    return f"{seconds:.0f} s" if math.isfinite(seconds) else "never"


def iqm_cell(row: Row, results: Results) -> str:
    """The interquartile mean with its interval, and the number of seeds where some are missing."""
    if not results:
        return NOT_RUN
    iqm = estimate_iqm(scores_of(row, results))
    unit = " %" if row.is_relative else ""
    interval = f" [{number(iqm.low[0])}, {number(iqm.high[0])}]" if len(results) > 1 else ""
    seeds = "" if len(results) == row.n_seeds else f" ({len(results)} of {row.n_seeds} seeds)"
    return f"{number(iqm.estimate[0])}{unit}{interval}{seeds}"


def target_cell(row: Row) -> str:
    """What is to be reached."""
    if row.target is None:
        return f"above {NAMES[THEIRS]}"
    target = f"≥ {number(row.target, 0)}{' %' if row.is_relative else ''}"
    return target + (f", {row.n_solved} of {row.n_seeds} seeds ≥ {row.solved:.0f}" if row.n_solved else "")


def verdict_cell(row: Row, by_algorithm: dict[str, Results]) -> str:
    """Whether it is reached; unknown while a seed is missing."""
    needed = [by_algorithm[OURS]] + ([by_algorithm[THEIRS]] if row.target is None else [])
    if any(len(results) < row.n_seeds for results in needed):
        return "open"
    ours, *theirs = (estimate_iqm(scores_of(row, results)).estimate[0] for results in needed)
    reached = bool(ours > theirs[0]) if row.target is None else bool(ours >= row.target)
    if not row.n_solved or row.solved is None:
        return "yes" if reached else "no"
    n_solved = sum(value >= row.solved for value in scores_of(row, by_algorithm[OURS]))
    return f"{'yes' if reached and n_solved >= row.n_solved else 'no'}, {n_solved} seeds ≥ {row.solved:.0f}"


# --- Tables ---------------------------------------------------------------------------------------------------------------


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    head_line, *other_lines = ("| " + " | ".join(cells) + " |" for cells in (head, *lines))
    return "\n".join([head_line, "|---" * len(head) + "|", *other_lines])


def _rows(*, of_defaults: bool) -> dict[str, Row]:
    return {name: row for name, row in ROWS.items() if (row.settings == "defaults") == of_defaults}


def _steps(row: Row) -> str:
    return f"{row.steps:,}".replace(",", " ")


def tuned_table(folder: Path) -> str:
    """Every row with a hyperparameter entry, and what is to be reached."""
    lines = []
    for name, row in _rows(of_defaults=False).items():
        results = read_row(name, folder)
        cells = [iqm_cell(row, results[algorithm]) for algorithm in NAMES]
        lines.append([row.env, _steps(row), *cells, target_cell(row), verdict_cell(row, results), row.published])
    head = ["environment", "steps", *NAMES.values(), "to reach", "reached", "the zoo's published DQN"]
    return _table(head, lines)


def short_table(folder: Path) -> str:
    """The same for the README: without what is to be reached."""
    lines = []
    for name, row in _rows(of_defaults=False).items():
        results = read_row(name, folder)
        lines.append([row.env, _steps(row), *(iqm_cell(row, results[algorithm]) for algorithm in NAMES), row.published])
    return _table(["environment", "steps", *NAMES.values(), "the zoo's published DQN"], lines)


def defaults_table(folder: Path) -> str:
    """The constructors' defaults."""
    lines = []
    for name, row in _rows(of_defaults=True).items():
        results = read_row(name, folder)
        lines.append([row.env, _steps(row), *(iqm_cell(row, results[algorithm]) for algorithm in NAMES)])
    return _table(["environment", "steps", *NAMES.values()], lines)


def time_table(folder: Path) -> str:
    """Seconds of training to the first evaluation that solved the environment."""
    lines = []
    for name, row in ROWS.items():
        if row.solved is None:
            continue
        results = read_row(name, folder)
        medians, cells = [], []
        for of_one in results.values():
            times = [seconds_to_solve(row, result) for result in of_one]
            medians.append(float(np.median([seconds for seconds, _ in times])) if times else np.nan)
            n_solved = sum(is_solved for _, is_solved in times)
            cells.append(f"{duration(medians[-1])} ({n_solved} of {len(times)} seeds got there)" if times else NOT_RUN)
        ratio = number(medians[0] / medians[1], 2) if np.isfinite(medians).all() else ""
        lines.append([row.env, f"≥ {row.solved:.0f}", *cells, ratio])
    return _table(["environment", "evaluation", *NAMES.values(), "ratio"], lines)


def seed_table(folder: Path) -> str:
    """The score of every seed."""
    lines = []
    for name, row in ROWS.items():
        for algorithm, results in read_row(name, folder).items():
            if not results:
                continue
            scores = dict(zip((result["seed"] for result in results), scores_of(row, results), strict=True))
            cells = [number(scores[seed]) if seed in scores else "" for seed in range(10)]
            lines.append([name, NAMES[algorithm], *cells])
    return _table(["row", "", *(f"seed {seed}" for seed in range(10))], lines) if lines else NOT_RUN.capitalize() + "."


def further_table(folder: Path) -> str:
    """Our entries on the seeds that nothing was chosen on."""
    lines = []
    for name, row in _rows(of_defaults=False).items():
        results = results_of(runs_of(name, row, [OURS], FURTHER_SEEDS), folder)
        if results:
            cell = iqm_cell(dataclasses.replace(row, n_seeds=len(results)), results)
            seeds = ", ".join(number(value) for value in scores_of(row, results))
            lines.append([row.env, _steps(row), str(len(results)), cell, seeds])
    return _table(["environment", "steps", "seeds", NAMES[OURS], "each seed"], lines) if lines else NOT_RUN.capitalize() + "."


def diverged_list(folder: Path) -> str:
    """The runs that ended before their budget, with the error."""
    lines = [
        f"- {name}, {NAMES[algorithm]}, seed {result['seed']}: {result['error']}"
        for name in ROWS
        for algorithm, results in read_row(name, folder).items()
        for result in results
        if "error" in result
    ]
    return "\n".join(lines) or "None of the runs above has."


def versions_table(folder: Path) -> str:
    """What the results were made with."""
    results = [result for name in ROWS for of_one in read_row(name, folder).values() for result in of_one]
    used = {(package, release) for result in results for package, release in result["versions"].items()}
    packages = sorted({package for package, _ in used})
    lines = [[package, ", ".join(sorted(release for p, release in used if p == package))] for package in packages]
    dates = sorted(result["date"] for result in results)
    return _table(["", ""], [["dates", f"{dates[0]} to {dates[-1]}" if dates else NOT_RUN], *lines])


def picture_list(_: Path) -> str:
    """The pictures that have been drawn."""
    drawn = [f"![{text}](images/{name}.png)" for name, text in PICTURES.items() if (IMAGES / f"{name}.png").exists()]
    return "\n\n".join(drawn) or "Not drawn yet."


TABLES: dict[str, Callable[[Path], str]] = {
    "tuned": tuned_table,
    "short": short_table,
    "defaults": defaults_table,
    "time": time_table,
    "seeds": seed_table,
    "further": further_table,
    "diverged": diverged_list,
    "pictures": picture_list,
    "versions": versions_table,
}


def fill_in(text: str, folder: Path = FOLDER) -> str:
    """
    Replace the tables in a text by those of the result files.

    :param text: With the markers
    :param folder: Folder of the result files
    :return: The text with new tables
    :raises KeyError: if a marker names a table that there is not
    """

    def fill(match: re.Match[str]) -> str:
        name = match[1]
        return f"<!-- results:{name} -->\n\n{TABLES[name](folder)}\n\n<!-- /results:{name} -->"

    return re.sub(r"<!-- results:(\w+) -->.*?<!-- /results:\1 -->", fill, text, flags=re.DOTALL)


def print_tables(folder: Path) -> None:
    """Every table but the pictures and the README's shorter one."""
    for name, table in TABLES.items():
        if name not in ("pictures", "short"):
            print(f"{name}:\n\n{table(folder)}\n")


def main() -> None:
    """Write the tables, or print those of other results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="folder of other result files: their tables are printed, none is written")
    folder = parser.parse_args().folder
    if folder is not None:
        if not any(of_one for name in ROWS for of_one in read_row(name, folder).values()):
            parser.error(f"--folder must hold results of the rows as they are, got {folder}")
        print_tables(folder)
        return
    for file in FILES:
        file.write_text(fill_in(file.read_text()))
        print(f"wrote {file.relative_to(REPOSITORY)}")


if __name__ == "__main__":
    main()
