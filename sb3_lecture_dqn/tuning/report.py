"""What a study leaves behind: progress lines, the zoo's report, Optuna's plots, and a hyperparameter entry."""

import pickle
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import optuna
import yaml
from optuna.trial import FrozenTrial, TrialState

from sb3_lecture_dqn import zoo
from sb3_lecture_dqn.model_files import replace_when_written
from sb3_lecture_dqn.search_space import convert_lecture_dqn_params
from sb3_lecture_dqn.tuning.storage import TuningError
from sb3_lecture_dqn.tuning.studies import check_entry

#: A line of progress at least so often.
QUIET_SECONDS = 60.0


class Progress:
    """
    Prints a line when the numbers change, and once a minute.

    :param n_trials: How many finished trials there shall be
    :param stream: Where to print
    """

    def __init__(self, n_trials: int, stream: TextIO) -> None:
        self._n_trials = n_trials
        self._stream = stream
        self._start: tuple[float, int] | None = None
        self._last: tuple[float, str] = (0.0, "")

    def __call__(self, trials: list[FrozenTrial]) -> None:
        """
        Print where the study stands, if that is news.

        :param trials: All trials of the study
        """
        now = time.monotonic()
        counts = Counter(trial.state for trial in trials)
        n_finished = counts[TrialState.COMPLETE] + counts[TrialState.PRUNED] + counts[TrialState.FAIL]
        if self._start is None:
            self._start = (now, n_finished)
        line = (
            f"{n_finished}/{self._n_trials} done ({counts[TrialState.PRUNED]} pruned, {counts[TrialState.FAIL]} failed), "
            f"{counts[TrialState.RUNNING]} running, {_best(trials)}"
        )
        if line != self._last[1] or now - self._last[0] > QUIET_SECONDS:
            self._last = (now, line)
            print(f"{line}, {self._time_left(now, n_finished)}", file=self._stream, flush=True)

    def _time_left(self, now: float, n_finished: int) -> str:
        assert self._start is not None
        start, n_before = self._start
        if n_finished == n_before:
            return "time left unknown"
        seconds = (now - start) / (n_finished - n_before) * max(self._n_trials - n_finished, 0)
        minutes, seconds = divmod(round(seconds), 60)
        hours, minutes = divmod(minutes, 60)
        return f"about {hours}:{minutes:02}:{seconds:02} left"


def _best(trials: list[FrozenTrial]) -> str:
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE and trial.value is not None]
    if not complete:
        return "no score yet"
    best = max(complete, key=lambda trial: trial.value or 0.0)
    return f"best {best.value:.2f} (trial {best.number})"


def write_report(study: optuna.Study, folder: Path, name: str) -> list[Path]:
    """
    Write what the zoo writes after a search, and Optuna's plots.

    :param study: The study
    :param folder: Folder of the files
    :param name: The beginning of their names
    :return: ``.csv`` (one row a trial), ``.pkl`` (the study, in memory) and the plots (``.png``) that the study is enough for
    """
    copied = _copy(study)  # a file that needs no database, and holds no password
    writers: dict[str, Callable[[Path], None]] = {
        ".csv": lambda path: copied.trials_dataframe().to_csv(path),
        ".pkl": lambda path: _save_pickle(copied, path),
    }
    if sum(trial.state == TrialState.COMPLETE for trial in copied.trials) > 1:
        writers["_history.png"] = lambda path: _save_plot("plot_optimization_history", copied, path)
        if len({trial.value for trial in copied.trials if trial.state == TrialState.COMPLETE}) > 1:
            writers["_importances.png"] = lambda path: _save_plot("plot_param_importances", copied, path)
    paths = [folder / f"{name}{ending}" for ending in writers]
    for path, write in zip(paths, writers.values(), strict=True):
        with replace_when_written(path) as unfinished:
            write(unfinished)
    return paths


def _copy(study: optuna.Study) -> optuna.Study:
    copied = optuna.create_study(study_name=study.study_name, direction="maximize", pruner=study.pruner)
    for key, value in study.user_attrs.items():
        copied.set_user_attr(key, value)
    copied.add_trials(study.get_trials())
    return copied


def _save_pickle(study: optuna.Study, path: Path) -> None:
    path.write_bytes(pickle.dumps(study))


def _save_plot(plot: str, study: optuna.Study, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from optuna.visualization import matplotlib as plots

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        axes = getattr(plots, plot)(study)
    axes.figure.set_size_inches(8, 5)
    axes.figure.savefig(path, bbox_inches="tight", dpi=120)
    pyplot.close(axes.figure)


def best_entry(study: optuna.Study, settings: zoo.TrialSettings) -> dict[str, Any]:
    """
    Turn the best trial into a hyperparameter entry.

    :param study: The study
    :param settings: Which environment it is of, and the file of the entry that the search started from
    :return: That entry, with the trial's values
    :raises TuningError: if no trial is complete, or that is not the entry that the search started from
    """
    try:
        params = study.best_trial.params
    except ValueError as error:
        raise TuningError(f"study {study.study_name!r} has no complete trial") from error
    with tempfile.TemporaryDirectory() as folder:
        manager = zoo.make_manager(settings, folder)
    entry = zoo.read_entry(manager)
    converted = convert_lecture_dqn_params(params)
    check_entry(study, zoo.entry_in_words(manager), {*converted, "n_timesteps"} - {"policy_kwargs"})
    drawn = zoo.keep_policy_kwargs(entry, converted)
    return {**entry, "n_timesteps": manager.n_timesteps, **drawn}


def write_entry(path: Path, env_id: str, entry: dict[str, Any], comment: str, replace: bool) -> None:
    """
    Add an entry to a hyperparameter file; the rest of the file keeps every byte.

    :param path: The file; it is made if it is missing
    :param env_id: The entry's key
    :param entry: The entry
    :param comment: A line above it
    :param replace: Whether an entry of that key may be replaced
    :raises TuningError: if there is one and it may not be, or if the file cannot take the entry
    """
    text = path.read_bytes().decode("utf-8") if path.exists() else ""
    try:
        added = f"# {comment}\n{yaml.safe_dump({env_id: entry}, sort_keys=True)}"
        before = yaml.safe_load(text) or {}
        if not isinstance(before, dict):
            raise TuningError(f"{path} is not a hyperparameter file: its top level must be a mapping")
        if env_id in before and not replace:
            raise TuningError(f"{path} has an entry {env_id} already: --replace replaces it, with the comments inside")
        changed = _without_entry(text, env_id) if env_id in before else text
        added = ("" if changed.endswith("\n") or not changed else "\n") + ("\n" if changed.strip() else "") + added
        changed += added.replace("\n", "\r\n" if "\r\n" in text else "\n")
        after = yaml.safe_load(changed)
    except yaml.YAMLError as error:
        raise TuningError(f"{path} cannot take the entry {env_id}: {' '.join(str(error).split())}") from error
    if after != {**before, env_id: entry}:
        raise TuningError(f"{path} cannot take the entry {env_id}: another entry would change")
    with replace_when_written(path) as unfinished:
        unfinished.write_bytes(changed.encode("utf-8"))


def _without_entry(text: str, env_id: str) -> str:
    lines = text.splitlines(keepends=True)
    top_level: Any = yaml.compose(text)
    for key, value in top_level.value:
        if key.value == env_id:
            first, last = key.start_mark.line, max(_last_line(value), key.start_mark.line)
            return "".join(lines[:first] + lines[last + 1 :])
    return text


def _last_line(node: Any) -> int:
    # a block's own end mark lies after the comments that follow it
    if isinstance(node, yaml.ScalarNode) or node.flow_style or not node.value:
        is_block_of_text = node.end_mark.column == 0 and node.end_mark.line > node.start_mark.line
        return int(node.end_mark.line) - int(is_block_of_text)  # which has ended in the line before
    last = node.value[-1]
    return _last_line(last[1] if isinstance(last, tuple) else last)
