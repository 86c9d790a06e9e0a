"""
Train LectureDQN and SB3's DQN on several seeds, and print the greedy return of each final model.

::

    python benchmarks/learning.py --env CartPole-v1 --steps 50000 --settings defaults
    python benchmarks/learning.py --env LunarLander-v2 --settings zoo --seeds 0 1 2 3 4

``defaults`` sets nothing but the seed; ``zoo`` takes the entry of the algorithm's hyperparameter file. One process a core and
one thread a process; a run whose line is in the output file already is not repeated.
"""

import argparse
import json
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import rl_zoo3
import torch as th
import yaml
from stable_baselines3 import DQN
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor

import sb3_lecture_dqn
from sb3_lecture_dqn import LectureDQN
from sb3_lecture_dqn.zoo import HYPERPARAMS_FILE

ALGORITHMS = {"lecture_dqn": LectureDQN, "dqn": DQN}
# Evaluation starts from seeds that no training run uses.
FIRST_EVALUATION_SEED = 1_000_000


def zoo_entry(algorithm: str, env_id: str) -> dict[str, Any]:
    """The constructor's arguments in the zoo's hyperparameter file."""
    file = HYPERPARAMS_FILE
    if algorithm != "lecture_dqn":
        file = Path(rl_zoo3.__file__).parent / "hyperparams" / f"{algorithm}.yml"
        env_id = env_id.replace("LunarLander-v2", "LunarLander-v3")
    entry: dict[str, Any] = yaml.safe_load(file.read_text())[env_id]
    if isinstance(entry.get("policy_kwargs"), str):
        entry["policy_kwargs"] = eval(entry["policy_kwargs"])  # the zoo's own notation
    return entry


def train_and_evaluate(run: dict[str, Any]) -> dict[str, Any]:
    """One training run; the result is the run's description with its returns."""
    th.set_num_threads(1)
    arguments = zoo_entry(run["algorithm"], run["env"]) if run["settings"] == "zoo" else {}
    steps = run["steps"] or int(arguments["n_timesteps"])
    arguments = {"policy": "MlpPolicy", **arguments, **run["params"]}
    arguments.pop("n_timesteps", None)
    if str(arguments.get("learning_rate", "")).startswith("lin_"):  # the zoo's notation
        arguments["learning_rate"] = rl_zoo3.linear_schedule(arguments["learning_rate"].removeprefix("lin_"))
    env = make_vec_env(run["env"], n_envs=arguments.pop("n_envs", 1), env_kwargs={"render_mode": None})
    model = ALGORITHMS[run["algorithm"]](env=env, seed=run["seed"], **arguments)
    start = time.perf_counter()
    model.learn(steps)
    seconds = time.perf_counter() - start
    evaluation_env = Monitor(gymnasium.make(run["env"]))
    evaluation_env.reset(seed=FIRST_EVALUATION_SEED + run["seed"])
    returns, _ = evaluate_policy(model, evaluation_env, n_eval_episodes=run["episodes"], return_episode_rewards=True)
    return {**run, "steps": steps, "mean": float(np.mean(returns)), "std": float(np.std(returns)), "seconds": seconds}


def main() -> None:
    """Run what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", required=True, help="environment id")
    parser.add_argument("--steps", type=int, default=0, help="environment steps (default: the zoo entry's)")
    parser.add_argument("--settings", choices=["defaults", "zoo"], required=True)
    parser.add_argument("--algorithms", nargs="+", choices=list(ALGORITHMS), default=list(ALGORITHMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--episodes", type=int, default=100, help="greedy episodes at the end")
    parser.add_argument("--params", default="{}", help="JSON: constructor arguments to set on top")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--output", type=Path, help="file of result lines (default: not kept)")
    arguments = parser.parse_args()
    if arguments.settings == "defaults" and not arguments.steps:
        parser.error("--settings defaults needs --steps")

    keys = ("env", "steps", "settings", "episodes")
    runs = [
        {
            **{key: getattr(arguments, key) for key in keys},
            "algorithm": algorithm,
            "seed": seed,
            "params": json.loads(arguments.params),
            "version": sb3_lecture_dqn.__version__,
        }
        for seed in arguments.seeds
        for algorithm in arguments.algorithms
    ]
    results = [json.loads(line) for line in _lines(arguments.output)]
    missing = [run for run in runs if not any(_same_run(run, result) for result in results)]
    with ProcessPoolExecutor(arguments.processes) as pool:
        for future in as_completed([pool.submit(train_and_evaluate, run) for run in missing]):
            result = future.result()
            results.append(result)
            print(json.dumps(result), flush=True)
            if arguments.output:
                with arguments.output.open("a") as file:
                    file.write(json.dumps(result) + "\n")
    for algorithm in arguments.algorithms:
        ours = [r for run in runs for r in results if run["algorithm"] == algorithm and _same_run(run, r)]
        means = ", ".join(f"{r['mean']:.1f} ± {r['std']:.1f}" for r in sorted(ours, key=lambda r: r["seed"]))
        overall = np.mean([r["mean"] for r in ours])
        print(f"| {algorithm} | {arguments.env} | {arguments.settings} | {means} | mean {overall:.1f} |")


def _lines(file: Path | None) -> list[str]:
    return file.read_text().splitlines() if file and file.exists() else []


def _same_run(run: dict[str, Any], result: dict[str, Any]) -> bool:
    keys = ("env", "settings", "algorithm", "seed", "params", "episodes")
    return all(run[key] == result[key] for key in keys) and run["steps"] in (0, result["steps"])


if __name__ == "__main__":
    main()
