"""
L5: Q : S → R^|A| gives the values of all actions in one forward pass; Q : S × A → R takes |A| passes.

::

    python examples/one_forward_pass.py
"""

import time
from collections.abc import Callable

import matplotlib.pyplot as plt
import numpy as np
import torch as th
from _plots import BLUE, GREEN, ORANGE, parse_folder, plot_band, save_picture
from gymnasium import spaces
from stable_baselines3.common.torch_layers import FlattenExtractor

from sb3_lecture_dqn import QNetwork

STATE_SIZE = 8
N_ACTIONS = (1, 2, 5, 10, 20, 50, 100)
REPEATS = 100


def make_network(input_size: int, n_actions: int) -> QNetwork:
    """The lecture's network: 2 × 256, LayerNorm, LeakyReLU."""
    inputs = spaces.Box(-np.inf, np.inf, (input_size,), np.float32)
    return QNetwork(inputs, spaces.Discrete(n_actions), FlattenExtractor(inputs), input_size)


def milliseconds(choose_action: Callable[[], th.Tensor]) -> float:
    """The CPU time of a call: what other processes take in between does not count."""
    start = time.thread_time()
    choose_action()
    return 1000 * (time.thread_time() - start)


def measure(n_actions: int) -> np.ndarray:
    """
    The times for argmax_a Q(s, a): by one pass, by |A| passes, and by one pass over a batch of |A| pairs (s, a).

    :param n_actions: |A|
    :return: Milliseconds, shape (3, REPEATS)
    """
    state = th.randn(1, STATE_SIZE)
    all_actions = th.eye(n_actions)
    pairs = th.cat([state.expand(n_actions, -1), all_actions], dim=1)  # (s, a), with a as a one-hot vector
    of_state = make_network(STATE_SIZE, n_actions)
    of_pair = make_network(STATE_SIZE + n_actions, 1)
    ways = (
        lambda: of_state(state).argmax(),
        lambda: th.stack([of_pair(pair[None]) for pair in pairs]).argmax(),
        lambda: of_pair(pairs).argmax(),
    )
    with th.no_grad():
        # In turn, so that a machine that becomes slower does so for all three; the first round does not count.
        rounds = [[milliseconds(way) for way in ways] for _ in range(REPEATS + 1)]
    return np.array(rounds[1:]).T


def main() -> None:
    """Measure, print, draw."""
    folder = parse_folder(__doc__)
    th.manual_seed(0)
    one_pass, many_passes, batch = np.array([measure(n) for n in N_ACTIONS]).swapaxes(0, 1)
    medians = [np.median(times[-1]) for times in (one_pass, many_passes, batch)]
    print(
        f"|A| = {N_ACTIONS[-1]}: one forward pass takes {medians[0]:.2f} ms; |A| passes take {medians[1]:.1f} ms, "
        f"{medians[1] / medians[0]:.0f} times as long; the |A| pairs in one batch take {medians[2]:.2f} ms, "
        f"{medians[2] / medians[0]:.1f} times as long."
    )

    figure, axes = plt.subplots(figsize=(6.5, 4))
    for times, label, color in (
        (many_passes, "Q : S × A → R, |A| passes", ORANGE),
        (batch, "Q : S × A → R, one pass over a batch of |A| pairs", GREEN),
        (one_pass, "Q : S → R^|A|, one pass (the lecture's)", BLUE),
    ):
        # The middle half of the repeats: now and then another process empties the caches.
        quartiles = np.percentile(times, [25, 50, 75], axis=1)
        plot_band(axes, N_ACTIONS, quartiles, label, color)
    axes.set(xscale="log", yscale="log", xlabel="number of actions |A|", ylabel="ms of CPU time for one argmax Q(s, a)")
    axes.set_title(f"The time to choose an action (median and quartiles of {REPEATS}, one thread)")
    axes.legend()
    save_picture(figure, folder / "one_forward_pass.png")


if __name__ == "__main__":
    main()
