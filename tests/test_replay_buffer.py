"""The replay buffer (L11): a ring, sampled uniformly, by the algorithm's own generator."""

import pickle
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from gymnasium import spaces
from scripted_envs import CountingEnv
from stable_baselines3 import HerReplayBuffer
from stable_baselines3.common.buffers import NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import BitFlippingEnv
from stable_baselines3.common.vec_env import VecNormalize

from sb3_lecture_dqn import LectureDQN
from sb3_lecture_dqn.replay_buffer import ContiguousReplayBuffer, end_last_episodes


def collected(buffer_size: int, steps: int, seed: int = 0) -> LectureDQN:
    env = CountingEnv(length=10**9)
    model = LectureDQN("MlpPolicy", env, buffer_size=buffer_size, learning_starts=10**6, train_freq=1, seed=seed)
    return model.learn(steps)


def test_a_full_ring_drops_the_oldest_transition_first() -> None:
    buffer = collected(buffer_size=50, steps=70).replay_buffer
    assert buffer is not None
    assert buffer.size() == 50
    assert sorted(buffer.observations[:, 0, 1].tolist()) == list(range(20, 70))


def test_every_transition_is_drawn_equally_often() -> None:
    model = collected(buffer_size=50, steps=70)
    draws = model._sample_batch(100_000).observations[:, 1].numpy().astype(int)
    counts = np.bincount(draws - 20, minlength=50)
    # χ² with 49 degrees of freedom is above 85.4 once in a thousand times
    chi_square = ((counts - 2_000) ** 2 / 2_000).sum()
    assert chi_square < 85.4


def test_a_ring_that_is_not_full_gives_only_what_was_stored() -> None:
    model = collected(buffer_size=1_000, steps=10)
    draws = model._sample_batch(1_000).observations[:, 1].numpy()
    assert set(draws.tolist()) == set(range(10))


def test_sampling_leaves_numpys_global_generator_alone_and_ignores_it() -> None:
    batches = []
    for global_seed in (1, 2):
        model = collected(buffer_size=50, steps=50)
        np.random.seed(global_seed)
        expected_next = np.random.RandomState(global_seed).random_sample()
        batches.append(model._sample_batch(64).observations.numpy())
        assert np.random.random_sample() == expected_next
    np.testing.assert_array_equal(batches[0], batches[1])


def test_memory_is_allocated_when_it_is_first_needed() -> None:
    model = LectureDQN("MlpPolicy", "CartPole-v1", buffer_size=100_000)
    assert model.__dict__["replay_buffer"] is None
    assert model.replay_buffer is not None
    assert model.replay_buffer.observations.shape == (100_000, 1, 4)


def test_a_buffer_that_was_filled_before_learning_is_kept() -> None:
    model = LectureDQN("MlpPolicy", CountingEnv(), buffer_size=10, learning_starts=100, train_freq=1)
    buffer = model.replay_buffer
    assert buffer is not None
    buffer.add(np.full((1, 2), 7.0), np.full((1, 2), 8.0), np.zeros((1, 1)), np.ones(1), np.zeros(1), [{}])
    model.learn(3)
    assert model.replay_buffer is buffer
    assert buffer.observations[0, 0].tolist() == [7.0, 7.0]
    assert buffer.pos == 4


def test_a_buffer_class_of_the_users_own_may_lack_the_timeout_switch() -> None:
    class PlainBuffer(ReplayBuffer):
        def __init__(self, buffer_size, observation_space, action_space, device, n_envs, optimize_memory_usage):  # type: ignore[no-untyped-def]
            super().__init__(
                buffer_size,
                observation_space,
                action_space,
                device,
                n_envs,
                optimize_memory_usage,
                handle_timeout_termination=False,
            )

    model = LectureDQN("MlpPolicy", "CartPole-v1", replay_buffer_class=PlainBuffer, learning_starts=10).learn(40)
    assert isinstance(model.replay_buffer, PlainBuffer)
    assert model._n_updates > 0


def test_a_buffer_of_the_users_own_is_made_once_with_the_size_that_was_asked_for() -> None:
    sizes: list[int] = []

    class OwnBuffer(ReplayBuffer):
        def __init__(self, buffer_size: int, *args: Any, **kwargs: Any) -> None:
            sizes.append(buffer_size)
            super().__init__(buffer_size, *args, **kwargs)

    model = LectureDQN("MlpPolicy", "CartPole-v1", buffer_size=500, replay_buffer_class=OwnBuffer, learning_starts=10)
    assert type(model.learn(40).replay_buffer) is OwnBuffer
    assert sizes == [500]


def test_wrong_buffer_arguments_are_reported_at_construction() -> None:
    with pytest.raises(ValueError, match="optimize_memory_usage"):
        LectureDQN(
            "MlpPolicy",
            "CartPole-v1",
            optimize_memory_usage=True,
            replay_buffer_kwargs={"handle_timeout_termination": True},
        )
    with pytest.raises(TypeError, match="no_such_argument"):
        LectureDQN("MlpPolicy", "CartPole-v1", replay_buffer_kwargs={"no_such_argument": 1})


SPACES = {
    "vector": spaces.Box(-1, 1, (3,), np.float32),
    "float64": spaces.Box(-1, 1, (3,), np.float64),
    "image": spaces.Box(0, 255, (5, 3, 1), np.uint8),
    "number": spaces.Discrete(7),
    "bits": spaces.MultiBinary(5),
}


def filled(buffer_class: type[ReplayBuffer], space: spaces.Space[Any], n_envs: int, **kwargs: Any) -> ReplayBuffer:
    """A ring of 20 transitions an environment, after 30."""
    buffer = buffer_class(20 * n_envs, space, spaces.Discrete(4), device="cpu", n_envs=n_envs, **kwargs)
    space.seed(0)
    rng = np.random.default_rng(0)
    for _ in range(30):
        observations, next_observations = (np.stack([space.sample() for _ in range(n_envs)]) for _ in range(2))
        actions, rewards, dones = rng.integers(4, size=n_envs), rng.normal(size=n_envs), rng.integers(2, size=n_envs)
        infos = [{"TimeLimit.truncated": bool(rng.integers(2))} for _ in range(n_envs)]
        buffer.add(observations, next_observations, actions, rewards, dones, infos)
    return buffer


@pytest.mark.parametrize("handle_timeout_termination", [False, True])
@pytest.mark.parametrize("n_envs", [1, 3])
@pytest.mark.parametrize("kind", SPACES)
def test_the_contiguous_buffer_is_sb3s_buffer(kind: str, n_envs: int, handle_timeout_termination: bool) -> None:
    buffers = [
        filled(buffer_class, SPACES[kind], n_envs, handle_timeout_termination=handle_timeout_termination)
        for buffer_class in (ReplayBuffer, ContiguousReplayBuffer)
    ]
    for name in ("observations", "next_observations", "actions", "rewards", "dones", "timeouts"):
        theirs, ours = (getattr(buffer, name) for buffer in buffers)
        np.testing.assert_array_equal(theirs, ours)
        assert theirs.dtype == ours.dtype
    samples = []
    for buffer in buffers:
        np.random.seed(0)
        samples.append(buffer.sample(50))
    for theirs, ours in zip(*samples, strict=True):
        if theirs is not None:  # no discounts without n-step returns
            assert theirs.dtype == ours.dtype
            np.testing.assert_array_equal(theirs.numpy(), ours.numpy())


def test_the_contiguous_buffer_normalises_as_sb3s_does() -> None:
    env = VecNormalize(make_vec_env("CartPole-v1", n_envs=1, seed=0))
    env.reset()
    for _ in range(50):
        env.step(np.zeros(1, int))
    samples = []
    for buffer_class in (ReplayBuffer, ContiguousReplayBuffer):
        buffer = filled(buffer_class, env.observation_space, 1)
        np.random.seed(0)
        samples.append(buffer.sample(50, env=env))
    for theirs, ours in zip(*samples, strict=True):
        if theirs is not None:
            assert theirs.dtype == ours.dtype
            np.testing.assert_array_equal(theirs.numpy(), ours.numpy())


def test_a_sample_is_a_copy() -> None:
    buffer = filled(ContiguousReplayBuffer, SPACES["vector"], 1)
    before = buffer.observations.copy()
    buffer.sample(50).observations.zero_()
    np.testing.assert_array_equal(buffer.observations, before)


def test_a_pickled_contiguous_buffer_is_small_and_whole() -> None:
    ours = filled(ContiguousReplayBuffer, SPACES["image"], 2)
    pickled = pickle.dumps(ours)
    assert len(pickled) < 1.1 * len(pickle.dumps(filled(ReplayBuffer, SPACES["image"], 2)))
    restored = pickle.loads(pickled)
    np.testing.assert_array_equal(restored.observations, ours.observations)
    restored.observations[0] = 7
    assert (restored._records["observations"][0] == 7).all()


def test_the_buffer_is_contiguous_unless_the_user_says_otherwise() -> None:
    assert type(LectureDQN("MlpPolicy", "CartPole-v1").replay_buffer) is ContiguousReplayBuffer
    for kwargs in ({"replay_buffer_class": ReplayBuffer}, {"optimize_memory_usage": True}):
        assert type(LectureDQN("MlpPolicy", "CartPole-v1", **kwargs).replay_buffer) is ReplayBuffer


def test_a_subclass_that_passes_its_arguments_on_gets_the_lectures_done_flag() -> None:
    class PassesOn(ReplayBuffer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)

    buffer = LectureDQN("MlpPolicy", "CartPole-v1", replay_buffer_class=PassesOn).replay_buffer
    assert isinstance(buffer, PassesOn)
    assert buffer.handle_timeout_termination is False


def test_what_is_assigned_to_the_contiguous_buffer_is_what_is_drawn() -> None:
    buffer = collected(buffer_size=50, steps=70).replay_buffer
    assert isinstance(buffer, ContiguousReplayBuffer)
    buffer.rewards = buffer.rewards * 0 + 7.0
    buffer.observations = np.full(buffer.observations.shape, 3.0)
    samples = buffer.sample(20)
    assert (samples.rewards == 7).all()
    assert (samples.observations == 3).all()


def test_an_array_of_another_shape_is_refused_in_one_line_that_names_what_takes_it() -> None:
    buffer = collected(buffer_size=50, steps=10).replay_buffer
    assert buffer is not None
    message = r"^rewards must have the shape \(50, 1\), got \(30, 1\); with replay_buffer_class=ReplayBuffer it may"
    with pytest.raises(ValueError, match=message):
        buffer.rewards = np.zeros((30, 1))


def test_fractions_are_refused_where_the_buffer_holds_integers() -> None:
    buffer = filled(ContiguousReplayBuffer, SPACES["image"], 1)
    before = buffer.observations.copy()
    with pytest.raises(TypeError, match="same_kind"):
        buffer.observations = np.full(before.shape, 0.5)
    np.testing.assert_array_equal(buffer.observations, before)


def test_the_contiguous_buffer_refuses_to_store_each_observation_once() -> None:
    space = spaces.Box(-1, 1, (2,))
    with pytest.raises(ValueError, match="optimize_memory_usage must be False"):
        ContiguousReplayBuffer(10, space, spaces.Discrete(2), optimize_memory_usage=True, handle_timeout_termination=False)


def test_the_buffer_can_be_dropped_and_is_made_again_when_it_is_needed() -> None:
    model = collected(buffer_size=50, steps=20)
    del model.replay_buffer
    assert "replay_buffer" not in {name for name, value in vars(model).items() if value is not None}
    assert model.replay_buffer is not None
    assert model.replay_buffer.size() == 0


def go_on_at_once(model: LectureDQN, folder: Path) -> LectureDQN:
    return model.learn(20)


def go_on_with_a_saved_buffer(model: LectureDQN, folder: Path) -> LectureDQN:
    model.save(folder / "model")
    model.save_replay_buffer(folder / "buffer")
    loaded = LectureDQN.load(folder / "model", env=CountingEnv(length=1_000, first_episode=7))
    loaded.load_replay_buffer(folder / "buffer")
    return loaded.learn(20, reset_num_timesteps=False)


@pytest.mark.parametrize("go_on", [go_on_at_once, go_on_with_a_saved_buffer])
@pytest.mark.parametrize("handle_timeout_termination", [False, True])
def test_no_target_reaches_over_the_reset_between_two_trainings(
    go_on: Any, handle_timeout_termination: bool, tmp_path: Path
) -> None:
    kwargs = {"handle_timeout_termination": handle_timeout_termination}
    env = CountingEnv(length=1_000)
    model = LectureDQN("MlpPolicy", env, n_steps=5, buffer_size=100, replay_buffer_kwargs=kwargs, seed=0).learn(20)
    replay_buffer: Any = go_on(model, tmp_path).replay_buffer
    samples = replay_buffer._get_samples(np.arange(40))
    assert samples.observations[:, 0].tolist() == samples.next_observations[:, 0].tolist()  # the number of the episode
    assert samples.dones[:15].sum() == 0
    assert set(samples.dones[15:20, 0].tolist()) == {float(not handle_timeout_termination)}  # the lecture's d, or the other


def test_a_buffer_that_is_none_of_sb3s_is_left_alone_between_two_trainings() -> None:
    """It need not know what SB3's say of themselves."""
    model = LectureDQN("MlpPolicy", CountingEnv(length=1_000), learning_starts=10, seed=0)
    buffer = model.replay_buffer
    assert buffer is not None
    model.replay_buffer = cast(Any, SimpleNamespace(add=buffer.add, sample=buffer.sample, size=buffer.size))
    model.learn(20).learn(20)
    assert buffer.size() == 40
    assert buffer.dones.sum() == 0
    assert model._n_updates > 20


@pytest.mark.parametrize("is_terminated", [False, True])
def test_an_episode_that_had_ended_is_not_ended_again(is_terminated: bool) -> None:
    box, actions = spaces.Box(-1, 1, (2,)), spaces.Discrete(2)
    replay_buffer = NStepReplayBuffer(10, box, actions, n_steps=3, n_envs=2)
    observations = np.zeros((2, 2), np.float32)
    dones = np.array([is_terminated, False])
    replay_buffer.add(observations, observations, np.zeros((2, 1)), np.ones(2), dones, [{}, {}])
    end_last_episodes(replay_buffer)
    assert replay_buffer.dones[0].tolist() == [1, 1]
    assert replay_buffer.timeouts[0].tolist() == [not is_terminated, 1]


def test_a_discount_that_the_targets_do_not_have_is_named() -> None:
    kwargs = {"n_steps": 3, "gamma": 0.5}
    with pytest.warns(UserWarning, match=r"the targets are those of replay_buffer_kwargs, .*'gamma': 0\.5.* not of"):
        LectureDQN("MlpPolicy", "CartPole-v1", n_steps=3, replay_buffer_class=NStepReplayBuffer, replay_buffer_kwargs=kwargs)


def test_a_loaded_model_with_another_discount_is_told_that_its_targets_keep_theirs(tmp_path: Path) -> None:
    LectureDQN("MlpPolicy", "CartPole-v1", n_steps=3).save(tmp_path / "model")
    with pytest.warns(UserWarning, match="the targets are those of replay_buffer_kwargs"):
        loaded = LectureDQN.load(tmp_path / "model", gamma=0.5)
    assert loaded.replay_buffer.gamma == 0.99  # type: ignore[union-attr]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = LectureDQN.load(tmp_path / "model", gamma=0.5, replay_buffer_kwargs={})
    assert loaded.replay_buffer.gamma == 0.5  # type: ignore[union-attr]


@pytest.mark.filterwarnings("error")
def test_no_goal_of_hindsight_comes_from_behind_the_reset_between_two_trainings() -> None:
    env = BitFlippingEnv(n_bits=20, continuous=False, max_steps=10)
    model = LectureDQN(
        "MultiInputPolicy", env, replay_buffer_class=HerReplayBuffer, learning_starts=100, buffer_size=50, seed=0
    )
    replay_buffer: Any = model.learn(16).learn(16).replay_buffer
    assert replay_buffer.ep_length[:26, 0].tolist() == 10 * [10] + 6 * [6] + 10 * [10]
