"""Callbacks that watch a run for what the lecture warns of."""

import copy
from typing import Any

import gymnasium
import numpy as np
import torch as th
from stable_baselines3.common.callbacks import BaseCallback, CallbackList, EvalCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.type_aliases import GymEnv
from stable_baselines3.common.vec_env import (
    VecEnv,
    VecEnvWrapper,
    VecMonitor,
    VecNormalize,
    VecTransposeImage,
    sync_envs_normalization,
    unwrap_vec_normalize,
)

from sb3_lecture_dqn.validation import check_int_at_least

DEFAULT_EVAL_FREQ = 10_000


class OverestimationCallback(BaseCallback):
    """
    Logs by how much Q overestimates (L8, L14): the gap between Q(s₀, a₀) and the return that π then collects.

    Every evaluation plays episodes with the greedy policy π from new initial states s₀, with a₀ = π(s₀), and logs three means
    over the episodes: ``eval/first_q_value``, Q(s₀, a₀, θ); ``eval/discounted_return``, Σ γᵗ rₜ up to the first d; and
    ``eval/overestimation``, the first minus the second, above 0 where Q promises more than π gets. All three are in the unit
    of the rewards that the model trains on.

    With ``handle_timeout_termination=True`` Q also counts what would come after a truncation, and the return does not.

    In a hyperparameter file of rl_zoo3::

        callback: sb3_lecture_dqn.callbacks.OverestimationCallback

    :param eval_env: The environment to play in. ``None`` takes that of the run's ``EvalCallback``, whose own episodes then
        draw other initial states than without this callback; or, without one, makes the training environment again by its id
    :param eval_freq: Number of steps of each training environment between two evaluations, at least 1; ``None`` takes that of
        the run's ``EvalCallback``, or 10 000 without one that evaluates
    :param n_eval_episodes: Number of episodes in an evaluation, at least 1
    :param verbose: 0 for no output, 1 for a line at each evaluation (the model's logger writes the values in any case)
    :raises ValueError: if a number is out of its range; or, when training starts, if ``eval_env`` is ``None`` and the training
        environment cannot be made again by its id
    """

    def __init__(
        self,
        eval_env: GymEnv | None = None,
        eval_freq: int | None = None,
        n_eval_episodes: int = 5,
        verbose: int = 0,
    ) -> None:
        super().__init__(verbose)
        check_int_at_least("n_eval_episodes", n_eval_episodes, 1)
        if eval_freq is not None:
            check_int_at_least("eval_freq", eval_freq, 1)
        self.eval_env = eval_env
        self.eval_freq = eval_freq
        self.n_eval_episodes = n_eval_episodes
        self._made_env: VecEnv | None = None

    def _on_training_start(self) -> None:
        eval_callback = _find_eval_callback(self.locals["callback"])
        of_callback = eval_callback.eval_freq if eval_callback is not None else 0
        self._steps_between = self.eval_freq or (of_callback if of_callback > 0 else DEFAULT_EVAL_FREQ)
        if self.eval_env is not None:
            self._env = self.model._wrap_env(self.eval_env, monitor_wrapper=False)
        elif eval_callback is not None:
            self._env = eval_callback.eval_env
        else:
            self._made_env = self._env = self.model._wrap_env(_make_again(self.training_env))
            self._made_env.seed(self.model.seed)

    def _on_step(self) -> bool:
        if self.n_calls % self._steps_between == 0:
            self._evaluate()
        return True

    def _on_training_end(self) -> None:
        if self._made_env is not None:
            self._made_env.close()
            self._made_env = None

    def _evaluate(self) -> None:
        if self.model.get_vec_normalize_env() is not None:
            sync_envs_normalization(self.training_env, self._env)
        watch = _DiscountedReturns(self.model, self._env)
        evaluate_policy(self.model, self._env, self.n_eval_episodes, deterministic=True, callback=watch, warn=False)
        q_value, discounted_return = float(np.mean(watch.first_q_values)), float(np.mean(watch.returns))
        gap = q_value - discounted_return
        if self.verbose >= 1:
            print(
                f"Step {self.num_timesteps}: Q(s0, a0) = {q_value:.2f}, discounted return = {discounted_return:.2f}, "
                f"overestimation = {gap:.2f}"
            )
        self.logger.record("eval/first_q_value", q_value)
        self.logger.record("eval/discounted_return", discounted_return)
        self.logger.record("eval/overestimation", gap)
        self.logger.record("time/total_timesteps", self.num_timesteps, exclude="tensorboard")
        self.logger.dump(self.num_timesteps)


class _DiscountedReturns:
    """
    Follows the episodes of ``evaluate_policy``, which calls it after each step of each environment.

    :param model: The model that is evaluated
    :param env: The environments that it is evaluated in
    """

    def __init__(self, model: Any, env: VecEnv) -> None:
        self.model = model
        self.first_q_values: list[float] = []
        self.returns: list[float] = []
        self._return_so_far = np.zeros(env.num_envs)
        self._discount = np.ones(env.num_envs)  # γᵗ
        self._starts_episode = np.ones(env.num_envs, dtype=bool)
        self._reward_scale = _reward_normalizer(model.get_vec_normalize_env(), env)

    def __call__(self, locals_: dict[str, Any], globals_: dict[str, Any]) -> None:
        if "is_pause" in locals_["info"]:  # of a GymVectorVecEnv: a step between two episodes
            return
        env_index = locals_["i"]
        if self._starts_episode[env_index]:
            self.first_q_values.append(self._q_value(locals_["observations"], locals_["actions"], env_index))
        reward = locals_["reward"] if self._reward_scale is None else self._reward_scale.normalize_reward(locals_["reward"])
        self._return_so_far[env_index] += self._discount[env_index] * reward
        self._discount[env_index] *= self.model.gamma
        self._starts_episode[env_index] = locals_["done"]
        if locals_["done"]:
            self.returns.append(self._return_so_far[env_index])
            self._return_so_far[env_index], self._discount[env_index] = 0.0, 1.0

    def _q_value(self, observations: Any, actions: np.ndarray, env_index: int) -> float:
        observation_tensors, _ = self.model.policy.obs_to_tensor(observations)
        with th.no_grad():
            return float(self.model.q_net(observation_tensors)[env_index, int(actions[env_index])])


def _reward_normalizer(training: VecNormalize | None, eval_env: VecEnv) -> VecNormalize | None:
    """What the rewards of the evaluation have to pass to be in the unit of those that the model trains on."""
    evaluation = unwrap_vec_normalize(eval_env)
    is_normalized = evaluation is not None and evaluation.norm_reward
    return training if training is not None and training.norm_reward and not is_normalized else None


def _find_eval_callback(callback: BaseCallback) -> EvalCallback | None:
    if isinstance(callback, CallbackList):
        found = (_find_eval_callback(child) for child in callback.callbacks)
        return next((child for child in found if child is not None), None)
    return callback if isinstance(callback, EvalCallback) else None


def _make_again(training_env: VecEnv) -> gymnasium.Env[Any, Any]:
    """
    A new environment like those trained in.

    :param training_env: The environments trained in
    :raises ValueError: if an id is not enough to make it
    """
    vec_env = training_env
    while isinstance(vec_env, (VecMonitor, VecTransposeImage)):  # these are put around the new one too, or change nothing
        vec_env = vec_env.venv
    if isinstance(vec_env, VecEnvWrapper):
        raise ValueError(f"eval_env must be given when the training environment is wrapped in {type(vec_env).__name__}")
    spec = copy.deepcopy(vec_env.get_attr("spec")[0])
    if spec is None:
        raise ValueError("eval_env must be given when the training environment has no id in Gymnasium")
    spec.additional_wrappers = tuple(wrapper for wrapper in spec.additional_wrappers if wrapper.name != "Monitor")
    for wrapper in spec.additional_wrappers:
        if wrapper.kwargs is None:
            raise ValueError(f"eval_env must be given when the training environment is wrapped in {wrapper.name}")
    # a native vector environment has the arguments of gymnasium.make_vec there
    spec.max_episode_steps = spec.kwargs.pop("max_episode_steps", spec.max_episode_steps)
    for name in ("render_mode", "num_envs", "vectorization_mode", "autoreset_mode"):
        spec.kwargs.pop(name, None)
    return gymnasium.make(spec)
