"""
Kill training runs at random moments, start them again, and compare what comes out with a run that nobody killed.

    python benchmarks/kills.py --kills 50

Each scenario (an environment, a number of environments, a kind of ``VecEnv``) is trained once without interruption and once
with ``kill -9`` at random moments. Compared bit for bit are the parameters, the optimizer, the replay buffer, the
normalisation, the evaluations, the files that were written (times apart) and the random generators.
"""

import argparse
import csv
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium
import numpy as np
import torch as th
from stable_baselines3.common.callbacks import BaseCallback, CheckpointCallback, EvalCallback
from stable_baselines3.common.env_util import make_atari_env, make_vec_env
from stable_baselines3.common.logger import configure
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv, VecFrameStack, VecNormalize, VecTransposeImage

from sb3_lecture_dqn import LectureDQN, ResumableCheckpointCallback
from sb3_lecture_dqn.resume.checkpoint_files import newest_checkpoint

PROCESSES = multiprocessing.get_context("fork")  # what is imported need not be imported again
ATARI_GAME = "PongNoFrameskip-v4"
ENVIRONMENTS = ("LunarLander-v2", "CartPole-v1", "Acrobot-v1", "MountainCar-v0", "RoboParking-v0", ATARI_GAME)


class Scenario(NamedTuple):
    """What is trained."""

    env_id: str
    n_envs: int
    kind: str
    n_timesteps: int
    save_freq: int

    def __str__(self) -> str:
        return f"{self.env_id} n_envs={self.n_envs} {self.kind}"


def all_scenarios() -> list[Scenario]:
    """Every environment, alone and eight at once, in one process and in many."""
    scenarios = []
    for env_id, n_envs, kind in itertools.product(ENVIRONMENTS, (1, 8), ("dummy", "subproc")):
        n_timesteps = 800 if env_id == ATARI_GAME else 2_000
        scenarios.append(Scenario(env_id, n_envs, kind, n_timesteps, n_timesteps // 8))
    return scenarios


def make_env(scenario: Scenario, seed: int, folder: Path | None) -> VecEnv:
    """The vector environment of a scenario; ``folder`` is where its monitor files go."""
    subproc = scenario.kind == "subproc"
    kwargs: dict[str, Any] = {
        "n_envs": scenario.n_envs if folder is not None else 1,
        "seed": seed,
        "monitor_dir": None if folder is None else str(folder),
        "vec_env_cls": SubprocVecEnv if subproc else DummyVecEnv,
        "vec_env_kwargs": {"start_method": "fork"} if subproc else {},
    }
    if scenario.env_id == ATARI_GAME:
        import ale_py

        gymnasium.register_envs(ale_py)
        # A game against an opponent that is not trained to be beaten takes long: evaluations stop early.
        kwargs["env_kwargs"] = {} if folder is not None else {"max_num_frames_per_episode": 400}
        return VecTransposeImage(VecFrameStack(make_atari_env(scenario.env_id, **kwargs), 2))
    env = make_vec_env(scenario.env_id, **kwargs)
    return VecNormalize(env, training=folder is not None, norm_reward=folder is not None)


def train(scenario: Scenario, folder: Path, checkpoints: Path, digest_file: Path, others: Sequence[BaseCallback] = ()) -> None:
    """Train a scenario, continuing if there is something to continue, and write what came out."""
    th.set_num_threads(1)
    env, eval_env = make_env(scenario, 0, folder), make_env(scenario, 100, None)
    is_atari = scenario.env_id == ATARI_GAME
    model = LectureDQN(
        "CnnPolicy" if is_atari else "MlpPolicy",
        env,
        learning_rate=1e-3,
        buffer_size=400 if is_atari else 800,  # it comes round
        learning_starts=100,
        batch_size=8 if is_atari else 32,
        train_freq=max(8 // scenario.n_envs, 1),
        gradient_steps=2,
        target_update_interval=200,
        policy_kwargs={"net_arch": [32, 32], **({"features_extractor_kwargs": {"features_dim": 32}} if is_atari else {})},
        seed=3,
        device="cpu",
    )
    model.set_logger(configure(str(folder), ["csv", "json"]))
    n_calls = scenario.n_timesteps // scenario.n_envs // 4
    evaluation = EvalCallback(
        eval_env,
        n_eval_episodes=1,
        eval_freq=n_calls,
        log_path=str(folder),
        best_model_save_path=str(folder),
        deterministic=False,
        verbose=0,
    )
    snapshots = CheckpointCallback(n_calls, str(folder / "snapshots"))
    checkpointing = ResumableCheckpointCallback(scenario.save_freq, checkpoints, keep_last=2)
    model.learn(scenario.n_timesteps, callback=[evaluation, checkpointing, snapshots, *others])
    digests = digest(model, evaluation, folder)
    env.close()
    eval_env.close()
    unfinished = digest_file.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(digests))
    os.replace(unfinished, digest_file)


def digest(model: LectureDQN, evaluation: EvalCallback, folder: Path) -> dict[str, str]:
    """A hash of everything that has to be the same."""
    replay_buffer = model.replay_buffer
    assert replay_buffer is not None
    arrays = {name: value for name, value in vars(replay_buffer).items() if isinstance(value, (np.ndarray, dict, int, bool))}
    normalize = model.get_vec_normalize_env()
    results = {
        "parameters": [tensor.numpy() for tensor in model.policy.state_dict().values()],
        "optimizer": _plain(model.policy.optimizer.state_dict()["state"]),
        "replay buffer": arrays,
        "normalisation": [] if normalize is None else [vars(normalize.obs_rms), vars(normalize.ret_rms), normalize.returns],
        "evaluations": [evaluation.evaluations_results, evaluation.evaluations_timesteps, evaluation.best_mean_reward],
        "evaluations.npz": _npz(folder / "evaluations.npz"),
        "progress.csv": _csv_without_times(folder / "progress.csv"),
        "progress.json": _json_without_times(folder / "progress.json"),
        "monitor files": [_csv_without_times(path) for path in sorted(folder.glob("*.monitor.csv"))],
        "snapshots": sorted(path.name for path in (folder / "snapshots").iterdir()),
        "best model": _parameters(folder / "best_model.zip"),
        "generators": [model.random_generator.bit_generator.state, np.random.get_state()[1], th.get_rng_state().numpy()],
        "last observation": model._last_obs,
        "counters": [model.num_timesteps, model._n_updates, model._n_calls, model._episode_num],
    }
    return {name: hashlib.sha256(_bytes(value)).hexdigest() for name, value in results.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value.numpy() if isinstance(value, th.Tensor) else value


def _bytes(value: Any) -> bytes:
    if isinstance(value, dict):
        return b"{" + b",".join(_bytes(key) + b":" + _bytes(item) for key, item in value.items()) + b"}"
    if isinstance(value, (list, tuple)):
        return b"[" + b",".join(map(_bytes, value)) + b"]"
    if isinstance(value, np.ndarray) and value.dtype != object:
        return str((value.dtype, value.shape)).encode() + value.tobytes()
    return repr(value).encode()


def _npz(path: Path) -> dict[str, np.ndarray]:
    if not path.exists():
        return {}
    with np.load(path) as saved:
        return {name: saved[name] for name in saved.files}


def _csv_without_times(path: Path) -> list[list[str]]:
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    rows = list(csv.DictReader(lines))
    return [[f"{key}={row[key]}" for key in sorted(row) if key != "t" and not _is_time(key)] for row in rows]


def _json_without_times(path: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: row[key] for key in sorted(row) if not _is_time(key)} for row in rows]


def _is_time(key: str) -> bool:
    return key in ("time/fps", "time/time_elapsed")


def _parameters(path: Path) -> list[np.ndarray]:
    if not path.exists():
        return []
    return [tensor.numpy() for tensor in LectureDQN.load(path, device="cpu").policy.state_dict().values()]


def in_new_process(function: Callable[..., None], *args: Any) -> bool:
    """Run a function in a process; whether it came to its end."""
    return exit_code_of(function, *args) == 0


def exit_code_of(function: Callable[..., None], *args: Any, seconds: float | None = None) -> int:
    """
    Run a function in a process, and kill it after some seconds, with the processes that it has started.

    :param function: What to run
    :param args: Its arguments
    :param seconds: When to kill it; ``None`` for never
    :return: The exit code: 0 if it came to its end, ``-signal.SIGKILL`` if it was killed before
    """
    process = PROCESSES.Process(target=_in_a_group_of_its_own, args=(function, *args))
    process.start()
    assert process.pid is not None
    os.setpgid(process.pid, process.pid)  # both do it: either may be the first to need it
    try:
        process.join(seconds)
    finally:
        if process.is_alive():
            os.killpg(process.pid, signal.SIGKILL)
            process.join()
    assert process.exitcode is not None
    return process.exitcode


def _in_a_group_of_its_own(function: Callable[..., None], *args: Any) -> None:
    os.setpgid(0, 0)
    function(*args)


def uninterrupted(scenario: Scenario, folder: Path) -> tuple[dict[str, str], float]:
    """What comes out if nobody kills the run, and how long it takes."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    start = time.perf_counter()
    if not in_new_process(train, scenario, folder / "run", folder / "checkpoints", folder / "digest.json"):
        raise RuntimeError(f"{scenario} cannot be trained")
    return json.loads((folder / "digest.json").read_text()), time.perf_counter() - start


def killed_until_done(
    scenario: Scenario, folder: Path, duration: float, n_kills: int, generator: random.Random
) -> tuple[dict[str, str], list[int]]:
    """What comes out if the run is killed so many times, and the steps that it was continued from."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    arguments = scenario, folder / "run", folder / "checkpoints", folder / "digest.json"
    continued_from: list[int] = []
    while len(continued_from) < n_kills:
        # A resumed run is shorter, so that a moment of the whole run often finds it finished: then from the start again.
        exit_code = exit_code_of(train, *arguments, seconds=generator.uniform(0.0, duration))
        if exit_code not in (0, -signal.SIGKILL):
            raise RuntimeError(f"{scenario} was to end or to be killed, got the exit code {exit_code}")
        if exit_code == 0:
            shutil.rmtree(folder)
            folder.mkdir()
            continued_from.clear()
            continue
        checkpoint = newest_checkpoint(folder / "checkpoints")
        continued_from.append(checkpoint.num_timesteps if checkpoint else 0)
    if not in_new_process(train, *arguments):
        raise RuntimeError(f"{scenario} cannot be continued")
    return json.loads((folder / "digest.json").read_text()), continued_from


def warm_up() -> None:
    """Have PyTorch import what it imports at the first use, so that the processes made of this one need not."""
    model = LectureDQN("MlpPolicy", "CartPole-v1", learning_starts=10, batch_size=4)
    model.learn(20)
    model.save(io.BytesIO())


def main() -> None:
    """Print a line for each scenario, and the number of runs that came out the same."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="kills in all")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--only", default="", help="only scenarios with this in their name")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    warm_up()
    generator = random.Random(arguments.seed)
    scenarios = [scenario for scenario in all_scenarios() if arguments.only in str(scenario)]
    n_done = n_same = 0
    with tempfile.TemporaryDirectory() as temporary:
        for index, scenario in enumerate(scenarios):
            n_kills = arguments.kills // len(scenarios) + (index < arguments.kills % len(scenarios))
            if n_kills == 0:
                continue
            expected, duration = uninterrupted(scenario, Path(temporary) / "reference")
            for _ in range(n_kills):
                result, (step,) = killed_until_done(scenario, Path(temporary) / "killed", duration, 1, generator)
                different = [name for name in expected if result[name] != expected[name]]
                n_done, n_same = n_done + 1, n_same + (not different)
                outcome = f"different: {different}" if different else "the same"
                print(f"{scenario}, continued from step {step} of {scenario.n_timesteps}: {outcome}", flush=True)
    print(f"{n_same} of {n_done} killed runs ended bit for bit like the run that nobody killed")


if __name__ == "__main__":
    main()
