"""Every example of a claim of the lecture is short, imports, stands in the gallery; the quickest one is run."""

import ast
import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch as th
import yaml
from matplotlib.figure import Figure

from sb3_lecture_dqn import LectureDQN
from sb3_lecture_dqn.envs.robo_parking_drivers import find_optimal_drive

REPOSITORY = Path(__file__).parents[1]
EXAMPLES = [
    REPOSITORY / "examples" / f"{name}.py"
    for name in (
        "correlated_batches",
        "done_mask",
        "drop_in",
        "exploding_q",
        "exploration",
        "lecture_loop",
        "one_forward_pass",
        "perturbed_table",
        "small_final_layer",
    )
]
# A script without a main function trains when it is imported; for it, that its code compiles has to do.
SCRIPTS = {"drop_in"}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_has_fewer_than_150_lines(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) < 150


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_says_what_it_shows_and_how_it_is_run(path: Path) -> None:
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert docstring is not None
    assert f"python examples/{path.name}" in docstring


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_imports_what_there_is(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(path.parent))
    monkeypatch.setattr("sys.argv", [str(path)])
    if path.stem in SCRIPTS:
        compile(path.read_text(encoding="utf-8"), str(path), "exec")
    else:
        assert callable(runpy.run_path(str(path), run_name="example")["main"])


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_explains_its_arguments_and_refuses_others_before_it_trains(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(path.parent))
    for argument, status in (("--help", 0), ("pictures", 2)):
        monkeypatch.setattr("sys.argv", [str(path), argument])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(path), run_name="__main__")
        assert end.value.code == status
    output = capsys.readouterr()
    assert f"python examples/{path.name}" in output.out
    assert "unrecognized arguments: pictures" in output.err


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_and_its_picture_stand_in_the_gallery(path: Path) -> None:
    gallery = (REPOSITORY / "docs" / "lecture.md").read_text(encoding="utf-8")
    assert f"examples/{path.name}" in gallery
    assert f"images/{path.stem}.png" in gallery


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_a_picture_is_committed_at_a_sensible_size(path: Path) -> None:
    picture = REPOSITORY / "docs" / "images" / f"{path.stem}.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size < 200_000


@pytest.mark.parametrize(
    ("example", "wrapper", "env_kwargs", "shown"),
    [
        # no reward but for the end of an episode
        ("evaluate.py --episodes 3", None, {"sutton_barto_reward": True}, "mean return -1.0 ± 0.0"),
        # every third of five steps, the picture before them, and eight at rest
        (
            "film.py --every 3 --width 60 --gif film.gif",
            {"gymnasium.wrappers.TimeLimit": {"max_episode_steps": 5}},
            None,
            "wrote film.gif, 5 frames",
        ),
    ],
)
def test_a_model_plays_in_the_environment_that_it_was_trained_in(
    example: str, wrapper: Any, env_kwargs: Any, shown: str, tmp_path: Path
) -> None:
    run_folder = tmp_path / "logs" / "lecture_dqn" / "CartPole-v1_1"
    LectureDQN("MlpPolicy", "CartPole-v1", policy_kwargs={"net_arch": [4]}, seed=0).save(run_folder / "CartPole-v1.zip")
    (run_folder / "CartPole-v1").mkdir()
    (run_folder / "CartPole-v1" / "config.yml").write_text(yaml.dump({"env_wrapper": wrapper}))
    (run_folder / "CartPole-v1" / "args.yml").write_text(yaml.dump({"env_kwargs": env_kwargs}))
    script, *arguments = example.split()
    command = [sys.executable, str(REPOSITORY / "examples" / script), "--env", "CartPole-v1", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert shown in result.stdout


NOT_A_PLACE = str(REPOSITORY / "README.md" / "pictures")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("evaluate.py --episodes 0", "argument --episodes: must be an integer of at least 1, got 0"),
        ("evaluate.py --seed -1", "argument --seed: must be an integer of at least 0, got -1"),
        ("evaluate.py --env Acrobot-v1", "no finished training of Acrobot-v1 in logs: train first, python -m rl_zoo3.train"),
        ("film.py --env Acrobot-v1", "no finished training of Acrobot-v1 in logs: train first, python -m rl_zoo3.train"),
        ("film.py --every 0", "argument --every: must be an integer of at least 1, got 0"),
        ("film.py --width 0", "argument --width: must be an integer of at least 1, got 0"),
        ("film.py --width wide", "argument --width: must be an integer of at least 1, got wide"),
        ("film.py --folder unfinished --env Acrobot-v1", "no finished training of Acrobot-v1 in unfinished: train first"),
        ("film.py --gif folder.gif", "argument --gif: must be a file that ends in .gif, got folder.gif"),
        ("film.py --gif film.mp4", "argument --gif: must be a file that ends in .gif, got film.mp4"),
        (f"film.py --gif {NOT_A_PLACE}/a.gif", "argument --gif: must be in a folder that can be made, got"),
        ("robo_parking.py --starts 0", "argument --starts: must be an integer of at least 1, got 0"),
        ("robo_parking.py --model nofile.zip", "--model must be a file, got nofile.zip: No such file or directory"),
        (f"robo_parking.py --model {REPOSITORY / 'README.md'}", "--model must be a file of LectureDQN.save, got"),
        ("robo_parking.py --model cartpole.zip", "--model must be trained on RoboParking-v0, got cartpole.zip"),
        (f"one_forward_pass.py --folder {NOT_A_PLACE}", "--folder must be a folder, or a place for one, got"),
    ],
)
def test_an_argument_that_cannot_work_is_refused_in_one_line(
    command: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    LectureDQN("MlpPolicy", "CartPole-v1", policy_kwargs={"net_arch": [4]}).save(tmp_path / "cartpole.zip")
    (tmp_path / "folder.gif").mkdir()
    (tmp_path / "unfinished" / "lecture_dqn" / "Acrobot-v1_1").mkdir(parents=True)
    script, *arguments = command.split()
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(REPOSITORY / "examples"))
    monkeypatch.setattr("sys.argv", [script, *arguments])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(REPOSITORY / "examples" / script), run_name="__main__")
    assert end.value.code == 2
    assert f"{script}: error: {message}" in capsys.readouterr().err.splitlines()[-1]


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], dict[str, Any]]:
    """What an example defines, by its name."""
    monkeypatch.syspath_prepend(str(REPOSITORY / "examples"))
    monkeypatch.setattr("sys.argv", ["example"])
    return lambda name: runpy.run_path(str(REPOSITORY / "examples" / f"{name}.py"), run_name="example")


class AlwaysRight:
    """A model that does not learn."""

    gamma = 0.5

    def predict(self, _: Any, deterministic: bool) -> tuple[np.ndarray, None]:
        assert deterministic
        return np.array(1), None


def test_the_latest_transitions_are_the_newest_in_their_order(example: Any) -> None:
    size = gymnasium.spaces.Box(0, 200, (1,), np.float32)
    buffer = example("correlated_batches")["LatestTransitions"](100, size, gymnasium.spaces.Discrete(2), device="cpu")
    for number in range(90):
        buffer.add(np.full((1, 1), number), np.full((1, 1), number + 1), np.zeros((1, 1)), np.zeros(1), np.zeros(1), [{}])
    assert buffer.sample(128).observations.flatten().tolist() == [*range(26, 90), *range(26, 90)]


def test_the_corridors_true_values_are_what_it_pays(example: Any) -> None:
    done_mask = example("done_mask")
    env, expected = done_mask["Corridor"](), []
    for state in range(done_mask["LENGTH"]):
        env.reset()
        env.state, value, weight, is_over = state, 0.0, 1.0, False
        while not is_over:
            _, reward, is_over, _, _ = env.step(0)
            value, weight = value + weight * reward, weight * done_mask["GAMMA"]
        expected.append(value)
    assert done_mask["TRUE_VALUES"] == pytest.approx(expected)


def test_what_a_policy_collects_is_discounted_from_the_first_reward_on(example: Any) -> None:
    env = gymnasium.make("CartPole-v1")
    env.reset(seed=1000)
    n_steps, is_over = 0, False
    while not is_over:
        is_over, n_steps = env.step(1)[2], n_steps + 1
    expected = sum(0.5**step for step in range(n_steps))
    assert example("exploding_q")["discounted_return"](AlwaysRight(), 1) == pytest.approx(expected, rel=1e-9)


def test_the_chain_pays_for_a_step_to_the_right_and_takes_it_back(example: Any) -> None:
    chain = example("exploration")["Chain"](True)
    chain.reset()
    assert [round(chain.step(action)[1], 9) for action in (0, 1, 1, 0)] == [0.0, 0.1, 0.1, -0.1]
    chain.reset()
    steps = [chain.step(1) for _ in range(20)]
    assert [step[1] for step in steps[18:]] == [pytest.approx(0.1), 1.0]
    assert [step[2] for step in steps] == [False] * 19 + [True]
    assert chain.first_goal == 24


def test_an_episode_does_not_go_on_behind_frozen_lakes_ends(example: Any) -> None:
    going_on, rewards = example("small_final_layer")["tables"]()
    assert set(np.flatnonzero(going_on.sum(axis=(1, 2)) == 0)) == {5, 7, 11, 12, 15}
    assert rewards[14, 2] == pytest.approx(1 / 3)
    assert going_on[14, 2].sum() == pytest.approx(2 / 3)


def test_the_loops_psi_stays_as_it_is_while_theta_is_trained(example: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run = example("lecture_loop")["run"]
    moved: list[float] = []

    def train(_: Any, theta: dict[str, th.Tensor], psi: dict[str, th.Tensor], *__: Any) -> dict[str, th.Tensor]:
        first_theta, first_psi = next(iter(theta.values())), next(iter(psi.values()))
        before = first_psi.detach().clone()
        with th.no_grad():
            first_theta += 1
        moved.append((first_theta - before).min().item())
        assert th.equal(first_psi, before)
        return theta

    monkeypatch.setitem(run.__globals__, "train", train)
    monkeypatch.setitem(run.__globals__, "NUM_UPDATES", 3)
    run(0)
    assert moved == pytest.approx([1, 1, 1], abs=1e-6)


def test_the_last_picture_of_an_episode_stays(example: Any) -> None:
    env: Any = gymnasium.Env()
    numbers = iter(range(10))
    env.render = lambda: next(numbers)
    steps = iter([False, False, True])
    env.step = lambda _: (None, 0.0, next(steps), False, {})
    assert example("film")["play"](AlwaysRight(), env, None) == [0, 1, 2, 3, *[3] * 8]


@pytest.mark.parametrize(("name", "value"), [("frame_stack", 4), ("normalize", True)])
def test_what_a_film_cannot_have_is_named(name: str, value: Any, example: Any, tmp_path: Path) -> None:
    (tmp_path / "config.yml").write_text(yaml.dump({name: value}))
    (tmp_path / "args.yml").write_text(yaml.dump({"env_kwargs": None}))
    with pytest.raises(SystemExit, match=f"^error: --env must be of an entry without {name}, got CartPole-v1"):
        example("film")["make_env"]("CartPole-v1", tmp_path)


def test_several_seeds_are_drawn_as_their_median_and_their_range(example: Any) -> None:
    figure = Figure()
    curves = [[1.0, 5.0], [2.0, 6.0], [9.0, 16.0]]
    line = example("_plots")["plot_band"](figure.subplots(), [0, 1], curves, "seeds", "black")
    assert line.get_ydata().tolist() == [2, 6]
    (band,) = figure.axes[0].collections
    assert {tuple(point) for point in band.get_paths()[0].vertices} == {(0, 1), (0, 9), (1, 5), (1, 16)}


def test_the_table_says_how_far_a_driver_is_below_the_optimum(example: Any, capsys: pytest.CaptureFixture[str]) -> None:
    example("robo_parking")["print_table"]({}, 2)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[0] for row in rows] == ["optimal", "scripted"]
    assert rows[0][2:] == ["0.0%", "100.0%"]
    assert float(rows[1][2].removesuffix("%")) > 0


def test_the_optimal_driver_parks_every_robot_with_the_return_that_the_search_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(REPOSITORY / "examples"))
    example = runpy.run_path(str(REPOSITORY / "examples" / "robo_parking.py"), run_name="example")
    starts = np.array([[3.6, 2.4, 0.0, 0.0], [0.3, 0.2, 0.0, 0.0]])
    returns, is_parked = example["drive"](example["optimal_driver"](starts), starts)
    assert is_parked.all()
    assert returns == pytest.approx([find_optimal_drive(start).episode_return for start in starts])


def test_the_quickest_example_runs_and_draws(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, str(REPOSITORY / "examples" / "one_forward_pass.py"), "--folder", str(tmp_path)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "|A| = 100: one forward pass takes" in result.stdout
    assert (tmp_path / "one_forward_pass.png").exists()
