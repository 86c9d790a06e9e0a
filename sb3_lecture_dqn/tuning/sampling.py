"""A sampler whose draws depend on the trial alone, not on what was drawn before it."""

import zlib
from collections.abc import Callable
from typing import Any

from optuna import Study
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState


class RepeatableSampler(BaseSampler):
    """
    Draws each trial, and each value that is drawn by itself, from a seed of its own.

    A process that dies while it stores a trial's values leaves some of them there. Whoever retries the trial keeps
    these; with one stream of random numbers all the others would be different ones.

    :param make_sampler: Makes the sampler that really draws, from a seed
    :param seed: What the seeds of all trials are made of
    """

    def __init__(self, make_sampler: Callable[[int], BaseSampler], seed: int) -> None:
        self._make_sampler = make_sampler
        self._seed = seed
        self._sampler = make_sampler(seed)

    def _sampler_for(self, trial: FrozenTrial, name: str = "") -> BaseSampler:
        return self._make_sampler(zlib.crc32(f"{self._seed} {trial.number} {name}".encode()))

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        """
        Turn to the trial, which has just begun.

        :param study: Its study
        :param trial: The trial
        """
        self._sampler = self._sampler_for(trial)
        self._sampler.before_trial(study, trial)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """
        Say which values are drawn together.

        :param study: The trial's study
        :param trial: The trial
        :return: The distributions of these values by name
        """
        return self._sampler.infer_relative_search_space(study, trial)

    def sample_relative(self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]) -> dict[str, Any]:
        """
        Draw the values that are drawn together.

        :param study: The trial's study
        :param trial: The trial
        :param search_space: What :meth:`infer_relative_search_space` said
        :return: The values by name
        """
        return self._sampler.sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """
        Draw a value by itself.

        :param study: The trial's study
        :param trial: The trial
        :param param_name: Name of the value
        :param param_distribution: What it is drawn from
        :return: The value
        """
        return self._sampler_for(trial, param_name).sample_independent(study, trial, param_name, param_distribution)

    def after_trial(self, study: Study, trial: FrozenTrial, state: TrialState, values: Any) -> None:
        """
        Let the sampler note what it wants to know of a trial that is over.

        :param study: The trial's study
        :param trial: The trial
        :param state: How it ended
        :param values: Its score, in a list, or ``None``
        """
        self._sampler.after_trial(study, trial, state, values)
