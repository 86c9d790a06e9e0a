"""
Whatever a user passes: it trains, or it says why, and nothing on disk is harmed.

    python -m pytest tests/test_properties.py --hypothesis-profile thorough

tries 400 cases of each of the five properties.
"""

import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from hypothesis import example, given
from hypothesis import strategies as st

from sb3_lecture_dqn import DivergenceError, LectureDQN, ResumableCheckpointCallback, load_safetensors, save_safetensors
from sb3_lecture_dqn.resume.checkpoint_files import newest_checkpoint
from sb3_lecture_dqn.validation import NUMERIC_ARGUMENTS

#: What says why: errors that a user's input is answered with. Anything else is a bug here.
CLEAR_ERRORS = (ValueError, AssertionError, TypeError, NotImplementedError, OverflowError)
pytestmark = pytest.mark.filterwarnings("ignore")


class EnvError(Exception):
    """Raised by the environment below, and not by us."""


class OddEnv(gymnasium.Env[Any, int]):
    """
    An environment that does what environments should not.

    :param observation_space: Its observations are samples of it
    :param length: Number of steps in an episode
    :param ends: What it says at the end of an episode, (terminated, truncated)
    """

    #: What is wrong with its code, for whoever repairs it: the step of its life at which it raises, that from which its
    #: observations are another thing, that thing, and its reward.
    faults: ClassVar[dict[str, Any]] = {}

    def __init__(
        self, observation_space: spaces.Space[Any] | None = None, length: int = 3, ends: tuple[bool, bool] = (True, False)
    ) -> None:
        self.observation_space = observation_space or spaces.Box(-1, 1, (2,), np.float32)
        self.observation_space.seed(0)
        self.action_space = spaces.Discrete(3)
        self.length, self.ends = length, ends
        self.n_steps = self.life = 0

    def _observe(self) -> Any:
        if self.life >= self.faults.get("wrong_from", 10**9):
            return self.faults["wrong"]
        return self.observation_space.sample()

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        self.n_steps = 0
        return self._observe(), {}

    def step(self, action: int) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        self.n_steps += 1
        self.life += 1
        if self.life == self.faults.get("raise_at"):
            raise EnvError("the environment raised")
        terminated, truncated = self.ends if self.n_steps >= self.length else (False, False)
        return self._observe(), self.faults.get("reward", 1), terminated, truncated, {}


def make_model(env: Any, policy: str = "MlpPolicy", **kwargs: Any) -> LectureDQN:
    settings: dict[str, Any] = {"learning_starts": 4, "batch_size": 4, "train_freq": 2, "policy_kwargs": {"net_arch": [4]}}
    return LectureDQN(policy, env, seed=0, device="cpu", **{**settings, **kwargs})


def assert_says_why(error: BaseException) -> None:
    assert len(str(error)) > 10, f"{type(error).__name__} says nothing"


numbers = st.one_of(
    st.integers(-2, 40),
    st.floats(-2, 2),
    st.sampled_from([float("nan"), float("inf"), -float("inf"), None, "1", True, 1e30, np.float32(0.5), np.int64(3), [1]]),
)
ARGUMENTS = (*NUMERIC_ARGUMENTS, "learning_rate", "train_freq", "stats_window_size")


@example(arguments={"batch_size": np.int64(3), "gradient_steps": np.int32(2)})  # which PyTorch would not take
@given(arguments=st.dictionaries(st.sampled_from(ARGUMENTS), numbers, min_size=1, max_size=3))
def test_any_argument_trains_or_is_named(arguments: dict[str, Any]) -> None:
    try:
        model = make_model(OddEnv(), **arguments)
        model.learn(12)
    except CLEAR_ERRORS as error:
        assert_says_why(error)
        named = [name for name in arguments if name in str(error) or "diverged" in str(error)]
        assert named, f"{error} names none of {arguments}"  # noqa: PT017 - pytest.raises asks for an error every time
    else:
        assert model.num_timesteps >= 12


# every integer of 8 to 64 bits, float16 to float64, bool
dtypes = st.sampled_from(["i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8", "?"]).map(
    lambda code: np.dtype(code).type
)
shapes = st.lists(st.integers(0, 4), max_size=4).map(tuple)


@st.composite
def boxes(draw: st.DrawFn) -> spaces.Box:
    dtype = draw(dtypes)
    high = 1 if dtype == np.bool_ else draw(st.integers(1, 100))
    return spaces.Box(0, high, draw(shapes), dtype)


images = st.tuples(st.sampled_from([(36, 36, 1), (3, 40, 36), (8, 8, 3), (36, 37, 4)])).map(
    lambda shape: spaces.Box(0, 255, shape[0], np.uint8)
)
simple_spaces = st.one_of(
    boxes(),
    images,
    st.builds(spaces.Discrete, st.integers(1, 5), start=st.integers(-1, 1)),
    st.builds(spaces.MultiBinary, st.one_of(st.integers(1, 4), st.just([2, 2]))),
    st.builds(spaces.MultiDiscrete, st.lists(st.integers(1, 4), min_size=1, max_size=3)),
    st.just(spaces.Tuple((spaces.Discrete(2),))),
    st.just(spaces.Text(3)),
)
nested_spaces = st.recursive(
    simple_spaces, lambda inner: st.dictionaries(st.sampled_from("abc"), inner, max_size=3).map(spaces.Dict), max_leaves=4
)


@given(space=nested_spaces, policy=st.sampled_from(["MlpPolicy", "CnnPolicy", "MultiInputPolicy"]))
def test_any_observation_space_trains_or_is_refused(space: spaces.Space[Any], policy: str) -> None:
    try:
        model = make_model(OddEnv(space), policy)
        model.learn(8)
    except CLEAR_ERRORS as error:
        assert_says_why(error)
    else:
        with tempfile.TemporaryDirectory() as folder:
            save_safetensors(model, Path(folder) / "model.safetensors")
            assert load_safetensors(Path(folder) / "model.safetensors").observation_space == model.observation_space


@given(
    buffer_size=st.integers(1, 6),
    batch_size=st.integers(1, 50),
    n_steps=st.integers(1, 4),
    length=st.integers(1, 3),
    ends=st.sampled_from([(True, False), (False, True), (True, True)]),
    handle_timeout_termination=st.booleans(),
    optimize_memory_usage=st.booleans(),
)
def test_short_episodes_and_buffers_smaller_than_a_batch_train_or_are_refused(
    buffer_size: int,
    batch_size: int,
    n_steps: int,
    length: int,
    ends: tuple[bool, bool],
    handle_timeout_termination: bool,
    optimize_memory_usage: bool,
) -> None:
    try:
        model = make_model(
            OddEnv(length=length, ends=ends),
            buffer_size=buffer_size,
            batch_size=batch_size,
            n_steps=n_steps,
            optimize_memory_usage=optimize_memory_usage,
            replay_buffer_kwargs={"handle_timeout_termination": handle_timeout_termination},
        )
        model.learn(14)
    except CLEAR_ERRORS as error:
        assert_says_why(error)
        assert optimize_memory_usage, f"it could be trained: {error}"  # noqa: PT017
    else:
        assert model._episode_num == 14 // length
        assert model._n_updates > 0


wrong_observations = st.sampled_from(
    [np.zeros(3), np.zeros((2, 2)), np.zeros(0), 0.0, None, "text", [0.0, 0.0], {"a": np.zeros(2)}, np.full(2, np.nan)]
)
rewards = st.sampled_from([0, 1, -3, 10**6, True, np.int64(2), np.float64(0.5), np.zeros(1), None, "1", float("nan"), 10**400])


faults = st.fixed_dictionaries(
    {},
    optional={
        "raise_at": st.integers(1, 40),
        "wrong_from": st.integers(0, 40),
        "reward": st.sampled_from(
            [0, 1, -3, 10**6, True, np.int64(2), np.float64(0.5), np.zeros(1), None, "1", float("nan"), 10**400]
        ),
    },
)
wrong_observations = st.sampled_from(
    [np.zeros(3), np.zeros((2, 2)), np.zeros(0), 0.0, None, "text", [0.0, 0.0], {"a": np.zeros(2)}, np.full(2, np.nan)]
)


@given(faults=faults, wrong=wrong_observations)
def test_an_environment_that_fails_leaves_a_checkpoint_to_go_on_from(faults: dict[str, Any], wrong: Any) -> None:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(OddEnv, "faults", {**faults, "wrong": wrong})
        try:
            make_model(OddEnv()).learn(40, callback=ResumableCheckpointCallback(10, folder))
        except (EnvError, *CLEAR_ERRORS) as error:
            assert_says_why(error)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            checkpoint = newest_checkpoint(Path(folder))
        assert checkpoint is not None or faults["wrong_from"] == 0
        patch.setattr(OddEnv, "faults", {})
        try:
            make_model(OddEnv()).learn(40, callback=ResumableCheckpointCallback(10, folder))
        except DivergenceError:
            assert faults["wrong_from"] == 0  # the first observation of all is in the checkpoint


@given(content=st.binary(max_size=300), name=st.sampled_from(["model.zip", "model.safetensors", "manifest.json"]))
def test_any_bytes_are_refused(content: bytes, name: str) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "checkpoint_10"
        folder.mkdir()
        (folder / name).write_bytes(content)
        load: Callable[[], Any] = {
            "model.zip": lambda: LectureDQN.load(folder / name),
            "model.safetensors": lambda: load_safetensors(folder / name),
            "manifest.json": lambda: newest_checkpoint(Path(temporary)),
        }[name]
        with pytest.raises(ValueError, match=r"must be a whole|holds no checkpoint that is whole"):
            load()
