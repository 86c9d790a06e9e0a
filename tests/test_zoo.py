"""rl_zoo3's commands with ``--algo lecture_dqn``, as users type them."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import torch as th
import yaml
from resuming import Interruption

from sb3_lecture_dqn import DivergenceError, LectureDQN, zoo
from sb3_lecture_dqn.divergence import DivergenceWatch
from sb3_lecture_dqn.search_space import convert_lecture_dqn_params, sample_lecture_dqn_params

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg", "SDL_VIDEODRIVER": "dummy"}


def run(*arguments: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a folder that has nothing to do with the project."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**ENVIRONMENT, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )


@pytest.fixture(scope="module")
def trained_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the logs of one short training, by the command of the README."""
    folder = tmp_path_factory.mktemp("zoo")
    arguments = ["--algo", "lecture_dqn", "--env", "LunarLander-v2", "-n", "400", "--eval-freq", "200", "--eval-episodes", "2"]
    result = run("-m", "rl_zoo3.train", *arguments, "--seed", "0", "--save-freq", "200", folder=folder)
    assert result.returncode == 0, result.stderr
    return folder


def test_train_saves_a_model_that_was_trained_by_our_hyperparameter_file(trained_folder: Path) -> None:
    run_folder = trained_folder / "logs" / "lecture_dqn" / "LunarLander-v2_1"
    model = LectureDQN.load(run_folder / "LunarLander-v2.zip")
    assert model._n_updates == 200  # two for four steps
    config = yaml.unsafe_load((run_folder / "LunarLander-v2" / "config.yml").read_text())
    ours = yaml.safe_load(zoo.HYPERPARAMS_FILE.read_text())["LunarLander-v2"]
    assert dict(config) == ours
    assert model.batch_size == ours["batch_size"]


def test_enjoy_plays_the_model(trained_folder: Path) -> None:
    arguments = ["--algo", "lecture_dqn", "--env", "LunarLander-v2", "-f", "logs", "--no-render", "-n", "1001"]
    result = run("-m", "rl_zoo3.enjoy", *arguments, folder=trained_folder)
    assert result.returncode == 0, result.stderr
    assert "Mean reward:" in result.stdout


def test_enjoy_finds_the_newest_training_where_there_is_no_trained_agent(trained_folder: Path) -> None:
    arguments = ["--algo", "lecture_dqn", "--env", "LunarLander-v2", "--no-render", "-n", "1001"]
    result = run("-m", "rl_zoo3.enjoy", *arguments, folder=trained_folder)
    assert result.returncode == 0, result.stderr
    assert "Mean reward:" in result.stdout


@pytest.mark.parametrize("folder", ["logs", "rl-trained-agents"])
def test_the_newest_training_is_the_newest_with_a_model(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zoo.register()
    from rl_zoo3.utils import EnvironmentName, get_model_path

    monkeypatch.chdir(tmp_path)
    runs = tmp_path / "logs" / "lecture_dqn"
    for name in ("CartPole-v1_9", "CartPole-v1_10", "CartPole-v1_11", "CartPole-v10_12", "Acrobot-v1_13"):
        (runs / name).mkdir(parents=True)
    for name in ("CartPole-v1_14_copy", "Own.v1_1", "Own-v1_2"):
        (runs / name).mkdir()
        (runs / name / f"{name.partition('_')[0]}.zip").touch()
    for name in ("CartPole-v1_9/CartPole-v1.zip", "CartPole-v1_10/CartPole-v1.zip", "CartPole-v10_12/CartPole-v10.zip"):
        (runs / name).touch()
    assert get_model_path(0, folder, "lecture_dqn", EnvironmentName("Own.v1"))[2] == "logs/lecture_dqn/Own.v1_1"
    assert get_model_path(0, folder, "lecture_dqn", EnvironmentName("CartPole-v1"))[2] == "logs/lecture_dqn/CartPole-v1_10"
    with pytest.raises(ValueError, match=r"No model found for lecture_dqn on CartPole-v1, path: logs/.*CartPole-v1_11"):
        get_model_path(11, "logs", "lecture_dqn", EnvironmentName("CartPole-v1"))
    (runs / "CartPole-v1_11" / "best_model.zip").touch()  # a run with a model, though not with the one that is asked for
    with pytest.raises(ValueError, match=r"No model found for lecture_dqn on CartPole-v1, path: logs/.*CartPole-v1_11"):
        get_model_path(0, "logs", "lecture_dqn", EnvironmentName("CartPole-v1"))


def test_an_agent_that_is_nowhere_is_looked_for_as_the_zoo_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zoo.register()
    from rl_zoo3.utils import EnvironmentName, get_model_path

    monkeypatch.chdir(tmp_path)
    for folder in ("rl-trained-agents", "elsewhere"):
        with pytest.raises(AssertionError, match=f"The {folder}/lecture_dqn folder was not found"):
            get_model_path(0, folder, "lecture_dqn", EnvironmentName("CartPole-v1"))


def test_only_this_algorithm_is_looked_for_in_the_logs_and_only_where_no_folder_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    zoo.register()
    from rl_zoo3.utils import EnvironmentName, get_model_path

    monkeypatch.chdir(tmp_path)
    for algorithm in ("lecture_dqn", "dqn"):
        (tmp_path / "logs" / algorithm / "CartPole-v1_1").mkdir(parents=True)
        (tmp_path / "logs" / algorithm / "CartPole-v1_1" / "CartPole-v1.zip").touch()
    for folder, algorithm in (("elsewhere", "lecture_dqn"), ("rl-trained-agents", "dqn")):
        with pytest.raises(AssertionError, match=f"The {folder}/{algorithm} folder was not found"):
            get_model_path(0, folder, algorithm, EnvironmentName("CartPole-v1"))


def test_registering_twice_changes_nothing() -> None:
    from rl_zoo3 import exp_manager, utils

    zoo.register()
    once = {"get_model_path": utils.get_model_path, **vars(exp_manager.ExperimentManager)}
    zoo.register()
    assert {"get_model_path": utils.get_model_path, **vars(exp_manager.ExperimentManager)} == once


def test_record_video_writes_a_video(trained_folder: Path) -> None:
    arguments = ["--algo", "lecture_dqn", "--env", "LunarLander-v2", "-f", "logs", "-n", "10", "-o", "videos", "--load-best"]
    result = run("-m", "rl_zoo3.record_video", *arguments, folder=trained_folder)
    assert result.returncode == 0, result.stderr
    assert [video.suffix for video in (trained_folder / "videos").iterdir() if video.suffix != ".json"] == [".mp4"]


def test_benchmark_lists_the_model(trained_folder: Path) -> None:
    # upstream's benchmark calls an enjoy.py in the working folder
    (trained_folder / "enjoy.py").write_text("from rl_zoo3.enjoy import enjoy\n\nenjoy()\n")
    arguments = ["--log-dir", "logs", "--benchmark-dir", "benchmark", "--no-hub", "-n", "1001", "--test-mode"]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    result = run("-m", "rl_zoo3.benchmark", *arguments, folder=trained_folder, PATH=path)
    assert result.returncode == 0, result.stderr
    assert "lecture_dqn" in (trained_folder / "benchmark" / "benchmark.md").read_text()


def test_plots_draw_the_training(trained_folder: Path) -> None:
    train = ["plot_train", "-a", "lecture_dqn", "-e", "LunarLander-v2", "-f", "logs", "-w", "1"]
    everything = ["all_plots", "-a", "lecture_dqn", "-e", "LunarLander-v2", "-f", "logs", "-o", "plots"]
    for arguments in (train, everything):
        result = run("-m", "sb3_lecture_dqn.zoo", *arguments, folder=trained_folder)
        assert result.returncode == 0, result.stderr
    assert "LECTURE_DQN" in result.stdout
    assert (trained_folder / "plots.pkl").exists()


def test_every_command_and_the_console_script_know_the_algorithm(tmp_path: Path) -> None:
    modules = ["train", "enjoy", "record_video", "record_training", "load_from_hub", "cli"]
    script = f"""
import contextlib, io, runpy, sys
for name in {modules!r}:
    sys.argv = ["rl_zoo3", *(["train"] if name == "cli" else []), "--help"]
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.suppress(SystemExit):
        runpy.run_module("rl_zoo3." + name, run_name="__main__")
    print(name, "lecture_dqn" in output.getvalue())
from rl_zoo3.hyperparams_opt import HYPERPARAMS_CONVERTER, HYPERPARAMS_SAMPLER
print("search", "lecture_dqn" in HYPERPARAMS_CONVERTER and "lecture_dqn" in HYPERPARAMS_SAMPLER)
"""
    result = run("-c", script, folder=tmp_path)
    assert result.stdout.split("\n")[:-1] == [f"{name} True" for name in [*modules, "search"]], result.stderr


def test_the_explicit_path_works_with_the_start_up_hook_switched_off(tmp_path: Path) -> None:
    arguments = ["--algo", "lecture_dqn", "--env", "CartPole-v1", "-n", "100", "--eval-freq", "-1"]
    result = run("-m", "sb3_lecture_dqn.zoo", "train", *arguments, folder=tmp_path, **{zoo.SWITCH: "0"})
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "logs" / "lecture_dqn" / "CartPole-v1_1" / "CartPole-v1.zip").exists()


def test_the_switch_hides_the_algorithm_from_the_zoo(tmp_path: Path) -> None:
    result = run("-m", "rl_zoo3.train", "--algo", "lecture_dqn", folder=tmp_path, **{zoo.SWITCH: "0"})
    assert result.returncode == 2
    assert "invalid choice: 'lecture_dqn'" in result.stderr


@pytest.mark.parametrize(("command", "got"), [([], ""), (["fly"], ", got 'fly'")])
def test_an_unknown_command_is_answered_with_the_known_ones(
    command: list[str], got: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["zoo.py", *command])
    with pytest.raises(SystemExit) as error:
        zoo.main()
    assert error.value.code == f"command must be one of {', '.join(zoo.COMMANDS)}{got}"


def test_a_python_that_a_command_starts_knows_the_algorithm_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(zoo.SWITCH, "0")
    monkeypatch.setattr(sys, "argv", ["zoo.py", "record_training", "--help"])  # which starts rl_zoo3.record_video
    with pytest.raises(SystemExit):
        zoo.main()
    assert "lecture_dqn" in capsys.readouterr().out
    assert zoo.SWITCH not in os.environ


@pytest.fixture
def train_in_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    zoo.register()
    from rl_zoo3.train import train

    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", ["train", "--algo", "lecture_dqn", *arguments])
        train()

    return call


def test_an_unknown_hyperparameter_is_named_and_nothing_is_written(train_in_process: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"unknown hyperparameter 'learning_rat', may be one of .*learning_rate"):
        train_in_process("--env", "CartPole-v1", "-params", "learning_rat:0.1")
    assert list(tmp_path.iterdir()) == []


def test_what_the_zoo_gives_by_itself_is_no_hyperparameter(train_in_process: Any) -> None:
    with pytest.raises(ValueError, match="unknown hyperparameter 'seed', may be one of batch_size") as error:
        train_in_process("--env", "CartPole-v1", "-n", "60", "-params", "seed:3")
    assert not any(name in str(error.value) for name in ("device", "verbose", "tensorboard_log"))


@pytest.mark.parametrize(
    ("of_evaluation", "reward"), [(None, 0.0), ({"sutton_barto_reward": False}, 1.0)], ids=["the entry's", "its own"]
)
def test_an_evaluation_has_the_arguments_that_an_entry_gives_its_environment_unless_it_is_given_its_own(
    of_evaluation: dict[str, Any] | None, reward: float, tmp_path: Path
) -> None:
    file = tmp_path / "mine.yml"
    file.write_text("CartPole-v1: {n_timesteps: 9, policy: MlpPolicy, env_kwargs: {sutton_barto_reward: true}}")
    settings = zoo.TrialSettings("CartPole-v1", conf_file=str(file))
    manager = zoo.make_manager(settings, str(tmp_path), eval_env_kwargs=of_evaluation)
    for is_evaluation in (False, True):
        env = manager.create_envs(1, eval_env=is_evaluation, no_log=True)
        env.reset()
        # Sutton and Barto's reward is 0 until the pole falls
        assert env.step(np.zeros(1, int))[1] == (reward if is_evaluation else 0.0)


@pytest.mark.parametrize("mistake", ["gamma:1.5", "batch_size:0", "policy_kwargs:dict(net_arch=[0])"])
def test_a_training_that_cannot_begin_leaves_the_runs_that_are_there(
    train_in_process: Any, tmp_path: Path, mistake: str
) -> None:
    run_folder = tmp_path / "logs" / "lecture_dqn" / "CartPole-v1_1"
    run_folder.mkdir(parents=True)
    with pytest.raises(ValueError, match=mistake.partition(":")[0].replace("policy_kwargs", "net_arch")):
        train_in_process("--env", "CartPole-v1", "--verbose", "0", "-params", mistake)
    assert list(run_folder.parent.iterdir()) == [run_folder]


@pytest.mark.parametrize("begins", ["before", "meanwhile"])
def test_a_training_that_cannot_begin_leaves_a_run_that_another_process_begins_in_the_same_folder(
    begins: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    zoo.register()
    from rl_zoo3.exp_manager import ExperimentManager

    manager = ExperimentManager(_arguments(), "lecture_dqn", "CartPole-v1", str(tmp_path), eval_freq=-1, verbose=0)
    others_run = Path(manager.save_path)
    if begins == "before":
        others_run.mkdir(parents=True)

    def fail_while_another_begins(model: LectureDQN) -> None:
        if begins == "meanwhile":
            (Path(manager.params_path) / "config.yml").touch()
        raise ValueError("gamma must be")

    monkeypatch.setattr(LectureDQN, "_setup_model", fail_while_another_begins)
    with pytest.raises(ValueError, match="gamma must be"):
        manager.setup_experiment()
    assert others_run.exists()


def test_other_algorithms_are_the_zoos_own(train_in_process: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(zoo.CHECKPOINTS, "checkpoints")
    dqn = ["--algo", "dqn", "--env", "CartPole-v1", "--eval-freq", "-1", "--verbose", "0", "-n", "60"]
    train_in_process(*dqn)
    train_in_process(*dqn, "-optimize", "--n-trials", "2", "--n-jobs", "2", "--no-optim-plots", "--eval-episodes", "1")
    (report,) = (tmp_path / "logs" / "dqn").glob("report_*.csv")
    assert "scores" not in report.read_text()
    (tmp_path / "mine.yml").write_text("CartPole-v1: {n_timesteps: 60, policy: MlpPolicy, batch_sizes: 7}\n")
    with pytest.raises(TypeError, match="batch_sizes"):
        train_in_process(*dqn, "-conf", "mine.yml")
    runs = {path.name for path in (tmp_path / "logs" / "dqn").iterdir() if path.is_dir()}
    assert runs == {"CartPole-v1_1", "CartPole-v1_2", "CartPole-v1_3"}
    config = (tmp_path / "logs" / "dqn" / "CartPole-v1_1" / "CartPole-v1" / "config.yml").read_text()
    assert yaml.unsafe_load(config)["target_update_interval"] == 10  # of the zoo's entry
    assert not (tmp_path / "checkpoints").exists()


def test_a_search_makes_no_checkpoints_and_heeds_none(
    train_in_process: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(zoo.CHECKPOINTS, "checkpoints")
    train_in_process("--env", "Acrobot-v1", "-n", "60", "--eval-freq", "-1", "--verbose", "0")
    before = sorted((tmp_path / "checkpoints").rglob("*"))
    search = ["-optimize", "--n-trials", "1", "-n", "60", "--n-evaluations", "1", "--eval-episodes", "1", "--no-optim-plots"]
    train_in_process("--env", "CartPole-v1", *search)
    assert sorted((tmp_path / "checkpoints").rglob("*")) == before


def test_every_key_that_the_zoo_takes_out_of_an_entry_is_known() -> None:
    import inspect

    from rl_zoo3.exp_manager import ExperimentManager

    source = inspect.getsource(ExperimentManager._preprocess_hyperparams)
    taken_out = set(re.findall(r'del hyperparams\["(\w+)"\]', source))
    assert {"frame_stack", "n_envs"} <= taken_out
    zoo.check_hyperparameter_keys(dict.fromkeys({*taken_out, "policy"}))


def test_an_unknown_environment_is_named_and_nothing_is_written(train_in_process: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"CartPoel-v1 not found in gym registry, you maybe meant CartPole-v1\?"):
        train_in_process("--env", "CartPoel-v1")
    assert list(tmp_path.iterdir()) == []


def test_a_conf_file_of_the_users_own_comes_first(train_in_process: Any, tmp_path: Path) -> None:
    (tmp_path / "mine.yml").write_text("CartPole-v1: {n_timesteps: 60, policy: MlpPolicy, batch_size: 7}\n")
    train_in_process("--env", "CartPole-v1", "-conf", "mine.yml", "--eval-freq", "-1", "--verbose", "0")
    model = LectureDQN.load(tmp_path / "logs" / "lecture_dqn" / "CartPole-v1_1" / "CartPole-v1.zip")
    assert model.batch_size == 7


def test_an_environment_without_an_entry_gets_the_default(train_in_process: Any, tmp_path: Path) -> None:
    train_in_process("--env", "Taxi-v4" if "Taxi-v4" in _registered() else "Taxi-v3", "-n", "60", "--eval-freq", "-1")
    assert len(list((tmp_path / "logs" / "lecture_dqn").iterdir())) == 1


def _registered() -> set[str]:
    import gymnasium

    return set(gymnasium.registry)


def test_a_trained_agent_goes_on_with_its_replay_buffer(train_in_process: Any, tmp_path: Path) -> None:
    common = ["--env", "CartPole-v1", "-n", "1100", "--eval-freq", "-1", "--verbose", "0", "--save-replay-buffer"]
    train_in_process(*common)
    first = tmp_path / "logs" / "lecture_dqn" / "CartPole-v1_1"
    train_in_process(*common, "-i", str(first / "CartPole-v1.zip"))
    second = LectureDQN.load(tmp_path / "logs" / "lecture_dqn" / "CartPole-v1_2" / "CartPole-v1.zip")
    second.load_replay_buffer(tmp_path / "logs" / "lecture_dqn" / "CartPole-v1_2" / "replay_buffer.pkl")
    assert second.replay_buffer is not None
    assert second.replay_buffer.pos > 2_000


def test_three_optuna_trials_and_a_run_of_one_of_them(train_in_process: Any, tmp_path: Path) -> None:
    study = ["--storage", "study.log", "--study-name", "lander", "--env", "CartPole-v1", "--seed", "0"]
    search = ["-optimize", "--n-trials", "3", "-n", "300", "--n-evaluations", "1", "--eval-episodes", "1", "--no-optim-plots"]
    train_in_process(*study, *search)
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend("study.log"))
    trials = optuna.load_study(study_name="lander", storage=storage).trials
    assert [trial.state for trial in trials] == [optuna.trial.TrialState.COMPLETE] * 3
    assert all(0.9 < trial.user_attrs["gamma"] < 1 for trial in trials)

    train_in_process(*study, "--trial-id", "2", "-n", "60", "--eval-freq", "-1")
    # the search has made the folder with the number 1
    model = LectureDQN.load(tmp_path / "logs" / "lecture_dqn" / "CartPole-v1_2" / "CartPole-v1.zip")
    assert model.batch_size == trials[2].params["batch_size"]
    assert model.gamma == pytest.approx(1 - trials[2].params["one_minus_gamma"])
    assert model.q_net.net_arch == [trials[2].params["width"]] * 2
    train_in_process(*study, "--trial-id", "2", "-n", "60", "--eval-freq", "-1", "-params", "batch_size:7")
    model = LectureDQN.load(tmp_path / "logs" / "lecture_dqn" / "CartPole-v1_3" / "CartPole-v1.zip")
    assert (model.batch_size, model.q_net.net_arch) == (7, [trials[2].params["width"]] * 2)


def test_the_same_command_started_again_continues(
    train_in_process: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["--env", "CartPole-v1", "-n", "700", "--save-freq", "150", "--eval-freq", "200", "--eval-episodes", "2"]
    command += ["--verbose", "0", "-params", "learning_starts:100", "train_freq:8", "gradient_steps:1", "normalize:True"]
    on_step = LectureDQN._on_step

    def interrupted_on_step(model: LectureDQN) -> None:
        on_step(model)
        if model.num_timesteps == 500:
            raise Interruption

    monkeypatch.setenv(zoo.CHECKPOINTS, "checkpoints")
    with monkeypatch.context() as patch:
        patch.setattr(LectureDQN, "_on_step", interrupted_on_step)
        with pytest.raises(Interruption):
            train_in_process(*command)
    train_in_process(*command)
    seed = json.loads((tmp_path / "checkpoints" / zoo.RUN_FILE).read_text())["seed"]
    monkeypatch.setenv(zoo.CHECKPOINTS, "other checkpoints")
    train_in_process(*command, "--seed", str(seed), "-f", "reference")

    continued, reference = (tmp_path / name / "lecture_dqn" for name in ("logs", "reference"))
    assert [path.name for path in continued.iterdir()] == ["CartPole-v1_1"]  # no second folder
    continued, reference = continued / "CartPole-v1_1", reference / "CartPole-v1_1"
    for name in ("CartPole-v1.zip", "best_model.zip", "rl_model_450_steps.zip"):
        a, b = (LectureDQN.load(folder / name).policy.state_dict() for folder in (continued, reference))
        assert all(th.equal(a[key], b[key]) for key in a), name
    a, b = (np.load(folder / "evaluations.npz") for folder in (continued, reference))
    assert all(np.array_equal(a[key], b[key]) for key in a.files)
    assert list(a["timesteps"]) == [200, 400, 600]
    a, b = ((folder / "0.monitor.csv").read_text().splitlines()[1:] for folder in (continued, reference))
    assert [line.split(",")[:2] for line in a] == [line.split(",")[:2] for line in b]


def test_a_folder_of_checkpoints_belongs_to_one_environment(
    train_in_process: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(zoo.CHECKPOINTS, "checkpoints")
    train_in_process("--env", "CartPole-v1", "-n", "60", "--eval-freq", "-1", "--verbose", "0")
    with pytest.raises(ValueError, match="must name a folder for Acrobot-v1, got checkpoints with a run of CartPole-v1"):
        train_in_process("--env", "Acrobot-v1", "-n", "60", "--eval-freq", "-1", "--verbose", "0")


SHORT = ("--env", "CartPole-v1", "--eval-freq", "-1", "--verbose", "0")


def test_checkpoints_of_which_nobody_knows_the_runs_folder_are_continued_in_a_new_one(
    train_in_process: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(zoo.CHECKPOINTS, "checkpoints")
    for _ in range(2):
        train_in_process(*SHORT, "-n", "60", "--seed", "0")
        run = json.loads((tmp_path / "checkpoints" / zoo.RUN_FILE).read_text())
        (tmp_path / "checkpoints" / zoo.RUN_FILE).unlink()
    assert Path(run["save_path"]).name == "CartPole-v1_2"


def test_a_run_is_continued_from_another_working_folder(
    train_in_process: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    LectureDQN("MlpPolicy", "CartPole-v1").save("agent")
    monkeypatch.setenv(zoo.CHECKPOINTS, str(tmp_path / "checkpoints"))
    train_in_process(*SHORT, "-n", "60", "-i", "agent.zip")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    train_in_process(*SHORT, "-n", "60", "-i", "../agent.zip")
    assert not list(elsewhere.rglob("*.zip"))
    assert [path.name for path in (tmp_path / "logs" / "lecture_dqn").iterdir()] == ["CartPole-v1_1"]


def test_a_save_frequency_counts_the_steps_of_all_environments_together(
    train_in_process: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(zoo.CHECKPOINTS, "checkpoints")
    train_in_process(*SHORT, "-n", "124", "--save-freq", "60", "-params", "n_envs:4", "train_freq:1")
    checkpoints = {path.name.split("_")[-1] for path in (tmp_path / "checkpoints").glob("checkpoint_*")}
    assert checkpoints == {"0", "60", "120"}


def test_a_run_that_an_older_version_began_is_continued(
    train_in_process: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(zoo.CHECKPOINTS, "checkpoints")
    train_in_process(*SHORT, "-n", "60")
    run_file = tmp_path / "checkpoints" / zoo.RUN_FILE
    older = {name: value for name, value in json.loads(run_file.read_text()).items() if name != "settings"}
    run_file.write_text(json.dumps(older))
    train_in_process(*SHORT, "-n", "60")
    assert len(list((tmp_path / "logs" / "lecture_dqn").iterdir())) == 1


@pytest.mark.parametrize("mistake", ["gama:0.9", "gamma:1.5"])
def test_a_first_start_that_fails_claims_no_folder(
    train_in_process: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mistake: str
) -> None:
    with monkeypatch.context() as patch:
        patch.setenv(zoo.CHECKPOINTS, "checkpoints")
        with pytest.raises(ValueError, match=mistake.partition(":")[0]):
            train_in_process(*SHORT, "-n", "60", "-params", mistake)
    train_in_process(*SHORT, "-n", "80")
    monkeypatch.setenv(zoo.CHECKPOINTS, "checkpoints")
    train_in_process(*SHORT, "-n", "60")
    runs = tmp_path / "logs" / "lecture_dqn"
    steps = {path.name: LectureDQN.load(path / "CartPole-v1.zip").num_timesteps for path in runs.iterdir()}
    assert steps == {"CartPole-v1_1": 80, "CartPole-v1_2": 60}


def test_a_start_that_came_to_no_checkpoint_binds_nobody(
    train_in_process: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted_learn(model: LectureDQN, *args: Any, **kwargs: Any) -> None:
        raise Interruption

    monkeypatch.setenv(zoo.CHECKPOINTS, "checkpoints")
    with monkeypatch.context() as patch:
        patch.setattr(LectureDQN, "learn", interrupted_learn)
        with pytest.raises(Interruption):
            train_in_process(*SHORT, "-n", "60", "--seed", "1")
    train_in_process(*SHORT, "-n", "70", "--seed", "2")
    assert json.loads((tmp_path / "checkpoints" / zoo.RUN_FILE).read_text())["seed"] == 2


def test_a_file_in_the_place_of_the_checkpoints_is_named(
    train_in_process: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv(zoo.CHECKPOINTS, "file")
    with pytest.raises(ValueError, match=f"{zoo.CHECKPOINTS} must name a folder, got file, which is a file"):
        train_in_process(*SHORT, "-n", "60")
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_a_folder_of_checkpoints_belongs_to_one_seed(train_in_process: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(zoo.CHECKPOINTS, "checkpoints")
    train_in_process(*SHORT, "-n", "60", "--seed", "1")
    with pytest.raises(ValueError, match="seed must be 1, with which the run in checkpoints was started, got 0;"):
        train_in_process(*SHORT, "-n", "60", "--seed=0")
    train_in_process(*SHORT, "-n", "60", "--seed", "1")
    train_in_process(*SHORT, "-n", "60")
    arguments = yaml.unsafe_load(Path("logs/lecture_dqn/CartPole-v1_1/CartPole-v1/args.yml").read_text())
    assert arguments["seed"] == 1


def test_a_restart_without_a_hyperparameter_of_the_run_is_refused(
    train_in_process: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(zoo.CHECKPOINTS, "checkpoints")
    train_in_process(*SHORT, "-n", "60", "-params", "tau:1.0")
    with pytest.raises(ValueError, match=r"tau must be 1\.0, with which the run in checkpoints was started, got not given;"):
        train_in_process(*SHORT, "-n", "60")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("-n", "60", "-params", "gamma:0.5"), "gamma must be .*, got 0.5;"),
        (("-n", "60", "-params", "normalize:True"), "normalize must be not given, .*, got True;"),
        (("-n", "90"), "n_timesteps must be 60, .*, got 90;"),
        (
            ("-n", "60", "--env-kwargs", "sutton_barto_reward:True"),
            "env_kwargs must be {}, .*, got {sutton_barto_reward: True};",
        ),
        (
            ("-n", "60", "--eval-env-kwargs", "sutton_barto_reward:True"),
            "eval_env_kwargs must be {}, .*, got {sutton_barto_reward: True};",
        ),
        (("-n", "60", "--eval-freq", "20"), "eval_freq must be -1, .*, got 20;"),
        (("-n", "60", "--eval-episodes", "9"), "eval_episodes must be 5, .*, got 9;"),
        (("-n", "60", "--n-eval-envs", "2"), "n_eval_envs must be 1, .*, got 2;"),
        (("-n", "60", "-i", "agent.zip"), "trained_agent must be '', .*, got '.*agent.zip';"),
        (("-n", "60", "--vec-env", "subproc"), "vec_env must be 'DummyVecEnv', .*, got 'SubprocVecEnv';"),
        (("-n", "60", "--save-freq", "10"), "callbacks must be .*'ResumableCheckpointCallback'.*, got .*'CheckpointCallback'"),
    ],
    ids=[
        "hyperparameter",
        "new hyperparameter",
        "steps",
        "environment",
        "environment of evaluations",
        "evaluations",
        "their episodes",
        "their environments",
        "another agent",
        "processes",
        "callbacks",
    ],
)
def test_a_refused_restart_leaves_every_file_as_it_was(
    train_in_process: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: tuple[str, ...], message: str
) -> None:
    def files() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    LectureDQN("MlpPolicy", "CartPole-v1").save("agent")
    monkeypatch.setenv(zoo.CHECKPOINTS, "checkpoints")
    train_in_process(*SHORT, "-n", "60")
    before = files()
    with pytest.raises(ValueError, match=message):
        train_in_process(*SHORT, *change)
    assert files() == before
    assert len(list((tmp_path / "logs" / "lecture_dqn").iterdir())) == 1


def test_a_trial_that_diverges_is_pruned(train_in_process: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    models: list[LectureDQN] = []

    def let_the_first_diverge(watch: DivergenceWatch, model: LectureDQN, metrics: dict[str, float]) -> None:
        models.append(model)
        if model is models[0]:
            raise DivergenceError("training has diverged")

    monkeypatch.setattr(DivergenceWatch, "check", let_the_first_diverge)
    study = ["--storage", "study.log", "--study-name", "lander", "--env", "CartPole-v1", "--seed", "0"]
    search = ["-optimize", "--n-trials", "2", "-n", "300", "--n-evaluations", "1", "--eval-episodes", "1", "--no-optim-plots"]
    train_in_process(*study, *search)
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend("study.log"))
    trials = optuna.load_study(study_name="lander", storage=storage).trials
    assert [trial.state.name for trial in trials] == ["PRUNED", "COMPLETE"]


def test_load_from_hub_lays_a_models_files_out_for_enjoy(
    trained_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    zoo.register()
    import zipfile

    from huggingface_sb3 import EnvironmentName
    from rl_zoo3 import load_from_hub

    run_folder = trained_folder / "logs" / "lecture_dqn" / "LunarLander-v2_1"
    hub = tmp_path / "hub"
    hub.mkdir()
    with zipfile.ZipFile(hub / "train_eval_metrics.zip", "w") as archive:
        archive.write(run_folder / "0.monitor.csv", "0.monitor.csv")
    (hub / "env_kwargs.yml").write_text("{}\n")
    (hub / "vec_normalize.pkl").touch()
    for name in ("args.yml", "config.yml"):
        (hub / name).write_bytes((run_folder / "LunarLander-v2" / name).read_bytes())
    (hub / "lecture_dqn-LunarLander-v2.zip").write_bytes((run_folder / "LunarLander-v2.zip").read_bytes())
    monkeypatch.setattr(load_from_hub, "load_from_hub", lambda _, filename: str(hub / filename))
    load_from_hub.download_from_hub(
        algo="lecture_dqn",
        env_name=EnvironmentName("LunarLander-v2"),
        exp_id=0,
        folder=str(tmp_path / "agents"),
        organization="someone",
    )
    downloaded = tmp_path / "agents" / "lecture_dqn" / "LunarLander-v2_1" / "LunarLander-v2.zip"
    assert LectureDQN.load(downloaded)._n_updates == 200


def test_every_entry_of_the_hyperparameter_file_builds_a_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    zoo.register()
    import ale_py
    import gymnasium
    from rl_zoo3.exp_manager import ExperimentManager

    gymnasium.register_envs(ale_py)
    entries = yaml.safe_load(zoo.HYPERPARAMS_FILE.read_text())
    env_ids = [{"default": "FrozenLake-v1", "atari": "PongNoFrameskip-v4"}.get(entry, entry) for entry in entries]
    for env_id in env_ids:
        manager = ExperimentManager(
            _arguments(), "lecture_dqn", env_id, str(tmp_path), eval_freq=-1, n_timesteps=0, verbose=0, device="cpu"
        )
        results = manager.setup_experiment()
        assert results is not None
        model = results[0]
        assert isinstance(model, LectureDQN)
        assert manager.n_timesteps > 0
        model.get_env().close()  # type: ignore[union-attr]


def _arguments() -> Any:
    import argparse

    return argparse.Namespace()


def fixed_trial(**params: Any) -> optuna.trial.FixedTrial:
    defaults = {
        "learning_rate": 1e-3,
        "learning_rate_schedule": "constant",
        "batch_size": 64,
        "buffer_size": 50_000,
        "learning_starts": 500,
        "one_minus_gamma": 0.02,
        "train_freq": 4,
        "update_ratio": 0.5,
        "target_update_interval": 100,
        "exploration_fraction": 0.1,
        "exploration_final_eps": 0.05,
        "width": 128,
    }
    return optuna.trial.FixedTrial({**defaults, **params})


def test_the_sampler_gives_arguments_that_the_constructor_takes() -> None:
    hyperparams = sample_lecture_dqn_params(fixed_trial(), 0, 1, {"using_her_replay_buffer": False})
    model = LectureDQN("MlpPolicy", "CartPole-v1", **hyperparams)
    assert (model.learning_rate, model.gamma, model.gradient_steps) == (1e-3, 0.98, 2)
    assert model.q_net.net_arch == [128, 128]


def test_a_trial_takes_a_gradient_step_whenever_it_trains() -> None:
    trial = fixed_trial(train_freq=1, update_ratio=0.25)
    assert sample_lecture_dqn_params(trial, 0, 1, {})["gradient_steps"] == 1


def test_a_linear_schedule_falls_to_zero_in_a_trial_and_is_written_in_the_zoos_notation() -> None:
    trial = fixed_trial(learning_rate_schedule="linear")
    hyperparams = sample_lecture_dqn_params(trial, 0, 1, {})
    schedule = hyperparams["learning_rate"]
    assert [schedule(progress) for progress in (1.0, 0.5, 0.0)] == pytest.approx([1e-3, 5e-4, 0.0])
    assert convert_lecture_dqn_params(trial.params)["learning_rate"] == "lin_0.001"
    assert trial.user_attrs == {"gamma": 0.98, "gradient_steps": 2, "learning_rate": "lin_0.001"}


def test_the_zoo_has_the_shape_that_the_extensions_rely_on() -> None:
    import inspect

    from rl_zoo3 import exp_manager, hyperparams_opt, utils

    advice = "rl_zoo3 has changed: sb3_lecture_dqn/zoo.py must follow"
    assert isinstance(utils.ALGOS, dict), advice
    assert isinstance(hyperparams_opt.HYPERPARAMS_SAMPLER, dict), advice
    assert isinstance(hyperparams_opt.HYPERPARAMS_CONVERTER, dict), advice
    assert {"exp_id", "folder", "algo", "env_name"} <= set(inspect.signature(utils.get_model_path).parameters), advice
    assert {"algo", "config"} <= set(inspect.signature(exp_manager.ExperimentManager).parameters), advice
    for method, parameters in {
        "read_hyperparameters": [],
        "objective": ["trial"],
        "hyperparameters_optimization": [],
        "create_callbacks": [],
        "setup_experiment": [],
        "load_trial": ["storage", "study_name", "trial_id", "convert"],
        "_create_sampler": ["sampler_method"],
        "_create_pruner": ["pruner_method"],
    }.items():
        function = getattr(exp_manager.ExperimentManager, method)
        assert list(inspect.signature(function).parameters) == ["self", *parameters], f"{advice} ({method})"
    assert "self.seed" in inspect.getsource(exp_manager.ExperimentManager.create_envs), f"{advice} (the environments' seed)"
    objective = inspect.getsource(exp_manager.ExperimentManager.objective)
    for step in ("kwargs = self._hyperparams.copy()", "kwargs.update(sampled_hyperparams)"):
        assert step in objective, f"{advice} (_Entry)"
    created = inspect.getsource(exp_manager.ExperimentManager)
    attributes = ["save_path", "params_path", "seed", "save_freq", "callbacks", "optimize_hyperparameters", "env_name"]
    attributes += ["n_timesteps", "env_kwargs", "eval_env_kwargs", "vec_env_class", "custom_hyperparams", "n_envs"]
    attributes += ["n_eval_envs", "eval_freq", "trained_agent", "_eval_env_kwargs_args"]
    attributes += ["n_evaluations", "n_eval_episodes", "optimization_log_path", "n_jobs", "n_trials", "max_total_trials"]
    attributes += ["storage", "study_name", "trial_id", "sampler", "pruner"]
    for attribute in attributes:
        assert f"self.{attribute} = " in created or f"self.{attribute}: " in created, advice
