"""Scores, studies and what outlives a process: everything of tuning that needs no engine."""

import asyncio
import contextlib
import io
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
import yaml
from optuna.trial import TrialState
from postgres import PostgresServer
from sqlalchemy import exc
from stable_baselines3.common.torch_layers import FlattenExtractor
from torch import nn

from sb3_lecture_dqn import LectureDQN, tune, zoo
from sb3_lecture_dqn.envs import minatar_breakout
from sb3_lecture_dqn.processes import here, is_alive
from sb3_lecture_dqn.search_space import merge_policy_kwargs
from sb3_lecture_dqn.tuning import studies
from sb3_lecture_dqn.tuning.driver import Outcome, Report
from sb3_lecture_dqn.tuning.report import Progress, write_report
from sb3_lecture_dqn.tuning.scoring import FIRST_SEED, score_on_seeds
from sb3_lecture_dqn.tuning.storage import first_line, hold, let_go, open_storage, put_back, wait_for_outages
from sb3_lecture_dqn.tuning.studies import RUNNER, SCORING, Runner, note_entry, open_study

SETTINGS = zoo.TrialSettings("CartPole-v1", n_timesteps=200, eval_episodes=1)
SEARCH = ["-optimize", "--no-optim-plots", "-n", "200", "--eval-episodes", "1", "--n-evaluations", "1", "--pruner", "none"]


@pytest.fixture
def zoo_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    zoo.register()
    from rl_zoo3.train import train

    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", ["train", "--algo", "lecture_dqn", "--env", "CartPole-v1", *arguments])
        train()

    return call


@pytest.fixture(params=["journal", "sqlite", "postgresql"])
def storage_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A storage of each kind; only the last one needs a server."""
    if request.param == "postgresql":
        url: str = request.getfixturevalue("postgres").url()
        return url
    return {"journal": f"{tmp_path}/study.log", "sqlite": f"sqlite:///{tmp_path}/study.db"}[request.param]


def fake_manager(**attributes: Any) -> Any:
    return SimpleNamespace(n_evaluations=4, optimization_log_path=None, **attributes)


def reporting_objective(scores: list[float]) -> Any:
    """What the zoo's objective does with a trial, with scores by seed."""

    def objective(manager: Any, trial: Any) -> float:
        score = scores[manager.seed - FIRST_SEED]
        trial.report(score, 1)
        if trial.should_prune():
            raise optuna.TrialPruned()
        return score

    return objective


class PruneAtStep(optuna.pruners.BasePruner):
    def __init__(self, step: int) -> None:
        self.step = step

    def prune(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> bool:
        return trial.last_step == self.step


@pytest.mark.parametrize(
    ("step", "state", "scores", "intermediate"),
    [
        (None, TrialState.COMPLETE, [1.0, 2.0, 6.0], {1: 1.0, 5: 1.5}),
        (1, TrialState.PRUNED, None, {1: 1.0}),
        (5, TrialState.PRUNED, [1.0, 2.0], {1: 1.0, 5: 1.5}),
    ],
)
def test_a_score_is_the_mean_over_seeds_and_a_trial_is_pruned_from_the_first_on(
    step: int | None, state: TrialState, scores: list[float] | None, intermediate: dict[int, float]
) -> None:
    study = optuna.create_study(direction="maximize", pruner=PruneAtStep(step) if step else optuna.pruners.NopPruner())
    study.optimize(lambda trial: score_on_seeds(reporting_objective([1.0, 2.0, 6.0]), fake_manager(), trial, 3), n_trials=1)
    (trial,) = study.trials
    assert (trial.state, trial.user_attrs.get("scores")) == (state, scores)
    assert trial.intermediate_values == intermediate
    if state == TrialState.COMPLETE:
        assert trial.value == 3.0


def test_a_trial_scores_the_same_wherever_and_whenever_it_runs(tmp_path: Path) -> None:
    params = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=3)).ask()
    zoo.sample_lecture_dqn_params(params, 0, 1, {})
    values = [zoo.make_manager(SETTINGS, str(tmp_path)).objective(optuna.trial.FixedTrial(params.params)) for _ in range(2)]
    assert values[0] == values[1]


#: One trial's values: small, so that it is quick.
PARAMS = {
    "learning_rate": 1e-3,
    "learning_rate_schedule": "constant",
    "batch_size": 32,
    "buffer_size": 10_000,
    "learning_starts": 100,
    "one_minus_gamma": 0.01,
    "train_freq": 4,
    "update_ratio": 0.25,
    "target_update_interval": 50,
    "exploration_fraction": 0.1,
    "exploration_final_eps": 0.05,
    "width": 64,
}


@pytest.fixture
def trained_models(monkeypatch: pytest.MonkeyPatch) -> list[LectureDQN]:
    """The models that are trained, in their order."""
    models: list[LectureDQN] = []
    learn = LectureDQN.learn

    def noted_learn(model: LectureDQN, *args: Any, **kwargs: Any) -> LectureDQN:
        models.append(model)
        return learn(model, *args, **kwargs)

    monkeypatch.setattr(LectureDQN, "learn", noted_learn)
    return models


@pytest.mark.parametrize("env", ["CartPole-v1", "RoboParking-v0", "MinAtar/Breakout-v1"])
def test_a_trial_of_a_shipped_entry_trains_the_network_of_that_entry(
    env: str, trained_models: list[LectureDQN], tmp_path: Path
) -> None:
    settings = zoo.TrialSettings(env, n_timesteps=160, eval_episodes=1)
    zoo.make_manager(settings, str(tmp_path)).objective(optuna.trial.FixedTrial(PARAMS))
    assert len(trained_models) == 2  # one for each seed
    encoder = minatar_breakout.Encoder if "MinAtar" in env else FlattenExtractor
    for model in trained_models:
        assert model._n_updates > 0
        assert model.q_net.net_arch == [64, 64]
        assert isinstance(model.q_net.features_extractor, encoder)


PLAIN = "CartPole-v1: {n_timesteps: 200, policy: MlpPolicy, policy_kwargs: 'dict(layer_norm=False, activation_fn=nn.ReLU)'}"


def is_plain(model: LectureDQN) -> bool:
    layers = [type(layer) for layer in model.q_net.q_net]
    return nn.ReLU in layers and nn.LayerNorm not in layers


def test_a_trial_keeps_the_policy_kwargs_of_the_users_own_entry(trained_models: list[LectureDQN], tmp_path: Path) -> None:
    (tmp_path / "mine.yml").write_text(PLAIN)
    settings = zoo.TrialSettings("CartPole-v1", eval_episodes=1, conf_file=str(tmp_path / "mine.yml"))
    zoo.make_manager(settings, str(tmp_path)).objective(optuna.trial.FixedTrial(PARAMS))
    assert all(is_plain(model) and model.q_net.net_arch == [64, 64] for model in trained_models)


def test_the_zoos_own_search_and_a_run_of_its_trial_keep_the_policy_kwargs_of_the_entry(
    zoo_train: Any, trained_models: list[LectureDQN], tmp_path: Path
) -> None:
    (tmp_path / "mine.yml").write_text(PLAIN)
    study_arguments = ["-conf", "mine.yml", "--storage", "study.log", "--study-name", "plain", "--seed", "0"]
    zoo_train(*study_arguments, *SEARCH, "--n-trials", "2")
    width = optuna.load_study(study_name="plain", storage=open_storage("study.log")).trials[1].params["width"]
    zoo_train(*study_arguments, "--trial-id", "1", "-n", "60", "--eval-freq", "-1")
    assert len(trained_models) == 5
    assert all(map(is_plain, trained_models))
    assert trained_models[-1].q_net.net_arch == [width] * 2


@pytest.mark.parametrize(
    ("of_entry", "merged"),
    [
        (None, {"net_arch": [64, 64]}),
        ({"layer_norm": False, "net_arch": [8]}, {"layer_norm": False, "net_arch": [64, 64]}),
        (" dict(net_arch=[8], activation_fn=nn.ReLU)", "dict(activation_fn=nn.ReLU, net_arch=[64, 64])"),
        ("{'layer_norm': False}", "dict({'layer_norm': False}, net_arch=[64, 64])"),
        ("dict({'net_arch': [8]}, a=1)", "dict(dict({'net_arch': [8]}, a=1), net_arch=[64, 64])"),
    ],
)
def test_policy_kwargs_are_merged_in_the_notation_of_the_entry(of_entry: Any, merged: Any) -> None:
    assert merge_policy_kwargs(of_entry, {"net_arch": [64, 64]}) == merged


@pytest.mark.parametrize("trial_seeds", [1, "many"])
def test_fewer_than_two_seeds_are_refused(zoo_train: Any, trial_seeds: Any) -> None:
    with pytest.raises(ValueError, match="trial_seeds must be an integer of at least 2, got"):
        zoo_train(*SEARCH, "-params", f"trial_seeds:{trial_seeds!r}")


def test_the_zoo_searches_in_memory_over_as_many_seeds_as_asked_for(zoo_train: Any, tmp_path: Path) -> None:
    zoo_train(*SEARCH, "--n-trials", "1", "-params", "trial_seeds:3", "--optimization-log-path", "trials")
    (report,) = (tmp_path / "logs" / "lecture_dqn").glob("report_*.csv")
    header, row = report.read_text().splitlines()
    assert "user_attrs_scores" in header
    assert row.count("COMPLETE") == 1
    assert len(list((tmp_path / "trials").rglob("trial_0/evaluations.npz"))) == 3  # one for each seed


def test_the_zoo_searches_in_a_storage_in_which_it_names_the_study(zoo_train: Any) -> None:
    with pytest.warns(UserWarning, match="no `--study-name`"):
        zoo_train(*SEARCH, "--storage", "study.log", "--n-trials", "1")
    (study,) = optuna.get_all_study_summaries(open_storage("study.log"))
    assert study.best_trial is not None


def test_the_zoo_searches_in_every_storage_and_trains_with_trial_0(zoo_train: Any, tmp_path: Path, storage_url: str) -> None:
    study_arguments = ["--storage", storage_url, "--study-name", "search", "--seed", "0"]
    zoo_train(*study_arguments, *SEARCH, "--n-trials", "2")
    study = optuna.load_study(study_name="search", storage=open_storage(storage_url))
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE] * 2
    assert all(len(trial.user_attrs["scores"]) == 2 for trial in study.trials)
    assert study.user_attrs[SCORING]["environment"] == "CartPole-v1"

    zoo_train(*study_arguments, "--trial-id", "0", "-n", "60", "--eval-freq", "-1")
    model = LectureDQN.load(tmp_path / "logs" / "lecture_dqn" / "CartPole-v1_2" / "CartPole-v1.zip")
    assert (model.batch_size, model.gamma) == (study.trials[0].params["batch_size"], study.trials[0].user_attrs["gamma"])


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ("cartpole --trial-id 0 --env Acrobot-v1", "study 'cartpole' was made with environment 'CartPole-v1', got"),
        ("ppo --trial-id 0", "study 'ppo' exists and is not one of lecture_dqn: choose"),
        ("none --trial-id 0", "there is no study 'none' in the storage"),
        ("none --trial-id 0 --storage sqlite:///no.db", "there is no study 'none' in the storage: there is no file no.db"),
        ("cartpole --trial-id -1", "--trial-id must be a trial of study 'cartpole' (0..1), got -1"),
        ("cartpole --trial-id 2", "--trial-id must be a trial of study 'cartpole' (0..1), got 2"),
        ("empty --trial-id 0", "--trial-id must be a trial of study 'empty' (none), got 0"),
    ],
)
def test_a_trial_that_there_is_not_is_refused_before_anything_is_trained(
    arguments: str, error: str, zoo_train: Any, tmp_path: Path
) -> None:
    storage = open_storage("study.log")
    study = open_study(storage, "cartpole", {"algorithm": "lecture_dqn", "environment": "CartPole-v1"})
    for _ in range(2):
        study.tell(study.ask({"batch_size": optuna.distributions.IntDistribution(1, 9)}), 1.0)
    study.ask()  # it has drawn nothing
    open_study(storage, "empty", {"algorithm": "lecture_dqn", "environment": "CartPole-v1"})
    ppo = optuna.create_study(study_name="ppo", storage=storage)
    ppo.tell(ppo.ask({"learning_rate": optuna.distributions.FloatDistribution(0, 1)}), 1.0)
    with pytest.raises(SystemExit, match=rf"^error: {re.escape(error)}[^\n]*$"):
        zoo_train("--storage", "study.log", "--study-name", *arguments.split())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["study.log"]


def test_the_zoo_does_not_mix_a_study_with_anothers(zoo_train: Any, tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path}/study.db"
    zoo_train(*SEARCH, "--storage", storage, "--study-name", "short", "--n-trials", "1")
    with pytest.raises(
        SystemExit, match=r"^error: study 'short' was made with n_timesteps 200, got 300: choose another[^\n]+$"
    ):
        zoo_train(*SEARCH, "--storage", storage, "--study-name", "short", "--n-trials", "1", "-n", "300")
    for option, name in (("--eval-episodes", "eval_episodes"), ("--n-evaluations", "n_evaluations")):
        with pytest.raises(SystemExit, match=rf"^error: study 'short' was made with {name} 1, got 2: choose another[^\n]+$"):
            zoo_train(*SEARCH, "--storage", storage, "--study-name", "short", "--n-trials", "1", option, "2")
    with pytest.raises(SystemExit, match=r"^error: storage no url cannot be opened: [^\n]+$"):
        zoo_train(*SEARCH, "--storage", "no url", "--study-name", "short", "--n-trials", "1")
    for no_trials in ("--n-trials", "--max-total-trials"):
        with pytest.raises(SystemExit, match=r"^error: the number of trials must be at least 1, got 0$"):
            zoo_train(*SEARCH, "--storage", storage, "--study-name", "short", no_trials, "0")
    assert len(optuna.load_study(study_name="short", storage=storage).trials) == 1


def test_a_study_is_not_continued_with_other_arguments_of_its_environment(zoo_train: Any) -> None:
    study = [*SEARCH, "--storage", "study.log", "--study-name", "rewards", "--n-trials", "1"]
    zoo_train(*study)
    refusal = r"^error: study 'rewards' was made with {} {{}}, got {{'sutton_barto_reward': True}}: choose another[^\n]+$"
    for option in ("env_kwargs", "eval_env_kwargs"):
        with pytest.raises(SystemExit, match=refusal.format(option)):
            zoo_train(*study, f"--{option.replace('_', '-')}", "sutton_barto_reward:True")
    assert len(optuna.load_study(study_name="rewards", storage=open_storage("study.log")).trials) == 1


def test_a_study_is_continued_with_the_same_arguments_of_its_environment(storage_url: str, tmp_path: Path) -> None:
    manager = zoo.make_manager(SETTINGS, str(tmp_path / "zoo"))
    manager.env_kwargs = {"size": (2, 3), "reward": int}  # which JSON knows as a list, and not at all
    for _ in range(2):
        study = open_study(open_storage(storage_url), "arguments", zoo.scoring_of(manager))
    assert study.user_attrs[SCORING]["env_kwargs"] == {"size": [2, 3], "reward": "<class 'int'>"}


@pytest.mark.parametrize("n_jobs", ["2", "-1"])
def test_jobs_that_would_share_the_random_numbers_are_refused(zoo_train: Any, n_jobs: str) -> None:
    with pytest.raises(SystemExit, match=rf"^error: --n-jobs must be 1 for lecture_dqn, got {n_jobs}: start several [^\n]+$"):
        zoo_train(*SEARCH, "--n-trials", "2", "--n-jobs", n_jobs)


def test_a_killed_process_of_the_zoo_leaves_its_trial_to_the_others(postgres: PostgresServer, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sb3_lecture_dqn.zoo", "train", "--algo", "lecture_dqn", "--env", "CartPole-v1", *SEARCH]
    study_arguments = ["--storage", postgres.url(), "--study-name", "killed", "--max-total-trials", "4", "-f", str(tmp_path)]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    victim = subprocess.Popen([*command, *study_arguments, "-n", "200", "--n-trials", "100"], cwd=tmp_path, **pipes)
    try:
        until(lambda: states("killed", postgres.url()).count(TrialState.RUNNING) == 1)
    finally:
        victim.send_signal(signal.SIGKILL)
        victim.wait()
    result = subprocess.run([*command, *study_arguments], cwd=tmp_path, check=False, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert states("killed", postgres.url()).count(TrialState.RUNNING) == 0
    assert states("killed", postgres.url()).count(TrialState.COMPLETE) == 4


@pytest.mark.parametrize("is_over", [False, True])
@pytest.mark.parametrize("is_pruned", [False, True])
def test_a_process_of_the_zoo_whose_trial_was_taken_over_stops_and_leaves_it_alone(
    is_over: bool, is_pruned: bool, zoo_train: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def learn_while_another_takes_over(model: LectureDQN, *args: Any, **kwargs: Any) -> None:
        study = optuna.load_study(study_name="slow", storage=open_storage("study.log"))
        put_back(study, study.trials[0])
        trial = study.ask()
        trial.set_user_attr("runner", "other")
        if is_over:
            study.tell(trial, 5.0)
        if is_pruned:
            raise ValueError("training has diverged")

    monkeypatch.setattr(LectureDQN, "learn", learn_while_another_takes_over)
    with pytest.raises(SystemExit, match=r"^error: trial 0 was taken over by another process: [^\n]+$"):
        zoo_train(*SEARCH, "--storage", "study.log", "--study-name", "slow", "--n-trials", "1")
    (trial,) = optuna.load_study(study_name="slow", storage=open_storage("study.log")).trials
    assert trial.user_attrs["runner"] == "other"
    assert trial.state == (TrialState.COMPLETE if is_over else TrialState.RUNNING)
    assert trial.value == (5.0 if is_over else None)


def test_two_processes_of_the_zoo_share_a_study(tmp_path: Path) -> None:
    url = str(tmp_path / "study.log")
    command = [sys.executable, "-m", "sb3_lecture_dqn.zoo", "train", "--algo", "lecture_dqn", "--env", "CartPole-v1", *SEARCH]
    command += ["--storage", url, "--study-name", "shared", "--n-trials", "3", "-f", str(tmp_path)]
    processes = [
        subprocess.Popen([*command, "--seed", seed], cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        for seed in "01"
    ]
    for process in processes:
        _, error = process.communicate(timeout=900)
        assert process.returncode == 0, error
    trials = optuna.load_study(study_name="shared", storage=open_storage(url)).trials
    assert [trial.state for trial in trials] == [TrialState.COMPLETE] * 6
    assert len({trial.user_attrs["runner"] for trial in trials}) == 2


def states(study_name: str, url: str) -> list[TrialState]:
    with contextlib.suppress(KeyError):
        return [trial.state for trial in optuna.load_study(study_name=study_name, storage=open_storage(url)).trials]
    return []


def until(condition: Any) -> None:
    """Wait for something that must come; the limit is for a broken program alone."""
    for _ in range(1200):
        if condition():
            return
        time.sleep(0.1)
    raise AssertionError("it did not happen within two minutes")


@pytest.mark.parametrize(
    ("error", "lives"), [(ProcessLookupError, False), (PermissionError, True)], ids=["nobody's", "another user's"]
)
def test_a_process_that_may_not_be_asked_is_alive(error: type[OSError], lives: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(process_id: int, number: int) -> None:
        assert number == 0
        raise error

    monkeypatch.setattr(os, "kill", refuse)
    assert is_alive(1) is lives
    with monkeypatch.context() as patch:
        patch.setattr("sb3_lecture_dqn.processes.os", SimpleNamespace(name="nt"))  # where asking would interrupt it
        assert is_alive(1)


def test_containers_of_the_same_host_name_are_two_places(monkeypatch: pytest.MonkeyPatch) -> None:
    places = []
    for namespace in ("pid:[1]", "pid:[2]"):
        monkeypatch.setattr(os, "readlink", lambda path, namespace=namespace: namespace)
        places.append(here())
    assert len({*places, here()}) == 2

    def no_link(path: str) -> str:
        raise FileNotFoundError(path)

    monkeypatch.setattr(os, "readlink", no_link)
    assert here() == socket.gethostname()


def open_cartpole_study(url: str, name: str = "study") -> optuna.Study:
    return open_study(open_storage(url), name, {"environment": "CartPole-v1"})


def claimed_trial(study: optuna.Study, life: dict[str, Any]) -> None:
    """A running trial of another runner."""
    study.set_user_attr(RUNNER + "other", life)
    study.ask().set_user_attr("runner", "other")


def test_a_trial_whose_process_died_is_retried_up_to_a_limit_and_then_fails(storage_url: str, dead_process_id: int) -> None:
    study = open_cartpole_study(storage_url, "retries")
    runner = Runner(study, max_retries=2)
    seen = []
    for _ in range(3):
        claimed_trial(study, {"host": here(), "pid": dead_process_id, "beats": 1})
        runner.put_lost_trials_back()
        seen.append(study.trials[0].state)
    assert seen == [TrialState.WAITING, TrialState.WAITING, TrialState.FAIL]
    assert study.trials[0].user_attrs["failure"] == "lost 3 times, at last because its process died"
    assert len(study.trials) == 1


def test_a_trial_of_another_host_is_lost_when_its_runner_has_been_silent_for_some_looks(
    tmp_path: Path, dead_process_id: int
) -> None:
    study = open_cartpole_study(f"sqlite:///{tmp_path}/study.db")
    claimed_trial(study, {"host": "elsewhere", "pid": dead_process_id, "beats": 0})
    study.ask()  # by somebody who died before saying so
    runner = Runner(study)
    for _ in range(2):
        runner.put_lost_trials_back()
    for look in range(1, 10):
        study.set_user_attr(RUNNER + "other", {"host": "elsewhere", "pid": dead_process_id, "beats": look})
        runner.put_lost_trials_back()
    for _ in range(studies.LOOKS):
        assert [trial.state for trial in study.trials] == [TrialState.RUNNING, TrialState.WAITING]
        runner.put_lost_trials_back()
    assert [trial.state for trial in study.trials] == [TrialState.WAITING, TrialState.WAITING]


def test_a_trial_that_nobody_claimed_is_lost_when_all_who_could_have_asked_for_it_are_gone(
    tmp_path: Path, dead_process_id: int
) -> None:
    study = open_cartpole_study(f"sqlite:///{tmp_path}/study.db")
    study.set_user_attr(RUNNER + "other", {"host": "elsewhere", "pid": 1, "beats": 1})
    study.ask()
    with Runner(study):
        assert study.trials[0].state == TrialState.RUNNING
    assert study.trials[0].state == TrialState.RUNNING

    study.set_user_attr(RUNNER + "other", {"host": here(), "pid": dead_process_id, "beats": 1})
    with Runner(study) as runner:
        assert study.trials[0].state == TrialState.WAITING
        study.ask()
        runner.put_lost_trials_back()  # between the question and the claim, for which it is at work itself
        assert study.trials[0].state == TrialState.RUNNING
    assert study.trials[0].state == TrialState.WAITING


def test_a_runner_says_that_it_lives_and_takes_up_what_is_lost_while_it_runs(
    tmp_path: Path, dead_process_id: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(studies, "BEAT_SECONDS", 0.05)
    study = open_cartpole_study(f"sqlite:///{tmp_path}/study.db")
    with Runner(study) as runner:
        claimed_trial(study, {"host": here(), "pid": dead_process_id, "beats": 1})
        until(lambda: study.trials[0].state == TrialState.WAITING)
        until(lambda: study.user_attrs[RUNNER + runner.id]["beats"] >= 3)
    assert study.user_attrs[RUNNER + runner.id] == {"ended": True}


def test_a_lost_trial_that_another_takes_up_at_the_same_moment_is_left_to_it(
    tmp_path: Path, dead_process_id: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = open_cartpole_study(f"sqlite:///{tmp_path}/study.db")
    claimed_trial(study, {"host": here(), "pid": dead_process_id, "beats": 1})

    def another_takes_it_up(process_id: int) -> bool:
        put_back(study, study.trials[0])
        study.ask().set_user_attr("runner", "third")
        return False

    monkeypatch.setattr(studies, "is_alive", another_takes_it_up)
    Runner(study).put_lost_trials_back()
    assert study.trials[0].state == TrialState.RUNNING
    assert study.trials[0].user_attrs == {"runner": "third"}


def test_a_study_waits_while_its_database_is_away_but_not_for_ever(
    postgres: PostgresServer, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = open_storage(postgres.url())
    study = open_study(storage, "outage", {})
    wait_for_outages(storage)
    numbers = [study.ask().number]
    postgres.stop()
    restart = threading.Timer(3.0, postgres.start)
    restart.start()
    try:
        for number in range(5):
            trial = study.ask()
            numbers.append(trial.number)
            trial.set_user_attr("n", number)
            study.tell(trial, float(number))
    finally:
        restart.join()
    assert numbers == [0, 1, 2, 3, 4, 5]
    trials = optuna.load_study(study_name="outage", storage=postgres.url()).trials
    assert [trial.value for trial in trials] == [None, 0.0, 1.0, 2.0, 3.0, 4.0]
    assert [trial.user_attrs.get("n") for trial in trials] == [None, 0, 1, 2, 3, 4]
    assert sum("does not answer, waiting" in message for message in caplog.messages) == 1
    assert "the study's database is back" in caplog.messages

    monkeypatch.setattr("sb3_lecture_dqn.tuning.storage.PATIENCE_SECONDS", 0.0)
    wait_for_outages(storage)
    postgres.stop()
    restart = threading.Timer(2.0, postgres.start)
    restart.start()
    try:
        with pytest.raises(optuna.exceptions.StorageInternalError):
            study.ask()
    finally:
        restart.join()


def test_a_search_of_the_zoo_waits_while_its_database_is_away(
    postgres: PostgresServer, zoo_train: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    learn = LectureDQN.learn
    restart = threading.Timer(1.0, postgres.start)

    def learn_without_the_database(model: LectureDQN, *args: Any, **kwargs: Any) -> LectureDQN:
        if restart.ident is None:
            postgres.stop()
            restart.start()
        return learn(model, *args, **kwargs)

    monkeypatch.setattr(LectureDQN, "learn", learn_without_the_database)
    try:
        zoo_train(*SEARCH, "--storage", postgres.url(), "--study-name", "waiting", "--n-trials", "1")
    finally:
        restart.join()
    assert states("waiting", postgres.url()) == [TrialState.COMPLETE]


def test_a_database_whose_tables_another_process_makes_at_the_same_moment_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    init = optuna.storages.RDBStorage.__init__
    races = iter([True])

    def init_after_a_race(storage: Any, *args: Any) -> None:
        if next(races, False):
            raise exc.ProgrammingError("CREATE TABLE", {}, Exception("it exists already"))
        init(storage, *args)

    monkeypatch.setattr(optuna.storages.RDBStorage, "__init__", init_after_a_race)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    assert open_cartpole_study(f"sqlite:///{tmp_path}/study.db").trials == []


def test_an_error_without_words_is_called_by_its_type() -> None:
    assert first_line(ConnectionResetError()) == "ConnectionResetError"


def test_held_trials_are_not_read_again_and_nothing_of_the_others_is_missed(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/study.db"
    study = open_cartpole_study(url)
    others = open_cartpole_study(url)
    mine = [study.ask() for _ in range(3)]
    for trial in mine:
        hold(study, trial)
    study.get_trials()
    theirs = [others.ask() for _ in range(2)]
    others.tell(theirs[0], 4.0)
    running, complete = TrialState.RUNNING, TrialState.COMPLETE
    assert [trial.state for trial in study.get_trials()] == [running, running, running, complete, running]

    others.tell(mine[0].number, 1.0)  # as if by mistake: seen when the trial is let go
    others.tell(theirs[1], 5.0)
    assert [trial.state for trial in study.get_trials()] == [running, running, running, complete, complete]
    let_go(study, mine[0])
    assert [trial.value for trial in study.get_trials()] == [1.0, None, None, 4.0, 5.0]


def test_a_held_trial_that_was_put_back_before_counts_as_running(tmp_path: Path) -> None:
    study = open_cartpole_study(f"sqlite:///{tmp_path}/study.db")
    put_back(study, study.ask())
    for _ in range(2):
        trial = study.ask()
        hold(study, trial)
        assert [trial.state for trial in study.get_trials()] == [TrialState.RUNNING]
        let_go(study, trial)
        put_back(study, trial)
        assert [trial.state for trial in study.get_trials()] == [TrialState.WAITING]


@pytest.fixture
def study_with_two_trials(tmp_path: Path) -> list[str]:
    """The arguments of ``tune best`` for a study whose trial 1 is the better one."""
    url = f"sqlite:///{tmp_path}/study.db"
    manager = zoo.make_manager(SETTINGS, str(tmp_path / "zoo"))
    study = open_study(open_storage(url), "best", zoo.scoring_of(manager))
    for seed in range(2):
        study.sampler = optuna.samplers.RandomSampler(seed=seed)
        trial = study.ask()
        zoo.sample_lecture_dqn_params(trial, 0, 1, {})
        study.tell(trial, float(seed))
    return ["best", "--storage", url, "--study-name", "best", "--env", "CartPole-v1"]


def best_params(arguments: list[str]) -> dict[str, Any]:
    return optuna.load_study(study_name="best", storage=arguments[2]).trials[1].params


def test_the_best_trial_becomes_an_entry_that_the_zoo_trains(
    study_with_two_trials: list[str], zoo_train: Any, tmp_path: Path
) -> None:
    assert tune.main([*study_with_two_trials, "--output", "mine.yml"]) == 0
    zoo_train("-conf", "mine.yml", "-n", "60", "--eval-freq", "-1")
    model = LectureDQN.load(tmp_path / "logs" / "lecture_dqn" / "CartPole-v1_1" / "CartPole-v1.zip")
    params = best_params(study_with_two_trials)
    assert (model.batch_size, model.q_net.net_arch) == (params["batch_size"], [params["width"]] * 2)
    written = (tmp_path / "mine.yml").read_text()
    assert yaml.safe_load(written)["CartPole-v1"]["n_timesteps"] == 200
    assert written.startswith("# Trial 1 of study best: 1.00, the mean over seeds [10000, 10001]\n")


def test_the_best_entry_keeps_the_policy_kwargs_of_the_entry_that_the_search_started_from(
    study_with_two_trials: list[str], zoo_train: Any, trained_models: list[LectureDQN], tmp_path: Path
) -> None:
    (tmp_path / "plain.yml").write_text(PLAIN)
    assert tune.main([*study_with_two_trials, "-conf", "plain.yml", "--output", "mine.yml"]) == 0
    zoo_train("-conf", "mine.yml", "-n", "60", "--eval-freq", "-1")
    (model,) = trained_models
    assert is_plain(model)
    assert model.q_net.net_arch == [best_params(study_with_two_trials)["width"]] * 2


OTHERS = """\
# of all things
Acrobot-v1: &base  # shared
  batch_size: 7  # why seven
{}
# of the mountain
MountainCar-v0: *base
"""


@pytest.mark.parametrize("name", ["mine.yml", "mine.yaml"])
@pytest.mark.parametrize("before", [OTHERS.format(""), OTHERS.format("").rstrip("\n")], ids=["", "no newline at the end"])
def test_an_entry_is_added_and_every_other_byte_stays(
    before: str, name: str, study_with_two_trials: list[str], tmp_path: Path
) -> None:
    file = tmp_path / name
    file.write_text(before)
    assert tune.main([*study_with_two_trials, "--output", str(file)]) == 0
    assert file.read_text().startswith(before)
    assert yaml.safe_load(file.read_text())["CartPole-v1"]["batch_size"] == best_params(study_with_two_trials)["batch_size"]


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("is_replaced", [False, True])
def test_a_file_keeps_its_line_endings_and_its_encoding(
    ending: str, is_replaced: bool, study_with_two_trials: list[str], tmp_path: Path
) -> None:
    file = tmp_path / "mine.yml"
    others = OTHERS.format("").replace("of all things", "of all θ").replace("\n", ending).encode("utf-8")
    old = f"CartPole-v1: {{batch_size: 8}}{ending}".encode()
    file.write_bytes(others + old if is_replaced else others)
    arguments = ["--replace"] if is_replaced else []
    assert tune.main([*study_with_two_trials, "--output", str(file), *arguments]) == 0
    written = file.read_bytes()
    assert written.startswith(others)
    assert written.count(ending.encode()) == written.count(b"\n") == len(written.splitlines())
    assert yaml.safe_load(written)["CartPole-v1"]["batch_size"] == best_params(study_with_two_trials)["batch_size"]


def test_an_existing_entry_is_replaced_only_when_asked(
    study_with_two_trials: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.yml"
    before = OTHERS.format("\n# mine\nCartPole-v1:\n  batch_size: 8\n  train_freq: [1, episode]  # old\n")
    file.write_text(before)
    arguments = [*study_with_two_trials, "--output", str(file)]
    assert tune.main(arguments) == 1
    assert "has an entry CartPole-v1 already: --replace replaces it" in capsys.readouterr().err
    assert file.read_text() == before
    assert tune.main([*arguments, "--replace"]) == 0
    assert file.read_text().startswith(OTHERS.format("\n# mine\n"))
    assert yaml.safe_load(file.read_text())["CartPole-v1"]["batch_size"] == best_params(study_with_two_trials)["batch_size"]


def test_a_file_that_cannot_take_the_entry_is_named(
    study_with_two_trials: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "latin.yml").write_bytes(b"CartPole-v0: {policy: \xe9}\n")
    for output in (tmp_path, tmp_path / "latin.yml"):
        assert one_line_error(capsys, *study_with_two_trials, "--output", str(output))
    (tmp_path / "list.yml").write_text("- CartPole-v0\n")
    error = one_line_error(capsys, *study_with_two_trials, "--output", str(tmp_path / "list.yml"))
    assert error.endswith("list.yml is not a hyperparameter file: its top level must be a mapping\n")
    for mistake in (["--conf-file", "nowhere.yml"], ["--gym-packages", "no_such_package"]):
        arguments = [*study_with_two_trials, "--output", str(tmp_path / "mine.yml"), *mistake]
        assert mistake[1] in one_line_error(capsys, *arguments)
    assert not (tmp_path / "mine.yml").exists()


def test_an_entry_that_a_yml_file_cannot_hold_is_named(
    study_with_two_trials: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    conf_file, output = tmp_path / "conf.py", tmp_path / "mine.yml"
    entry = 'dict(n_timesteps=200, policy="MlpPolicy", policy_kwargs=dict(activation_fn=nn.ReLU))'
    conf_file.write_text(f"from torch import nn\nhyperparams = {{'CartPole-v1': {entry}}}\n")
    arguments = [*study_with_two_trials, "--conf-file", str(conf_file), "--output", str(output)]
    assert "mine.yml cannot take the entry CartPole-v1: " in one_line_error(capsys, *arguments)
    assert not output.exists()


@pytest.mark.parametrize("storage", ["sqlite:///nowhere.db", "nowhere.log", "sqlite:///no/folder.db"])
def test_the_best_trial_is_not_looked_for_in_a_storage_that_is_made_for_it(
    storage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["best", "--env", "CartPole-v1", "--output", "mine.yml", "--storage", storage]
    assert f"there is no file {storage.removeprefix('sqlite:///')}" in one_line_error(capsys, *arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("mine.yml", "CartPole-v1: [", "got mine.yml: ParserError: "),
        ("mine.yml", "", "got mine.yml: AttributeError: "),
        ("mine.yml", "CartPole-v1:", "got mine.yml: AttributeError: "),
        (
            "mine.yml",
            "CartPole-v1: {policy: MlpPolicy}",
            "a hyperparameter entry must have n_timesteps, got policy",
        ),
        ("mine.yml", "CartPole-v1: {n_timesteps: 9}", "a hyperparameter entry must have policy, got n_timesteps"),
        ("mine.yml", PLAIN.replace("nn.ReLU", "RaLU"), "got NameError: name 'RaLU' is not defined"),
        ("mine.yml", PLAIN.replace("nn.ReLU", "("), "got SyntaxError: "),
        ("mine.py", "hyperparams = 1 / 0", "got mine.py: ZeroDivisionError: division by zero"),
        ("mine.py", "", "got mine.py: KeyError: 'hyperparams'"),
    ],
)
def test_a_hyperparameter_file_that_cannot_be_used_gets_one_line_and_leaves_nothing(
    name: str, content: str, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_text(content)
    assert reason in one_line_error(capsys, "--env", "CartPole-v1", "--trials", "1", "--conf-file", name)
    assert [path.name for path in tmp_path.iterdir()] == [name]


BLOCK = """\
CartPole-v1:
  batch_size: 8
  policy_kwargs: |
    dict(net_arch=[8])
# of all things
Acrobot-v1: {batch_size: 7}
"""


@pytest.mark.parametrize("before", [BLOCK, BLOCK.replace("# of all things\n", ""), BLOCK.replace("|", ">-")])
def test_an_entry_that_ends_in_a_block_of_text_is_replaced_alone(
    before: str, study_with_two_trials: list[str], tmp_path: Path
) -> None:
    file = tmp_path / "mine.yml"
    file.write_text(before)
    assert tune.main([*study_with_two_trials, "--output", str(file), "--replace"]) == 0
    assert file.read_text().startswith(before[before.index("[8])\n") + 5 :])


@pytest.mark.parametrize("value", ["", " *base"], ids=["nothing", "another's"])
def test_an_entry_with_nothing_of_its_own_is_replaced_alone(
    value: str, study_with_two_trials: list[str], tmp_path: Path
) -> None:
    file = tmp_path / "mine.yml"
    others = "Acrobot-v1: &base\n  batch_size: 7\n"
    file.write_text(f"{others}CartPole-v1:{value}\n# of the pole\n")
    assert tune.main([*study_with_two_trials, "--output", str(file), "--replace"]) == 0
    assert file.read_text().startswith(f"{others}# of the pole\n\n# Trial 1 ")


def test_the_best_entry_is_written_into_what_the_zoo_reads_as_one(
    study_with_two_trials: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "mine.py"
    assert "must end in .yml or .yaml" in one_line_error(capsys, *study_with_two_trials, "--output", str(output))
    assert not output.exists()


def test_the_best_trial_is_not_put_into_an_entry_that_its_search_did_not_start_from(
    study_with_two_trials: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    conf_file, output = tmp_path / "conf.yml", tmp_path / "mine.yml"
    conf_file.write_text("CartPole-v1: {n_timesteps: 200, policy: MlpPolicy, normalize: true, batch_size: 7}")
    settings = zoo.TrialSettings("CartPole-v1", conf_file=str(conf_file))
    study = optuna.load_study(study_name="best", storage=study_with_two_trials[2])
    note_entry(study, zoo.entry_in_words(zoo.make_manager(settings, str(tmp_path / "zoo"))))
    note_entry(study, {"policy": "'OfALaterSearch'"})  # which counts no more
    message = one_line_error(capsys, *study_with_two_trials, "--output", str(output))
    assert "must hold the entry that study 'best' was searched from" in message
    entry = conf_file.read_text()
    for addition, difference in (
        ("train_freq: 9, max_grad_norm: 3.0", "max_grad_norm was not given, got 3.0"),
        ("policy_kwargs: {net_arch: [8]}", "policy_kwargs was not given, got {net_arch: [8]}"),
    ):
        conf_file.write_text(entry.replace("batch_size: 7", addition))
        message = one_line_error(capsys, *study_with_two_trials, "-conf", str(conf_file), "--output", str(output))
        assert message.endswith(f"was searched from: there {difference}\n")
    conf_file.write_text(entry.replace("batch_size: 7", "batch_size: 8").replace("200", "300"))  # which the trials have
    assert tune.main([*study_with_two_trials, "-conf", str(conf_file), "--output", str(output)]) == 0
    assert yaml.safe_load(output.read_text())["CartPole-v1"]["normalize"] is True


def test_an_entry_of_a_module_is_read_as_often_as_it_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "entries_of_a_module.py").write_text(
        "hyperparams = {'CartPole-v1': dict(n_timesteps=90, policy='MlpPolicy', normalize=True)}"
    )
    monkeypatch.syspath_prepend(tmp_path)
    settings = zoo.TrialSettings("CartPole-v1", conf_file="entries_of_a_module")
    managers = [zoo.make_manager(settings, str(tmp_path)) for _ in range(3)]
    assert [(manager.n_timesteps, manager.normalize) for manager in managers] == [(90, True)] * 3


def test_an_entry_that_others_refer_to_is_not_replaced(
    study_with_two_trials: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.yml"
    before = "CartPole-v1: &cart\n  batch_size: 8\nCartPole-v0: *cart\n"
    file.write_text(before)
    assert tune.main([*study_with_two_trials, "--output", str(file), "--replace"]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert file.read_text() == before


class InlineEngine:
    """An engine that runs each trial at once, in this process, as a machine would that has nothing but the package."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._outcomes: list[Any] = []

    def capacity(self) -> int:
        return 1

    def submit(self, settings: zoo.TrialSettings, params: dict[str, Any], number: int, attempt: int) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(self.folder)
            try:
                value = zoo.make_manager(settings, str(self.folder)).objective(optuna.trial.FixedTrial(params, number))
                self._outcomes.append(Outcome(number, TrialState.COMPLETE, value))
            except Exception as error:
                self._outcomes.append(Outcome(number, TrialState.FAIL, reason=f"{type(error).__name__}: {error}"))

    def wait(self, seconds: float) -> list[Any]:
        outcomes, self._outcomes = self._outcomes, []
        return outcomes

    def answer(self, report: Any, is_pruned: bool) -> None: ...


@pytest.fixture
def tune_inline(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The command, for a short study, with that engine; the result is its exit status."""
    engine = InlineEngine(tmp_path_factory.mktemp("elsewhere"))
    monkeypatch.setattr(tune, "_enter_engine", lambda stack, arguments: engine)
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: tune.main(["--eval-episodes", "1", "--sampler", "random", *arguments])


@pytest.mark.parametrize(
    ("name", "content"),
    [("mine.yml", PLAIN), ("mine.yaml", PLAIN), ("mine.py", f"import yaml\nhyperparams = yaml.safe_load({PLAIN!r})\n")],
)
def test_a_hyperparameter_file_goes_with_the_trials_to_machines_that_do_not_have_it(
    name: str, content: str, tune_inline: Any, trained_models: list[LectureDQN], tmp_path: Path
) -> None:
    (tmp_path / name).write_text(content)
    assert tune_inline("--env", "CartPole-v1", "--trials", "1", "--conf-file", name) == 0
    assert len(trained_models) == 2
    assert all(map(is_plain, trained_models))


class ScriptedEngine:
    """
    An engine on which every trial reports, the later the worse, and then is over.

    :param outcome: What becomes of a trial that is not pruned, by its number
    """

    def __init__(self, outcome: Callable[[int], Outcome]) -> None:
        self._outcome = outcome
        self._events: list[Report | Outcome] = []

    def capacity(self) -> int:
        return 1

    def submit(self, settings: zoo.TrialSettings, params: dict[str, Any], number: int, attempt: int) -> None:
        self._events.append(Report(1, number, attempt, -float(number), 1))

    def wait(self, seconds: float) -> list[Report | Outcome]:
        events, self._events = self._events, []
        return events

    def answer(self, report: Report, is_pruned: bool) -> None:
        pruned = Outcome(report.number, TrialState.PRUNED)
        self._events.append(pruned if is_pruned else self._outcome(report.number))


def complete(number: int) -> Outcome:
    return Outcome(number, TrialState.COMPLETE, -float(number))


@pytest.fixture
def tune_scripted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The command with an engine that trains nothing; the results are its exit status and the study's trials."""
    monkeypatch.chdir(tmp_path)

    def call(engine: Any, *arguments: str) -> tuple[int, list[optuna.trial.FrozenTrial]]:
        monkeypatch.setattr(tune, "_enter_engine", lambda stack, arguments: engine)
        status = tune.main(["--env", "CartPole-v1", "--study-name", "study", "--storage", "study.log", *arguments])
        return status, optuna.load_study(study_name="study", storage=open_storage("study.log")).trials

    return call


@pytest.mark.parametrize(
    ("arguments", "n_pruned"),
    [
        (["--pruner", "median", "--n-startup-trials", "1"], 3),
        (["--pruner", "median", "--n-startup-trials", "3"], 1),
        (["--pruner", "none", "--n-startup-trials", "1"], 0),
    ],
)
def test_trials_are_pruned_as_the_command_says(arguments: list[str], n_pruned: int, tune_scripted: Any) -> None:
    status, trials = tune_scripted(ScriptedEngine(complete), "--trials", "4", "--n-evaluations", "1", *arguments)
    assert status == 0
    assert [trial.state.name for trial in trials] == ["COMPLETE"] * (4 - n_pruned) + ["PRUNED"] * n_pruned


def test_a_study_of_which_every_trial_was_pruned_is_no_error(tune_scripted: Any) -> None:
    scores = {"scores": [1.0, 2.0]}
    pruning = ScriptedEngine(lambda number: Outcome(number, TrialState.PRUNED, attributes=scores))
    status, (trial,) = tune_scripted(pruning, "--trials", "1")
    assert (status, trial.state) == (0, TrialState.PRUNED)
    assert trial.user_attrs["scores"] == scores["scores"]


def test_a_lost_trial_is_retried_as_often_as_the_command_says(tune_scripted: Any) -> None:
    lossy = ScriptedEngine(lambda number: Outcome(number, TrialState.RUNNING, reason="its node died"))
    status, (trial,) = tune_scripted(lossy, "--trials", "1", "--max-retries", "1")
    assert status == 1
    assert trial.user_attrs["failure"] == "lost 2 times, at last because its node died"


def test_what_decides_a_score_is_what_the_command_says(tune_scripted: Any) -> None:
    arguments = ["-n", "150", "--n-evaluations", "3", "--eval-episodes", "2", "--seeds", "4"]
    assert tune_scripted(ScriptedEngine(complete), "--trials", "1", *arguments)[0] == 0
    scoring = optuna.load_study(study_name="study", storage=open_storage("study.log")).user_attrs[SCORING]
    assert scoring == {
        "algorithm": "lecture_dqn",
        "environment": "CartPole-v1",
        "env_kwargs": {},
        "eval_env_kwargs": {},
        "n_timesteps": 150,
        "n_evaluations": 3,
        "eval_episodes": 2,
        "seeds": [10_000, 10_001, 10_002, 10_003],
    }


def test_the_seed_of_the_command_decides_what_is_drawn(tune_scripted: Any, tmp_path: Path) -> None:
    drawn = []
    for seed in "112":
        (tmp_path / "study.log").unlink(missing_ok=True)
        _, (trial,) = tune_scripted(ScriptedEngine(complete), "--trials", "1", "--sampler", "random", "--seed", seed)
        drawn.append(trial.params)
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("is_impatient", [False, True])
def test_a_signal_stops_a_study_with_its_report_and_a_second_one_at_once(
    number: signal.Signals, is_impatient: bool, tune_scripted: Any, tmp_path: Path
) -> None:
    class SignalledEngine(ScriptedEngine):
        def wait(self, seconds: float) -> list[Report | Outcome]:
            signal.raise_signal(number)
            if is_impatient:
                signal.raise_signal(number)
            return []

    handlers = [signal.getsignal(known) for known in (signal.SIGINT, signal.SIGTERM)]
    status, (trial,) = tune_scripted(SignalledEngine(complete), "--trials", "1")
    assert status == 130
    assert trial.state == TrialState.WAITING
    assert bool(list((tmp_path / "logs").rglob("report_*.csv"))) is not is_impatient
    assert [signal.getsignal(known) for known in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_a_database_that_does_not_come_back_is_named_and_its_trials_wait_for_the_next_start(
    tune_scripted: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    class EngineWithoutADatabase(ScriptedEngine):
        def wait(self, seconds: float) -> list[Report | Outcome]:
            raise optuna.exceptions.StorageInternalError("An exception is raised") from ConnectionResetError("cut off")

    status, (trial,) = tune_scripted(EngineWithoutADatabase(complete), "--trials", "1")
    assert status == 1
    assert capsys.readouterr().err == "error: the database did not come back, start again when it has: cut off\n"
    study = optuna.load_study(study_name="study", storage=open_storage("study.log"))
    assert trial.state == TrialState.RUNNING  # nothing more was asked of the database
    assert "beats" in study.user_attrs[RUNNER + trial.user_attrs["runner"]]


@pytest.mark.parametrize("by_the_zoo", [False, True])
def test_the_best_trial_goes_into_the_entry_that_its_search_started_from_and_no_other(
    by_the_zoo: bool, zoo_train: Any, tune_scripted: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.yml").write_text(PLAIN)
    study_arguments = ["--storage", "study.log", "--study-name", "study"]
    if by_the_zoo:
        zoo_train(*SEARCH, *study_arguments, "-conf", "mine.yml", "--n-trials", "1", "-params", "trial_seeds:3")
    else:
        arguments = ["--trials", "1", "-n", "150", "--seeds", "3", "-conf", "mine.yml"]
        assert tune_scripted(ScriptedEngine(complete), *arguments)[0] == 0
    capsys.readouterr()
    best = ["best", *study_arguments, "--env", "CartPole-v1", "--output", "best.yml"]
    assert "must hold the entry that study 'study' was searched from" in one_line_error(capsys, *best)
    assert tune.main([*best, "-conf", "mine.yml"]) == 0
    assert "nn.ReLU" in yaml.safe_load((tmp_path / "best.yml").read_text())["CartPole-v1"]["policy_kwargs"]


def test_a_study_whose_trials_have_all_failed_is_an_error(
    tune_inline: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.yml").write_text(PLAIN.replace("layer_norm", "layer_norms"))
    assert tune_inline("--env", "CartPole-v1", "--trials", "2", "--conf-file", "mine.yml") == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: all 2 trials of study 'lecture_dqn-CartPole-v1' have failed, the last with TypeError: ")
    assert "layer_norms" in error


def test_the_report_of_an_environment_with_a_slash_in_its_name_is_named_as_the_zoo_names_it(
    tune_inline: Any, tmp_path: Path
) -> None:
    arguments = ["--env", "MinAtar/Breakout-v1", "--trials", "1", "-n", "150", "--pruner", "none", "-f", "results"]
    assert tune_inline(*arguments) == 0
    assert not (tmp_path / "logs").exists()
    reports = [path.name for path in (tmp_path / "results" / "lecture_dqn").iterdir() if path.suffix != ".db"]
    assert len(reports) == 2
    assert all(name.startswith("report_MinAtar-Breakout-v1_1-trials-150-random-none_") for name in reports)


def test_only_the_engine_imports_ray(tmp_path: Path) -> None:
    modules = "sb3_lecture_dqn.tune, sb3_lecture_dqn.tuning.driver, rl_zoo3.exp_manager"
    script = f"import sys, {modules}; print('ray' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True, capture_output=True, text=True)
    assert result.stdout == "False\n"


def one_line_error(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What the command says when it refuses; it must be one line."""
    try:
        status = tune.main(list(arguments))
    except SystemExit as error:  # argparse
        status = int(str(error.code))
    assert status in (1, 2)
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


def test_bad_input_gets_one_line_and_starts_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from sb3_lecture_dqn.tuning import engine

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(engine.ray, "init", lambda *_, **__: pytest.fail("it started"))
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        free = f"127.0.0.1:{unused.getsockname()[1]}"
        cartpole = ["--env", "CartPole-v1", "--trials", "1"]
        away = f"postgresql+psycopg://tuner:secret@{free}/postgres"
        error = one_line_error(capsys, *cartpole, "--storage", away)
        assert "cannot be opened" in error
        assert "secret" not in error
        assert f"Ray cluster {free} cannot be reached" in one_line_error(capsys, *cartpole, "--ray-address", free)
    for address in ("ray://there", "ray://there:10001", "there"):
        assert f"auto or HOST:PORT, got {address}" in one_line_error(capsys, *cartpole, "--ray-address", address)
    assert "--trials: must be at least 1, got 0" in one_line_error(capsys, "--env", "CartPole-v1", "--trials", "0")
    assert "--seeds: must be at least 2, got 1" in one_line_error(capsys, *cartpole, "--seeds", "1")
    assert "must have an action space Discrete(n)" in one_line_error(capsys, "--env", "Pendulum-v1", "--trials", "1")
    assert "must have an observation space that is" in one_line_error(capsys, "--env", "Blackjack-v1", "--trials", "1")
    assert "CartPoel" in one_line_error(capsys, "--env", "CartPoel-v1", "--trials", "1")
    assert "no_such_package" in one_line_error(capsys, *cartpole, "--gym-packages", "no_such_package")
    no_file = "error: [Errno 2] No such file or directory: 'nowhere.yml'\n"
    assert one_line_error(capsys, *cartpole, "--conf-file", "nowhere.yml") == no_file
    assert "cannot be opened" in one_line_error(capsys, *cartpole, "--storage", "no url")
    (tmp_path / "poem.log").write_text("no journal\n")
    assert "must be a journal file" in one_line_error(capsys, *cartpole, "--storage", "poem.log")
    assert "there is no study" in one_line_error(capsys, "best", "--env", "CartPole-v1", "--output", "mine.yml")
    assert [path.name for path in tmp_path.iterdir()] == ["poem.log"]


@pytest.mark.parametrize("answer", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"hm", b""])
def test_a_port_where_something_else_answers_is_no_cluster(
    answer: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    def serve() -> None:
        connection, _ = server.accept()
        with connection:
            connection.recv(1024)
            connection.sendall(answer)

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=serve)
        thread.start()
        address = f"127.0.0.1:{server.getsockname()[1]}"
        error = one_line_error(capsys, "--env", "CartPole-v1", "--trials", "1", "--ray-address", address)
        thread.join()
    assert error == f"error: Ray cluster {address} cannot be reached: something else answers there\n"
    assert list(tmp_path.iterdir()) == []


def test_a_cluster_that_speaks_tls_is_not_greeted_without(monkeypatch: pytest.MonkeyPatch) -> None:
    from sb3_lecture_dqn.tuning import engine

    monkeypatch.setattr(engine, "CONNECT_SECONDS", 0.2)
    monkeypatch.setenv("RAY_USE_TLS", "1")
    with socket.create_server(("127.0.0.1", 0)) as server:
        engine.check_address(f"127.0.0.1:{server.getsockname()[1]}")
        connection, _ = server.accept()
        with connection:
            assert connection.recv(1024) == b""


def test_a_port_that_says_nothing_is_no_cluster(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from sb3_lecture_dqn.tuning import engine

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(engine, "CONNECT_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        error = one_line_error(capsys, "--env", "CartPole-v1", "--trials", "1", "--ray-address", address)
    assert error == f"error: Ray cluster {address} cannot be reached: timed out\n"


def test_a_cluster_that_is_not_there_leaves_no_study(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from sb3_lecture_dqn.tuning import engine

    def no_cluster(*_: Any, **__: Any) -> None:
        raise ConnectionError("Could not find any running Ray instance.\nStart one.")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(engine.ray, "init", no_cluster)
    arguments = ["--env", "CartPole-v1", "--trials", "1", "--ray-address", "auto"]
    assert "Ray cluster auto cannot be reached: Could not find" in one_line_error(capsys, *arguments)
    assert "there is no study" in one_line_error(capsys, "best", "--env", "CartPole-v1", "--output", "mine.yml")


def test_a_study_of_another_environment_or_algorithm_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    url = f"sqlite:///{tmp_path}/study.db"
    open_study(open_storage(url), "ours", {"algorithm": "lecture_dqn", "environment": "Acrobot-v1"})
    foreign = optuna.create_study(storage=url, study_name="foreign")
    foreign.add_trial(optuna.create_trial(value=1.0))
    optuna.create_study(storage=url, study_name="costs", direction="minimize")
    arguments = ["--env", "CartPole-v1", "--storage", url, "--study-name"]
    for command in (["--trials", "1"], ["best", "--output", "mine.yml"]):
        refusal = "made with environment 'Acrobot-v1', got 'CartPole-v1'"
        assert refusal in one_line_error(capsys, *command, *arguments, "ours")
        for name in ("foreign", "costs"):
            refusal = f"study '{name}' exists and is not one of lecture_dqn"
            assert refusal in one_line_error(capsys, *command, *arguments, name)
    assert [trial.value for trial in optuna.load_study(study_name="foreign", storage=url).trials] == [1.0]


def test_a_storage_that_may_not_be_written_is_named(
    postgres: PostgresServer, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    open_cartpole_study(postgres.url(), "theirs")
    postgres.execute("CREATE ROLE reader LOGIN")
    postgres.execute("GRANT SELECT ON ALL TABLES IN SCHEMA public TO reader")
    arguments = ["--env", "CartPole-v1", "--trials", "1", "--study-name", "mine", "--storage"]
    assert "permission denied" in one_line_error(capsys, *arguments, postgres.url(user="reader"))
    open_cartpole_study(f"sqlite:///{tmp_path}/study.db", "theirs")
    error = one_line_error(capsys, *arguments, f"sqlite:///file:{tmp_path}/study.db?mode=ro&uri=true")
    assert "readonly database" in error
    assert [path.name for path in tmp_path.iterdir()] == ["study.db"]


def test_progress_names_the_best_trial_and_the_time_that_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    def trials_of(values: list[float], *others: TrialState) -> list[optuna.trial.FrozenTrial]:
        study = optuna.create_study(direction="maximize")
        study.add_trials([optuna.create_trial(value=value) for value in values])
        study.add_trials([optuna.create_trial(state=state) for state in others])
        return study.trials

    pruned, failed = TrialState.PRUNED, TrialState.FAIL
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    stream = io.StringIO()
    show = Progress(10, stream)
    for seconds, trials in (
        (0.0, trials_of([], failed, TrialState.WAITING)),
        (100.0, trials_of([-3.0, -1.5, -2.0], pruned, pruned, failed)),
        (1.0, trials_of([-3.0, -1.5, -2.0], pruned, pruned, failed)),  # no news
        (99.0, trials_of([-3.0, -1.5, -2.0], pruned, pruned, failed)),
        (3_600.0, trials_of([-3.0] * 9, pruned, pruned, failed)),
    ):
        clock[0] += seconds
        show(trials)
    assert stream.getvalue().splitlines() == [
        "1/10 done (0 pruned, 1 failed), 0 running, no score yet, time left unknown",
        "6/10 done (2 pruned, 1 failed), 0 running, best -1.50 (trial 1), about 0:01:20 left",
        "6/10 done (2 pruned, 1 failed), 0 running, best -1.50 (trial 1), about 0:02:40 left",
        "12/10 done (2 pruned, 1 failed), 0 running, best -3.00 (trial 0), about 0:00:00 left",
    ]


def test_a_report_draws_what_the_study_is_enough_for_and_keeps_what_it_says_of_itself(tmp_path: Path) -> None:
    study = open_cartpole_study(f"sqlite:///{tmp_path}/study.db")
    expected = {".csv", ".pkl"}
    for value, plot in ((1.0, None), (1.0, "_history.png"), (2.0, "_importances.png")):
        trial = study.ask()
        trial.suggest_float("gamma", 0.9, 1.0)
        study.tell(trial, value)
        expected |= {plot} if plot else set()
        paths = write_report(study, tmp_path, "report")
        assert {path.name.removeprefix("report") for path in paths} == expected
        assert all(path.exists() for path in paths)
    copied = pickle.loads((tmp_path / "report.pkl").read_bytes())
    assert copied.user_attrs == study.user_attrs
    assert [trial.value for trial in copied.trials] == [1.0, 1.0, 2.0]


def test_a_worker_keeps_the_scores_of_the_seeds_before_a_trial_was_pruned(monkeypatch: pytest.MonkeyPatch) -> None:
    from sb3_lecture_dqn.tuning import engine

    answers = iter([False, True])  # to the first seed's evaluation, and to the mean over two seeds
    mailbox = SimpleNamespace(report=SimpleNamespace(remote=lambda *report: next(answers)))
    monkeypatch.setattr(engine.ray, "get", lambda answer: answer)
    settings = zoo.TrialSettings("CartPole-v1", n_timesteps=160, n_evaluations=1, eval_episodes=1, seeds=3)
    outcome = engine._run_trial(settings, PARAMS, 0, 1, mailbox)
    assert outcome.state == TrialState.PRUNED
    assert len(outcome.attributes["scores"]) == 2


def test_every_report_reaches_the_driver_and_its_answer_who_waits_for_it() -> None:
    from sb3_lecture_dqn.tuning.engine import Mailbox

    async def exchange() -> list[Any]:
        mailbox = Mailbox()
        workers = [asyncio.create_task(mailbox.report(number, 1, float(number), 1)) for number in range(3)]
        await asyncio.sleep(0)
        reports = await mailbox.take()
        for report in reversed(reports):
            for is_pruned in (report.number == 1, True):  # the first answer counts
                await mailbox.answer(report.ticket, is_pruned)
        answers = await asyncio.gather(*workers)
        await mailbox.answer(reports[0].ticket, True)  # who nobody waits for any more
        return [[report.value for report in reports], answers]

    assert asyncio.run(exchange()) == [[0.0, 1.0, 2.0], [False, True, False]]
