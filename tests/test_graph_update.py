"""
The update on a GPU is the plain update too.

Where there is a CUDA device, each test with captures runs on it too. On the CPU, what is captured is replayed as a GPU would
do it: the same operations on the same memory, without any line of Python in between. That they also run on a device other than
the CPU is tried with tensors that have no contents.
"""

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from operator import itemgetter
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import numpy as np
import pytest
import torch as th
from both_paths import (
    BATCH_SIZE,
    DEVICES,
    VECTOR,
    DictEncoder,
    DoubleFlatten,
    SmallCnn,
    SpaceEnv,
    copied,
    largest_difference,
    make_model,
    moved,
    random_batch,
    train_both,
    train_on,
    trained_in_float64,
)
from gymnasium import spaces
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import FakeImageEnv, SimpleMultiObsEnv
from stable_baselines3.common.torch_layers import FlattenExtractor, NatureCNN
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from sb3_lecture_dqn import LectureDQN, lecture_dqn, replay_buffer
from sb3_lecture_dqn.fast import device_copy, graph, products, update
from sb3_lecture_dqn.fast.acting import to_tensors
from sb3_lecture_dqn.fast.device_copy import DrawnRows
from sb3_lecture_dqn.fast.graph import Capturer, GraphActing, GraphUpdate, map_tensors
from sb3_lecture_dqn.replay_buffer import ContiguousReplayBuffer

T = TypeVar("T")


class Capture(TorchDispatchMode):
    """What was captured: which operations, and how often it was replayed."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Any] = []
        self.n_replays = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations.append(func)
        return func(*args, **(kwargs or {}))

    def replay(self) -> None:
        self.n_replays += 1


class Recording(Capture):
    """Stands for a CUDA graph; what the work wrote is put back, because a capture computes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, list[th.Tensor]]] = []
        self.overwritten: dict[int, tuple[th.UntypedStorage, th.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for argument, value in zip(func._schema.arguments, [*args, *kwargs.values()], strict=False):
            is_written = argument.alias_info is not None and argument.alias_info.is_write
            for tensor in tree_leaves(value) if is_written else []:
                self.keep(tensor)
        for tensor in (value for name, value in kwargs.items() if name in {"out", "grad_input"}):
            self.keep(tensor)
        outputs = super().__torch_dispatch__(func, types, args, kwargs)
        # a graph knows memory: it does not follow a parameter that is moved
        args, kwargs = tree_map_only(
            th.Tensor, lambda tensor: tensor.detach() if tensor.requires_grad else tensor, (args, kwargs)
        )
        self.calls.append((func, args, kwargs, [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, th.Tensor)]))
        return outputs

    def keep(self, tensor: th.Tensor) -> None:
        storage = tensor.untyped_storage()
        self.overwritten.setdefault(storage.data_ptr(), (storage, storage.clone()))

    def put_back(self) -> None:
        for storage, contents in self.overwritten.values():
            storage.copy_(contents)

    @th.inference_mode()
    def replay(self) -> None:
        super().replay()
        for func, args, kwargs, outputs in self.calls:
            results = [leaf for leaf in tree_leaves(func(*args, **kwargs)) if isinstance(leaf, th.Tensor)]
            for output, result in zip(outputs, results, strict=True):
                if output.data_ptr() != result.data_ptr():
                    output.copy_(result)


class NoisyEncoder(FlattenExtractor):
    """An encoder of a user's own."""


class Captures:
    """Counts what CUDA is asked for, or stands for it on the CPU."""

    def __init__(self) -> None:
        self.recordings: list[Capture] = []

    @property
    def n_replays(self) -> int:
        return sum(recording.n_replays for recording in self.recordings)

    @property
    def of_updates(self) -> list[Capture]:
        """Those of gradient steps, and not of acting."""
        return [recording for recording in self.recordings if any("lerp" in func.__name__ for func in recording.operations)]

    def on_the_cpu(self, work: Callable[[], T], _: th.device) -> tuple[Callable[[], None], T]:
        with Recording() as recording:
            results = work()
        recording.put_back()
        self.recordings.append(recording)
        return recording.replay, results

    def by_cuda(self, work: Callable[[], T], device: th.device) -> tuple[Callable[[], None], T]:
        noted = Capture()

        def noted_work() -> T:
            with noted:
                return work()

        def noted_replay() -> None:
            noted.replay()
            replay()

        replay, results = CAPTURE(noted_work, device)
        self.recordings.append(noted)
        return noted_replay, results


CAPTURE = graph.capture


@pytest.fixture(params=DEVICES)
def captures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Captures:
    """The path of a GPU, with the encoders of the other tests, which work in float64, as known ones."""
    captures, device = Captures(), request.param
    known = (*update.MODELESS_MODULES, SmallCnn, DictEncoder, DoubleFlatten)
    monkeypatch.setattr(update, "MODELESS_MODULES", known)
    monkeypatch.setattr(graph, "MODELESS_MODULES", known)
    monkeypatch.setattr(graph, "capture", captures.by_cuda if device == "cuda" else captures.on_the_cpu)
    monkeypatch.setattr(Capturer, "can_capture", True)
    monkeypatch.setattr(th.cuda, "is_available", lambda: device == "cuda")  # SB3 takes a GPU where there is one
    if device == "cpu":
        monkeypatch.setattr(GraphUpdate, "device_type", "cpu")
        monkeypatch.setattr(GraphActing, "device_type", "cpu")
        monkeypatch.setattr(LectureDQN, "_make_fast_update", lambda self: GraphUpdate.for_policy(self.policy))
        monkeypatch.setattr(lecture_dqn, "FastActing", GraphActing)
        monkeypatch.setattr(replay_buffer, "is_cuda", lambda _: True)
        monkeypatch.setattr(device_copy, "free_memory", lambda _: 10**8)
        monkeypatch.setattr(products, "is_onednn_quicker", lambda: False)
    return captures


@pytest.mark.parametrize("max_grad_norm", [None, 0.5])
@pytest.mark.parametrize("kind", ["vector", "image", "dict"])
def test_replays_agree_with_the_plain_path_in_float64_over_500_updates(
    captures: Captures, kind: str, max_grad_norm: float | None
) -> None:
    kwargs: dict[str, Any] = {"max_grad_norm": max_grad_norm, "target_update_interval": 20, "learning_rate": 1e-3}
    plain, fast = (make_model(kind, fast, **kwargs) for fast in (False, True))
    train_both(kind, (plain, fast), 500)
    assert (len(captures.recordings), captures.n_replays) == (1, 499)
    assert largest_difference(plain, fast) < 1e-9
    assert largest_difference(plain, make_model(kind, fast=False)) > 0.01


@pytest.mark.parametrize("kwargs", [{}, {"n_steps": 3}, {"max_grad_norm": 0.5}])
@pytest.mark.parametrize("normalised", [False, True])
def test_whole_float64_runs_agree(captures: Captures, kwargs: dict[str, Any], normalised: bool) -> None:
    plain, fast = (trained_in_float64(fast, normalised, **kwargs) for fast in (False, True))
    assert fast._n_updates == plain._n_updates == 501
    assert (len(captures.recordings), captures.n_replays) == (1, 500)
    assert largest_difference(plain, fast) < 1e-9


IMAGES = spaces.Box(0, 255, (1, 36, 36), np.uint8)
OBSERVATIONS = [
    ("MlpPolicy", spaces.Box(-1, 1, (8,), np.float32)),
    ("CnnPolicy", IMAGES),
    ("MultiInputPolicy", spaces.Dict({"image": IMAGES, "number": spaces.Discrete(3)})),
]


def make_float32_model(policy: str, space: spaces.Space[Any], **kwargs: Any) -> LectureDQN:
    """A model with 40 random transitions in D."""
    env = SpaceEnv("vector")
    env.observation_space = space
    model = LectureDQN(policy, env, learning_rate=1e-3, batch_size=8, buffer_size=100, seed=0, **kwargs)
    model._setup_learn(100)
    fill(model, 40)
    return model


@pytest.mark.parametrize(("policy", "space"), OBSERVATIONS)
def test_one_float32_update_agrees_with_sb3s_own_encoders(captures: Captures, policy: str, space: Any) -> None:
    plain, fast = make_float32_model(policy, space), make_float32_model(policy, space)
    plain._current_fast_update = lambda: None  # type: ignore[method-assign]
    fast.train(1, 8)
    fast.train(1, 8)
    plain.set_parameters(copied(fast.get_parameters()))
    plain.random_generator = copy.deepcopy(fast.random_generator)
    for model in (plain, fast):
        model.train(1, 8)
    assert captures.n_replays == 2
    assert largest_difference(plain, fast) < 1e-6


@pytest.mark.parametrize(
    ("policy", "make_env"),
    [
        ("MlpPolicy", lambda: "CartPole-v1"),
        ("CnnPolicy", lambda: FakeImageEnv(screen_height=36, screen_width=36, n_channels=1, discrete=True)),
        ("MultiInputPolicy", SimpleMultiObsEnv),
    ],
)
def test_one_float32_update_agrees_at_100_points_of_a_real_run(captures: Captures, policy: str, make_env: Any) -> None:
    settings: dict[str, Any] = {"learning_rate": 5e-4, "buffer_size": 1_000, "policy_kwargs": {"net_arch": [32, 32]}}
    run = LectureDQN(policy, make_env(), learning_starts=50, gradient_steps=1, seed=0, **settings)
    run.learn(60)
    plain = LectureDQN(policy, make_env(), **settings)
    plain._current_fast_update = lambda: None  # type: ignore[method-assign]
    plain._setup_learn(100)
    for _ in range(100):
        run.learn(4, reset_num_timesteps=False)
        plain.set_parameters(copied(run.get_parameters()))
        batch = run._sample_batch(BATCH_SIZE)
        for model in (run, plain):
            model._sample_batch = lambda _, batch=batch: batch  # type: ignore[method-assign]
            model.train(1, BATCH_SIZE)
            del model._sample_batch  # type: ignore[method-assign]
        assert largest_difference(plain, run) < 1e-6
    assert isinstance(run._fast_update, GraphUpdate)


class UsersCnn(NatureCNN):
    """May view images in another shape."""


@pytest.mark.parametrize(
    ("policy_kwargs", "is_known"),
    [
        ({"features_extractor_class": NatureCNN}, True),
        ({"features_extractor_class": UsersCnn}, False),
        ({"optimizer_kwargs": {"fused": True}}, False),
    ],
)
def test_convolutions_are_laid_out_for_a_gpu_and_saved_for_any_device(
    captures: Captures, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policy_kwargs: dict[str, Any], is_known: bool
) -> None:
    monkeypatch.setattr(graph, "is_cuda", lambda _: True)
    model = make_float32_model("CnnPolicy", IMAGES, policy_kwargs=policy_kwargs)
    for _ in range(3):
        model.train(1, 8)
    weight = dict(model.q_net.named_parameters())["features_extractor.cnn.2.weight"]
    assert weight.is_contiguous(memory_format=th.channels_last) == is_known
    monkeypatch.setattr(graph, "is_cuda", lambda device: device.type == "cuda")
    assert len(model.policy.parameters_to_vector()) == sum(p.numel() for p in model.policy.parameters())
    model.save(tmp_path / "model")
    loaded = LectureDQN.load(tmp_path / "model", device="cpu")
    np.testing.assert_array_equal(loaded.policy.parameters_to_vector(), model.policy.parameters_to_vector())
    observations = observations_of(IMAGES, 4)
    q_values, same_q_values = (m.q_net(m.policy.obs_to_tensor(observations)[0]) for m in (model, loaded))
    assert dict(loaded.q_net.named_parameters())["features_extractor.cnn.2.weight"].is_contiguous()
    assert th.allclose(q_values.cpu(), same_q_values, atol=1e-3)


def trained_model(**kwargs: Any) -> LectureDQN:
    settings = {"batch_size": 16, "learning_starts": 50, "gradient_steps": 4, "learning_rate": 1e-3, **kwargs}
    return LectureDQN("MlpPolicy", "CartPole-v1", seed=0, **settings).learn(100)


def test_several_steps_of_a_training_call_are_replays_of_one_capture(captures: Captures) -> None:
    model = trained_model()
    assert model._n_updates == 4 * 13
    # the first call is made operation by operation
    assert [recording.n_replays for recording in captures.of_updates] == [12]


def note_draws(buffer: ReplayBuffer | None) -> list[ReplayBufferSamples]:
    """What is drawn to be read on the device, as it is there."""
    assert isinstance(buffer, ContiguousReplayBuffer)
    draws: list[ReplayBufferSamples] = []
    draw = buffer.draw

    def noted_draw(*args: Any) -> DrawnRows:
        drawn = draw(*args)
        assert isinstance(drawn, DrawnRows)
        draws.append(drawn.records.samples(th.from_numpy(drawn.indices).to(drawn.records.words.device)))
        return drawn

    buffer.draw = noted_draw  # type: ignore[method-assign]
    return draws


def fill(model: LectureDQN, n: int) -> None:
    rng, space = np.random.default_rng(0), model.observation_space
    space.seed(0)
    assert model.replay_buffer is not None
    for _ in range(n):
        transition = (rng.integers(3, size=1), rng.normal(size=1), rng.integers(2, size=1), [{}])
        model.replay_buffer.add(space.sample(), space.sample(), *transition)


@pytest.mark.parametrize("max_grad_norm", [None, 0.5])
def test_any_number_of_steps_is_made_of_graphs_of_one_two_four_or_more(
    captures: Captures, max_grad_norm: float | None
) -> None:
    kwargs: dict[str, Any] = {"max_grad_norm": max_grad_norm, "learning_rate": lambda progress: 1e-3 * progress}
    plain, fast = (make_model("vector", fast, **kwargs) for fast in (False, True))
    fill(fast, 10)
    draws = note_draws(fast.replay_buffer)
    for n, n_captures in ((1, 0), (2, 0), (3, 2), (7, 2), (7, 3), (8, 3), (20, 3), (20, 4), (13, 5), (0, 5)):
        draws.clear()
        fast.train(n, BATCH_SIZE)
        batches = iter([map_tensors(itemgetter(rows), draw) for draw in draws for rows in slices_of(draw)])
        plain._sample_batch = lambda _, batches=batches: next(batches)  # type: ignore[method-assign]
        plain.train(n, BATCH_SIZE)
        assert len(captures.recordings) == n_captures
        assert largest_difference(plain, fast) < 1e-12
        for model in (plain, fast):
            model._current_progress_remaining -= 0.05
    assert fast._n_updates == 81
    assert {**fast._training_metrics.pop()} == pytest.approx({**plain._training_metrics.pop()}, rel=1e-9)


FLAT_IMAGES = ("MlpPolicy", spaces.Box(-1, 1, (1, 36, 36), np.float32))


@pytest.mark.parametrize(
    ("observations", "batch_size", "n_drawn"),
    [(OBSERVATIONS[0], 512, 32), (OBSERVATIONS[0], 1, 64), (OBSERVATIONS[1], 256, 4), (FLAT_IMAGES, 256, 4)],
)
def test_few_steps_are_drawn_at_once_where_they_need_much_memory(
    captures: Captures, observations: Any, batch_size: int, n_drawn: int
) -> None:
    model = make_float32_model(*observations)
    draws = note_draws(model.replay_buffer)
    model.train(65, batch_size)
    assert [len(draw.actions) // batch_size for draw in draws] == [n_drawn] * (65 // n_drawn) + [1]


def slices_of(draw: ReplayBufferSamples) -> list[slice]:
    return [slice(start, start + BATCH_SIZE) for start in range(0, len(draw.actions), BATCH_SIZE)]


def rows_of_batch(batch: ReplayBufferSamples, n: int) -> ReplayBufferSamples:
    """As many rows as are asked for; of a buffer of a user's own, so that each draw is a batch."""
    rows = th.arange(n) % BATCH_SIZE
    return ReplayBufferSamples(*(None if field is None else field[rows] for field in batch))  # type: ignore[arg-type]


def change_gamma(model: LectureDQN) -> None:
    model.gamma = 0.5


def change_clipping(model: LectureDQN) -> None:
    model.max_grad_norm = 1e-3


def change_betas(model: LectureDQN) -> None:
    model.policy.optimizer.param_groups[0]["betas"] = (0.5, 0.9)


def change_epsilon(model: LectureDQN) -> None:
    model.policy.optimizer.param_groups[0]["eps"] = 1e-2


def change_batch_size(model: LectureDQN) -> None:
    model.batch_size = 20


def change_learning_rate(model: LectureDQN) -> None:
    model.lr_schedule = lambda _: 1e-2


def change_parameters(model: LectureDQN) -> None:
    model.set_parameters(model.get_parameters())


@pytest.mark.parametrize(
    ("change", "n_captures"),
    [
        (change_gamma, 2),
        (change_clipping, 2),
        (change_betas, 2),
        (change_epsilon, 1),
        (change_batch_size, 2),
        (change_learning_rate, 1),
        (change_parameters, 2),
    ],
)
def test_both_paths_agree_after_a_change_in_the_middle_of_a_run(
    captures: Captures, change: Callable[[LectureDQN], None], n_captures: int
) -> None:
    plain, fast = (make_model("vector", fast, learning_rate=1e-3) for fast in (False, True))
    batch = random_batch("vector", np.random.default_rng(0))
    for model in (plain, fast):
        model._sample_batch = partial(rows_of_batch, moved(batch, model.device))  # type: ignore[method-assign]
    for n in range(6):
        for model in (plain, fast):
            if n == 3:
                change(model)
            model.train(1, model.batch_size)
    assert len(captures.recordings) == n_captures
    assert largest_difference(plain, fast) < 1e-12


class OnlyOn(TorchDispatchMode):
    """Refuses operations with tensors on another device; those on ``meta`` cannot be read by the host at all."""

    def __init__(self, device_type: str) -> None:
        super().__init__()
        self.device_type = device_type
        self.n_operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        devices = {leaf.device.type for leaf in tree_leaves((args, kwargs, outputs)) if isinstance(leaf, th.Tensor)}
        assert devices <= {self.device_type}, f"{func} has tensors on {devices}"
        self.n_operations += not func.is_view
        return outputs


NO_CONTENTS = th.device("meta")


@pytest.mark.parametrize(("policy", "space"), OBSERVATIONS)
def test_what_is_captured_asks_the_host_for_nothing_and_stays_on_its_device(
    monkeypatch: pytest.MonkeyPatch, policy: str, space: Any
) -> None:
    captured: list[OnlyOn] = []

    def capture(work: Callable[[], T], device: th.device) -> tuple[Callable[[], None], T]:
        assert device == NO_CONTENTS
        captured.append(OnlyOn("meta"))
        with captured[-1]:
            results = work()
        return lambda: None, results

    monkeypatch.setattr(graph, "capture", capture)
    monkeypatch.setattr(GraphUpdate, "device_type", "meta")
    model = make_float32_model(policy, space, max_grad_norm=1.0)
    samples = model._sample_batch(8)
    model.policy.to(NO_CONTENTS)
    model.policy.optimizer = th.optim.Adam(model.q_net.parameters())
    model.device = NO_CONTENTS
    model._sample_batch = lambda _: moved(samples, NO_CONTENTS)  # type: ignore[method-assign]
    monkeypatch.setattr(model, "_record_training_metrics", lambda: None)
    monkeypatch.setattr(th, "is_autocast_enabled", lambda _: False)  # which does not know this device
    for _ in range(3):
        model.train(1, 8)
    assert len(captured) == 1
    assert captured[0].n_operations > 20
    assert isinstance(model._fast_update, GraphUpdate)


@pytest.mark.parametrize("handle_timeout_termination", [False, True])
def test_transitions_are_read_on_their_device_without_the_host(handle_timeout_termination: bool) -> None:
    record = ContiguousReplayBuffer(1, IMAGES, spaces.Discrete(3), device="cpu")._records.dtype
    words = th.zeros(20, record.itemsize // 8, dtype=th.int64, device=NO_CONTENTS)
    records = device_copy.CopiedRecords(words, record, handle_timeout_termination)
    with OnlyOn("meta"):
        samples = records.samples(th.zeros(6, dtype=th.int64, device=NO_CONTENTS))
    assert samples.observations.shape == (6, 1, 36, 36)  # type: ignore[union-attr]
    assert (samples.dones.shape, samples.rewards.dtype) == ((6, 1), th.float32)


def test_the_metrics_of_replays_are_those_of_the_plain_path(captures: Captures) -> None:
    models = [make_model("vector", fast, max_grad_norm=0.5) for fast in (False, True)]
    train_both("vector", models, 20)
    plain, fast = ({**model._training_metrics.pop()} for model in models)
    assert captures.n_replays == 19
    assert set(plain) == {"loss", "q_values", "td_target", "gradient_norm"}
    assert fast == pytest.approx(plain, rel=1e-9)


def refuse(*_: Any) -> Any:
    raise RuntimeError("operation not permitted when stream is capturing")


class AskingEncoder(DoubleFlatten):
    """Asks the device for a number, for which a capture cannot wait."""

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return super().forward(observations) * max(float(observations.max()), 0.5)


def test_where_cuda_cannot_capture_a_warning_says_so_once_and_the_steps_are_made(
    captures: Captures, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setattr(graph, "MODELESS_MODULES", (*graph.MODELESS_MODULES, AskingEncoder))
    settings: dict[str, Any] = {"policy_kwargs": {"features_extractor_class": AskingEncoder}}
    plain, fast = (make_model("vector", fast, **settings) for fast in (False, True))
    if fast.device.type == "cpu":  # which would answer
        monkeypatch.setattr(graph, "capture", refuse)
    train_both("vector", (plain, fast), 10)
    assert ["cannot capture this, which is slower without: " in str(warning.message) for warning in recwarn] == [True]
    assert captures.recordings == []
    assert isinstance(fast._fast_update, GraphUpdate)
    assert fast._n_updates == 10
    assert largest_difference(plain, fast) < 1e-12


def test_a_model_trained_by_replays_goes_on_by_the_plain_path(captures: Captures, tmp_path: Path) -> None:
    models = [make_model("vector", fast) for fast in (False, True)]
    train_both("vector", models, 10)
    plain, fast = models
    assert captures.n_replays == 9
    states = [model.policy.optimizer.state_dict()["state"] for model in models]
    assert {float(state["step"]) for state in states[1].values()} == {10.0}
    for index, state in states[0].items():
        for name, value in state.items():
            assert th.allclose(states[1][index][name], value, rtol=0, atol=1e-12)
    fast.save(tmp_path / "model")
    continued = make_model("vector", fast=False)
    continued.set_parameters(str(tmp_path / "model"))
    batch = random_batch("vector", np.random.default_rng(1))
    for model in (plain, fast, continued):
        train_on(model, batch)
    assert largest_difference(plain, fast) < 1e-12
    assert largest_difference(plain, continued) < 1e-12


@pytest.mark.parametrize(
    "policy_kwargs",
    [
        {"optimizer_kwargs": {"fused": True}},
        {"optimizer_class": th.optim.SGD},
        {"activation_fn": th.nn.Tanh},
        {"features_extractor_class": NoisyEncoder},
    ],
)
def test_the_plain_path_is_taken_for_what_a_graph_might_not_do(captures: Captures, policy_kwargs: dict[str, Any]) -> None:
    model = trained_model(policy_kwargs=policy_kwargs)
    assert model._n_updates == 4 * 13
    assert model._fast_update is None


def test_the_plain_path_is_taken_with_mixed_precision(captures: Captures, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("vector", fast=True)
    monkeypatch.setattr(th, "is_autocast_enabled", lambda device_type: device_type == model.device.type)
    assert model._current_fast_update() is None
    monkeypatch.setattr(th, "is_autocast_enabled", lambda _: False)
    assert isinstance(model._current_fast_update(), GraphUpdate)


def test_the_plain_path_is_taken_for_step_counts_on_the_device(captures: Captures) -> None:
    model = trained_model()
    assert GraphUpdate.for_policy(model.policy) is not None
    model.policy.optimizer.param_groups[0]["capturable"] = True
    assert GraphUpdate.for_policy(model.policy) is None


def test_a_batch_of_a_users_own_is_left_as_it_is(captures: Captures) -> None:
    model = make_model("vector", fast=True)
    rng = np.random.default_rng(0)
    batches = [moved(random_batch("vector", rng), model.device) for _ in range(5)]
    before = copy.deepcopy(batches)
    for batch in batches:
        train_on(model, batch)
    assert captures.n_replays == 4
    for batch, unchanged in zip(batches, before, strict=True):
        assert all(th.equal(part, old) for part, old in zip(batch[:5], unchanged[:5], strict=True))


def test_there_is_no_graph_on_a_cpu() -> None:
    model = trained_model(device="cpu")
    assert GraphUpdate.for_policy(model.policy) is None
    assert GraphActing.for_policy(model.policy) is None


N_OPERATIONS = [(75, 192), (108, 291), (116, 320)]


@pytest.mark.parametrize(("observations", "n_operations"), list(zip(OBSERVATIONS, N_OPERATIONS, strict=True)))
def test_one_captured_step_is_few_operations_and_several_are_fewer_each(
    captures: Captures, observations: Any, n_operations: tuple[int, int]
) -> None:
    model = make_float32_model(*observations, max_grad_norm=10.0)
    for n_steps in (1, 1, 4, 4):
        model.train(n_steps, 8)
    counts = [sum(not func.is_view for func in recording.operations) for recording in captures.recordings]
    assert len(counts) == 2
    assert all(np.less_equal(counts, n_operations)), counts


class FakeCuda:
    """CUDA's contexts, as far as a capture enters them; PyTorch's context of a graph leaves its stream behind if it fails."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.entered: list[tuple[str, Any]] = []
        self.current, self.streams = "default", 0
        monkeypatch.setattr(th.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: None))
        monkeypatch.setattr(th.cuda, "current_stream", lambda _: self.current)
        monkeypatch.setattr(th.cuda, "Stream", self.make_stream)
        monkeypatch.setattr(th.cuda, "device", lambda device: self.context("device", device))
        monkeypatch.setattr(th.cuda, "stream", lambda stream: self.context("stream", stream))
        monkeypatch.setattr(th.cuda, "graph", lambda _, stream, capture_error_mode: self.graph_context(stream))

    def make_stream(self, device: th.device) -> str:
        self.streams += 1
        return f"stream {self.streams} of {device}"

    @contextmanager
    def context(self, kind: str, value: Any) -> Iterator[None]:
        self.entered.append((kind, value))
        before = self.current
        try:
            yield
        finally:
            self.current = before

    @contextmanager
    def graph_context(self, stream: str) -> Iterator[None]:
        self.entered.append(("graph", stream))
        before, self.current = self.current, stream
        yield
        self.current = before


def test_a_capture_is_on_its_device_and_on_the_same_stream_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, device = FakeCuda(monkeypatch), th.device("cuda:1")
    graph._capture_stream.cache_clear()
    for _ in range(2):
        cuda.entered.clear()
        replay, results = graph.capture(lambda: cuda.current, device)
        assert cuda.entered == [("device", device), ("stream", "default"), ("graph", "stream 1 of cuda:1")]
        assert results == "stream 1 of cuda:1"
        assert callable(replay)
    graph._capture_stream.cache_clear()


def test_a_capture_that_fails_leaves_the_stream_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError

    cuda = FakeCuda(monkeypatch)
    with pytest.raises(RuntimeError):
        graph.capture(fail, th.device("cuda:0"))
    assert cuda.current == "default"
    graph._capture_stream.cache_clear()


def test_the_order_of_a_dictionary_means_nothing(captures: Captures) -> None:
    plain, fast = (make_model("dict", fast) for fast in (False, True))
    rng = np.random.default_rng(0)
    for n in range(6):
        batch = random_batch("dict", rng)
        if n % 2 == 1:
            turned = [dict(reversed(observations.items())) for observations in (batch.observations, batch.next_observations)]  # type: ignore[attr-defined]
            batch = batch._replace(observations=turned[0], next_observations=turned[1])  # type: ignore[arg-type]
        train_on(plain, batch)
        train_on(fast, batch)
    assert len(captures.recordings) == 1
    assert largest_difference(plain, fast) < 1e-12


def make_acting_model(policy: str, space: spaces.Space[Any]) -> LectureDQN:
    model = make_float32_model(policy, space)
    weight = model.q_net.q_net[-1].weight
    weight.data.copy_(th.randn(weight.shape, generator=th.Generator().manual_seed(0)))  # so that actions differ
    return model


def observations_of(space: spaces.Space[Any], n_envs: int) -> Any:
    samples = [space.sample() for _ in range(n_envs)]
    if isinstance(space, spaces.Dict):
        return {key: np.stack([sample[key] for sample in samples]) for key in space}
    return np.stack(samples)


@pytest.mark.parametrize(("policy", "space"), OBSERVATIONS)
def test_replayed_acting_is_the_policys(captures: Captures, policy: str, space: spaces.Space[Any]) -> None:
    model = make_acting_model(policy, space)
    acting = GraphActing.for_policy(model.policy)
    assert acting is not None
    actions = []
    for n_envs, n_calls in ((1, 20), (4, 10), (1, 10)):
        for _ in range(n_calls):
            observations = observations_of(space, n_envs)
            assert acting.accepts(observations)
            actions.append(acting.greedy_actions(observations))
            np.testing.assert_array_equal(actions[-1], model.policy.predict(observations, deterministic=True)[0])
    assert (len(captures.recordings), captures.n_replays) == (2, 19 + 9 + 10)
    assert len(set(np.concatenate(actions))) > 1


def test_replayed_acting_follows_the_parameters(captures: Captures) -> None:
    space = OBSERVATIONS[0][1]
    model = make_acting_model("MlpPolicy", space)
    acting = GraphActing.for_policy(model.policy)
    assert acting is not None
    observation = observations_of(space, 1)
    for action in (0, 2, 1, 0):
        with th.no_grad():
            model.q_net.q_net[-1].bias.zero_()[action] = 1e4
        assert acting.is_current(model.policy)
        assert acting.greedy_actions(observation) == [action]
    assert captures.n_replays == 3


def test_replayed_acting_notices_that_an_encoders_weights_have_moved(captures: Captures) -> None:
    policy, space = OBSERVATIONS[1]
    model = make_acting_model(policy, space)
    acting = GraphActing.for_policy(model.policy)
    assert acting is not None
    observations = observations_of(space, 4)
    for _ in range(3):
        acting.greedy_actions(observations)
    for module in model.q_net.features_extractor.modules():
        if isinstance(module, th.nn.Conv2d):
            module.weight.data = module.weight.data.clone()
    assert not acting.is_current(model.policy)
    assert not acting.accepts(observations)


def test_a_run_acts_and_trains_by_replays_as_it_would_by_the_plain_path(
    captures: Captures, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run() -> LectureDQN:
        # one gradient step at a time, so that both draw the same batches
        settings: dict[str, Any] = {"train_freq": 1, "gradient_steps": 1, "batch_size": 16, "exploration_fraction": 0.1}
        env = make_vec_env("CartPole-v1", n_envs=2, seed=0)
        return LectureDQN("MlpPolicy", env, buffer_size=300, learning_starts=50, seed=0, **settings).learn(300)

    fast = run()
    n_replays = captures.n_replays
    assert isinstance(fast._fast_acting, GraphActing)
    monkeypatch.setattr(GraphActing, "for_policy", classmethod(lambda cls, policy: None))
    monkeypatch.setattr(LectureDQN, "_current_fast_update", lambda _: None)
    plain = run()
    assert captures.n_replays == n_replays > 100
    assert fast.replay_buffer is not None
    assert plain.replay_buffer is not None
    np.testing.assert_array_equal(fast.replay_buffer.actions, plain.replay_buffer.actions)
    assert largest_difference(plain, fast) < 1e-3


@pytest.mark.parametrize(("policy", "space"), OBSERVATIONS)
def test_what_is_captured_of_acting_asks_the_host_for_nothing(policy: str, space: spaces.Space[Any]) -> None:
    model = make_float32_model(policy, space)
    model.policy.to(NO_CONTENTS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GraphActing, "device_type", "meta")
        acting = GraphActing.for_policy(model.policy)
    assert isinstance(acting, GraphActing)
    observations = moved(to_tensors(observations_of(space, 4)), NO_CONTENTS)
    with th.no_grad(), OnlyOn("meta") as operations:
        assert acting._actions(observations).shape == (4,)
    assert operations.n_operations > 5


def test_acting_goes_on_where_cuda_cannot_capture(
    captures: Captures, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setattr(graph, "capture", refuse)
    model = trained_model()
    assert model._n_updates == 4 * 13
    assert [str(warning.message) for warning in recwarn if "capture" in str(warning.message)] == [
        "CUDA cannot capture this, which is slower without: operation not permitted when stream is capturing"
    ]


def replay_buffer_of(model: LectureDQN) -> ContiguousReplayBuffer:
    assert isinstance(model.replay_buffer, ContiguousReplayBuffer)
    return model.replay_buffer


def test_a_flag_of_the_buffer_that_changes_is_followed(captures: Captures) -> None:
    """d of a transition that a time limit ended; graphs that read the transitions have it as a constant."""
    plain, fast = (make_model("vector", fast, gamma=0.9) for fast in (False, True))
    for model in (plain, fast):
        model.replay_buffer = ContiguousReplayBuffer(
            10, VECTOR, spaces.Discrete(3), device=model.device, handle_timeout_termination=True
        )
        model.replay_buffer.add(*np.ones((2, 1, 5)), np.zeros((1, 1)), np.ones(1), np.ones(1), [{"TimeLimit.truncated": True}])
    for n in range(8):
        for model in (plain, fast):
            replay_buffer_of(model).handle_timeout_termination = n < 4
            model.train(1, 4)
    assert len(captures.recordings) == 2
    assert largest_difference(plain, fast) < 1e-12


def test_a_sample_put_into_the_buffer_is_asked(captures: Captures) -> None:
    model = make_float32_model("MlpPolicy", OBSERVATIONS[0][1])
    buffer, asked = replay_buffer_of(model), []
    sample = buffer.sample
    buffer.sample = lambda *args, **kwargs: (asked.append(args), sample(*args, **kwargs))[1]  # type: ignore[method-assign]
    model.train(2, 8)
    assert asked == [(16,)]


def exchange_buffer(model: LectureDQN) -> None:
    model.replay_buffer = copy.deepcopy(replay_buffer_of(model))


def delete_buffer(model: LectureDQN) -> None:
    del model.replay_buffer


@pytest.mark.parametrize("change", [exchange_buffer, delete_buffer])
def test_a_buffer_that_is_gone_leaves_nothing_on_the_device(captures: Captures, change: Callable[[LectureDQN], None]) -> None:
    model = make_float32_model("MlpPolicy", OBSERVATIONS[0][1])
    for _ in range(3):
        model.train(1, 8)
    copied = replay_buffer_of(model)._device_copy._copied
    assert copied is not None
    words = weakref.ref(copied.words)
    del copied
    change(model)
    captures.recordings.clear()
    gc.collect()
    assert words() is None


def test_transitions_are_those_of_another_buffer_as_soon_as_there_is_one(captures: Captures) -> None:
    model = make_float32_model("MlpPolicy", OBSERVATIONS[0][1])
    for n_before in (0, 3):
        before = replay_buffer_of(model)
        for _ in range(n_before):
            model.train(1, 8)
        model.replay_buffer = copy.deepcopy(before)
        replay_buffer_of(model).rewards[:] = 1_000 + n_before
        for _ in range(3):
            model.train(1, 8)
        model._training_metrics.pop()
        model.train(1, 8)
        assert model._training_metrics.pop()["td_target"] == pytest.approx(1_000 + n_before, abs=1)
    assert captures.n_replays > 4


def test_betas_in_a_list_may_be_changed_in_place(captures: Captures) -> None:
    betas = [0.5, 0.9]
    plain, fast = (make_model("vector", fast, policy_kwargs={"optimizer_kwargs": {"betas": betas}}) for fast in (False, True))
    for model in (plain, fast):
        model.policy.optimizer.param_groups[0]["betas"] = betas
    train_both("vector", (plain, fast), 4)
    betas[0] = 0.9
    train_both("vector", (plain, fast), 4)
    assert len(captures.recordings) == 2
    assert largest_difference(plain, fast) < 1e-12


def test_an_interruption_between_two_graphs_leaves_the_step_count_of_what_was_done(
    captures: Captures, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_float32_model("MlpPolicy", OBSERVATIONS[0][1])
    for _ in range(2):
        model.train(3, 8)
    parts: list[int] = []
    do = Capturer.do

    def interrupted(capturer: Any, inputs: Any, work: Any) -> Any:
        parts.append(len(inputs.coefficients))
        if parts == [2, 1]:
            raise KeyboardInterrupt
        return do(capturer, inputs, work)

    monkeypatch.setattr(Capturer, "do", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.train(3, 8)
    assert {float(state["step"]) for state in model.policy.optimizer.state.values()} == {8.0}


def test_a_run_can_do_without_graphs(captures: Captures, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Capturer, "can_capture", False)
    model = trained_model()
    assert model._n_updates == 4 * 13
    assert isinstance(model._fast_update, GraphUpdate)
    assert captures.recordings == []


def test_an_encoder_of_a_users_own_acts_by_itself(captures: Captures) -> None:
    model = trained_model(policy_kwargs={"features_extractor_class": NoisyEncoder})
    assert model._fast_acting is None
