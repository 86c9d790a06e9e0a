"""Means of training metrics that do not make the program wait for the device."""

from collections.abc import Callable, Sequence
from typing import Any

import torch as th


class RunningMeans:
    """
    Means of scalars, which are computed and read from the device only when asked for.

    :param names: Names of the metrics
    """

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names
        self._sums: th.Tensor | None = None
        self._count = 0
        self._not_summed: list[tuple[int, Callable[[], Sequence[th.Tensor]]]] = []

    def add(self, count: int, values: Callable[[], Sequence[th.Tensor]]) -> None:
        """
        Add values for each metric.

        :param count: Number of values of each metric
        :param values: Gives tensors of ``count`` values each, without gradient, in the order of the names
        """
        self._not_summed.append((count, values))

    def _sum(self) -> None:
        for count, values in self._not_summed:
            sums = th.stack([value.view(count) for value in values()]).sum(dim=1)
            self._sums = sums if self._sums is None else self._sums.add_(sums)
            self._count += count
        self._not_summed = []

    def __getstate__(self) -> dict[str, Any]:
        self._sum()
        return {name: value for name, value in self.__dict__.items() if name != "_not_summed"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _not_summed=[])

    def pop(self) -> dict[str, float]:
        """
        The means since the last call; this waits for the device.

        :return: Mean of each metric by name, or nothing if no value was added
        """
        self._sum()
        if self._sums is None:
            return {}
        means = (self._sums / self._count).tolist()
        self._sums, self._count = None, 0
        return dict(zip(self.names, means, strict=True))
