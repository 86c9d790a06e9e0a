"""Every example of a claim of the lecture is short, imports, stands in the gallery; the quickest one is run."""

import ast
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

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
        # five steps, the picture before them, and eight at rest
        (
            "film.py --every 1 --width 60 --gif film.gif",
            {"gymnasium.wrappers.TimeLimit": {"max_episode_steps": 5}},
            None,
            "wrote film.gif, 14 frames",
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
    script, *arguments = command.split()
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(REPOSITORY / "examples"))
    monkeypatch.setattr("sys.argv", [script, *arguments])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(REPOSITORY / "examples" / script), run_name="__main__")
    assert end.value.code == 2
    assert f"{script}: error: {message}" in capsys.readouterr().err.splitlines()[-1]


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
