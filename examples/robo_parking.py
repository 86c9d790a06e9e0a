"""
Train the lecture's DQN to park a robot (L4), and compare it with two drivers that are not learned.

::

    python examples/robo_parking.py                      # train (some minutes), print the table, write the GIF
    python examples/robo_parking.py --model FILE.zip     # the same with models that are trained already

The drivers are compared on the same random starts. The scripted one drives left to the kerb, then along it to the corner. The
optimal one is a shortest-path search on the true model, which the DQN does not know. Needs ``sb3-lecture-dqn[extra]``.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch as th
import yaml
from _arguments import gif_file, integer_at_least
from film import play, write_gif
from rl_zoo3 import linear_schedule

from sb3_lecture_dqn import LectureDQN
from sb3_lecture_dqn.envs import GymVectorVecEnv
from sb3_lecture_dqn.envs.robo_parking import MAX_EPISODE_STEPS
from sb3_lecture_dqn.envs.robo_parking_drivers import drive_along_kerbs, find_optimal_drive
from sb3_lecture_dqn.zoo import HYPERPARAMS_FILE

ENV_ID = "RoboParking-v0"
# Evaluation starts from seeds that no training run uses: robot i gets this seed + i.
FIRST_EVALUATION_SEED = 1_000_000
GIF_STARTS = ((3.6, 2.4, 0.0, 0.0), (1.1, 3.7, 0.0, 0.0), (3.8, 0.6, 0.0, 0.0))
GIF_SIZE, GIF_COLOURS = 360, 128

Driver = Callable[[np.ndarray], np.ndarray]


def train(seed: int) -> LectureDQN:
    """Train with the settings of the zoo's entry, on one vector environment in place of many scalar ones."""
    settings: dict[str, Any] = yaml.safe_load(HYPERPARAMS_FILE.read_text())[ENV_ID]
    n_steps, n_envs = int(settings.pop("n_timesteps")), settings.pop("n_envs")
    settings["learning_rate"] = linear_schedule(settings["learning_rate"].removeprefix("lin_"))
    env = GymVectorVecEnv(gymnasium.make_vec(ENV_ID, num_envs=n_envs))
    model = LectureDQN(env=env, seed=seed, verbose=1, **settings)
    return model.learn(n_steps, log_interval=100)


def load(parser: argparse.ArgumentParser, file: Path) -> LectureDQN:
    """A trained model, or one line that says why it cannot be one."""
    try:
        model = LectureDQN.load(file, device="cpu")
    except OSError as error:
        parser.error(f"--model must be a file, got {file}: {error.strerror}")
    except ValueError as error:
        parser.error(f"--model must be a file of LectureDQN.save, got {file}: {error}")
    env = gymnasium.make(ENV_ID)
    if (model.observation_space, model.action_space) != (env.observation_space, env.action_space):
        parser.error(f"--model must be trained on {ENV_ID}, got {file} with other spaces")
    return model


def greedy_driver(model: LectureDQN) -> Driver:
    """The policy π of a model."""
    return lambda observations: model.predict(observations, deterministic=True)[0]


def optimal_driver(starts: np.ndarray) -> Driver:
    """Replays the drives that the search finds; what a robot does after it has parked does not count."""
    actions = np.zeros((MAX_EPISODE_STEPS, len(starts)), dtype=np.int64)
    for i, start in enumerate(starts):
        found = find_optimal_drive(start).actions
        actions[: len(found), i] = found
    steps = iter(actions)
    return lambda observations: next(steps)


def drive(driver: Driver, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The return of one episode from each start, and whether it ended in the corner."""
    n_starts = len(starts)
    env = gymnasium.make_vec(ENV_ID, num_envs=n_starts)
    observations, _ = env.reset(options={"state": starts})
    returns, is_parked, is_driving = np.zeros(n_starts), np.zeros(n_starts, dtype=bool), np.ones(n_starts, dtype=bool)
    while is_driving.any():
        observations, rewards, terminations, truncations, _ = env.step(driver(observations))
        returns += rewards * is_driving
        is_parked |= terminations & is_driving
        is_driving &= ~(terminations | truncations)
    return returns, is_parked


def print_table(models: dict[str, LectureDQN], n_starts: int) -> None:
    """Print a row for each driver."""
    starts, _ = gymnasium.make_vec(ENV_ID, num_envs=n_starts).reset(seed=FIRST_EVALUATION_SEED)
    rows = {"optimal": drive(optimal_driver(starts), starts), "scripted": drive(drive_along_kerbs, starts)}
    rows |= {name: drive(greedy_driver(model), starts) for name, model in models.items()}
    optimal_returns, _ = rows["optimal"]
    print(f"| driver, {n_starts} starts | mean return | below the optimum | success rate |\n|---|---|---|---|")
    for name, (returns, is_parked) in rows.items():
        gap = returns.mean() / optimal_returns.mean() - 1
        print(f"| {name} | {returns.mean():.2f} | {gap:.1%} | {is_parked.mean():.1%} |", flush=True)


def film(model: LectureDQN, file: Path) -> None:
    """Film the model as it parks from a few starts."""
    env = gymnasium.make(ENV_ID, render_mode="rgb_array")
    frames = []
    for start in GIF_STARTS:
        observation, _ = env.reset(options={"state": start})
        frames += play(model, env, observation)
    env.close()
    write_gif(frames, file, GIF_SIZE, env.metadata["render_fps"], GIF_COLOURS)


def main() -> None:
    """Train or load, compare, film."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", type=Path, help="trained models to compare (default: train one)")
    parser.add_argument("--seed", type=integer_at_least(0), default=0, help="seed of the training")
    parser.add_argument("--starts", type=integer_at_least(1), default=1000, help="number of starts in the comparison")
    parser.add_argument("--gif", type=gif_file, default=Path("robo_parking.gif"), help="where to write the GIF")
    arguments = parser.parse_args()
    th.set_num_threads(1)  # fastest for networks of this size

    if arguments.model:
        models = {str(file): load(parser, file) for file in arguments.model}
    else:
        models = {f"LectureDQN, seed {arguments.seed}": train(arguments.seed)}
    print_table(models, arguments.starts)
    film(next(iter(models.values())), arguments.gif)


if __name__ == "__main__":
    main()
