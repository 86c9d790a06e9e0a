"""Every example of a claim of the lecture is short, imports, stands in the gallery; the quickest one is run."""

import ast
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from sb3_lecture_dqn import LectureDQN

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
    LectureDQN("MlpPolicy", "CartPole-v1", policy_kwargs={"net_arch": [4]}).save(run_folder / "CartPole-v1.zip")
    (run_folder / "CartPole-v1").mkdir()
    (run_folder / "CartPole-v1" / "config.yml").write_text(yaml.dump({"env_wrapper": wrapper}))
    (run_folder / "CartPole-v1" / "args.yml").write_text(yaml.dump({"env_kwargs": env_kwargs}))
    script, *arguments = example.split()
    command = [sys.executable, str(REPOSITORY / "examples" / script), "--env", "CartPole-v1", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert shown in result.stdout


def test_the_quickest_example_runs_and_draws(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, str(REPOSITORY / "examples" / "one_forward_pass.py"), str(tmp_path)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "|A| = 100: one forward pass takes" in result.stdout
    assert (tmp_path / "one_forward_pass.png").exists()
