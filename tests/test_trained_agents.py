"""The agents in rl-trained-agents: that the zoo's enjoy plays them, and what is in their folders."""

import base64
import os
import re
import shutil
import sys
import zipfile
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import trained_agent
from hatchling.builders.wheel import WheelBuilder
from results import ROWS, read_results

from sb3_lecture_dqn import LectureDQN
from sb3_lecture_dqn.zoo import CHECKPOINTS

AGENTS = sorted((trained_agent.AGENTS / "lecture_dqn").glob("*_1"))
RETURN = re.compile(r"\| return \| \*\*-?\d+\.\d\d ± \d+\.\d\d\*\* \(mean ± standard deviation, 100 greedy episodes")


@pytest.fixture(scope="module")
def made_agent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An agent of a tiny budget, by the command that makes the others."""
    return trained_agent.make_agent("CartPole-v1", 3, 1_200, tmp_path_factory.mktemp("agents"))


def check_agent(folder: Path) -> None:
    """What holds for each agent's folder."""
    env_id = folder.name.removesuffix("_1")
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    needed = {"README.md", f"{env_id}.zip", f"{env_id}/args.yml", f"{env_id}/config.yml"}
    assert needed <= names <= needed | {f"{env_id}/vecnormalize.pkl"}
    assert (folder / f"{env_id}.zip").stat().st_size <= 1_000_000

    card = (folder / "README.md").read_text(encoding="utf-8")
    assert RETURN.search(card)
    assert f"-m rl_zoo3.train --algo lecture_dqn --env {env_id} --seed" in card
    model = LectureDQN.load(folder / f"{env_id}.zip", device="cpu")
    observation, _ = gymnasium.make(env_id).reset(seed=0)
    assert model.action_space.contains(int(model.predict(observation, deterministic=True)[0]))
    steps = re.search(r"\| environment steps \| ([\d ]+) \|", card)
    assert steps is not None
    assert model.num_timesteps >= int(steps[1].replace(" ", ""))


def test_an_agent_has_what_playing_needs_and_a_card(made_agent: Path) -> None:
    check_agent(made_agent)
    assert "| environment steps | 1 200 |" in (made_agent / "README.md").read_text(encoding="utf-8")


def test_an_agent_stays_when_its_successor_comes_to_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "lecture_dqn" / "CartPole-v1_1"
    folder.mkdir(parents=True)
    (folder / "README.md").write_text("the one before")
    monkeypatch.setattr(trained_agent, "train", lambda *_: [])  # writes no model
    with pytest.raises(FileNotFoundError):
        trained_agent.make_agent("CartPole-v1", 3, 1_200, tmp_path)
    assert (folder / "README.md").read_text() == "the one before"
    assert list(folder.parent.iterdir()) == [folder]


def test_an_agent_takes_the_place_of_the_one_before(made_agent: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def train_again(_: str, __: int, ___: int, folder: Path) -> list[str]:
        log_folder = folder / "logs" / "lecture_dqn" / "CartPole-v1_1"
        shutil.copytree(made_agent, log_folder)
        return ["another", "command"]

    before = (made_agent / "README.md").read_text(encoding="utf-8")
    (made_agent / "old").touch()
    monkeypatch.setattr(trained_agent, "train", train_again)
    trained_agent.make_agent("CartPole-v1", 3, 1_200, made_agent.parents[1])
    card = made_agent / "README.md"
    assert "| command | `another command` |" in card.read_text(encoding="utf-8")
    card.write_text(before, encoding="utf-8")
    check_agent(made_agent)
    assert list(made_agent.parent.iterdir()) == [made_agent]


def test_an_agents_training_does_not_go_on_from_the_checkpoints_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environments: list[dict[str, str]] = []
    monkeypatch.setattr(trained_agent.subprocess, "run", lambda *_, env, **__: environments.append(env))
    monkeypatch.setenv(CHECKPOINTS, str(tmp_path))
    trained_agent.train("CartPole-v1", 0, None, tmp_path)
    assert [CHECKPOINTS in environment for environment in environments] == [False]


def test_an_agent_of_an_environment_with_a_slash_in_its_name_is_where_enjoy_finds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rl_zoo3.utils import EnvironmentName, get_model_path

    monkeypatch.setattr(trained_agent, "MAX_BYTES", 10_000_000)
    monkeypatch.setattr(trained_agent, "FINAL_EPISODES", 10)
    folder = trained_agent.make_agent("MinAtar/Breakout-v1", 3, 100, tmp_path)
    env_name = EnvironmentName("MinAtar/Breakout-v1")
    assert get_model_path(0, str(tmp_path), "lecture_dqn", env_name)[1] == str(folder / "MinAtar-Breakout-v1.zip")
    assert "--env MinAtar/Breakout-v1 -f rl-trained-agents" in (folder / "README.md").read_text(encoding="utf-8")


def test_an_agent_says_nothing_about_the_machine_it_was_made_on(made_agent: Path) -> None:
    contents = [path.read_bytes() for path in made_agent.rglob("*") if path.suffix in (".yml", ".md")]
    with zipfile.ZipFile(made_agent / "CartPole-v1.zip") as archive:
        data = archive.read("data")
    contents += [data, *(base64.b64decode(pickled) for pickled in re.findall(rb'":serialized:": "([^"]+)"', data))]
    assert len(contents) > 5
    for secret in (sys.prefix, str(Path.home()), str(Path.cwd()), str(made_agent.parent), os.path.realpath(sys.base_prefix)):
        assert all(secret.encode() not in content for content in contents), secret


def test_enjoy_plays_an_agent(made_agent: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from rl_zoo3.enjoy import enjoy

    monkeypatch.chdir(made_agent.parents[2])
    arguments = ["--algo", "lecture_dqn", "--env", "CartPole-v1", "-f", made_agent.parents[1].name, "--no-render", "-n", "600"]
    monkeypatch.setattr(sys, "argv", ["enjoy", *arguments])
    enjoy()
    assert "Mean reward:" in capsys.readouterr().out


def test_training_goes_on_from_an_agent(made_agent: Path) -> None:
    env = gymnasium.make("CartPole-v1")
    model = LectureDQN.load(made_agent / "CartPole-v1.zip", env=env, learning_starts=0, train_freq=4)
    before = model._n_updates
    model.learn(40, reset_num_timesteps=False)
    assert model._n_updates > before


@pytest.mark.parametrize("folder", AGENTS, ids=lambda folder: folder.name)
def test_a_committed_agent_loads_is_small_and_has_a_card(folder: Path) -> None:
    check_agent(folder)


@pytest.mark.parametrize("env_id", ["Acrobot-v1", "CartPole-v1", "LunarLander-v2", "MountainCar-v0"])
def test_an_agents_card_says_what_the_table_says_of_its_seed(env_id: str) -> None:
    """RoboParking's agent was trained for more steps than the row."""
    card = (trained_agent.AGENTS / "lecture_dqn" / f"{env_id}_1" / "README.md").read_text(encoding="utf-8")
    found = re.search(r"\| seed \| (\d+) \|\n\| return \| \*\*(\S+) ± (\S+)\*\*", card)
    assert found is not None
    run = ("lecture_dqn", int(found[1]))
    (returns,) = [result["returns"] for result in read_results(env_id) if (result["algorithm"], result["seed"]) == run]
    assert (found[2], found[3]) == (f"{np.mean(returns):.2f}", f"{np.std(returns):.2f}")


@pytest.mark.parametrize(
    ("env_id", "place"),
    [
        ("Acrobot-v1", "the best"),
        ("CartPole-v1", "one of the 8 best"),
        ("LunarLander-v2", "the best"),
        ("MountainCar-v0", "the best"),
    ],
)
def test_the_card_of_an_agent_that_is_the_best_of_its_row_says_so(env_id: str, place: str) -> None:
    card = (trained_agent.AGENTS / "lecture_dqn" / f"{env_id}_1" / "README.md").read_text(encoding="utf-8")
    seed = re.search(r"\| seed \| (\d+) \|", card)
    assert seed is not None
    sentence = trained_agent.place_in_the_table(env_id, int(seed[1]), ROWS[env_id].steps)
    assert sentence == f"; {place} of the table's 10 seeds on these very episodes"
    assert sentence in card
    assert trained_agent.place_in_the_table(env_id, 0, ROWS[env_id].steps) == ""


def test_every_agent_that_the_readme_plays_is_there() -> None:
    readme = (trained_agent.AGENTS.parent / "README.md").read_text(encoding="utf-8")
    played = re.findall(r"--env (\S+) -f rl-trained-agents", readme)
    assert played
    assert {f"{env_id}_1" for env_id in played} <= {folder.name for folder in AGENTS}


def test_the_wheel_holds_the_package_and_no_agents() -> None:
    files = {file.relative_path for file in WheelBuilder(str(trained_agent.AGENTS.parent)).recurse_included_files()}
    assert {Path(file).parts[0] for file in files} == {"sb3_lecture_dqn", "hyperparams"}
