"""The adapter from Gymnasium's vector environments to SB3's, beside what SB3 makes of the same environments."""

import warnings
from collections.abc import Callable
from typing import Any, ClassVar

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.envs.classic_control.cartpole import CartPoleVectorEnv
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv
from gymnasium.wrappers.vector import DictInfoToList, NormalizeObservation, NormalizeReward, RecordEpisodeStatistics
from scripted_envs import CountingEnv
from stable_baselines3 import PPO
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecMonitor

from sb3_lecture_dqn import LectureDQN
from sb3_lecture_dqn.envs import GymVectorVecEnv, RoboParkingVectorEnv
from sb3_lecture_dqn.replay_buffer import FIELDS

pytestmark = pytest.mark.usefixtures("without_the_zoos_time_limit")

N_ENVS = 3


class Countdown(gymnasium.Env[dict[str, Any], int]):
    """Dictionaries as observations; ends when a random number of steps is over."""

    observation_space = spaces.Dict({"left": spaces.Box(0, 9, (1,), np.float32), "seen": spaces.Discrete(10)})
    action_space = spaces.Discrete(2)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        super().reset(seed=seed)
        self.left = int(self.np_random.integers(3, 9))
        return self._observe(), {"start": self.left}

    def step(self, action: int) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        self.left -= 1
        info = {"parity": "odd"} if self.left % 2 else {}
        return self._observe(), float(action), self.left == 0, self.left == 1 and action == 1, info

    def _observe(self) -> dict[str, Any]:
        return {"left": np.array([self.left], dtype=np.float32), "seen": self.left}


def make_robo_parking() -> gymnasium.Env:
    return gymnasium.make("RoboParking-v0", max_episode_steps=40)


def make_cart_pole() -> gymnasium.Env:
    return gymnasium.make("CartPole-v1", max_episode_steps=20)


def sync(make_env: Callable[[], gymnasium.Env], mode: AutoresetMode) -> VectorEnv:
    return SyncVectorEnv([make_env] * N_ENVS, autoreset_mode=mode)


def robo_parking(make_env: Callable[[], gymnasium.Env], mode: AutoresetMode) -> VectorEnv:
    return gymnasium.make_vec("RoboParking-v0", num_envs=N_ENVS, max_episode_steps=40, autoreset_mode=mode)


def assert_same(ours: Any, theirs: Any) -> None:
    if isinstance(theirs, dict):
        assert set(ours) == set(theirs)
        for key in theirs:
            assert_same(ours[key], theirs[key])
    elif isinstance(theirs, np.ndarray):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)
    else:
        assert ours == theirs


@pytest.mark.parametrize(
    ("make_vector_env", "make_env", "mode"),
    [
        *((robo_parking, make_robo_parking, mode) for mode in (AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP)),
        *((sync, make_env, mode) for make_env in (make_robo_parking, make_cart_pole, Countdown) for mode in AutoresetMode),
    ],
)
def test_it_is_what_sb3_makes_of_the_same_environments(
    make_vector_env: Callable[[Callable[[], gymnasium.Env], AutoresetMode], VectorEnv],
    make_env: Callable[[], gymnasium.Env],
    mode: AutoresetMode,
) -> None:
    ours = GymVectorVecEnv(make_vector_env(make_env, mode))
    theirs = VecMonitor(DummyVecEnv([make_env] * N_ENVS))
    assert ours.observation_space == theirs.observation_space
    assert ours.action_space == theirs.action_space
    ours.seed(11)
    theirs.seed(11)
    assert_same(ours.reset(), theirs.reset())
    assert ours.reset_infos == theirs.unwrapped.reset_infos
    generator = np.random.default_rng(0)
    # Towards the corner, so that some robots park in time.
    shares = [0.47, 0.03, 0.03, 0.47] if make_env is make_robo_parking else [0.5, 0.5]
    n_ended = n_truncated = 0
    for step in range(400):
        if step == 300:  # in the middle of episodes
            assert_same(ours.reset(), theirs.reset())
        actions = generator.choice(len(shares), size=N_ENVS, p=shares)
        our_step, their_step = ours.step(actions), theirs.step(actions)
        for our_part, their_part in zip(our_step[:3], their_step[:3], strict=True):
            assert_same(our_part, their_part)
        for our_info, their_info in zip(our_step[3], their_step[3], strict=True):
            for info in (our_info, their_info):
                if "episode" in info:
                    assert info["episode"].pop("t") >= 0
            assert_same(our_info, their_info)
        assert ours.reset_infos == theirs.unwrapped.reset_infos
        n_ended += their_step[2].sum()
        n_truncated += sum(info["TimeLimit.truncated"] for info in their_step[3])
    assert 0 < n_truncated < n_ended


class ResetsInTheNextStep(VectorEnv):
    """What Gymnasium's next-step mode asks of a vector environment, and no ``reset_mask``."""

    metadata: ClassVar[dict[str, Any]] = {"autoreset_mode": AutoresetMode.NEXT_STEP}

    def __init__(self, make_env: Callable[[], gymnasium.Env]) -> None:
        self.inner = sync(make_env, AutoresetMode.NEXT_STEP)
        self.num_envs = self.inner.num_envs
        self.single_observation_space = self.inner.single_observation_space
        self.single_action_space = self.inner.single_action_space
        self.observation_space, self.action_space = self.inner.observation_space, self.inner.action_space

    def reset(self, *, seed: Any = None, options: Any = None) -> Any:
        return self.inner.reset(seed=seed)

    def step(self, actions: Any) -> Any:
        return self.inner.step(actions)


@pytest.mark.parametrize("make_env", [make_robo_parking, make_cart_pole, Countdown])
def test_what_resets_in_the_next_step_alone_has_the_same_episodes_with_a_pause_between(
    make_env: Callable[[], gymnasium.Env],
) -> None:
    ours = GymVectorVecEnv(ResetsInTheNextStep(make_env))
    ours.seed(11)
    observations = ours.reset()
    generator = np.random.default_rng(0)
    singles = [VecMonitor(DummyVecEnv([make_env])) for _ in range(N_ENVS)]
    last: list[Any] = []
    for i, single in enumerate(singles):
        single.seed(11 + i)
        last.append(single.reset())
    pauses = [False] * N_ENVS
    n_pauses = 0
    for _ in range(200):
        actions = generator.integers(ours.action_space.n, size=N_ENVS)
        previous_observations = observations
        observations, rewards, dones, infos = ours.step(actions)
        for i, single in enumerate(singles):
            if pauses[i]:
                n_pauses += 1
                assert (rewards[i], dones[i]) == (0, True)
                assert set(infos[i]) == {"terminal_observation", "TimeLimit.truncated", "is_pause"}
                assert not infos[i]["TimeLimit.truncated"]
                assert_same(infos[i]["terminal_observation"], row(previous_observations, i))
                assert ours.reset_infos[i] == single.unwrapped.reset_infos[0]
                assert_same(row(observations, i), row(last[i], 0))
                pauses[i] = False
                continue
            last[i], their_rewards, their_dones, (their_info,) = single.step(actions[i : i + 1])
            assert (rewards[i], dones[i]) == (their_rewards[0], their_dones[0])
            pauses[i] = bool(dones[i])
            if pauses[i]:
                assert infos[i]["episode"].pop("t") >= 0
                del their_info["episode"]["t"]
            assert_same(infos[i], their_info)
            assert_same(row(observations, i), their_info["terminal_observation"] if pauses[i] else row(last[i], 0))
    assert n_pauses > 5


def row(observations: Any, i: int) -> Any:
    return {key: value[i] for key, value in observations.items()} if isinstance(observations, dict) else observations[i]


def test_gymnasiums_own_cart_pole_vector_environment_is_learned_from_and_its_pauses_are_not_counted() -> None:
    env = GymVectorVecEnv(CartPoleVectorEnv(num_envs=2))
    model = LectureDQN("MlpPolicy", env, learning_starts=50, seed=0).learn(200)
    returns, lengths = evaluate_policy(model, env, n_eval_episodes=10, return_episode_rewards=True)
    assert len(returns) == 10
    assert returns == lengths  # 1 for each step, without the pauses
    assert min(lengths) >= 8  # no pole falls sooner


@pytest.mark.parametrize(
    ("policy", "make_env", "settings"),
    [
        ("MlpPolicy", make_cart_pole, {}),
        ("MlpPolicy", make_cart_pole, {"n_steps": 3}),
        ("MlpPolicy", make_cart_pole, {"replay_buffer_class": ReplayBuffer}),
        ("MultiInputPolicy", Countdown, {}),
    ],
)
def test_in_the_place_of_a_pause_the_last_transition_is_stored_once_more(
    policy: str, make_env: Any, settings: dict[str, Any]
) -> None:
    env = GymVectorVecEnv(ResetsInTheNextStep(make_env))
    timeouts = {"handle_timeout_termination": True}
    buffer = (
        LectureDQN(policy, env, buffer_size=250, replay_buffer_kwargs=timeouts, seed=0, **settings).learn(600).replay_buffer
    )
    assert buffer is not None
    pauses = np.argwhere((buffer.dones[:-1] == 1) & (buffer.dones[1:] == 1))
    assert len(pauses) > 5
    for step, i in pauses:
        for name in FIELDS:
            field = getattr(buffer, name)
            for array in field.values() if isinstance(field, dict) else [field]:
                assert_same(array[step + 1, i], array[step, i])
    assert 0 not in buffer.rewards[: buffer.pos] or make_env is Countdown


def test_a_reset_ends_the_pauses() -> None:
    env = GymVectorVecEnv(CartPoleVectorEnv(num_envs=1))
    env.seed(0)
    env.reset()
    while not env.step(np.array([0]))[2].any():
        pass
    env.reset()
    _, rewards, dones, infos = env.step(np.array([0]))
    assert (rewards.tolist(), dones.tolist()) == ([1.0], [False])
    assert "is_pause" not in infos[0]


class IgnoresTheMask(ResetsInTheNextStep):
    metadata: ClassVar[dict[str, Any]] = {"autoreset_mode": AutoresetMode.DISABLED}


def test_disabled_autoreset_without_a_reset_of_some_is_refused() -> None:
    env = GymVectorVecEnv(IgnoresTheMask(make_cart_pole))
    env.seed(0)
    env.reset()
    with pytest.raises(ValueError, match=r"env must be able to reset some of its sub-environments alone"):
        [env.step(np.array([0, 1, 0])) for _ in range(12)]  # a pole that is pushed one way all the time falls in steps 8 to 10


class PartlyBlind(CountingEnv):
    """Has a sensor that sees nothing."""

    def _observation(self) -> np.ndarray:
        return np.array([np.nan, self.step_count], dtype=np.float32)


def test_what_is_not_a_number_is_not_taken_for_a_reset_of_all() -> None:
    make_envs = [lambda: PartlyBlind(length=2), lambda: PartlyBlind(length=5)]
    env = GymVectorVecEnv(SyncVectorEnv(make_envs, autoreset_mode=AutoresetMode.DISABLED))
    env.reset()
    observations = [env.step(np.array([0, 0]))[0][:, 1].tolist() for _ in range(3)]
    assert observations == [[1, 1], [0, 2], [1, 3]]


def test_observations_of_a_vector_environment_that_writes_into_its_own_are_the_callers_to_keep() -> None:
    make_envs = [lambda: CountingEnv(length=2), lambda: CountingEnv(length=5)]
    env = GymVectorVecEnv(SyncVectorEnv(make_envs, copy=False, autoreset_mode=AutoresetMode.SAME_STEP))
    observations = [env.reset(), *(env.step(np.array([0, 0]))[0] for _ in range(3))]
    assert [each[:, 1].tolist() for each in observations] == [[0, 0], [1, 1], [0, 2], [1, 3]]


def test_anything_but_a_vector_environment_is_refused() -> None:
    with pytest.raises(TypeError, match=r"env must be a gymnasium\.vector\.VectorEnv, got TimeLimit"):
        GymVectorVecEnv(make_cart_pole())  # type: ignore[arg-type]


def test_a_vector_environment_must_say_how_it_resets() -> None:
    for wrapper in (DictInfoToList, NormalizeObservation, NormalizeReward):
        with pytest.raises(ValueError, match=f"env must not be wrapped in {wrapper.__name__}"):
            GymVectorVecEnv(wrapper(RoboParkingVectorEnv(2)))
    env = RoboParkingVectorEnv(2)
    env.metadata = {}
    with pytest.raises(ValueError, match="env must have an AutoresetMode"):
        GymVectorVecEnv(env)


def test_gymnasiums_episode_statistics_are_refused_where_they_do_not_learn_what_is_reset() -> None:
    with pytest.raises(ValueError, match="env must not be wrapped in RecordEpisodeStatistics: the infos have 'episode'"):
        GymVectorVecEnv(RecordEpisodeStatistics(sync(make_cart_pole, AutoresetMode.NEXT_STEP)))
    env = GymVectorVecEnv(RecordEpisodeStatistics(sync(make_cart_pole, AutoresetMode.SAME_STEP)))
    env.reset()
    lengths = [info["episode"]["l"] for _ in range(30) for info in env.step(np.ones(3, int))[3] if "episode" in info]
    assert lengths == list(env.env.length_queue)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("mode", "shared_memory"),
    [(AutoresetMode.NEXT_STEP, False), (AutoresetMode.NEXT_STEP, True), (AutoresetMode.SAME_STEP, False)],
)
def test_no_step_of_processes_is_lost_whatever_they_share(mode: AutoresetMode, shared_memory: bool) -> None:
    env = GymVectorVecEnv(AsyncVectorEnv([make_cart_pole], autoreset_mode=mode, shared_memory=shared_memory))
    try:
        env.seed(0)
        env.reset()
        steps = [env.step(np.array([1])) for _ in range(30)]
    finally:
        env.close()
    # CartPole gives 1 for each; processes that share no memory cannot be asked to reset, and pause
    assert [rewards[0] for _, rewards, _, _ in steps] == [float("is_pause" not in info) for _, _, _, (info,) in steps]
    has_pauses = mode == AutoresetMode.NEXT_STEP and not shared_memory
    assert any("is_pause" in info for _, _, _, (info,) in steps) == has_pauses


class KeepsItsRewards(ResetsInTheNextStep):
    """Gives the same array of rewards in each step."""

    def __init__(self, make_env: Callable[[], gymnasium.Env]) -> None:
        super().__init__(make_env)
        self.rewards = np.ones(self.num_envs, np.float32)

    def step(self, actions: Any) -> Any:
        observations, _, *others = super().step(actions)
        return observations, self.rewards, *others


def test_what_an_algorithm_adds_to_rewards_does_not_reach_the_environment() -> None:
    env = GymVectorVecEnv(KeepsItsRewards(make_cart_pole))
    PPO("MlpPolicy", env, n_steps=32, batch_size=32, n_epochs=1, seed=0, device="cpu").learn(96)  # adds to them at the limit
    assert env.env.rewards.tolist() == [1] * N_ENVS  # type: ignore[attr-defined]


def test_options_may_hold_arrays() -> None:
    env = GymVectorVecEnv(RoboParkingVectorEnv(2))
    state = np.array([1.0, 2.0, 0.0, 0.0])
    env.set_options([{"state": state}, {"state": state.copy()}])
    np.testing.assert_array_equal(env.reset(), [state] * 2)
    for others in ({"state": state + 1}, {"state": state, "more": 1}, {}):
        env.set_options([{"state": state}, others])
        with pytest.raises(ValueError, match="options must be the same"):
            env.reset()


def test_options_reach_the_next_reset_only() -> None:
    env = GymVectorVecEnv(RoboParkingVectorEnv(2))
    env.set_options({"state": (1.0, 2.0, 0.0, 0.0)})
    np.testing.assert_array_equal(env.reset(), [[1, 2, 0, 0]] * 2)
    assert not np.array_equal(env.reset(), [[1, 2, 0, 0]] * 2)
    env.set_options([{"state": (1.0, 2.0, 0.0, 0.0)}, {"state": (2.0, 1.0, 0.0, 0.0)}])
    with pytest.raises(ValueError, match="options must be the same"):
        env.reset()


def test_a_seed_decides_all_that_follows() -> None:
    def play(seed: int) -> np.ndarray:
        env = GymVectorVecEnv(RoboParkingVectorEnv(2, max_episode_steps=5))
        env.seed(seed)
        return np.array([env.reset(), *(env.step(np.array([0, 3]))[0] for _ in range(20))])

    np.testing.assert_array_equal(play(1), play(1))
    assert not np.array_equal(play(1), play(2))


def test_attributes_are_the_sub_environments_where_there_are_some() -> None:
    env = GymVectorVecEnv(sync(Countdown, AutoresetMode.NEXT_STEP))
    env.reset()
    assert len(set(map(str, env.get_attr("np_random")))) == 1
    env.set_attr("left", 5)
    assert env.get_attr("left", indices=[0, 2]) == [5, 5]
    assert [float(observation["left"][0]) for observation in env.env_method("_observe")] == [5.0] * N_ENVS
    assert not env.has_attr("nothing")


def test_some_of_synchronous_environments_can_be_asked_and_set_and_to_look_at_a_method_does_not_call_it() -> None:
    env = GymVectorVecEnv(sync(Countdown, AutoresetMode.NEXT_STEP))
    env.reset()
    env.set_attr("left", 5)
    env.set_attr("left", 3, indices=0)
    assert env.get_attr("left") == [3, 5, 5]
    assert [float(observation["left"][0]) for observation in env.env_method("_observe", indices=[0, 2])] == [3.0, 5.0]
    assert env.has_attr("step")
    assert env.get_attr("left") == [3, 5, 5]
    assert env.get_attr("step", indices=1)[0](0)[0]["seen"] == 4


def test_environments_in_processes_are_asked_together() -> None:
    vector_env = AsyncVectorEnv([make_cart_pole] * 2)
    try:
        env = GymVectorVecEnv(vector_env)
        assert env.get_attr("gravity", indices=1) == [9.8]
        env.set_attr("gravity", 5.0)
        assert env.get_attr("gravity") == [5.0, 5.0]
        with pytest.raises(ValueError, match=r"indices must be None or all of 0\.\.1, got 0"):
            env.set_attr("gravity", 3.0, indices=0)
        with pytest.raises(ValueError, match="indices must be"):
            env.env_method("has_wrapper_attr", "gravity", indices=[1])
        assert env.env_method("has_wrapper_attr", "gravity") == [True, True]
    finally:
        vector_env.close()


def test_attributes_are_the_vector_environments_where_there_are_no_sub_environments() -> None:
    env = GymVectorVecEnv(RoboParkingVectorEnv(2, mass=12.0))
    assert env.get_attr("mass") == [12.0, 12.0]
    assert env.get_attr("mass", indices=1) == [12.0]
    env.set_attr("name", "ours")
    assert env.get_attr("name") == ["ours", "ours"]
    assert not env.has_attr("nothing")
    with pytest.raises(AttributeError, match=r"no sub-environments that could be called for start\(\)"):
        env.env_method("start")


def test_rendering_tiles_the_pictures() -> None:
    env = GymVectorVecEnv(RoboParkingVectorEnv(2, render_mode="rgb_array"))
    env.reset()
    picture = env.render()
    assert picture is not None
    assert picture.shape == (600, 1200, 3) or picture.shape == (1200, 600, 3)
    env.close()
    assert env.env.closed


def test_sb3_trains_and_evaluates_on_it_directly() -> None:
    env = GymVectorVecEnv(gymnasium.make_vec("RoboParking-v0", num_envs=8, max_episode_steps=20))
    model = LectureDQN("MlpPolicy", env, learning_starts=100, batch_size=16, train_freq=1, gradient_steps=1, seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # SB3 warns where it finds no episode statistics
        model.learn(400)
        returns, lengths = evaluate_policy(model, env, n_eval_episodes=8, return_episode_rewards=True)
    assert len(model.ep_info_buffer or ()) >= 8
    # an episode ends by parking or at the time limit
    assert model.ep_info_buffer is not None
    assert model.ep_success_buffer is not None
    assert len(model.ep_success_buffer) == len(model.ep_info_buffer)
    episodes = zip(model.ep_success_buffer, model.ep_info_buffer, strict=True)
    assert all(is_success or info["l"] == 20 for is_success, info in episodes)
    assert len(lengths) == 8  # type: ignore[arg-type]
    assert max(lengths) <= 20  # type: ignore[type-var]
    assert all(value < 0 for value in returns)  # type: ignore[operator, union-attr]
    assert env.env_is_wrapped(Monitor) == [True] * 8
    assert env.env_is_wrapped(gymnasium.wrappers.TimeLimit) == [False] * 8
