"""
Speed of LectureDQN beside SB3's DQN and SBX's DQN in one run: each peer in a process of its own, and they take turns.

::

    python benchmarks/speed.py                      # the whole table
    python benchmarks/speed.py --rows train sample  # some rows
    python benchmarks/speed.py --rounds 9 --threads 1

A round is the same work for all; the figure is the median of the rounds' ratios. Peers that are not installed or do not start,
and CUDA where there is none, are left out with a line that says so; all rows but CUDA's are on the CPU. Absolute numbers swing
with whatever else the machine does.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

#: The zoo's settings for DQN on LunarLander-v3; epsilon is at its final value, as it is for most of a run.
LUNAR_LANDER = {
    "learning_rate": 6.3e-4,
    "batch_size": 128,
    "buffer_size": 50_000,
    "learning_starts": 0,
    "target_update_interval": 250,
    "train_freq": 4,
    "gradient_steps": -1,
    "exploration_fraction": 1e-4,
    "exploration_final_eps": 0.1,
    "policy_kwargs": {"net_arch": [256, 256]},
    "device": "cpu",
}
BATCH_SIZE, WIDTH = 128, 256


class Row(NamedTuple):
    """A line of the table."""

    work: str
    unit: str
    peers: tuple[str, ...]
    rounds_of: Callable[[str], Callable[[], float]]
    busy: bool = False


# --- What a worker process does ---------------------------------------------------------------------------------------------


def algorithm(peer: str) -> Any:
    """The class of a peer."""
    if peer == "sbx":
        os.environ["JAX_PLATFORMS"] = "cpu"  # else JAX computes on a GPU if there is one
        from sbx import DQN as SBX

        return SBX
    from stable_baselines3 import DQN

    from sb3_lecture_dqn import LectureDQN

    return {"sb3": DQN, "lecture_dqn": LectureDQN}[peer]


def steps_per_second(model: Any, steps: int) -> Callable[[], float]:
    """Rounds of ``learn``, in environment steps per second."""
    model.learn(500)

    def one_round() -> float:
        start = time.perf_counter()
        model.learn(steps, reset_num_timesteps=False)
        return steps / (time.perf_counter() - start)

    return one_round


def train(peer: str, device: str = "cpu") -> Callable[[], float]:
    """LunarLander-v3 with the zoo's settings."""
    import gymnasium

    settings = {**LUNAR_LANDER, "device": device}
    return steps_per_second(algorithm(peer)("MlpPolicy", gymnasium.make("LunarLander-v3"), seed=0, **settings), 1_000)


def collect(peer: str) -> Callable[[], float]:
    """Greedy collection alone."""
    import gymnasium

    settings = {**LUNAR_LANDER, "gradient_steps": 0, "exploration_initial_eps": 0.0, "exploration_final_eps": 0.0}
    return steps_per_second(algorithm(peer)("MlpPolicy", gymnasium.make("LunarLander-v3"), seed=0, **settings), 2_000)


def robo_parking(peer: str) -> Callable[[], float]:
    """RoboParking, 64 environments, a gradient step for 64 steps."""
    import gymnasium
    from stable_baselines3.common.env_util import make_vec_env

    from sb3_lecture_dqn.envs import GymVectorVecEnv

    if peer == "lecture_dqn":
        env: Any = GymVectorVecEnv(gymnasium.make_vec("RoboParking-v0", num_envs=64))
    else:
        env = make_vec_env("RoboParking-v0", n_envs=64)
    settings = {**LUNAR_LANDER, "train_freq": 1, "gradient_steps": 1}
    return steps_per_second(algorithm(peer)("MlpPolicy", env, seed=0, **settings), 64 * 250)


def gradient_step(
    peer: str, batch_size: int = BATCH_SIZE, device: str = "cpu", pixels: bool = False, steps: int = 400
) -> Callable[[], float]:
    """Gradient steps per second, sampling included; or of the peer ``floor``, the matrix products that a step cannot avoid."""
    import torch as th

    if peer == "floor":
        return matrix_products()
    settings = {**LUNAR_LANDER, "batch_size": batch_size, "gradient_steps": 4, "device": device}
    policy, env = ("CnnPolicy", random_images()) if pixels else ("MlpPolicy", "LunarLander-v3")
    if pixels:  # few steps before the first round, because a large batch of images takes a peer up to half a second
        settings = {**settings, "buffer_size": 5_000, "learning_starts": 360}
    model = algorithm(peer)(policy, env, seed=0, **settings)
    model.learn(400)

    def one_round() -> float:
        start = time.perf_counter()
        for _ in range(steps // 4):
            model.train(gradient_steps=4, batch_size=batch_size)
        if device == "cuda":
            th.cuda.synchronize()
        return steps / (time.perf_counter() - start)

    return one_round


def matrix_products() -> Callable[[], float]:
    """Rounds of the products, in gradient steps per second."""
    four_products = products_of_a_step(BATCH_SIZE, WIDTH)

    def one_round() -> float:
        start = time.perf_counter()
        for _ in range(1_000):
            four_products()
        return 1_000 / (time.perf_counter() - start)

    return one_round


def products_of_a_step(batch_size: int, width: int) -> Callable[[], None]:
    """
    Per gradient step: two forward passes through the middle layer, its weights' gradient and its inputs' gradient, by the
    library that LectureDQN takes for them.
    """
    import torch as th

    from sb3_lecture_dqn.fast.products import LARGE_PRODUCT, ONEDNN_LINEAR, is_onednn_quicker

    inputs, weight = th.randn(batch_size, width), th.randn(width, width)
    output, gradient = th.empty(batch_size, width), th.empty(width, width)

    def by_pytorchs_own() -> None:
        th.mm(inputs, weight.t(), out=output)
        th.mm(inputs, weight.t(), out=output)
        th.mm(output.t(), inputs, out=gradient)
        th.mm(inputs, weight, out=output)

    def by_onednn() -> None:
        for factors in ((inputs, weight), (inputs, weight), (output.t(), inputs.t()), (inputs, weight.t())):
            ONEDNN_LINEAR(*factors, None, "none", [], "")

    is_onednns = is_onednn_quicker() and batch_size * width * width >= LARGE_PRODUCT
    return by_onednn if is_onednns else by_pytorchs_own


def random_images() -> Any:
    """Atari's observation space without Atari's cost."""
    from stable_baselines3.common.envs import FakeImageEnv

    return FakeImageEnv(screen_height=84, screen_width=84, n_channels=4, discrete=True, channel_first=True)


def sample(peer: str) -> Callable[[], float]:
    """Batches of 128 out of 1 000 000 LunarLander transitions."""
    import gymnasium

    env = gymnasium.make("LunarLander-v3")
    model = algorithm(peer)("MlpPolicy", env, buffer_size=1_000_000, seed=0, device="cpu")
    buffer = model.replay_buffer
    rng = np.random.default_rng(0)
    for name in ("observations", "next_observations", "rewards"):
        array = getattr(buffer, name)
        array[:] = rng.normal(size=array.shape)  # so that every page of memory is really there
    buffer.actions[:], buffer.dones[:], buffer.timeouts[:], buffer.full = 1, 0, 0, True
    draw = model._sample_batch if peer == "lecture_dqn" else buffer.sample

    def one_round() -> float:
        start = time.perf_counter()
        for _ in range(5_000):
            draw(BATCH_SIZE)
        return 5_000 / (time.perf_counter() - start)

    return one_round


def train_on_cuda(peer: str) -> Callable[[], float]:
    """The same training on a CUDA device."""
    return train(peer, "cuda")


def on_cuda(batch_size: int, pixels: bool, steps: int) -> Callable[[str], Callable[[], float]]:
    """Gradient steps on a CUDA device, so many in a round."""
    return lambda peer: gradient_step(peer, batch_size, "cuda", pixels, steps)


ROWS = {
    "train": Row("LunarLander-v3, the zoo's settings", "env steps/s", ("lecture_dqn", "sb3", "sbx"), train),
    "train_busy": Row("the same, one core busy", "env steps/s", ("lecture_dqn", "sb3", "sbx"), train, busy=True),
    "gradient_step": Row("one gradient step", "steps/s", ("lecture_dqn", "sb3", "floor"), gradient_step),
    "collect": Row("greedy collection, one environment", "env steps/s", ("lecture_dqn", "sb3"), collect),
    "robo_parking": Row("RoboParking-v0, 64 environments", "env steps/s", ("lecture_dqn", "sb3"), robo_parking),
    "sample": Row("128 of 1 000 000 transitions", "batches/s", ("lecture_dqn", "sb3"), sample),
    "cuda_train": Row("CUDA, LunarLander-v3, the zoo's settings", "env steps/s", ("lecture_dqn", "sb3"), train_on_cuda),
    "cuda_mlp_128": Row("CUDA, MLP, batch 128", "steps/s", ("lecture_dqn", "sb3"), on_cuda(128, False, 2_000)),
    "cuda_mlp_4096": Row("CUDA, MLP, batch 4096", "steps/s", ("lecture_dqn", "sb3"), on_cuda(4096, False, 2_000)),
    "cuda_cnn_128": Row("CUDA, Nature CNN, batch 128", "steps/s", ("lecture_dqn", "sb3"), on_cuda(128, True, 400)),
    "cuda_cnn_4096": Row("CUDA, Nature CNN, batch 4096", "steps/s", ("lecture_dqn", "sb3"), on_cuda(4096, True, 40)),
}


def work(row: str, peer: str, threads: int) -> None:
    """One round for each line on standard input."""
    import torch as th

    if threads:
        th.set_num_threads(threads)
    one_round = ROWS[row].rounds_of(peer)
    print("ready", flush=True)
    for _ in sys.stdin:
        print(one_round(), flush=True)


# --- What the parent does ---------------------------------------------------------------------------------------------------


#: Never sleeps, and ends with the process that started it, however that ends: its standard input is closed then.
SPINNER = """\
import select, sys
while not select.select([sys.stdin], [], [], 0)[0]:
    sum(range(100_000))
"""


@contextmanager
def busy_core(is_busy: bool) -> Iterator[None]:
    """Another process that never sleeps."""
    if not is_busy:
        yield
        return
    with subprocess.Popen([sys.executable, "-c", SPINNER], stdin=subprocess.PIPE):  # waits for its end
        yield


class Worker:
    """
    A peer in a process of its own.

    :raises ChildProcessError: if it does not start
    """

    def __init__(self, row: str, peer: str, threads: int) -> None:
        command = [sys.executable, __file__, "--worker", row, peer, "--threads", str(threads)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        if self._read() != "ready":
            self.close()
            raise ChildProcessError(f"{peer} does not start; its error is above")

    def _read(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def one_round(self) -> float:
        """One round now."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return float(self._read())

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()


def measure(name: str, rounds: int, threads: int) -> dict[str, list[float]]:
    """All rounds of a row, the peers in turn."""
    row = ROWS[name]
    workers: dict[str, Worker] = {}
    with busy_core(row.busy):
        try:
            for peer in row.peers:
                if peer != "sbx" or importlib.util.find_spec("sbx"):
                    _start(workers, name, peer, threads)
            results = [{peer: worker.one_round() for peer, worker in workers.items()} for _ in range(rounds)]
        finally:
            for worker in workers.values():
                worker.close()
    return {peer: [result[peer] for result in results] for peer in workers}


def _start(workers: dict[str, Worker], name: str, peer: str, threads: int) -> None:
    try:
        workers[peer] = Worker(name, peer, threads)
    except ChildProcessError as error:
        if peer == "lecture_dqn":  # the one that all others are compared with
            raise SystemExit(str(error)) from error
        print(f"left out: {error}", flush=True)


def print_row(name: str, rates: dict[str, list[float]]) -> None:
    """Medians and ranges, and ours against each peer."""
    row = ROWS[name]
    for peer, values in rates.items():
        ratio = float(np.median(np.array(rates["lecture_dqn"]) / np.array(values)))
        cost = f"{1 / ratio:.2f} × the floor's time" if peer == "floor" else f"{ratio:.2f} ×"
        against = "" if peer == "lecture_dqn" else cost
        spread = f"{np.median(values):.0f} ({min(values):.0f} to {max(values):.0f}) {row.unit}"
        print(f"| {row.work} | {peer} | {spread} | {against} |", flush=True)


def peak_memory_of_enjoy() -> None:
    """Peak memory of ``rl_zoo3.enjoy`` for a model trained with a replay buffer of 1 000 000 transitions."""
    peaks = {}
    with tempfile.TemporaryDirectory() as folder:
        for algo in ("lecture_dqn", "dqn"):
            common = ["--algo", algo, "--env", "LunarLander-v3", "-f", folder]
            settings = ["-params", "buffer_size:1000000", "train_freq:4", "learning_starts:100"]
            run_zoo("train", *common, "-n", "2000", "--eval-freq", "-1", *settings)
            peaks[algo] = run_zoo("enjoy", *common, "--no-render", "-n", "500")
    ratio = peaks["lecture_dqn"] / peaks["dqn"]
    print(f"| peak memory of enjoy | lecture_dqn | {peaks['lecture_dqn']:.0f} MiB | |")
    print(f"| peak memory of enjoy | dqn | {peaks['dqn']:.0f} MiB | {ratio:.2f} × |", flush=True)


def run_zoo(command: str, *arguments: str) -> float:
    """Run a command of the zoo; gives its peak memory in MiB."""
    process = subprocess.Popen(
        [sys.executable, "-m", f"rl_zoo3.{command}", *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"rl_zoo3.{command} failed: {' '.join(arguments)}")
    return usage.ru_maxrss / 1024  # Linux counts in KiB


def describe_machine(threads: int) -> None:
    """What the figures were measured on."""
    import torch as th

    names = ("sb3-lecture-dqn", "stable-baselines3", "sbx-rl", "jax", "torch", "gymnasium", "numpy")
    versions = ", ".join(f"{name} {version_of(name)}" for name in names)
    machine = platform.processor() or platform.machine()
    print(f"{machine}, {os.cpu_count()} cores, Python {platform.python_version()}, {versions}")
    print(f"threads: {threads or f'each library its own ({th.get_num_threads()} in PyTorch)'}")
    if not importlib.util.find_spec("sbx"):
        print("left out: SBX is not installed (pip install sbx-rl)")
    if not th.cuda.is_available():
        print("left out: the CUDA rows, because there is no CUDA device")


def version_of(distribution: str) -> str:
    """The installed version of a distribution."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def main() -> None:
    """Measure and print the rows that were asked for."""
    import torch as th

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=[*ROWS, "memory"], default=[*ROWS, "memory"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0, help="PyTorch's threads (default: each library's own choice)")
    parser.add_argument("--output", type=Path, help="file for the rounds, one JSON line a row")
    parser.add_argument("--worker", nargs=2, metavar=("ROW", "PEER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(*arguments.worker, arguments.threads)
        return
    describe_machine(arguments.threads)
    print("\n| work | | median (range) | LectureDQN against it |\n|---|---|---|---|")
    for name in arguments.rows:
        if name == "memory":
            peak_memory_of_enjoy()
        elif not name.startswith("cuda") or th.cuda.is_available():
            rates = measure(name, arguments.rounds, arguments.threads)
            print_row(name, rates)
            if arguments.output:
                with arguments.output.open("a") as file:
                    file.write(json.dumps({"row": name, "threads": arguments.threads, "rates": rates}) + "\n")


if __name__ == "__main__":
    main()
