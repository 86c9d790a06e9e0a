"""
Train an agent by the zoo's own command, and put it where ``rl_zoo3.enjoy -f rl-trained-agents`` finds it, with a model card.

::

    python benchmarks/trained_agent.py --env CartPole-v1 --seed 0
    python benchmarks/trained_agent.py --env LunarLander-v2 --seed 0 --steps 500000 --folder my_agents
    python -m rl_zoo3.enjoy --algo lecture_dqn --env CartPole-v1 -f rl-trained-agents

The final model is kept, not the best checkpoint, without replay buffer and without the state of its optimizer; and it is
evaluated on the episodes of the tables, on seeds that no training has used. An agent that is there already is replaced when
the new one has its card.
"""

import argparse
import datetime
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch as th
import yaml
from results import (
    FINAL_EPISODES,
    FIRST_FINAL_SEED,
    N_EVALUATION_ENVS,
    PACKAGES,
    ROWS,
    SEEDS_OF_EACH,
    greedy_returns,
    optimal_return,
    results_of,
    runs_of,
)
from rl_zoo3.utils import EnvironmentName, create_test_env, get_saved_hyperparams
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_lecture_dqn import LectureDQN
from sb3_lecture_dqn.zoo import CHECKPOINTS

AGENTS = Path(__file__).parents[1] / "rl-trained-agents"
MAX_BYTES = 1_000_000

CARD = """\
# {env}, trained with LectureDQN

| | |
|---|---|
| environment | `{env}` |
| algorithm | [`LectureDQN`](../../../README.md): the Deep Q Network of a Cambridge lecture |
| command | `{command}` |
| environment steps | {steps} |
| seed | {seed} |
| return | **{mean:.2f} ± {std:.2f}** \
(mean ± standard deviation, {episodes} greedy episodes on seeds that no training has used){reference} |
| which model | the final one, not the best checkpoint |
| versions | {versions} |
| trained on | {date} |
| licence | MIT |

Watch it, in a clone of this repository:

```sh
python -m rl_zoo3.enjoy --algo lecture_dqn --env {env} -f rl-trained-agents
```

The file holds both networks and neither the replay buffer nor the state of the optimizer: training can go on from it, with
Adam's averages starting from 0. As every model of SB3 it holds pickles; load only files that you trust. The figures come from
`python benchmarks/trained_agent.py`.
"""


def train(env_id: str, seed: int, steps: int | None, folder: Path) -> list[str]:
    """
    Run the zoo's command.

    :param env_id: Environment id
    :param seed: Seed
    :param steps: Environment steps; ``None`` for the hyperparameter entry's
    :param folder: The working folder, in which the zoo makes ``logs``
    :return: The command, as a user would type it
    """
    arguments = ["-m", "rl_zoo3.train", "--algo", "lecture_dqn", "--env", env_id, "--seed", str(seed), "--eval-freq", "-1"]
    arguments += [] if steps is None else ["-n", str(steps)]
    environment = {name: value for name, value in os.environ.items() if name != CHECKPOINTS}  # the run is no other one's rest
    subprocess.run([sys.executable, *arguments], cwd=folder, check=True, env={**environment, "OMP_NUM_THREADS": "1"})
    return ["python", *arguments]


def publish(env_id: str, log_folder: Path, target: Path) -> LectureDQN:
    """
    Copy what playing needs from the zoo's log folder, and nothing else.

    :param env_id: Environment id
    :param log_folder: What the zoo's command has written, ``logs/lecture_dqn/<env name>_1``
    :param target: The new folder of the agent
    :return: The model
    :raises ValueError: if the model's file is too large
    """
    env_name = EnvironmentName(env_id)
    (target / env_name).mkdir(parents=True)
    for name in ("config.yml", "args.yml", "vecnormalize.pkl"):
        source = log_folder / env_name / name
        if source.exists():
            shutil.copyfile(source, target / env_name / name)
    model = LectureDQN.load(log_folder / f"{env_name}.zip", device="cpu")
    model.policy.optimizer.state.clear()
    file = target / f"{env_name}.zip"
    model.save(file)
    if file.stat().st_size > MAX_BYTES:
        raise ValueError(f"{file} must have at most {MAX_BYTES} bytes, got {file.stat().st_size}")
    return model


def evaluate(model: LectureDQN, env_id: str, folder: Path, seed: int) -> list[float]:
    """The returns of greedy episodes in the environment that the zoo's enjoy makes of an agent's folder."""
    hyperparams, stats_path = get_saved_hyperparams(str(folder / EnvironmentName(env_id)), test_mode=True)
    env = create_test_env(
        env_id,
        n_envs=N_EVALUATION_ENVS,
        stats_path=stats_path,
        seed=FIRST_FINAL_SEED + SEEDS_OF_EACH * seed,
        should_render=False,
        hyperparams=hyperparams,
        vec_env_cls=DummyVecEnv,
    )
    returns = greedy_returns(model, env, FINAL_EPISODES)
    env.close()
    return returns


def place_in_the_table(env_id: str, seed: int, steps: int) -> str:
    """What a card says of a figure that is the best of many: the tables' runs had the same episodes."""
    name = next((name for name, row in ROWS.items() if (row.env, row.steps, row.settings) == (env_id, steps, "zoo")), None)
    if name is None:
        return ""
    means = {result["seed"]: np.mean(result["returns"]) for result in results_of(runs_of(name, ROWS[name], ["lecture_dqn"]))}
    best = max(means.values(), default=0)
    if means.get(seed) != best:
        return ""
    n_best = list(means.values()).count(best)
    place = "the best" if n_best == 1 else f"one of the {n_best} best"
    return f"; {place} of the table's {len(means)} seeds on these very episodes"


def make_card(env_id: str, command: list[str], seed: int, steps: int, returns: list[float]) -> str:
    """The model card."""
    reference = place_in_the_table(env_id, seed, steps)
    if env_id == "RoboParking-v0":
        optimum = optimal_return(env_id, FIRST_FINAL_SEED + SEEDS_OF_EACH * seed)
        reference += f"; from the same starts, the optimal driver has {optimum:.2f}"
    return CARD.format(
        env=env_id,
        command=shlex.join(command),
        seed=seed,
        steps=f"{steps:,}".replace(",", " "),
        mean=np.mean(returns),
        std=np.std(returns),
        episodes=len(returns),
        reference=reference,
        versions=", ".join(f"{package} {version(package)}" for package in PACKAGES),
        date=datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    )


def make_agent(env_id: str, seed: int, steps: int | None, agents: Path) -> Path:
    """
    Train, publish, evaluate.

    :param env_id: Environment id
    :param seed: Seed
    :param steps: Environment steps; ``None`` for the hyperparameter entry's
    :param agents: The folder of all agents
    :return: The agent's folder
    """
    env_name = EnvironmentName(env_id)  # the zoo's folders and files are named so
    target = agents / "lecture_dqn" / f"{env_name}_1"
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory(prefix=".", dir=target.parent) as beside:
        command = train(env_id, seed, steps, Path(folder))
        new = Path(beside) / "new"
        model = publish(env_id, Path(folder) / "logs" / "lecture_dqn" / f"{env_name}_1", new)
        returns = evaluate(model, env_id, new, seed)
        config = yaml.unsafe_load((new / env_name / "config.yml").read_text())
        (new / "README.md").write_text(make_card(env_id, command, seed, int(steps or config["n_timesteps"]), returns))
        if target.exists():
            target.rename(Path(beside) / "old")
        new.rename(target)
    return target


def main() -> None:
    """Make an agent and say how good it is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", required=True, help="environment id")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="environment steps (default: the hyperparameter entry's)")
    parser.add_argument("--folder", type=Path, default=AGENTS, help="the folder of all agents")
    arguments = parser.parse_args()
    th.set_num_threads(1)
    target = make_agent(arguments.env, arguments.seed, arguments.steps, arguments.folder)
    print((target / "README.md").read_text())


if __name__ == "__main__":
    main()
