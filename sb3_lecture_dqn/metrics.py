"""Means of training metrics that do not make the program wait for the device."""

from collections.abc import Callable, Sequence
from itertools import groupby
from operator import itemgetter
from typing import Any

import torch as th

#: Gives the values of the metrics from what several additions kept: a row for each name, without gradient.
MetricsOf = Callable[[Sequence[Any]], th.Tensor]


def stack_metrics(kept: Sequence[Sequence[th.Tensor]]) -> th.Tensor:
    """
    The values of the metrics, where each addition keeps one scalar of each.

    :param kept: The scalars of each addition, in the order of the names
    :return: The values, shape (number of metrics, number of additions)
    """
    return th.stack([th.stack(values) for values in zip(*kept, strict=True)])


class RunningMeans:
    """
    Means of scalars, which are computed and read from the device only when asked for.

    :param names: Names of the metrics
    """

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names
        self._sums: th.Tensor | None = None
        self._count = 0
        self._not_summed: list[tuple[MetricsOf, Any]] = []

    def add(self, metrics_of: MetricsOf, kept: Any) -> None:
        """
        Add values for each metric.

        :param metrics_of: What computes the values when they are asked for, of all that was kept for it at once
        :param kept: What it needs
        """
        self._not_summed.append((metrics_of, kept))

    def _sum(self) -> None:
        for metrics_of, additions in groupby(self._not_summed, itemgetter(0)):
            values = metrics_of([kept for _, kept in additions])
            sums = values.sum(dim=1)
            self._sums = sums if self._sums is None else sums + self._sums.to(sums.device)
            self._count += values.shape[1]
        self._not_summed = []

    def __getstate__(self) -> dict[str, Any]:
        self._sum()
        sums = None if self._sums is None else self._sums.cpu()  # it may go on on another device
        return {**{name: value for name, value in self.__dict__.items() if name != "_not_summed"}, "_sums": sums}

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
