"""The result tables: how they are made, and that those in README.md and docs/results.md are the result files'."""

import dataclasses
import functools
import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import figures
import gymnasium
import numpy as np
import pytest
import results
import tables
from dying import KILLED, LEFT, write_or_die
from matplotlib import pyplot as plt
from PIL import Image
from results import ROWS, Run
from rl_zoo3.utils import ALGOS
from rliable import metrics
from stable_baselines3.common.env_util import make_vec_env

from sb3_lecture_dqn import DivergenceError, LectureDQN, ResumableCheckpointCallback
from sb3_lecture_dqn.envs import minatar_breakout
from sb3_lecture_dqn.envs.robo_parking_drivers import drive_along_kerbs
from sb3_lecture_dqn.zoo import CHECKPOINTS

CARTPOLE = "CartPole-v1"


def made_up_result(run: Run, mean_return: float = 0.0, curve: tuple[tuple[int, float, float], ...] = ()) -> dict[str, Any]:
    """A line as a training writes it."""
    return {
        "row": run.name,
        "env": run.row.env,
        "algorithm": run.algorithm,
        "seed": run.seed,
        "date": "2030-01-01",
        "versions": {"python": "3.11.7"},
        "settings": results.settings_in_use(run),
        "training_seconds": 50.0,
        "curve": curve,
        "returns": [mean_return] * 100,
        "optimal_return": -66.0,
    }


def write_results(name: str, n_seeds: int, folder: Path, ours: float = 1.0, theirs: float = 0.0) -> None:
    """A result file with so many seeds of both algorithms."""
    for run in results.runs_of(name, ROWS[name], seeds=range(n_seeds)):
        mean_return = ours if run.algorithm == "lecture_dqn" else theirs
        results.append_result(made_up_result(run, mean_return + run.seed), folder)


def row_of_table(table: str, env: str) -> list[str]:
    """The cells of the first line of an environment."""
    line = next(line for line in table.splitlines() if line.startswith(f"| {env} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


# --- What is committed ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", tables.FILES, ids=lambda file: file.name)
def test_the_tables_are_those_of_the_result_files(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert "<!-- results:" in text
    assert tables.fill_in(text) == text, "python benchmarks/tables.py"


def test_every_committed_result_was_made_with_the_settings_in_force() -> None:
    for name, row in ROWS.items():
        lines = results.read_results(name)
        further = results.runs_of(name, row, ["lecture_dqn"], results.FURTHER_SEEDS)
        runs = {(run.algorithm, run.seed): run for run in [*results.runs_of(name, row), *further]}
        assert len(lines) == len({(line["algorithm"], line["seed"]) for line in lines}), f"{name}: a run is there twice"
        for line in lines:
            run = runs[line["algorithm"], line["seed"]]
            assert line["settings"] == results.settings_in_use(run), f"{run}: trained with settings that have changed since"
            assert len(line["returns"]) == results.FINAL_EPISODES


def test_the_pictures_that_the_results_allow_are_committed_at_a_sensible_size() -> None:
    drawn = figures.draw_all(figures.read_rows(results.FOLDER))
    plt.close("all")
    assert {name for name in tables.PICTURES if (tables.IMAGES / f"{name}.png").exists()} == set(drawn)
    for name in drawn:
        picture = tables.IMAGES / f"{name}.png"
        assert picture.read_bytes().startswith(b"\x89PNG")
        assert picture.stat().st_size < 400_000


@pytest.mark.parametrize("name", tables.PICTURES)
def test_a_picture_is_of_the_committed_results(name: str) -> None:
    with Image.open(tables.IMAGES / f"{name}.png") as picture:
        assert picture.info["Source"] == figures.digest_of(figures.read_rows(results.FOLDER)), "python benchmarks/figures.py"


# --- Running --------------------------------------------------------------------------------------------------------------


def test_a_row_is_run_and_not_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    command = ["results.py", "--rows", CARTPOLE, "--steps", "300", "--seeds", "0", "--algorithms", "lecture_dqn"]
    monkeypatch.setattr(sys, "argv", [*command, "--processes", "1", "--folder", str(tmp_path)])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    results.main()
    output = capfd.readouterr().out
    assert "CartPole-v1 lecture_dqn seed 0: 300 of 300 steps" in output
    assert "CartPole-v1 lecture_dqn seed 0: done; 1 of 1 runs" in output
    file = tmp_path / "CartPole-v1.jsonl"
    check_line(json.loads(file.read_text()), "lecture_dqn")

    before = file.read_bytes()
    results.main()
    assert "1 of 1 runs are there already" in capfd.readouterr().out
    assert file.read_bytes() == before


def check_line(line: dict[str, Any], algorithm: str) -> None:
    """What the line of a run of 300 steps on CartPole says."""
    assert (line["algorithm"], line["seed"]) == (algorithm, 0)
    assert line["settings"]["n_timesteps"] == 300
    assert line["settings"]["tau"] == 1.0  # not in the entry: the constructor's default
    assert line["steps"] >= 300
    assert line["versions"]["torch"]
    assert [steps for steps, _, _ in line["curve"]] == list(range(15, 301, 15))
    assert 0 < line["curve"][-1][1] <= line["training_seconds"]
    assert len(line["returns"]) == 100
    assert all(episode_return >= 1 for episode_return in line["returns"])


def test_sb3s_dqn_is_run_with_the_zoos_entry() -> None:
    result = results.train_and_evaluate(Run(CARTPOLE, dataclasses.replace(ROWS[CARTPOLE], steps=300), "dqn", 0))
    check_line(json.loads(json.dumps(result)), "dqn")
    assert result["settings"]["policy_kwargs"] == "dict(net_arch=[256, 256])"
    assert result["settings"]["learning_rate"] == 2.3e-3


def test_runs_are_interleaved_seed_by_seed() -> None:
    runs = results.runs_of(CARTPOLE, ROWS[CARTPOLE], seeds=[0, 1])
    assert [(run.seed, run.algorithm) for run in runs] == [(0, "lecture_dqn"), (0, "dqn"), (1, "lecture_dqn"), (1, "dqn")]


@pytest.mark.parametrize("folder", [[], ["--folder", "results"], ["--folder", "../benchmarks/results"]])
@pytest.mark.parametrize("experiment", [["--params", '{"gamma": 0.9}'], ["--seeds", "10"], ["--steps", "300"]])
def test_an_experiment_does_not_touch_the_committed_results(
    experiment: list[str], folder: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "run_in_processes", lambda *_: pytest.fail("it started"))
    monkeypatch.chdir(results.FOLDER.parent)
    monkeypatch.setattr(sys, "argv", ["results.py", "--rows", CARTPOLE, *experiment, *folder])
    with pytest.raises(SystemExit, match="2"):
        results.main()


@pytest.mark.parametrize(
    ("argument", "value", "reason"),
    [
        ("--processes", "0", "at least 1, got 0"),
        ("--steps", "0", "at least 1, got 0"),
        ("--params", "3", "a JSON object, got 3"),
        ("--seeds", "-1", "at least 0, got -1"),
        ("--folder", __file__, f"a folder that can be written to, got {__file__} (File exists)"),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_starts(
    argument: str, value: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(results, "run_in_processes", lambda *_: pytest.fail("it started"))
    monkeypatch.setattr(sys, "argv", ["results.py", "--rows", CARTPOLE, "--folder", str(tmp_path), argument, value])
    with pytest.raises(SystemExit, match="2"):
        results.main()
    assert capsys.readouterr().err.endswith(f"error: {argument} must be {reason}\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_command_takes_its_trainings_with_it(number: signal.Signals, tmp_path: Path) -> None:
    runs = ["--rows", CARTPOLE, "--steps", "3000", "--seeds", "0", "--algorithms", "lecture_dqn"]
    command = [sys.executable, results.__file__, *runs, "--processes", "1", "--folder", str(tmp_path)]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # in a session of its own, where Ctrl-C reaches all of its processes, as in a terminal
    # a shell lets what it starts in the background ignore Ctrl-C, and that is inherited
    heed_ctrl_c = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(command, **pipes, start_new_session=True, preexec_fn=heed_ctrl_c) as process:
        assert process.stdout is not None
        assert any(line.endswith(": starts\n") for line in process.stdout)
        if number == signal.SIGINT:
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)
        _, errors = process.communicate()  # ends when all that write to it have ended
    assert errors == ("" if number == signal.SIGKILL else "interrupted; the same command goes on with what is missing\n")
    assert not list(tmp_path.iterdir())  # no result, and no claim on a run


def test_a_run_that_another_process_trains_is_left_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "train_and_evaluate", lambda *_: pytest.fail("it was trained twice"))
    run = Run(CARTPOLE, ROWS[CARTPOLE], "dqn", 0)
    with results._claimed(run, tmp_path) as is_ours:
        assert is_ours
        with pytest.raises(SystemExit, match=str(results.LEFT_TO_ANOTHER)):
            results.carry_out(run, tmp_path)
        with results._claimed(dataclasses.replace(run, seed=1), tmp_path) as is_ours:
            assert is_ours
    assert not list(tmp_path.iterdir())


def test_what_a_dead_process_had_claimed_is_free(tmp_path: Path) -> None:
    run = Run(CARTPOLE, ROWS[CARTPOLE], "dqn", 0)
    with results._claimed(run, tmp_path):
        (file,) = tmp_path.iterdir()
    file.touch()
    with results._claimed(run, tmp_path) as is_ours:
        assert is_ours
    assert not list(tmp_path.iterdir())


def test_a_run_that_another_command_has_finished_meanwhile_is_not_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "train_and_evaluate", lambda *_: pytest.fail("it was trained twice"))
    run = Run(CARTPOLE, ROWS[CARTPOLE], "dqn", 0)
    results.append_result(made_up_result(run), tmp_path)
    results.carry_out(run, tmp_path)
    assert len(results.read_results(CARTPOLE, tmp_path)) == 1


def test_a_result_that_cannot_be_written_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError("no space left on device")

    run = Run(CARTPOLE, ROWS[CARTPOLE], "dqn", 0)
    monkeypatch.setattr(results, "train_and_evaluate", lambda *_: made_up_result(run, 12.0))
    monkeypatch.setattr(results, "append_result", refuse)
    with pytest.raises(SystemExit, match="no space left on device"):
        results.carry_out(run, tmp_path)
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == json.loads(json.dumps(made_up_result(run, 12.0)))


def test_a_killed_run_loses_only_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = ["first", KILLED, LEFT, "last"]
    assert results.run_in_processes(runs, tmp_path, 2, write_or_die) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "last"]
    output = capsys.readouterr().out
    assert "killed: FAILED with exit code -9" in output
    assert "left: left to the command that is training it" in output


def test_a_command_with_failed_runs_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "run_in_processes", lambda *_: 2)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(sys, "argv", ["results.py", "--rows", CARTPOLE, "--folder", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"^2 runs have failed; the same command repeats them$"):
        results.main()


def test_a_crash_while_a_line_is_written_leaves_the_file_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_results(CARTPOLE, 1, tmp_path)
    before = results.result_file(CARTPOLE, tmp_path).read_bytes()
    write_text = Path.write_text

    def write_half(path: Path, text: str) -> int:
        write_text(path, text[: len(text) // 2])
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_text", write_half)
    with pytest.raises(OSError, match="no space left"):
        write_results(CARTPOLE, 2, tmp_path)
    assert results.result_file(CARTPOLE, tmp_path).read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["CartPole-v1.jsonl"]


def test_lines_that_are_written_at_once_are_all_there_and_none_twice(tmp_path: Path) -> None:
    runs = results.runs_of(CARTPOLE, ROWS[CARTPOLE], seeds=range(4))
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda run: results.append_result(made_up_result(run), tmp_path), runs * 2))
    assert len(results.results_of(runs, tmp_path)) == len(runs)
    assert len(results.read_results(CARTPOLE, tmp_path)) == len(runs)


def test_a_result_of_other_settings_is_not_counted(tmp_path: Path) -> None:
    row = ROWS[CARTPOLE]
    experiment = results.runs_of(CARTPOLE, row, ["lecture_dqn"], [0], {"gamma": 0.9})
    results.append_result(made_up_result(experiment[0]), tmp_path)
    assert len(results.results_of(experiment, tmp_path)) == 1
    assert results.results_of(results.runs_of(CARTPOLE, row, ["lecture_dqn"], [0]), tmp_path) == []


def test_the_zoos_entry_is_read_as_the_zoo_reads_it(tmp_path: Path) -> None:
    params = {"n_envs": 2, "learning_rate": "lin_1e-3", "normalize": True, "frame_stack": 3, "train_freq": 4}
    params |= {"policy_kwargs": "dict(net_arch=[32])", "n_timesteps": 7}
    manager, model = results.make_manager(Run(CARTPOLE, ROWS[CARTPOLE], "dqn", 0, params), tmp_path)
    assert manager.n_timesteps == 20_000  # the row's budget, not the entry's
    assert model.n_envs == 2
    assert model.lr_schedule(0.5) == pytest.approx(5e-4)
    assert model.get_vec_normalize_env() is not None
    assert model.observation_space.shape == (12,)
    assert model.policy_kwargs["net_arch"] == [32]


def test_an_evaluation_normalizes_as_the_training_does_by_now(tmp_path: Path) -> None:
    run = Run(CARTPOLE, ROWS[CARTPOLE], "lecture_dqn", 0, {"normalize": True, "n_envs": 2, "train_freq": 4})
    manager, model = results.make_manager(run, tmp_path)
    env = results.make_evaluation_env(manager, 77)
    model.learn(40)
    results.greedy_returns(model, env, 1)
    np.testing.assert_array_equal(cast(Any, env).obs_rms.mean, model.get_vec_normalize_env().obs_rms.mean)
    assert model.get_vec_normalize_env().obs_rms.count > 40


def test_each_evaluation_has_seeds_of_its_own_and_the_optimal_driver_those_of_the_final_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first_seeds: list[int] = []
    make_evaluation_env = results.make_evaluation_env
    monkeypatch.setattr(
        results,
        "make_evaluation_env",
        lambda manager, first_seed: (first_seeds.append(first_seed), make_evaluation_env(manager, first_seed))[1],
    )
    monkeypatch.setattr(results, "optimal_return", lambda _, first_seed: float(first_seeds.append(first_seed) or 0))
    row = dataclasses.replace(ROWS[CARTPOLE], steps=20, is_relative=True)
    for seed in (0, 3):
        results.train_and_evaluate(Run(CARTPOLE, row, "lecture_dqn", seed))
    assert first_seeds == [6_000_000, 5_000_000, 5_000_000, 6_003_000, 5_003_000, 5_003_000]


def test_no_run_goes_on_from_the_checkpoints_that_the_zoo_was_told_to_make(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CHECKPOINTS, str(tmp_path / "checkpoints"))
    manager, _ = results.make_manager(Run(CARTPOLE, ROWS[CARTPOLE], "lecture_dqn", 0), tmp_path)
    assert not any(isinstance(callback, ResumableCheckpointCallback) for callback in manager.callbacks)
    assert not (tmp_path / "checkpoints").exists()


def test_settings_can_be_read_where_the_zoo_was_not_extended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(ALGOS, "lecture_dqn")
    assert results.settings_in_use(Run(CARTPOLE, ROWS[CARTPOLE], "lecture_dqn", 0))["tau"] == 1.0


def test_returns_are_those_before_normalization() -> None:
    row = dataclasses.replace(ROWS[CARTPOLE], steps=60)
    result = results.train_and_evaluate(Run(CARTPOLE, row, "lecture_dqn", 0, {"normalize": True, "n_envs": 2}))
    assert all(episode_return == int(episode_return) >= 8 for episode_return in result["returns"])


def test_a_run_that_diverges_counts_with_the_policy_that_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    def diverge(model: LectureDQN, gradient_steps: int, batch_size: int = 1) -> None:
        raise DivergenceError("Q has exploded")

    monkeypatch.setattr(LectureDQN, "train", diverge)
    row = dataclasses.replace(ROWS[CARTPOLE], steps=60)
    result = results.train_and_evaluate(Run(CARTPOLE, row, "lecture_dqn", 0, {"learning_starts": 10, "train_freq": 20}))
    assert result["error"] == "Q has exploded"
    assert result["steps"] == 20
    assert len(result["returns"]) == 100


def test_evaluations_do_not_count_as_time_of_training(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(results.time, "perf_counter", lambda: clock[0])

    def evaluate(_: Any) -> list[float]:
        clock[0] += 1000
        return [1.0]

    curve = results.LearningCurve(evaluate, 40, lambda line: None)
    curve.model = cast(Any, None)
    curve._on_training_start()
    for step in range(1, 41):
        clock[0] += 1
        curve.num_timesteps = step
        curve._on_step()
    assert [(steps, seconds) for steps, seconds, _ in curve.points] == [(steps, float(steps)) for steps in range(2, 41, 2)]
    assert curve.training_seconds() == 40


def test_the_optimal_driver_starts_where_the_evaluation_starts() -> None:
    class AlongKerbs:
        """A model that is not learned."""

        def predict(self, observations: np.ndarray, deterministic: bool = False, **_: Any) -> tuple[np.ndarray, None]:
            assert deterministic
            return drive_along_kerbs(observations), None

        def get_env(self) -> None:
            return None

    env_id, first_seed = "RoboParking-v0", 77
    env = make_vec_env(env_id, results.N_EVALUATION_ENVS, seed=first_seed)
    returns = results.greedy_returns(AlongKerbs(), env, results.FINAL_EPISODES)
    single = gymnasium.make(env_id)
    expected = []
    for start in results.final_starts(env_id, first_seed):
        observation, _ = single.reset(options={"state": start})
        is_over, episode_return = False, 0.0
        while not is_over:
            observation, reward, terminated, truncated, _ = single.step(drive_along_kerbs(observation))
            episode_return, is_over = episode_return + float(reward), terminated or truncated
        expected.append(episode_return)
    assert sorted(returns) == pytest.approx(sorted(expected), abs=1e-2)


# --- Breakout -------------------------------------------------------------------------------------------------------------


def test_breakout_trains_both_algorithms_with_one_encoder(tmp_path: Path) -> None:
    row = dataclasses.replace(ROWS["MinAtar-Breakout"], steps=40)
    for algorithm in results.ALGORITHMS:
        run = Run("MinAtar-Breakout", row, algorithm, 0, {"learning_starts": 10})
        _, model = results.make_manager(run, tmp_path)
        encoder = model.policy.q_net.features_extractor
        assert isinstance(encoder, minatar_breakout.Encoder)
        assert [tuple(p.shape) for p in encoder.parameters()] == [(16, 4, 3, 3), (16,)]
        assert encoder.features_dim == 1024
        assert len(results.train_and_evaluate(run)["returns"]) == 100


@pytest.mark.usefixtures("without_minatar")
def test_a_row_without_its_dependency_says_so_in_one_line(tmp_path: Path) -> None:
    run = Run("MinAtar-Breakout", ROWS["MinAtar-Breakout"], "lecture_dqn", 0)
    with pytest.raises(SystemExit, match=rf"^{run}: MinAtar/Breakout-v1 needs MinAtar: pip install MinAtar$"):
        results.carry_out(run, tmp_path)
    assert not list(tmp_path.iterdir())


# --- Tables and pictures --------------------------------------------------------------------------------------------------


def test_a_row_without_results_says_so(tmp_path: Path) -> None:
    cells = row_of_table(tables.tuned_table(tmp_path), CARTPOLE)
    assert cells == [CARTPOLE, "20 000", "not run yet", "not run yet", "≥ 500", "open", "500 at 50 000 steps"]


@pytest.mark.parametrize(("n_seeds", "ours"), [(1, "500.0 (1 of 10 seeds)"), (3, "501.0 [500.0, 502.0] (3 of 10 seeds)")])
def test_a_row_with_missing_seeds_says_how_many_it_has(n_seeds: int, ours: str, tmp_path: Path) -> None:
    write_results(CARTPOLE, n_seeds, tmp_path, ours=500)
    cells = row_of_table(tables.tuned_table(tmp_path), CARTPOLE)
    assert cells[2] == ours
    assert cells[5] == "open"


def test_a_row_without_a_target_is_judged_against_sb3s(tmp_path: Path) -> None:
    name, env = "MinAtar-Breakout", "MinAtar/Breakout-v1"
    for run in results.runs_of(name, ROWS[name], ["lecture_dqn"]):
        results.append_result(made_up_result(run, 5.0 + run.seed), tmp_path)
    assert row_of_table(tables.tuned_table(tmp_path), env)[4:6] == ["above SB3's DQN", "open"]
    for theirs, verdict in ((5.0, "no"), (4.9, "yes")):
        (tmp_path / str(theirs)).mkdir()
        write_results(name, 3, tmp_path / str(theirs), ours=5.0, theirs=theirs)
        assert row_of_table(tables.tuned_table(tmp_path / str(theirs)), env)[5] == verdict


def test_a_minus_sign_is_one_and_zero_has_none() -> None:
    assert [tables.number(value) for value in (-1.26, -0.04, 0.04, 3)] == ["−1.3", "0.0", "0.0", "3.0"]


def test_a_whole_row_is_judged(tmp_path: Path) -> None:
    write_results(CARTPOLE, 10, tmp_path, ours=495.5)  # seeds 495.5 to 504.5
    write_results("Acrobot-v1", 10, tmp_path, ours=-80)
    table = tables.tuned_table(tmp_path)
    assert row_of_table(table, CARTPOLE)[2].startswith("500.0 [49")
    assert row_of_table(table, CARTPOLE)[5] == "yes"
    assert row_of_table(table, "Acrobot-v1")[2].startswith("−75.5 [−")
    assert row_of_table(table, "Acrobot-v1")[5] == "no"


def test_a_target_may_be_a_number_of_seeds_too(tmp_path: Path) -> None:
    write_results("LunarLander-v2", 10, tmp_path, ours=255)
    assert row_of_table(tables.tuned_table(tmp_path), "LunarLander-v2")[5] == "yes, 10 seeds ≥ 200"
    few = {tables.OURS: [{"returns": [199 if seed < 2 else 300]} for seed in range(10)], tables.THEIRS: []}
    assert tables.verdict_cell(ROWS["LunarLander-v2"], few) == "no, 8 seeds ≥ 200"


def test_the_interquartile_mean_forgets_the_best_and_the_worst_seeds() -> None:
    assert tables.estimate_iqm((0, 1, 2, 3, 4, 5, 6, 7, 8, 1e9)).estimate == pytest.approx([4.5])


@pytest.mark.parametrize("n_seeds", [1, 2, 3, 5, 8, 10])
def test_the_interquartile_mean_is_rliables(n_seeds: int) -> None:
    values = np.random.default_rng(n_seeds).normal(size=(n_seeds, 4))
    expected = [metrics.aggregate_iqm(column) for column in values.T]
    assert tables.interquartile_mean(values) == pytest.approx(expected)


def test_the_intervals_are_the_same_each_time_and_draw_from_a_generator_of_their_own() -> None:
    values = np.arange(10.0)[:, None]
    np.random.seed(1)
    first = tables.estimate(values, tables.interquartile_mean, 200)
    after = np.random.random()
    np.random.seed(1)
    assert np.random.random() == after
    assert tables.estimate(values, tables.interquartile_mean, 200) == first
    assert first.low < 4.5 < first.high


def test_roboparking_counts_against_the_optimal_driver() -> None:
    row = ROWS["RoboParking-v0"]
    assert results.score(row, {"returns": [-67.32], "optimal_return": -66.0}) == pytest.approx(-2.0)
    assert results.score(row, {"returns": [-66.0], "optimal_return": -66.0}) == 0


def test_a_run_that_never_lands_counts_with_its_full_time(tmp_path: Path) -> None:
    name = "LunarLander-v2"
    for run in results.runs_of(name, ROWS[name]):
        lands = run.algorithm == "lecture_dqn" and run.seed < 8
        curve = ((5_000, 4.0, 120.0), (10_000, 8.0, 200.0 if lands else 199.9), (15_000, 12.0, 100.0))
        results.append_result(made_up_result(run, curve=curve), tmp_path)
    cells = row_of_table(tables.time_table(tmp_path), name)
    assert cells[2:] == ["8 s (8 of 10 seeds got there)", "50 s (0 of 10 seeds got there)", "0.16"]
    axes = figures.draw_time_to_solve(name, tables.read_row(name, tmp_path)).axes[0]
    plt.close("all")
    shares = {str(line.get_label()).partition(",")[0]: list(zip(*line.get_data(), strict=True)) for line in axes.lines}
    assert shares["LectureDQN"] == [(0, 0), *((8, n / 10) for n in range(1, 9)), (50, 0.8)]
    assert shares["SB3's DQN"] == [(0, 0), (50, 0)]


def test_a_run_that_diverged_early_does_not_count_as_a_quick_one(tmp_path: Path) -> None:
    name = "LunarLander-v2"
    for run in results.runs_of(name, ROWS[name]):
        diverged = {"training_seconds": 2.0, "error": "Q has exploded"} if run.algorithm == "lecture_dqn" else {}
        results.append_result({**made_up_result(run, curve=((5_000, 4.0, 230.0),)), **diverged, "curve": []}, tmp_path)
    cells = row_of_table(tables.time_table(tmp_path), name)
    assert cells[2:] == ["never (0 of 10 seeds got there)", "50 s (0 of 10 seeds got there)", ""]
    labels = figures.draw_time_to_solve(name, tables.read_row(name, tmp_path)).axes[0].get_legend_handles_labels()[1]
    plt.close("all")
    assert labels == ["LectureDQN, median never", "SB3's DQN, median 50 s"]


def test_the_curve_of_a_diverged_run_goes_on_with_its_last_value(tmp_path: Path) -> None:
    """Of ours one seed of three diverges at the second evaluation, of SB3's all do before the first."""
    name = "Acrobot-v1"
    steps = [2_500 * (i + 1) for i in range(results.N_EVALUATIONS)]
    for run in results.runs_of(name, ROWS[name], seeds=range(3)):
        n_points = 0 if run.algorithm == "dqn" else (20, 1, 20)[run.seed]
        curve = tuple((step, 1.0, -90.0 + 30 * run.seed) for step in steps[:n_points])
        error = {} if n_points == 20 else {"error": "Q has exploded"}
        results.append_result({**made_up_result(run, -500.0, curve), **error}, tmp_path)
    axes = figures.draw_learning_curves(figures.read_rows(tmp_path)).axes[0]
    plt.close("all")
    lines = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}
    assert lines == {"LectureDQN": (steps, [-60.0] * 20), "SB3's DQN": (steps, [-500.0] * 20)}


def test_a_diverged_run_is_listed(tmp_path: Path) -> None:
    run = results.runs_of(CARTPOLE, ROWS[CARTPOLE])[0]
    results.append_result({**made_up_result(run), "error": "Q has exploded"}, tmp_path)
    assert tables.diverged_list(tmp_path) == "- CartPole-v1, `LectureDQN`, seed 0: Q has exploded"


def test_further_seeds_are_a_table_of_their_own(tmp_path: Path) -> None:
    assert tables.further_table(tmp_path) == "Not run yet."
    write_results(CARTPOLE, 2, tmp_path, ours=500.0)
    before = tables.tuned_table(tmp_path)
    for run in results.runs_of(CARTPOLE, ROWS[CARTPOLE], ["lecture_dqn"], [119, 100, 101, 120]):
        results.append_result(made_up_result(run, run.seed - 110.0), tmp_path)
    cells = row_of_table(tables.further_table(tmp_path), CARTPOLE)
    assert cells[1:3] == ["20 000", "3"]
    assert cells[3].startswith("−3.3 [")
    assert cells[4] == "−10.0, −9.0, 9.0"
    assert tables.tuned_table(tmp_path) == before


def test_pictures_are_drawn_of_the_rows_that_have_results(tmp_path: Path) -> None:
    name = "LunarLander-v2"
    assert figures.draw_all(figures.read_rows(tmp_path)) == {}
    write_results("Acrobot-v1", 1, tmp_path)  # too few
    for run in results.runs_of(CARTPOLE, ROWS[CARTPOLE], ["lecture_dqn"], range(3)):  # nothing to compare with
        results.append_result(made_up_result(run), tmp_path)
    for run in results.runs_of(name, ROWS[name], seeds=range(3)):
        points = tuple((5_000 * (i + 1), 4.0 * i, 10.0 * i * run.seed) for i in range(results.N_EVALUATIONS))
        results.append_result(made_up_result(run, 200.0 + run.seed, points), tmp_path)
    pictures = figures.draw_all(figures.read_rows(tmp_path))
    assert list(pictures) == list(tables.PICTURES)
    curves = pictures["learning_curves"]
    assert [axes.get_title() for axes in curves.axes if axes.get_visible()] == ["LunarLander-v2\n100 000 steps"]
    lines = {line.get_label(): line.get_ydata() for line in curves.axes[0].lines}
    assert lines["LectureDQN"] == pytest.approx(range(0, 200, 10))  # of the middle seed
    plt.close("all")


def test_each_row_of_a_picture_is_beside_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "N_RESAMPLES_OF_PAIRS", 10)
    write_results("Acrobot-v1", 3, tmp_path, ours=10.0)
    write_results("MountainCar-v0", 3, tmp_path, theirs=10.0)
    rows = figures.read_rows(tmp_path)
    better = figures.draw_probability_of_improvement(rows).axes[0]
    names = {tick.get_text().partition(",")[0]: height for height, tick in enumerate(better.get_yticklabels())}
    probabilities = {float(np.mean(line.get_ydata())): float(line.get_xdata()[0]) for line in better.lines[:2]}  # type: ignore[arg-type, index]
    assert {name: probabilities[height] for name, height in names.items()} == {"Acrobot-v1": 1, "MountainCar-v0": 0}
    scores = figures.draw_iqm(rows).axes[0]
    bars = {bar.get_label(): (bar.patches[0].get_x(), round(bar.patches[0].get_y())) for bar in scores.containers}
    assert bars == {"LectureDQN": (10.0, 1), "SB3's DQN": (0.0, 0)}
    plt.close("all")


def test_pictures_are_written_with_a_hash_of_the_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_results("Acrobot-v1", 3, tmp_path / "results")
    arguments = ["--folder", str(tmp_path / "results"), "--output", str(tmp_path / "pictures")]
    monkeypatch.setattr(sys, "argv", ["figures.py", *arguments])
    figures.main()
    plt.close("all")
    before = figures.read_rows(tmp_path / "results")
    with Image.open(tmp_path / "pictures" / "iqm.png") as picture:
        assert picture.info["Source"] == figures.digest_of(before)
    write_results("Acrobot-v1", 4, tmp_path / "results")
    assert figures.digest_of(figures.read_rows(tmp_path / "results")) != figures.digest_of(before)


@pytest.mark.parametrize("program", [figures, tables])
def test_a_folder_without_results_is_refused(
    program: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = results.runs_of(CARTPOLE, ROWS[CARTPOLE], params={"gamma": 0.9})[0]
    results.append_result(made_up_result(run), tmp_path)  # of an experiment, not of the row
    monkeypatch.setattr(sys, "argv", ["program", "--folder", str(tmp_path)])
    with pytest.raises(SystemExit, match="2"):
        program.main()
    last_line = capsys.readouterr().err.splitlines()[-1]
    assert "error: --folder must hold " in last_line
    assert last_line.endswith((f"as they are, got {tmp_path}", f"as it is, got {tmp_path}"))


def test_the_tables_of_another_folder_are_printed_and_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_results(CARTPOLE, 3, tmp_path, ours=400)
    monkeypatch.setattr(tables, "FILES", [tmp_path / "untouched.md"])
    monkeypatch.setattr(sys, "argv", ["tables.py", "--folder", str(tmp_path)])
    tables.main()
    output = capsys.readouterr().out
    assert row_of_table(output, CARTPOLE)[2].startswith("401.0 [400.0, 402.0]")
    assert "images/" not in output
    assert not (tmp_path / "untouched.md").exists()


def test_the_tables_are_written_into_their_places_and_all_else_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "results.md"
    marked = "<!-- results:versions -->{}<!-- /results:versions -->"
    file.write_text(f"# ε\n{marked.format('old')}\nbetween\n{marked.format('')}\nend\n")
    monkeypatch.setattr(tables, "FILES", [file])
    monkeypatch.setattr(tables, "REPOSITORY", tmp_path)
    monkeypatch.setattr(sys, "argv", ["tables.py"])
    for _ in range(2):  # once more changes nothing
        tables.main()
        table = f"\n\n{tables.versions_table(results.FOLDER)}\n\n"
        assert file.read_text() == f"# ε\n{marked.format(table)}\nbetween\n{marked.format(table)}\nend\n"


def test_help_writes_no_tables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tables, "FILES", [tmp_path / "missing.md"])
    monkeypatch.setattr(sys, "argv", ["tables.py", "--help"])
    with pytest.raises(SystemExit, match="0"):
        tables.main()


def test_a_row_of_defaults_sets_nothing() -> None:
    rows = {name: row for name, row in ROWS.items() if row.settings == "defaults"}
    entries = [results.read_entry(run) for name, row in rows.items() for run in results.runs_of(name, row)]
    assert len(entries) == 60
    assert all(entry == {"policy": "MlpPolicy", "n_timesteps": entry["n_timesteps"]} for entry in entries)
