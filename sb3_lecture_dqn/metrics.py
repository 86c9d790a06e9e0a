"""Means of training metrics that do not make the program wait for the device."""

import torch as th


class RunningMeans:
    """
    Means of scalars, summed on the device where they are computed and read from it only when asked for.

    :param names: Names of the metrics
    """

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names
        self._sums: th.Tensor | None = None
        self._count = 0

    def add(self, count: int, *values: th.Tensor) -> None:
        """
        Add values for each metric.

        :param count: Number of values of each metric
        :param values: Tensors of ``count`` values each, in the order of the names
        """
        sums = th.stack(values).detach().view(len(values), count).sum(dim=1)
        self._sums = sums if self._sums is None else self._sums.add_(sums)
        self._count += count

    def pop(self) -> dict[str, float]:
        """
        The means since the last call; this waits for the device.

        :return: Mean of each metric by name, or nothing if no value was added
        """
        if self._sums is None:
            return {}
        means = (self._sums / self._count).tolist()
        self._sums, self._count = None, 0
        return dict(zip(self.names, means, strict=True))
