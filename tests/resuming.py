"""Training runs that are interrupted, and what is compared afterwards."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from stable_baselines3.common.callbacks import BaseCallback

from sb3_lecture_dqn import LectureDQN, ResumableCheckpointCallback


def load_benchmark(name: str) -> ModuleType:
    """A program of ``benchmarks/`` as a module."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[1] / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


kills: Any = load_benchmark("kills")


class Interruption(BaseException):
    """Nothing handles it, as nothing handles ``kill -9``."""


class InterruptAt(BaseCallback):
    """
    Ends the run in the middle of a step.

    :param step: At which step
    """

    not_in_checkpoints = frozenset({"step"})

    def __init__(self, step: int) -> None:
        super().__init__()
        self.step = step

    def _on_step(self) -> bool:
        if self.num_timesteps >= self.step:
            raise Interruption
        return True


Build = Callable[[], LectureDQN]


#: Attributes of a replay buffer that another run may have otherwise.
LEFT_OUT = ("env", "device", "_stored", "_device_copy")


def fingerprint(model: LectureDQN) -> dict[str, bytes]:
    """Everything of a model that has to be the same, bit for bit."""
    buffer = {name: value for name, value in vars(model.replay_buffer).items() if name not in LEFT_OUT}
    parts: dict[str, Any] = {
        "parameters": [tensor.numpy() for tensor in model.policy.state_dict().values()],
        "optimizer": kills._plain(model.policy.optimizer.state_dict()["state"]),
        "replay buffer": buffer,
        "observation": model._last_obs,
        "counters": [model.num_timesteps, model._n_updates, model._n_calls, model._episode_num, model.exploration_rate],
        "generator": model.random_generator.bit_generator.state,
        "episodes": [(episode["r"], episode["l"]) for episode in model.ep_info_buffer or ()],
    }
    return {name: kills._bytes(part) for name, part in parts.items()}


def run(build: Build, n_timesteps: int, folder: Path | None, *others: BaseCallback, save_freq: int = 100) -> LectureDQN:
    """Train a new model; with a folder, by way of its checkpoints."""
    model = build()
    callbacks: list[BaseCallback] = list(others)
    if folder is not None:
        callbacks.insert(0, ResumableCheckpointCallback(save_freq, folder, keep_last=2))
    model.learn(n_timesteps, callback=callbacks)
    return model


def interrupted_run(build: Build, n_timesteps: int, folder: Path, *steps: int, save_freq: int = 100) -> LectureDQN:
    """Train a model in pieces: each ends at its step, the last one at the end."""
    for step in steps:
        try:
            run(build, n_timesteps, folder, InterruptAt(step), save_freq=save_freq)
        except Interruption:
            continue
        raise AssertionError(f"the run was over before step {step}")
    return run(build, n_timesteps, folder, InterruptAt(n_timesteps + 100), save_freq=save_freq)


def differences(a: LectureDQN, b: LectureDQN) -> list[str]:
    """What differs between two models."""
    first, second = fingerprint(a), fingerprint(b)
    return [name for name in first if first[name] != second[name]]
