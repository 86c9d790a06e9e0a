"""
The lecture's DQN, in the order in which the lecture builds it.

The first part is its mathematics, as functions that hold no state. The second part, :class:`LectureDQN`, is the bookkeeping
that Stable-Baselines3 expects around them. Symbols: θ online parameters, ψ target parameters, d the done flag, π the greedy
policy, π_E the exploration policy, D the replay buffer, B a training batch.

The lecture's train loop (L15) is ``OffPolicyAlgorithm.learn``, which SB3 provides; each line of it lands here::

    collected_data = collect_training_data(env, pi_e)   # predict(deterministic=False), then SB3's collect_rollouts
    dataset += collected_data                           # SB3's ReplayBuffer.add
    train_data = dataset.sample()                       # _sample_batch
    theta = train(Q, theta, psi, train_data)            # train
    psi = theta                                         # _on_step, every target_update_interval steps
    metrics = evaluate(env, pi)                         # predict(deterministic=True), by EvalCallback
"""

import inspect
import io
import pickle
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import gymnasium
import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3 import HerReplayBuffer
from stable_baselines3.common.buffers import NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.save_util import load_from_zip_file
from stable_baselines3.common.type_aliases import (
    GymEnv,
    MaybeCallback,
    ReplayBufferSamples,
    RolloutReturn,
    Schedule,
    TensorDict,
)
from stable_baselines3.common.utils import ConstantSchedule, LinearSchedule, get_parameters_by_name, polyak_update
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

from sb3_lecture_dqn.divergence import DivergenceWatch, check_parameters
from sb3_lecture_dqn.envs.single_vec_env import SingleVecEnv
from sb3_lecture_dqn.fast.acting import FastActing
from sb3_lecture_dqn.fast.compiling import Use, can_compile
from sb3_lecture_dqn.fast.device_copy import DrawnRows
from sb3_lecture_dqn.fast.graph import GraphActing, GraphUpdate, lay_out_for_device
from sb3_lecture_dqn.fast.head import is_own_method, read_head
from sb3_lecture_dqn.fast.threads import threads_for
from sb3_lecture_dqn.fast.update import FastUpdate, hard_copy, has_vector_observations, rows_of
from sb3_lecture_dqn.metrics import MetricsOf, RunningMeans, stack_metrics
from sb3_lecture_dqn.model_files import (
    MissingPolicyError,
    add_checksum_behind,
    add_checksums,
    check_model_file,
    check_replay_buffer_file,
    replace_when_written,
    with_ending,
)
from sb3_lecture_dqn.policies import CnnPolicy, LectureDQNPolicy, MlpPolicy, MultiInputPolicy, QNetwork
from sb3_lecture_dqn.replay_buffer import UNIFORM_BUFFERS, ContiguousReplayBuffer, end_last_episodes, repeat_last_transitions
from sb3_lecture_dqn.resume.checkpoints import record_for_checkpoints
from sb3_lecture_dqn.seeding import make_generator, numpy_draws_from
from sb3_lecture_dqn.validation import (
    NUMERIC_ARGUMENTS,
    as_plain_number,
    check_above_zero,
    check_action_space,
    check_at_least,
    check_in_unit_interval,
    check_int_at_least,
    check_observation_space,
    check_policy_class,
    check_replay_buffer_class,
    check_state_dict,
    check_train_freq,
)

SelfLectureDQN = TypeVar("SelfLectureDQN", bound="LectureDQN")

#: Falls to 0 over the training, so that the final policy is not the last one of many that come and go.
DEFAULT_LEARNING_RATE = LinearSchedule(5e-4, 0.0, end_fraction=1.0)

# --- The mathematics ------------------------------------------------------------------------------------------------------


def epsilon_greedy(
    greedy_actions: np.ndarray, random_actions: np.ndarray, u: np.ndarray, exploration_rate: float
) -> np.ndarray:
    """
    The exploration policy π_E (L9): U(A) if u ≤ ε, argmax_a Q(s, a) if u > ε.

    :param greedy_actions: argmax_a Q(s, a, θ) of each environment, shape (n_envs,)
    :param random_actions: A draw from U(A) for each environment, shape (n_envs,)
    :param u: A draw from U[0, 1] for each environment, shape (n_envs,)
    :param exploration_rate: ε, in [0, 1]
    :return: Actions, shape (n_envs,)
    """
    return np.where(u <= exploration_rate, random_actions, greedy_actions)


def td_target(rewards: th.Tensor, dones: th.Tensor, next_q_values: th.Tensor, discounts: th.Tensor | float) -> th.Tensor:
    """
    The target of the Q function (L12): r + ¬d γ max_a' Q(s', a', ψ).

    :param rewards: r, shape (B, 1)
    :param dones: d, shape (B, 1), 1 where the episode ends, else 0
    :param next_q_values: Q(s', ·, ψ), shape (B, |A|)
    :param discounts: γ, or with n-step returns γⁿ of each transition, shape (B, 1)
    :return: Targets, shape (B, 1)
    """
    not_done = 1 - dones
    return rewards + not_done * discounts * next_q_values.amax(dim=1, keepdim=True)


def squared_td_error(q_values: th.Tensor, targets: th.Tensor) -> th.Tensor:
    """
    The objective (L12): (Q(s, a, θ) − target)², mean over the batch.

    :param q_values: Q(s, a, θ) of the actions taken, shape (B, 1)
    :param targets: Targets, shape (B, 1), without gradient
    :return: The loss, a scalar
    """
    return (q_values - targets).square().mean()


@th.no_grad()
def update_target(parameters: list[th.Tensor], target_parameters: list[th.Tensor], tau: float) -> None:
    """
    The update of the target network (L13): ψ = θ, or where τ is below 1, ψ = τ θ + (1 − τ) ψ.

    :param parameters: θ
    :param target_parameters: ψ
    :param tau: τ, in [0, 1]
    """
    if tau == 1:
        hard_copy(parameters, target_parameters)
    else:
        polyak_update(parameters, target_parameters, tau)


@dataclass(frozen=True)
class FastTargets:
    """The targets (L12) of transitions for the fast update; equal to another if γ is."""

    gamma: float

    def __call__(self, fast_update: FastUpdate, samples: ReplayBufferSamples, rows: slice) -> th.Tensor:
        """
        The targets of some of the transitions.

        :param fast_update: Computes Q(s', ·, ψ)
        :param samples: The transitions
        :param rows: Which of them
        :return: Targets, shape (n, 1)
        """
        discounts = self.gamma if samples.discounts is None else samples.discounts[rows]
        next_q_values = fast_update.next_q_values(rows_of(samples.next_observations, rows))
        targets = td_target(samples.rewards[rows], samples.dones[rows], next_q_values, discounts)
        return targets.to(next_q_values.dtype)  # a buffer of a user's own may give rewards in float64


def _lists_to_arrays(observation: Any) -> Any:
    if isinstance(observation, dict):
        return {name: _lists_to_arrays(part) for name, part in observation.items()}
    return np.asarray(observation) if isinstance(observation, list) else observation


# --- The algorithm --------------------------------------------------------------------------------------------------------


class LectureDQN(OffPolicyAlgorithm):
    """
    Deep Q Network as the lecture builds it; a drop-in for ``stable_baselines3.DQN``.

    It takes DQN's arguments in DQN's order. What differs, and where it comes from in the lecture: the squared loss (L12); d =
    terminated ∨ truncated (L2); the network and its small final layer (L6, L8); an ε-greedy draw for each environment (L9);
    no gradient clipping unless asked for; defaults that learn.

    :param policy: The policy to use: ``"MlpPolicy"``, ``"CnnPolicy"``, ``"MultiInputPolicy"`` or a subclass of
        :class:`~sb3_lecture_dqn.policies.LectureDQNPolicy`
    :param env: The environment to learn from, with a ``Discrete`` action space; an id string is made without a render mode
    :param learning_rate: Learning rate of Adam, at least 0, or a function of the remaining progress (from 1 to 0); by default
        it falls linearly from 5e-4 to 0 over the steps of a training; give a number to train in many small pieces
    :param buffer_size: Maximum number of transitions in D (L11), at least 1
    :param learning_starts: Number of steps with uniform actions before learning starts, at least 0
    :param batch_size: Number of transitions in B (L11), at least 1
    :param tau: Share of θ in a target update, in [0, 1]; the lecture's hard copy is 1 (L13)
    :param gamma: The discount factor γ (L1), in [0, 1]
    :param train_freq: Train every ``train_freq`` steps, at least 1; or a tuple like ``(5, "step")`` or ``(2, "episode")``
    :param gradient_steps: Gradient steps per training, at least 0; -1 for as many as there were environment steps
    :param replay_buffer_class: Replay buffer class (for instance ``HerReplayBuffer``). ``None`` selects SB3's, or where plain
        arrays are stored ``ContiguousReplayBuffer``, which draws the same and samples faster
    :param replay_buffer_kwargs: Keyword arguments of the replay buffer. ``dict(handle_timeout_termination=True)`` makes d =
        terminated alone; by default d is the lecture's terminated ∨ truncated (L2)
    :param optimize_memory_usage: Whether D stores each observation once, at the cost of more complexity
    :param n_steps: Number of rewards in a target, at least 1; the lecture's is 1. More uses SB3's ``NStepReplayBuffer``
    :param target_update_interval: Number of environment steps between two updates of ψ (L13), at least 1. A value travels one
        step back in time with each of them, so a run needs many more updates than an episode has steps
    :param exploration_fraction: Share of the training over which ε falls, in [0, 1]
    :param exploration_initial_eps: First ε, in [0, 1]
    :param exploration_final_eps: Last ε, in [0, 1]
    :param max_grad_norm: Largest norm of the gradient, above 0; ``None`` for no clipping, as in the lecture
    :param stats_window_size: Number of episodes that the logged means are taken over, at least 1
    :param tensorboard_log: Folder of the TensorBoard logs (``None`` for none)
    :param policy_kwargs: Keyword arguments of the policy
    :param verbose: 0 for no output, 1 for information, 2 for debugging
    :param seed: Seed of every generator that the algorithm draws from
    :param device: PyTorch device; ``"auto"`` takes a GPU if there is one
    :param _init_setup_model: Whether to build the networks now
    :raises ValueError: if a value is out of its range, the policy is not one of this package, or it cannot take the
        observations
    :raises AssertionError: if the action space is not ``Discrete`` from 0
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": MlpPolicy,
        "CnnPolicy": CnnPolicy,
        "MultiInputPolicy": MultiInputPolicy,
    }
    # Gradient steps between two reads of the training metrics from the device.
    metrics_interval: ClassVar[int] = 100

    action_space: spaces.Discrete
    exploration_schedule: Schedule
    q_net: QNetwork
    q_net_target: QNetwork
    policy: LectureDQNPolicy
    random_generator: np.random.Generator

    def __init__(
        self,
        policy: str | type[LectureDQNPolicy],
        env: GymEnv | str,
        learning_rate: float | Schedule = DEFAULT_LEARNING_RATE,
        buffer_size: int = 100_000,
        learning_starts: int = 1_000,
        batch_size: int = 64,
        tau: float = 1.0,
        gamma: float = 0.99,
        train_freq: int | tuple[int, str] = 4,
        gradient_steps: int = -1,
        replay_buffer_class: type[ReplayBuffer] | None = None,
        replay_buffer_kwargs: dict[str, Any] | None = None,
        optimize_memory_usage: bool = False,
        n_steps: int = 1,
        target_update_interval: int = 50,
        exploration_fraction: float = 0.1,
        exploration_initial_eps: float = 1.0,
        exploration_final_eps: float = 0.05,
        max_grad_norm: float | None = None,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
        _init_setup_model: bool = True,
    ) -> None:
        check_policy_class(policy, self.policy_aliases, LectureDQNPolicy)
        if isinstance(env, str):
            # SB3 would make it with render_mode="rgb_array", with which a step of LunarLander takes longer.
            env = gymnasium.make(env)
        if isinstance(env, (gymnasium.Env, VecEnv)):  # SB3 wraps anything else, or says why it cannot
            check_action_space(env.action_space)
            check_observation_space(env.observation_space)
        super().__init__(
            policy,
            env,
            learning_rate,
            buffer_size,
            learning_starts,
            batch_size,
            tau,
            gamma,
            train_freq,
            gradient_steps,
            action_noise=None,
            replay_buffer_class=replay_buffer_class,
            replay_buffer_kwargs=replay_buffer_kwargs,
            optimize_memory_usage=optimize_memory_usage,
            n_steps=n_steps,
            policy_kwargs=policy_kwargs,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            verbose=verbose,
            device=device,
            seed=seed,
            sde_support=False,
            supported_action_spaces=(spaces.Discrete,),
            support_multi_env=True,
        )
        self.exploration_initial_eps = exploration_initial_eps
        self.exploration_final_eps = exploration_final_eps
        self.exploration_fraction = exploration_fraction
        self.target_update_interval = target_update_interval
        self.max_grad_norm = max_grad_norm
        self.exploration_rate = 0.0
        self._n_calls = 0

        if _init_setup_model:
            self._setup_model()

    # Set-up: Q, θ, ψ, D

    def _setup_model(self) -> None:
        self._check_hyperparameters()
        self._set_default_replay_buffer_class()
        self._set_default_done_flag()
        self._make_policy_and_buffer()
        lay_out_for_device(self.policy)

        self._create_aliases()
        self.batch_norm_stats = get_parameters_by_name(self.q_net, ["running_"])
        self.batch_norm_stats_target = get_parameters_by_name(self.q_net_target, ["running_"])
        self.exploration_schedule = self._make_exploration_schedule()
        self._fast_update: FastUpdate | None = None
        self._fast_acting: FastActing | None = None
        self._is_collecting = False
        self._training_metrics = RunningMeans(("loss", "q_values", "td_target", "gradient_norm"))
        self._divergence_watch = DivergenceWatch()
        if self.n_envs > self.target_update_interval:
            warnings.warn(
                f"The number of environments used is greater than target_update_interval ({self.n_envs} > "
                f"{self.target_update_interval}): the target network is updated after each step of all of them",
                stacklevel=2,
            )

    def _make_policy_and_buffer(self) -> None:
        if self.replay_buffer_class not in (None, HerReplayBuffer, *UNIFORM_BUFFERS):
            super()._setup_model()  # a user's own D is made once and at once
            return
        # SB3 makes D here. One transition stands in for it, which checks its arguments; the property below makes the real one
        # when somebody asks for it, and a model that is loaded to play never does.
        buffer_size, self.buffer_size = self.buffer_size, 1
        allocated_buffer = self.replay_buffer
        super()._setup_model()
        self.buffer_size = buffer_size
        self.replay_buffer = allocated_buffer

    def _check_hyperparameters(self) -> None:
        for name in ("buffer_size", "batch_size", "n_steps", "target_update_interval"):
            check_int_at_least(name, getattr(self, name), 1)
        for name in ("gamma", "tau", "exploration_fraction", "exploration_initial_eps", "exploration_final_eps"):
            check_in_unit_interval(name, getattr(self, name))
        check_int_at_least("gradient_steps", self.gradient_steps, -1)
        check_int_at_least("stats_window_size", self._stats_window_size, 1)
        check_at_least("learning_starts", self.learning_starts, 0)
        if not callable(self.learning_rate):
            check_at_least("learning_rate", self.learning_rate, 0)
            self.learning_rate = float(self.learning_rate)
        if self.max_grad_norm is not None:
            check_above_zero("max_grad_norm", self.max_grad_norm, allow_infinity=True)
        # numpy's numbers are not enough for PyTorch, for Python's deque and for JSON
        for name in (*NUMERIC_ARGUMENTS, "_stats_window_size"):
            setattr(self, name, as_plain_number(getattr(self, name)))
        self.train_freq = check_train_freq(self.train_freq)
        check_replay_buffer_class(self.replay_buffer_class)

    def _set_default_replay_buffer_class(self) -> None:
        """D where SB3 would take its ``ReplayBuffer``: the same one, with a faster draw of B."""
        if self.replay_buffer_class is NStepReplayBuffer and self.n_steps > 1:
            of_model = {"n_steps": self.n_steps, "gamma": self.gamma}
            of_buffer = {name: self.replay_buffer_kwargs.get(name, value) for name, value in of_model.items()}
            if of_buffer == of_model:
                # A loaded model's: SB3 gives it n and γ only where it chooses the class itself.
                self.replay_buffer_class = None
            else:
                warnings.warn(
                    f"the targets are those of replay_buffer_kwargs, {of_buffer}, and not of the model's {of_model}; without "
                    "them in replay_buffer_kwargs they are the model's",
                    stacklevel=2,
                )
        is_plain = self.n_steps == 1 and not self.optimize_memory_usage
        if self.replay_buffer_class is ContiguousReplayBuffer and not is_plain:
            self.replay_buffer_class = None  # the same: it was chosen for other arguments
        if self.replay_buffer_class is None and is_plain and not isinstance(self.observation_space, spaces.Dict):
            self.replay_buffer_class = ContiguousReplayBuffer

    def _set_default_done_flag(self) -> None:
        """d = terminated ∨ truncated (L2), unless the user or a buffer of their own says otherwise."""
        if self.replay_buffer_class is not None:
            parameters = inspect.signature(self.replay_buffer_class).parameters
            passes_on = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
            if "handle_timeout_termination" not in parameters and not passes_on:
                return
        # A copy: the user's dictionary stays as it was.
        self.replay_buffer_kwargs = {"handle_timeout_termination": False, **self.replay_buffer_kwargs}

    def _make_exploration_schedule(self) -> Schedule:
        if self.exploration_fraction == 0:  # SB3's LinearSchedule would divide by it
            return ConstantSchedule(self.exploration_final_eps)
        return LinearSchedule(self.exploration_initial_eps, self.exploration_final_eps, self.exploration_fraction)

    @staticmethod
    def _wrap_env(env: GymEnv, verbose: int = 0, monitor_wrapper: bool = True) -> VecEnv:
        """As SB3 wraps it; one environment in a vector environment that costs less."""
        vec_env = OffPolicyAlgorithm._wrap_env(env, verbose, monitor_wrapper)
        if isinstance(env, VecEnv) or type(vec_env) is not DummyVecEnv:
            return vec_env
        return SingleVecEnv(vec_env.envs[0])

    def _create_aliases(self) -> None:
        self.q_net = self.policy.q_net
        self.q_net_target = self.policy.q_net_target

    @property
    def replay_buffer(self) -> ReplayBuffer | None:
        """D, the replay buffer (L11), allocated when it is first asked for."""
        if self.__dict__.get("replay_buffer") is None and hasattr(self, "policy"):
            self.replay_buffer = self._make_replay_buffer()
        return self.__dict__.get("replay_buffer")

    @replay_buffer.setter
    def replay_buffer(self, replay_buffer: ReplayBuffer | None) -> None:
        if self.__dict__.get("replay_buffer") is not None:
            self._fast_update = None  # its graphs keep what they read of the buffer before
        # Under SB3's own name, so that save(include=["replay_buffer"]) finds it.
        self.__dict__["replay_buffer"] = replay_buffer

    @replay_buffer.deleter
    def replay_buffer(self) -> None:
        self.replay_buffer = None

    def _make_replay_buffer(self) -> ReplayBuffer:
        assert self.replay_buffer_class is not None  # chosen in SB3's _setup_model
        buffer_kwargs = self.replay_buffer_kwargs.copy()
        if issubclass(self.replay_buffer_class, HerReplayBuffer):
            buffer_kwargs["env"] = self.env
        return self.replay_buffer_class(
            self.buffer_size,
            self.observation_space,
            self.action_space,
            device=self.device,
            n_envs=self.n_envs,
            optimize_memory_usage=self.optimize_memory_usage,
            **buffer_kwargs,
        )

    def set_random_seed(self, seed: int | None = None) -> None:
        """
        Seed Python, numpy, PyTorch, the action space, the environment and the algorithm's own generator.

        :param seed: The seed; ``None`` leaves the first five as they are
        """
        super().set_random_seed(seed)
        self.random_generator = make_generator(seed)

    # Policies: π and π_E

    def predict(
        self,
        observation: np.ndarray | dict[str, np.ndarray],
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        """
        The greedy policy π or the exploration policy π_E (L9).

        :param observation: One observation, or one for each environment
        :param state: Returned as it is (for recurrent policies, which these are not)
        :param episode_start: Without effect (for recurrent policies)
        :param deterministic: ``True`` for π, ``False`` for π_E
        :return: The actions, shape (n_envs,), or () for a single observation; and ``state``
        """
        if observation is not self._last_obs:
            observation = _lists_to_arrays(observation)
        is_with_info = isinstance(observation, tuple)  # what env.reset() returns: SB3's policy says what is wrong with it
        if deterministic or self.exploration_rate == 0 or is_with_info:
            return self._greedy_actions(observation), state
        is_vectorized = observation is self._last_obs or self.policy.is_vectorized_observation(observation)
        first_observation = next(iter(observation.values())) if isinstance(observation, dict) else observation
        n_envs = len(first_observation) if is_vectorized else 1

        u = self.random_generator.random(n_envs)  # u ~ U[0, 1], one for each environment
        actions = self._random_actions(n_envs)
        if (u > self.exploration_rate).any():
            actions = epsilon_greedy(self._greedy_actions(observation), actions, u, self.exploration_rate)
        return (actions if is_vectorized else actions.reshape(())), state

    def _random_actions(self, n_envs: int) -> np.ndarray:
        """U(A), one for each environment."""
        if n_envs > 1:
            return self.random_generator.integers(self.action_space.n, size=n_envs)
        return np.array([self.random_generator.integers(self.action_space.n)])  # the same draw, without looking at a size

    def _greedy_actions(self, observation: np.ndarray | dict[str, np.ndarray]) -> np.ndarray:
        """π(s), without SB3's checks and conversions for the observations that the collection acts on."""
        fast_acting = self._fast_acting if self._is_collecting and observation is self._last_obs else None
        if fast_acting is not None and fast_acting.accepts(observation):
            return fast_acting.greedy_actions(observation)
        return self.policy.predict(observation, deterministic=True)[0]

    def collect_rollouts(self, *args: Any, **kwargs: Any) -> RolloutReturn:
        """
        Collect transitions with π_E (L10).

        :param args: As for ``OffPolicyAlgorithm.collect_rollouts``
        :param kwargs: As for ``OffPolicyAlgorithm.collect_rollouts``
        :return: How much was collected
        """
        if self._fast_acting is None or not self._fast_acting.is_current(self.policy):
            kind = FastActing if self.device.type == "cpu" else GraphActing
            self._fast_acting = kind.for_policy(self.policy)
        self._is_collecting = not th.is_autocast_enabled(self.device.type)
        try:
            return super().collect_rollouts(*args, **kwargs)
        finally:
            self._is_collecting = False

    def _store_transition(
        self,
        replay_buffer: ReplayBuffer,
        buffer_action: np.ndarray,
        new_obs: np.ndarray | dict[str, np.ndarray],
        reward: np.ndarray,
        dones: np.ndarray,
        infos: list[dict[str, Any]],
    ) -> None:
        """D ∪ {(s, a, r, s', d)} (L10); a pause of ``GymVectorVecEnv`` is no transition of the environment."""
        is_plain = type(replay_buffer) is ContiguousReplayBuffer and self._vec_normalize_env is None
        if is_plain and not any(dones):
            # SB3 copies s' first, to put the last observation of an episode into it; D copies it anyway
            self._last_original_obs = self._last_obs
            replay_buffer.add(self._last_obs, new_obs, buffer_action, reward, dones, infos)  # type: ignore[arg-type]
            self._last_obs = new_obs
        else:
            super()._store_transition(replay_buffer, buffer_action, new_obs, reward, dones, infos)
        paused = [i for i, info in enumerate(infos) if "is_pause" in info]
        if paused and isinstance(replay_buffer, (HerReplayBuffer, *UNIFORM_BUFFERS)):
            repeat_last_transitions(replay_buffer, paused)

    # Training: θ and ψ

    def _sample_batch(self, batch_size: int) -> ReplayBufferSamples:
        """B ~ U(D) (L11), drawn by the algorithm's own generator."""
        assert self.replay_buffer is not None
        with numpy_draws_from(self.random_generator):
            return self.replay_buffer.sample(batch_size, env=self._vec_normalize_env)

    def train(self, gradient_steps: int, batch_size: int = 100) -> None:
        """
        Gradient steps on θ: min_θ (Q(s, a, θ) − (r + ¬d γ max_a' Q(s', a', ψ)))² (L12).

        :param gradient_steps: Number of gradient steps
        :param batch_size: Number of transitions in each B
        :raises DivergenceError: if training has diverged
        """
        self._update_learning_rate(self.policy.optimizer)
        fast_update = self._current_fast_update()
        if fast_update is not None:
            self._fast_gradient_steps(fast_update, gradient_steps, batch_size)
        else:
            self.policy.set_training_mode(True)
            for _ in range(gradient_steps):
                metrics = [metric.detach() for metric in self._gradient_step(self._sample_batch(batch_size))]
                self._count_updates(1, stack_metrics, metrics)
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")

    def _gradient_step(self, batch: ReplayBufferSamples) -> tuple[th.Tensor, ...]:
        """
        One gradient step on θ, as the slide has it.

        :param batch: B
        :return: The loss, the mean Q(s, a, θ), the mean target and the norm of the gradient
        """
        discounts = self.gamma if batch.discounts is None else batch.discounts
        with th.no_grad():
            next_q_values = self.q_net_target(batch.next_observations)  # Q(s', ·, ψ)
            targets = td_target(batch.rewards, batch.dones, next_q_values, discounts)
        all_q_values = self.q_net(batch.observations)  # Q(s, ·, θ)
        q_values = all_q_values.gather(dim=1, index=batch.actions.long())  # Q(s, a, θ)
        loss = squared_td_error(q_values, targets)

        self.policy.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        gradient_norm = self._clip_gradient()
        self.policy.optimizer.step()
        return loss, q_values.mean(), targets.mean(), gradient_norm

    def _clip_gradient(self) -> th.Tensor:
        """Clip the gradient if asked to, and give its norm before that."""
        parameters = list(self.q_net.parameters())
        if self.max_grad_norm is None:
            return th.nn.utils.get_total_norm(p.grad for p in parameters if p.grad is not None)
        return th.nn.utils.clip_grad_norm_(parameters, self.max_grad_norm)

    def _on_step(self) -> None:
        """After each step of the environments: ψ = θ every ``target_update_interval`` steps (L13), and the next ε."""
        self._n_calls += 1
        # One call stands for n_envs transitions.
        if self._n_calls % max(self.target_update_interval // self.n_envs, 1) == 0:
            update_target(list(self.q_net.parameters()), list(self.q_net_target.parameters()), self.tau)
            if self.batch_norm_stats:
                polyak_update(self.batch_norm_stats, self.batch_norm_stats_target, 1.0)
        self._update_exploration_rate(self._current_progress_remaining)

    def _update_exploration_rate(self, progress_remaining: float) -> None:
        self.exploration_rate = self.exploration_schedule(progress_remaining)
        self.logger.record("rollout/exploration_rate", self.exploration_rate)

    def _setup_learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        reset_num_timesteps: bool = True,
        tb_log_name: str = "run",
        progress_bar: bool = False,
    ) -> tuple[int, BaseCallback]:
        record_for_checkpoints(callback, self.env)
        replay_buffer = self.__dict__.get("replay_buffer")
        if isinstance(replay_buffer, ReplayBuffer) and (reset_num_timesteps or self._last_obs is None):
            end_last_episodes(replay_buffer)  # SB3 resets the environments
        total_timesteps, callback = super()._setup_learn(
            total_timesteps, callback, reset_num_timesteps, tb_log_name, progress_bar
        )
        if reset_num_timesteps:
            self._divergence_watch.count_from_zero()
        # SB3 sets ε only after the first step; π_E is ε-greedy from the first one.
        self._update_exploration_rate(1.0 - self.num_timesteps / max(total_timesteps, 1))
        return total_timesteps, callback

    def learn(
        self: SelfLectureDQN,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 4,
        tb_log_name: str = "LectureDQN",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfLectureDQN:
        """
        The lecture's train loop (L15).

        :param total_timesteps: Number of environment steps to train for
        :param callback: Callback(s) called at every step
        :param log_interval: Number of episodes between two logs
        :param tb_log_name: Name of the run in TensorBoard
        :param reset_num_timesteps: Whether steps are counted from 0 again
        :param progress_bar: Whether to show a progress bar
        :return: The trained model
        :raises DivergenceError: if training has diverged
        """
        super().learn(total_timesteps, callback, log_interval, tb_log_name, reset_num_timesteps, progress_bar)
        self._record_training_metrics()
        self.check_divergence()
        return self

    # The same gradient steps, faster

    def _current_fast_update(self) -> FastUpdate | None:
        """The fast update, made again where the policy changed since; ``None`` where only the plain one is right."""
        if not all(is_own_method(self, name, LectureDQN) for name in ("_gradient_step", "_clip_gradient")):
            return None  # a loss or a clipping of a user's own
        if self.q_net is not self.policy.q_net or self.q_net_target is not self.policy.q_net_target:
            return None
        if th.is_autocast_enabled(self.device.type):
            return None
        if self._fast_update is None or not self._fast_update.is_current(self.policy):
            self._fast_update = self._make_fast_update()
        return self._fast_update

    def _make_fast_update(self) -> FastUpdate | None:
        if self.device.type != "cpu":
            return GraphUpdate.for_policy(self.policy)
        heads = list(map(read_head, (self.q_net, self.q_net_target)))
        use = Use.STEPS if None not in heads and has_vector_observations(self.policy) else Use.HEAD
        if not all(can_compile(head, use) for head in heads):
            return FastUpdate.for_policy(self.policy)
        from sb3_lecture_dqn.fast.compiled_update import CompiledUpdate  # it imports Numba

        return CompiledUpdate.for_policy(self.policy)

    def _fast_gradient_steps(self, fast_update: FastUpdate, gradient_steps: int, batch_size: int) -> None:
        """The same function as many times :meth:`_gradient_step`, without PyTorch's modules and graph."""
        if fast_update.needs_training_mode:
            self.policy.set_training_mode(True)
        with threads_for(fast_update.multiply_adds(batch_size)) as are_threads_left:
            may_be_used = are_threads_left and fast_update.may_use_second_thread
            with fast_update.second_thread.measured(may_be_used, gradient_steps):
                self._fast_updates(fast_update, gradient_steps, batch_size)

    def _fast_updates(self, fast_update: FastUpdate, gradient_steps: int, batch_size: int) -> None:
        # Another buffer may mean something by a batch, as HER does, whose batches begin with the goals that are not changed.
        is_uniform = type(self.replay_buffer) in UNIFORM_BUFFERS and is_own_method(self, "_sample_batch", LectureDQN)
        updates_at_once = fast_update.updates_at_once(batch_size) if is_uniform else 1
        while gradient_steps > 0:
            n_updates = min(gradient_steps, updates_at_once)
            gradient_steps -= n_updates
            # ψ stays as it is while train runs, so several batches are sampled at once and targets computed ahead.
            samples = self._draw(n_updates * batch_size, fast_update.kind_of_records if is_uniform else None)
            # what a buffer that we do not know gives is one batch, however large
            rows = batch_size if is_uniform or isinstance(samples, DrawnRows) else len(samples.actions)
            results = fast_update.steps(samples, FastTargets(self.gamma), rows, self.max_grad_norm)
            self._count_updates(n_updates, fast_update.metrics_of, results)

    def _draw(self, n_rows: int, kind_of_records: type[Any] | None) -> ReplayBufferSamples | DrawnRows:
        """Several B, or which transitions they are where D has records of the kind to read them in, not to be normalised."""
        buffer = self.replay_buffer
        if kind_of_records is None or not isinstance(buffer, ContiguousReplayBuffer) or self._vec_normalize_env is not None:
            return self._sample_batch(n_rows)
        if not all(is_own_method(buffer, name, ContiguousReplayBuffer) for name in ("sample", "_get_samples")):
            return self._sample_batch(n_rows)
        with numpy_draws_from(self.random_generator):
            return buffer.draw(n_rows, kind_of_records)

    # Metrics, and whether they can be right

    def _count_updates(self, n_updates: int, metrics_of: MetricsOf, results: Any) -> None:
        intervals_before = self._n_updates // self.metrics_interval
        self._n_updates += n_updates
        self._training_metrics.add(metrics_of, results)
        if self._n_updates // self.metrics_interval > intervals_before:
            self._record_training_metrics()

    def _record_training_metrics(self) -> None:
        means = self._training_metrics.pop()
        for name, mean in means.items():
            self.logger.record(f"train/{name}", mean)
        self._divergence_watch.check(self, means)

    def check_divergence(self) -> None:
        """
        Check that θ, ψ and the newest transitions are finite. Training itself looks at the transitions and at its metrics,
        every ``metrics_interval`` gradient steps. In a callback's ``_on_step``, the transition of which is counted and not yet
        stored, the step in the error is one too late.

        :raises DivergenceError: if they are not
        """
        self._divergence_watch.check(self, {})
        check_parameters(self)

    def dump_logs(self) -> None:
        """
        Write the log, with the means of the training metrics since the last time.

        :raises DivergenceError: if training has diverged
        """
        self._record_training_metrics()
        super().dump_logs()

    # Files

    def save(
        self,
        path: str | Path | io.BufferedIOBase,
        exclude: Any = None,
        include: Any = None,
    ) -> None:
        """
        Save the model in a zip file; a failure leaves a file that was there before as it was.

        :param path: The file (``.zip`` is added to a name without an ending), or a file-like object
        :param exclude: Names of attributes to leave out, beside SB3's usual ones
        :param include: Names of attributes to save although they are usually left out
        """
        if not isinstance(path, (str, Path)):
            super().save(path, exclude, include)
            return
        with replace_when_written(with_ending(path, ".zip")) as unfinished:
            super().save(unfinished, exclude, include)
            add_checksums(unfinished)

    def save_replay_buffer(self, path: str | Path | io.BufferedIOBase) -> None:
        """
        Save D, with a checksum behind it; a failure leaves a file that was there before as it was.

        :param path: The file (``.pkl`` is added to a name without an ending), or a file-like object
        """
        if not isinstance(path, (str, Path)):
            super().save_replay_buffer(path)
            return
        with replace_when_written(with_ending(path, ".pkl")) as unfinished:
            super().save_replay_buffer(unfinished)
            add_checksum_behind(unfinished)

    def load_replay_buffer(self, path: str | Path | io.BufferedIOBase, truncate_last_traj: bool = True) -> None:
        """
        Load D.

        :param path: The file (``.pkl`` may be left out), or a file-like object
        :param truncate_last_traj: Whether a ``HerReplayBuffer``'s last episode ends where it is
        :raises FileNotFoundError: if there is no such file
        :raises ValueError: if the file is damaged or truncated; D is then what it was
        """
        if not isinstance(path, (str, Path)):
            super().load_replay_buffer(path, truncate_last_traj)
            return
        try:
            super().load_replay_buffer(check_replay_buffer_file(path), truncate_last_traj)
        except (EOFError, pickle.UnpicklingError) as error:
            raise ValueError(f"path must be a whole replay buffer, got {path}: {error}") from error

    @classmethod
    def load(
        cls: type[SelfLectureDQN],
        path: str | Path | io.BufferedIOBase,
        env: GymEnv | None = None,
        device: th.device | str = "auto",
        custom_objects: dict[str, Any] | None = None,
        print_system_info: bool = False,
        force_reset: bool = True,
        **kwargs: Any,
    ) -> SelfLectureDQN:
        """
        Load a model from a zip file; its replay buffer is allocated only when it is used.

        :param path: The file (``.zip`` may be left out), or a file-like object
        :param env: The environment to go on with; ``None`` is enough to predict
        :param device: PyTorch device
        :param custom_objects: Objects to use in the place of saved ones
        :param print_system_info: Whether to print the system that the model was saved on, and this one
        :param force_reset: Whether the environment is reset before training goes on
        :param kwargs: Attributes to change
        :return: The model
        :raises FileNotFoundError: if there is no such file
        :raises ValueError: if the file is truncated, not a zip file, or a model of another algorithm
        """
        check_model_file(path, LectureDQNPolicy, cls.__name__, custom_objects)
        return super().load(path, env, device, custom_objects, print_system_info, force_reset, **kwargs)

    def set_parameters(
        self,
        load_path_or_dict: str | TensorDict,
        exact_match: bool = True,
        device: th.device | str = "auto",
    ) -> None:
        """
        Take θ, ψ and the optimizer's state from a file or a dictionary.

        :param load_path_or_dict: The file (``.zip`` may be left out), or what ``get_parameters`` returned
        :param exact_match: Whether every part must be there
        :param device: PyTorch device
        :raises FileNotFoundError: if there is no such file
        :raises ValueError: if the file is truncated, not a zip file, a model of another algorithm or one of another network;
            nothing is changed then
        """
        parameters = load_path_or_dict
        if not isinstance(parameters, dict):
            parameters = self._read_parameters(parameters, device)
        check_state_dict("load_path_or_dict", parameters.get("policy", {}), self.policy.state_dict(), exact_match)
        super().set_parameters(parameters, exact_match, device)
        self._divergence_watch = DivergenceWatch(is_trained=True)

    def _read_parameters(self, path: str, device: th.device | str) -> TensorDict:
        missing_policy = None
        try:
            check_model_file(path, LectureDQNPolicy, type(self).__name__)
        except MissingPolicyError as error:
            missing_policy = error
        _, parameters, _ = load_from_zip_file(path, load_data=False, device=device)
        # its numbers are enough, if they are of such a network
        if missing_policy is not None and set(parameters["policy"]) != set(self.policy.state_dict()):
            raise missing_policy
        return parameters

    def __getstate__(self) -> dict[str, Any]:
        """For pickles and copies; what makes it faster is made again."""
        return {**self.__dict__, "_fast_update": None, "_fast_acting": None}

    def _excluded_save_params(self) -> list[str]:
        return [
            *super()._excluded_save_params(),
            "q_net",
            "q_net_target",
            "random_generator",
            "_fast_update",
            "_fast_acting",
            "_is_collecting",
            "_training_metrics",
            "_divergence_watch",
        ]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        return ["policy", "policy.optimizer"], []
