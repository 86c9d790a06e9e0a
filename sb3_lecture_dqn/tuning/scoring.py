"""What a trial is worth: the mean over several seeds, because one seed proves little; pruned after the first."""

import copy
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import optuna
from stable_baselines3.common.utils import set_random_seed

DEFAULT_SEEDS = 2
#: Every trial of every study trains on this seed and those that follow: far from the seeds that the winner is checked with.
FIRST_SEED = 10_000


class LaterSeed:
    """
    A trial as the seeds after the first see it: they draw the same values, report nothing and are not pruned midway.

    :param trial: The Optuna trial
    """

    def __init__(self, trial: optuna.Trial) -> None:
        self._trial = trial

    def __getattr__(self, name: str) -> Any:
        return getattr(self._trial, name)

    def report(self, value: float, step: int) -> None:
        """
        Do nothing: the steps are those of the first seed.

        :param value: Without effect
        :param step: Without effect
        """

    def should_prune(self) -> bool:
        """
        Go on.

        :return: ``False``
        """
        return False


def score_on_seeds(objective: Callable[[Any, Any], float], manager: Any, trial: optuna.Trial, n_seeds: int) -> float:
    """
    Score a trial by rl_zoo3's objective on several seeds.

    The first seed reports and is pruned as in rl_zoo3. After each further one but the last, the mean so far is reported as
    one more step, and decides about the rest. The scores of the seeds stay in the trial's user attribute ``scores``.

    :param objective: ``ExperimentManager.objective`` as rl_zoo3 wrote it
    :param manager: The ``ExperimentManager``
    :param trial: The Optuna trial
    :param n_seeds: Number of seeds
    :return: The mean over the seeds of the last evaluation's mean return
    :raises optuna.TrialPruned: if the trial is not worth its remaining seeds
    """
    scores: list[float] = []
    for index in range(n_seeds):
        one_seed = _for_seed(manager, FIRST_SEED + index)
        scores.append(float(objective(one_seed, trial if index == 0 else LaterSeed(trial))))
        trial.set_user_attr("scores", scores)
        if 0 < index < n_seeds - 1:
            trial.report(float(np.mean(scores)), manager.n_evaluations + index)
            if trial.should_prune():
                raise optuna.TrialPruned()
    return float(np.mean(scores))


def _for_seed(manager: Any, seed: int) -> Any:
    one_seed = copy.copy(manager)
    one_seed.seed = seed  # of the environments
    if manager.optimization_log_path is not None:
        one_seed.optimization_log_path = os.path.join(manager.optimization_log_path, f"seed_{seed}")
    set_random_seed(seed)  # the zoo makes the model without a seed: it then draws from the global generators
    return one_seed
