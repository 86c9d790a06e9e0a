"""
Where the time of a training step goes, beside SB3's DQN, and how it grows with batch, width, threads and environments.

::

    python benchmarks/anatomy.py parts       # one gradient step, part by part
    python benchmarks/anatomy.py growth      # batch × width × threads
    python benchmarks/anatomy.py threads     # one and two threads, idle and with one core busy
    python benchmarks/anatomy.py second      # what the second thread is given, idle and with one core busy
    python benchmarks/anatomy.py envs        # number of environments
    python benchmarks/anatomy.py choices     # what was chosen beside what was not
    python benchmarks/anatomy.py cuda        # the same on a CUDA device

Figures are microseconds, or rates; ratios within one table are what they are for. ``parts``, ``growth`` and ``choices`` give
the smallest of several medians of one thread's own time, whatever else the machine does; ``threads`` and ``second`` give what
one waits for, the former on average and the latter as a median; ``envs`` gives the best of three rates. All of these are on
the CPU. ``cuda`` gives averages, of what one waits for or, of Adam and the Nature CNN, of what the device does.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
import torch as th
from speed import busy_core, products_of_a_step
from stable_baselines3 import DQN
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import SimpleMultiObsEnv
from stable_baselines3.common.torch_layers import NatureCNN
from torch.nn import functional

from sb3_lecture_dqn import LectureDQN
from sb3_lecture_dqn.envs import GymVectorVecEnv
from sb3_lecture_dqn.fast import kernels, threads
from sb3_lecture_dqn.fast.acting import FastActing
from sb3_lecture_dqn.fast.adam import FlatAdam
from sb3_lecture_dqn.fast.graph import Capturer, capture
from sb3_lecture_dqn.fast.head import forward
from sb3_lecture_dqn.fast.products import ONEDNN_LINEAR
from sb3_lecture_dqn.fast.second_thread import SecondThread, Work

SETTINGS = {
    "learning_starts": 0,
    "buffer_size": 50_000,
    "batch_size": 128,
    "gradient_steps": 4,
    "train_freq": 4,
    "seed": 0,
    "device": "cpu",
}


def microseconds(work: Callable[[], object], repeat: int = 50, rounds: int = 7) -> float:
    """The time of one call: the best of several medians."""
    clock = time.thread_time if th.get_num_threads() == 1 else time.perf_counter
    medians = []
    for _ in range(rounds):
        times = []
        for _ in range(repeat):
            start = clock()
            work()
            times.append(clock() - start)
        medians.append(np.median(times))
    return 1e6 * float(min(medians))


@th.enable_grad()
def trained(algorithm: type[Any], width: int = 256, **settings: Any) -> Any:
    """A model in the middle of a run on LunarLander-v3."""
    policy_kwargs = {"net_arch": [width, width]}
    model = algorithm("MlpPolicy", gymnasium.make("LunarLander-v3"), policy_kwargs=policy_kwargs, **{**SETTINGS, **settings})
    return model.learn(400)


def parts_of_ours(batch_size: int = 128, n_steps: int = 4) -> dict[str, float]:
    """The parts of a gradient step of LectureDQN; what a training call of four steps shares counts a fourth."""
    model = trained(LectureDQN)
    update = model._current_fast_update()
    samples = model._sample_batch(n_steps * batch_size)
    batch = model._sample_batch(batch_size)
    q_values_of, targets = update.compiled_head.for_several(), th.randn(batch_size, 1)

    def read_transitions() -> object:
        return update._read(model._draw(n_steps * batch_size, update.kind_of_records), model.gamma)

    def q_values() -> th.Tensor:
        return th.from_numpy(q_values_of(batch.observations.numpy()))

    def q_values_and_gradient() -> object:
        return update._head_gradients_of(batch.observations, batch.actions, lambda: targets)

    with th.inference_mode():
        forward_time = microseconds(q_values)
        return {
            "sampling": microseconds(read_transitions) / n_steps,
            "Q(s', ·, ψ)": microseconds(lambda: update.next_q_values(samples.next_observations)) / n_steps,
            "Q(s, ·, θ)": forward_time,
            "its gradient": microseconds(q_values_and_gradient) - forward_time,
            "norm of the gradient": microseconds(update._squared_norm),
            "Adam": microseconds(update.adam.step),
            "all": microseconds(lambda: model.train(n_steps, batch_size)) / n_steps,
        }


def parts_of_sb3(batch_size: int = 128) -> dict[str, float]:
    """The parts of a gradient step of SB3's DQN."""
    model = trained(DQN)
    batch = model.replay_buffer.sample(batch_size)
    targets = th.randn(batch_size, 1)

    def loss() -> th.Tensor:
        return functional.smooth_l1_loss(model.q_net(batch.observations).gather(1, batch.actions.long()), targets)

    def forward_and_backward() -> None:
        model.policy.optimizer.zero_grad()
        loss().backward()  # type: ignore[no-untyped-call]

    def next_q_values() -> th.Tensor:
        with th.no_grad():
            q_values: th.Tensor = model.q_net_target(batch.next_observations)
            return q_values

    forward_time = microseconds(loss)
    return {
        "sampling": microseconds(lambda: model.replay_buffer.sample(batch_size)),
        "Q(s', ·, ψ)": microseconds(next_q_values),
        "Q(s, ·, θ)": forward_time,
        "its gradient": microseconds(forward_and_backward) - forward_time,
        "norm of the gradient": microseconds(lambda: th.nn.utils.clip_grad_norm_(model.policy.parameters(), 10)),
        "Adam": microseconds(model.policy.optimizer.step),
        "all": microseconds(lambda: model.train(4, batch_size)) / 4,
    }


def products(batch_size: int, width: int) -> float:
    """The four products of the middle layer that a step cannot avoid."""
    return microseconds(products_of_a_step(batch_size, width))


def print_parts() -> None:
    """The table of parts, on one thread."""
    th.set_num_threads(1)
    ours, theirs = parts_of_ours(), parts_of_sb3()
    print("| µs a gradient step (batch 128, one thread) | LectureDQN | SB3's DQN |\n|---|---|---|")
    for part, cost in ours.items():
        print(f"| {part} | {cost:.0f} | {theirs[part]:.0f} |")
    print(f"| the four products | {products(128, 256):.0f} | |")


def print_growth() -> None:
    """A gradient step by batch and width, on one thread."""
    th.set_num_threads(1)
    print("| batch | width | µs a step | × the products |\n|---|---|---|---|")
    for width in (64, 256, 1024):
        for batch_size in (32, 128, 512, 2048):
            model = trained(LectureDQN, width)
            cost = microseconds(lambda: model.train(4, batch_size), repeat=5, rounds=3) / 4  # noqa: B023
            print(f"| {batch_size} | {width} | {cost:.0f} | {cost / products(batch_size, width):.2f} |", flush=True)


def print_threads() -> None:
    """A gradient step by threads, idle and busy; the limit on small work is lifted for this."""
    threads.SMALL_WORK = 0
    print("| batch | one core busy | µs on 1 thread | µs on 2 threads | 2 threads take |\n|---|---|---|---|---|")
    for batch_size in (128, 512, 2048):
        model = trained(LectureDQN)
        for is_busy in (False, True):
            with busy_core(is_busy):
                costs = [_cost_on(n_threads, model, batch_size) for n_threads in (1, 2)]
            print(f"| {batch_size} | {is_busy} | {costs[0]:.0f} | {costs[1]:.0f} | {costs[1] / costs[0]:.2f} × |", flush=True)


def _cost_on(n_threads: int, model: Any, batch_size: int) -> float:
    th.set_num_threads(n_threads)
    start = time.perf_counter()  # what the user waits for, not what the threads compute
    for _ in range(50):
        model.train(4, batch_size)
    return 1e6 * (time.perf_counter() - start) / 200


def print_second_thread() -> None:
    """A gradient step by one thread and by two, blocks in turn."""
    th.set_num_threads(2)
    SecondThread.repetitions = 0  # this decides, not the measurement while training
    print("| batch | width | one core busy | µs by one thread | by two | two take |", "|---|---|---|---|---|---|", sep="\n")
    for batch_size, width in ((32, 64), (128, 64), (128, 256), (512, 256)):
        model = trained(LectureDQN, width)
        for is_busy in (False, True):
            with busy_core(is_busy):
                one, two = _costs_by_threads(model, batch_size)
            print(f"| {batch_size} | {width} | {is_busy} | {one:.0f} | {two:.0f} | {two / one:.2f} × |", flush=True)


def _costs_by_threads(model: Any, batch_size: int) -> list[float]:
    seconds: dict[Work, list[float]] = {Work.NOTHING: [], Work.GRADIENTS: []}
    for work in 15 * tuple(seconds):
        model._current_fast_update().second_thread._best = work
        for _ in range(10):
            start = time.perf_counter()
            model.train(4, batch_size)
            seconds[work].append(time.perf_counter() - start)
    return [1e6 * float(np.median(times)) / 4 for times in seconds.values()]


def print_envs() -> None:
    """Environment steps a second by the number of environments: RoboParking, one gradient step for 64 steps."""
    th.set_num_threads(1)
    print("| environments | LectureDQN on the vector environment | SB3's DQN on make_vec_env | |\n|---|---|---|---|")
    for n_envs in (1, 8, 64, 256):
        vector_env = GymVectorVecEnv(gymnasium.make_vec("RoboParking-v0", num_envs=n_envs))
        rates = [_steps_per_second(*run, n_envs) for run in ((LectureDQN, vector_env), (DQN, _scalar_envs(n_envs)))]
        print(f"| {n_envs} | {rates[0]:.0f} | {rates[1]:.0f} | {rates[0] / rates[1]:.1f} × |", flush=True)


def _scalar_envs(n_envs: int) -> Any:
    return make_vec_env("RoboParking-v0", n_envs=n_envs)


def _steps_per_second(algorithm: type[Any], env: Any, n_envs: int) -> float:
    settings = {**SETTINGS, "train_freq": max(64 // n_envs, 1), "gradient_steps": max(n_envs // 64, 1)}
    settings.update(exploration_fraction=1e-4, exploration_final_eps=0.1, target_update_interval=256)
    model = algorithm("MlpPolicy", env, policy_kwargs={"net_arch": [256, 256]}, **settings).learn(1_000)
    steps = 64 * 100
    rates = []
    for _ in range(3):
        start = time.perf_counter()
        model.learn(steps, reset_num_timesteps=False)
        rates.append(steps / (time.perf_counter() - start))
    return max(rates)


def step_of_cart_pole(algorithm: type[Any]) -> float:
    """A step in the vector environment that an algorithm makes of CartPole, always the same action."""
    env = algorithm("MlpPolicy", "CartPole-v1", buffer_size=1, device="cpu").get_env()
    env.reset()
    actions = np.array([0])
    return microseconds(lambda: env.step(actions))


def acting_on_a_dictionary(algorithm: type[Any]) -> float:
    """A greedy action from an image and a vector."""
    model = algorithm("MultiInputPolicy", SimpleMultiObsEnv(), buffer_size=100, device="cpu")
    observations = model.env.reset()
    if algorithm is LectureDQN:
        acting = FastActing.for_policy(model.policy)
        return microseconds(lambda: acting.greedy_actions(observations))
    return microseconds(lambda: model.policy.predict(observations, deterministic=True))


def costs_between_the_products() -> dict[str, float]:
    """What Numba compiles, and PyTorch's operations for the same."""
    update = trained(LectureDQN)._current_fast_update()
    layer = update.compiled_head.hidden_layers[1]
    outputs, gradient, overwritten, activations = (th.randn(128, 256) for _ in range(4))
    means, rstds = np.zeros(128, np.float32), np.ones(128, np.float32)
    settings = layer.norm_weight, layer.norm_bias, layer.epsilon, layer.negative_slope
    of_parameters = [np.empty(256, np.float32) for _ in range(3)]
    weight, bias = th.from_numpy(layer.norm_weight), th.from_numpy(layer.norm_bias)
    _, *mean_and_rstd = th.native_layer_norm(outputs, [256], weight, bias, 1e-5)

    def activate() -> None:
        functional.leaky_relu_(th.native_layer_norm(outputs, [256], weight, bias, 1e-5)[0], 0.01)

    def backward_by_a_kernel() -> None:
        overwritten.copy_(gradient)
        arrays = (tensor.numpy() for tensor in (overwritten, outputs, activations))
        of_layer = layer.norm_weight, layer.negative_slope
        kernels.normalise_and_activate_backward(*arrays, means, rstds, *of_layer, *of_parameters)

    def backward() -> None:
        th.ops.aten.leaky_relu_backward.grad_input(gradient, activations, 0.01, True, grad_input=overwritten)
        arguments = ([256], *mean_and_rstd, weight, bias, [True, True, True])
        th.ops.aten.native_layer_norm_backward.default(overwritten, outputs, *arguments)[0].sum(dim=0)

    return {
        "LayerNorm and LeakyReLU: a kernel": microseconds(
            lambda: kernels.normalise_and_activate(outputs.numpy(), *settings, activations.numpy(), means, rstds)
        ),
        "LayerNorm and LeakyReLU: PyTorch's operations": microseconds(activate),
        "their gradient and the bias's: a kernel": microseconds(backward_by_a_kernel),
        "their gradient and the bias's: PyTorch's operations": microseconds(backward),
    }


def costs_of_acting() -> dict[str, float]:
    """A greedy action from LunarLander's observation, and from an image and a vector."""
    model, sb3 = trained(LectureDQN), trained(DQN)
    update, acting = model._current_fast_update(), FastActing.for_policy(model.policy)
    by_numpy = FastActing.for_policy(model.policy)
    by_numpy.compiled_head = None
    observation = model.env.reset()

    def by_pytorch() -> np.ndarray:
        actions: np.ndarray = forward(update.head, th.from_numpy(observation)).argmax(dim=1).numpy()
        return actions

    return {
        "acting: kernels on the parameters": microseconds(lambda: acting.greedy_actions(observation)),
        "acting: numpy on the parameters": microseconds(lambda: by_numpy.greedy_actions(observation)),
        "acting: the same in PyTorch's operations": microseconds(by_pytorch),
        "acting: SB3's predict": microseconds(lambda: sb3.policy.predict(observation, deterministic=True)),
        "acting on an image and a vector: its encoder, then kernels": acting_on_a_dictionary(LectureDQN),
        "acting on an image and a vector: SB3's predict": acting_on_a_dictionary(DQN),
    }


def costs_of_adam() -> dict[str, float]:
    """A step of Adam on LunarLander's network."""
    model = trained(LectureDQN)
    update = model._current_fast_update()
    fused = FlatAdam(th.optim.Adam(model.q_net.parameters()), update.theta, update.gradient)
    parameter = th.nn.Parameter(update.theta.clone())
    parameter.grad = update.gradient.clone()
    adams = [th.optim.Adam([parameter], fused=is_fused, foreach=False) for is_fused in (True, False)]
    return {
        "Adam: a kernel": microseconds(update.adam.step),
        "Adam: PyTorch's fused kernel": microseconds(fused.step),
        "Adam: torch.optim.Adam(fused=True), one tensor": microseconds(adams[0].step),
        "Adam: torch.optim.Adam(), one tensor": microseconds(adams[1].step),
    }


def costs_of_products() -> dict[str, float]:
    """The products of a batch of 128 with a layer, by the libraries that there are."""
    inputs, gradient = th.randn(128, 256), th.randn(128, 256)
    weight, zeros, outputs = th.randn(256, 256), np.zeros(256, np.float32), np.empty((128, 256), np.float32)
    weight_gradient = np.empty((256, 256), np.float32)

    def by_a_kernel() -> None:
        kernels.multiply_transposed(inputs.numpy(), weight.numpy(), zeros, outputs)

    def gradient_by_a_kernel() -> None:
        kernels.multiply(gradient.numpy().T, inputs.numpy(), zeros, weight_gradient)

    costs = {
        "the product with the middle layer: a kernel": microseconds(by_a_kernel),
        "the gradient of its weight: a kernel": microseconds(gradient_by_a_kernel),
        "the product with the middle layer: MKL": microseconds(lambda: th.mm(inputs, weight.t())),
        "the gradient of its weight: MKL": microseconds(lambda: th.mm(gradient.t(), inputs)),
    }
    if ONEDNN_LINEAR is not None:
        empty = (None, "none", [], "")
        costs["the product with the middle layer: oneDNN"] = microseconds(lambda: ONEDNN_LINEAR(inputs, weight, *empty))
        costs["the gradient of its weight: oneDNN"] = microseconds(lambda: ONEDNN_LINEAR(gradient.t(), inputs.t(), *empty))
    return costs


def print_choices() -> None:
    """What was chosen beside what was not, on one thread."""
    th.set_num_threads(1)
    sb3 = trained(DQN)
    replay_buffer = trained(LectureDQN).replay_buffer
    with th.no_grad():
        costs = {
            **costs_of_acting(),
            **costs_between_the_products(),
            **costs_of_adam(),
            "128 of 50 000 transitions: one record each": microseconds(lambda: replay_buffer.sample(128)),
            "128 of 50 000 transitions: SB3's arrays": microseconds(lambda: sb3.replay_buffer.sample(128)),
            "a step of CartPole-v1 in a vector environment of one": step_of_cart_pole(LectureDQN),
            "a step of CartPole-v1 in SB3's vector environment": step_of_cart_pole(DQN),
            **costs_of_products(),
        }
    print_costs(costs)


def waited_for(work: Callable[[], object], repeat: int = 200) -> float:
    """The time of one call, and of what it leaves the CUDA device to do."""
    for _ in range(20):
        work()
    th.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeat):
        work()
    th.cuda.synchronize()
    return 1e6 * (time.perf_counter() - start) / repeat


def on_device(work: Callable[[], object], repeat: int = 20) -> float:
    """What a CUDA device takes, without the host: the time of one of many calls in a graph."""
    device = th.device("cuda")
    for _ in range(3):
        work()
    th.cuda.synchronize()
    replay, _ = capture(lambda: [work() for _ in range(repeat)], device)
    return waited_for(replay, 20) / repeat


def of_nature_cnn(memory_format: th.memory_format, n_images: int) -> float:
    """Forward and backward through SB3's encoder for images."""
    space = gymnasium.spaces.Box(0, 255, (4, 84, 84), np.uint8)
    encoder: Any = NatureCNN(space).to("cuda").to(memory_format=memory_format)
    images = th.rand(n_images, *space.shape, device="cuda")
    gradient, parameters = th.randn(n_images, 512, device="cuda"), list(encoder.parameters())
    return on_device(lambda: th.autograd.grad(encoder(images), parameters, gradient), 4)


def print_cuda() -> None:
    """What was chosen beside what was not, on a CUDA device."""
    if not th.cuda.is_available():
        raise SystemExit("there is no CUDA device")
    model = trained(LectureDQN, device="cuda")
    update, acting, observation = model._current_fast_update(), model._fast_acting, model.env.reset()
    adam = update.adam
    fused = FlatAdam(th.optim.Adam(model.q_net.parameters()), update.theta, update.gradient)
    fused.step_count = th.ones((), device="cuda")
    coefficients = adam.coefficients(1).to("cuda")

    def step_of_adam() -> None:
        adam.begin(coefficients)
        adam.step()

    costs = {
        "a gradient step: four in a graph": waited_for(lambda: model.train(4, 128)) / 4,
        "a gradient step: one in a graph": waited_for(lambda: model.train(1, 128)),
        "acting: a graph": waited_for(lambda: acting.greedy_actions(observation)),
        "acting: SB3's predict": waited_for(lambda: model.policy.predict(observation, deterministic=True)),
        "Adam: plain operations": on_device(step_of_adam),
        "Adam: the fused kernel": on_device(fused.step),
    }
    for n_images in (128, 4096):
        kinds = {"channels side by side": th.channels_last, "channels apart": th.contiguous_format}
        costs |= {f"Nature CNN, {n_images} images: {name}": of_nature_cnn(kind, n_images) for name, kind in kinds.items()}
    Capturer.can_capture = False
    model = trained(LectureDQN, device="cuda")
    costs["a gradient step: operation by operation"] = waited_for(lambda: model.train(4, 128)) / 4
    print_costs(costs)


def print_costs(costs: dict[str, float]) -> None:
    """A table of microseconds."""
    print("| | µs |\n|---|---|")
    for choice, cost in costs.items():
        print(f"| {choice} | {cost:.0f} |")


def main() -> None:
    """Print the table that was asked for."""
    tables = {
        "parts": print_parts,
        "growth": print_growth,
        "threads": print_threads,
        "second": print_second_thread,
        "envs": print_envs,
        "choices": print_choices,
        "cuda": print_cuda,
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=list(tables))
    tables[parser.parse_args().table]()


if __name__ == "__main__":
    main()
