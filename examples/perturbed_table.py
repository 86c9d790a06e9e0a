"""
L14: raise one entry of a table and of a network that holds the same table; in the network, the others move too.

::

    python examples/perturbed_table.py
"""

import matplotlib.pyplot as plt
import numpy as np
import torch as th
from _plots import parse_folder, save_picture
from gymnasium import spaces
from matplotlib.axes import Axes
from stable_baselines3.common.torch_layers import FlattenExtractor

from sb3_lecture_dqn import QNetwork
from sb3_lecture_dqn.lecture_dqn import squared_td_error

# The slide's table. Rows are actions, columns states.
TABLE = np.array([[1, 3, 2], [7, 4, 5], [1, 0, 0]], dtype=np.float32)
RAISED_TO = 5.0
SEEDS = range(10)
# A state is a number, as on the slide, or a vector of its own, which shares as little as a network can.
ENCODINGS = {"s as a number": th.tensor([[0.0], [1.0], [2.0]]), "s as a one-hot vector": th.eye(3)}


def raise_one_entry(states: th.Tensor, seed: int) -> tuple[np.ndarray, int]:
    """
    Fit the lecture's network to the table, then take gradient steps on the entry (s = 0, a = 0) alone until it is raised.

    :param states: Encodings of the three states
    :param seed: Seed of the first parameters
    :return: The table of the network afterwards, and how many steps that took
    """
    th.manual_seed(seed)
    inputs = spaces.Box(0, 2, (states.shape[1],), np.float32)
    network = QNetwork(inputs, spaces.Discrete(3), FlattenExtractor(inputs), states.shape[1])
    optimizer = th.optim.Adam(network.parameters(), lr=5e-4)
    table = th.as_tensor(TABLE.T)
    while True:
        loss = squared_td_error(network(states), table)
        if loss < 1e-6:
            break
        step(optimizer, loss)

    optimizer = th.optim.Adam(network.parameters(), lr=5e-4)
    n_steps = 0
    while (entry := network(states[:1])[:, :1]) < RAISED_TO:
        step(optimizer, squared_td_error(entry, th.full((1, 1), RAISED_TO + 0.1)))
        n_steps += 1
    return network(states).detach().numpy().T, n_steps


def step(optimizer: th.optim.Optimizer, loss: th.Tensor) -> None:
    """One gradient step."""
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def draw_table(axes: Axes, title: str, values: np.ndarray, spread: np.ndarray | None = None) -> None:
    """A table of numbers, coloured by how far each is from the slide's."""
    axes.imshow(values - TABLE, cmap="RdBu_r", vmin=-4, vmax=4)
    for (a, s), value in np.ndenumerate(values):
        text = f"{value:.0f}" if spread is None else f"{value:.1f}\n± {spread[a, s]:.1f}"
        is_dark = abs(value - TABLE[a, s]) > 2.5
        axes.text(s, a, text, ha="center", va="center", fontsize=11, color="white" if is_dark else "black")
    axes.set_xticks(range(3), [f"s = {s}" for s in range(3)])
    axes.set_yticks(range(3), [f"a = {a}" for a in range(3)])
    axes.tick_params(length=0)
    axes.set_title(title)


def main() -> None:
    """Raise the entry for several seeds, print what else moved, draw the tables."""
    folder = parse_folder(__doc__)
    figure, panels = plt.subplots(1, 4, figsize=(11, 3.1))
    raised = TABLE.copy()
    raised[0, 0] = RAISED_TO
    draw_table(panels[0], "The table", TABLE)
    draw_table(panels[1], "The table, (0, 0) raised to 5", raised)
    others = np.ones_like(TABLE, dtype=bool)
    others[0, 0] = False
    for axes, (name, states) in zip(panels[2:], ENCODINGS.items(), strict=True):
        tables, n_steps = zip(*(raise_one_entry(states, seed) for seed in SEEDS), strict=True)
        after = np.array(tables)
        moved = np.abs(after - TABLE)[:, others]
        draw_table(axes, f"A network, {name}", after.mean(axis=0), after.std(axis=0))
        print(
            f"{name}: {np.mean(n_steps):.0f} gradient steps on (s = 0, a = 0) alone raised it by 4; the other eight entries "
            f"moved by {moved.mean():.2f} on average and by {moved.max(axis=1).mean():.2f} at most "
            f"(means over {len(SEEDS)} seeds); in the table they moved by 0."
        )
    figure.suptitle(f"Raising one entry by 4 (networks: mean ± std over {len(SEEDS)} seeds; red rose, blue fell)")
    save_picture(figure, folder / "perturbed_table.png")


if __name__ == "__main__":
    main()
