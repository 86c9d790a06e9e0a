"""What the package relies on in other libraries beyond their documentation; a failure here says that upstream has changed."""

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import optuna
import pytest
import torch as th
from gymnasium.envs.classic_control import CartPoleEnv
from stable_baselines3 import HerReplayBuffer
from stable_baselines3.common import buffers, env_util, off_policy_algorithm, save_util
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.envs import BitFlippingEnv
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv
from torch.optim import optimizer as torch_optimizer

from sb3_lecture_dqn import LectureDQN
from sb3_lecture_dqn.fast.products import ONEDNN_LINEAR
from sb3_lecture_dqn.replay_buffer import ContiguousReplayBuffer
from sb3_lecture_dqn.resume.replay_buffer_rows import stores_rows_as_sb3
from sb3_lecture_dqn.resume.training_state import ALGORITHM_STATE, KNOWN_ATTRIBUTES, LOGGER_STATE, NOT_A_CALLBACKS_OWN
from sb3_lecture_dqn.tuning import storage

HOOKS = ("forward_hooks", "forward_pre_hooks", "backward_hooks", "backward_pre_hooks")
VECTOR, ACTIONS = gymnasium.spaces.Box(-1, 1, (2,)), gymnasium.spaces.Discrete(2)
ADVICE = "Stable-Baselines3 has changed: sb3_lecture_dqn/lecture_dqn.py must follow"
OPTUNA_ADVICE = "Optuna has changed: sb3_lecture_dqn/tuning/storage.py must follow"


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("_setup_model", []),
        ("_setup_learn", ["total_timesteps", "callback", "reset_num_timesteps", "tb_log_name", "progress_bar"]),
        ("_on_step", []),
        ("_store_transition", ["replay_buffer", "buffer_action", "new_obs", "reward", "dones", "infos"]),
        ("_update_learning_rate", ["optimizers"]),
        ("_excluded_save_params", []),
        ("_get_torch_save_params", []),
        ("dump_logs", []),
        ("set_random_seed", ["seed"]),
        ("_wrap_env", ["verbose", "monitor_wrapper"]),
        ("save", ["path", "exclude", "include"]),
    ],
)
def test_methods_that_lecture_dqn_overrides_or_calls_take_what_they_took(method: str, parameters: list[str]) -> None:
    assert list(inspect.signature(getattr(OffPolicyAlgorithm, method)).parameters)[1:] == parameters, ADVICE


def test_attributes_that_lecture_dqn_reads_are_set_by_sb3() -> None:
    model = LectureDQN("MlpPolicy", "CartPole-v1")
    for name in ("_vec_normalize_env", "_current_progress_remaining", "_n_updates", "_last_obs", "_stats_window_size"):
        assert name in vars(model), f"{ADVICE} ({name})"


def test_sb3_asks_for_the_replay_buffer_before_it_makes_one() -> None:
    source = inspect.getsource(off_policy_algorithm.OffPolicyAlgorithm._setup_model)
    assert "if self.replay_buffer is None" in source, ADVICE


def test_sb3s_buffers_draw_from_numpys_global_generator() -> None:
    assert "np.random.randint" in inspect.getsource(buffers.BaseBuffer.sample), f"{ADVICE} (seeding.numpy_draws_from)"


def test_the_file_helpers_that_files_uses_are_there() -> None:
    assert callable(save_util.open_path), ADVICE
    assert callable(save_util.json_to_data), ADVICE


def test_policies_have_the_hooks_that_ours_fill_in() -> None:
    for name in ("_predict", "_get_constructor_parameters", "_update_features_extractor", "extract_features"):
        assert callable(getattr(BasePolicy, name)), f"{ADVICE} (policies.py, {name})"


# Private names of other libraries, with the module of ours that uses them.
PRIVATE_NAMES: list[tuple[Callable[[], Any], str, list[str]]] = [
    (lambda: BasePolicy, "policies.py", ["_dummy_schedule", "_update_features_extractor", "_get_constructor_parameters"]),
    (lambda: buffers.ReplayBuffer, "replay_buffer.py", ["_get_samples", "_normalize_obs", "_normalize_reward"]),
    (
        lambda: buffers.NStepReplayBuffer(9, VECTOR, ACTIONS),
        "resume/replay_buffer_rows.py",
        ["pos", "full", "dones", "timeouts"],
    ),
    (lambda: LectureDQN("MlpPolicy", "CartPole-v1").env, "gym_vector_vec_env.py", ["_options", "_seeds", "_get_indices"]),
    (lambda: DummyVecEnv, "single_vec_env.py", ["_save_obs"]),
    (lambda: VecEnv, "gym_vector_vec_env.py", ["_reset_seeds", "_reset_options"]),
    (lambda: gymnasium.wrappers.OrderEnforcing(CartPoleEnv()), "resume/episode_recorder.py", ["_has_reset"]),
    (lambda: th.nn.Linear(1, 1), "fast/head.py", ["_modules", "_parameters", *(f"_{hooks}" for hooks in HOOKS)]),
    (lambda: th.nn.modules.module, "fast/head.py", [f"_global_{hooks}" for hooks in HOOKS]),
    (lambda: th.nn.Parameter(th.zeros(1)), "fast/head.py", ["_backward_hooks", "_post_accumulate_grad_hooks"]),
    (lambda: th.optim.Adam([th.zeros(1)]), "fast/adam.py", ["_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"]),
    (lambda: torch_optimizer, "fast/adam.py", ["_global_optimizer_pre_hooks", "_global_optimizer_post_hooks"]),
    (lambda: th, "fast/adam.py", ["_fused_adam_"]),
    (lambda: th, "fast/update.py and fast/graph.py", ["_foreach_copy_"]),
]


@pytest.mark.parametrize(("make", "module", "names"), PRIVATE_NAMES)
def test_private_names_of_other_libraries_are_there(make: Callable[[], Any], module: str, names: list[str]) -> None:
    owner = make()
    missing = [name for name in names if not hasattr(owner, name)]
    assert missing == [], f"{owner!r} has no {missing} any more: sb3_lecture_dqn's {module} must follow"


def test_pytorchs_product_by_onednn_takes_what_it_took() -> None:
    schema = str(getattr(ONEDNN_LINEAR, "_schema", None))
    arguments = "(Tensor X, Tensor W, Tensor? B, str attr, Scalar?[] scalars, str? algorithm) -> Tensor Y"
    assert schema.endswith(arguments), f"{schema}: sb3_lecture_dqn's fast/products.py must follow"


def test_callbacks_find_sb3s_local_variables_under_the_names_that_ours_read() -> None:
    assert "callback" in OffPolicyAlgorithm.learn.__code__.co_varnames, "callbacks.py and resume/checkpoints.py must follow"
    needed = {"info", "i", "observations", "actions", "reward", "done"}
    assert needed <= set(evaluate_policy.__code__.co_varnames), "OverestimationCallback in callbacks.py must follow"


def test_optunas_cache_calls_its_database_by_methods_that_wait_for_outages() -> None:
    from optuna.storages import _cached_storage

    source = inspect.getsource(_cached_storage._CachedStorage)
    called = set(re.findall(r"self\._backend\.(\w+)\(", source))
    assert called, OPTUNA_ADVICE
    heartbeat = {name for name in called if "heartbeat" in name or "stale" in name}  # switched off
    patient = {*optuna.storages.BaseStorage.__abstractmethods__, *storage.CACHE_METHODS, "remove_session"}
    assert called - heartbeat <= patient, OPTUNA_ADVICE
    assert all(callable(getattr(optuna.storages.RDBStorage, name)) for name in storage.CACHE_METHODS), OPTUNA_ADVICE


def test_optunas_cache_reads_trials_by_arguments_that_leave_some_out() -> None:
    parameters = ["self", "study_id", "states", "included_trial_ids", "trial_id_greater_than"]
    assert list(inspect.signature(optuna.storages.RDBStorage._get_trials).parameters) == parameters, OPTUNA_ADVICE


@pytest.mark.parametrize("kind", ["memory", "sqlite", "journal"])
def test_a_running_trial_can_be_put_back_into_optunas_queue(tmp_path: Path, kind: str) -> None:
    urls = {"sqlite": f"sqlite:///{tmp_path}/study.db", "journal": f"{tmp_path}/study.log"}
    study = optuna.create_study(storage=storage.open_storage(urls[kind]) if kind in urls else None)
    trial = study.ask()
    value = trial.suggest_float("x", 0, 1)
    storage.set_trial_attribute(study, study.trials[0], "key", 1)
    assert storage.is_held(study, trial, None), OPTUNA_ADVICE
    storage.put_back(study, study.trials[0])
    again = study.ask()
    assert (again.number, again.suggest_float("x", 0, 1), again.user_attrs) == (0, value, {"key": 1}), OPTUNA_ADVICE
    study.tell(again, 1.0)
    assert study.best_value == 1.0, OPTUNA_ADVICE


# What checkpoints rely on. A run that is continued is exact only if they know every attribute that training changes.

CHECKPOINT_ADVICE = "checkpoints must follow: see sb3_lecture_dqn/resume/training_state.py and resume/replay_buffer_rows.py"


def test_every_attribute_of_a_trained_model_is_known_to_checkpoints() -> None:
    model = LectureDQN("MlpPolicy", "CartPole-v1", learning_starts=10, batch_size=4).learn(30)
    assert set(vars(model)) <= KNOWN_ATTRIBUTES, f"{set(vars(model)) - KNOWN_ATTRIBUTES} may be state: {CHECKPOINT_ADVICE}"
    assert set(ALGORITHM_STATE) <= set(vars(model)), CHECKPOINT_ADVICE


def test_collecting_begins_where_checkpoints_are_made() -> None:
    collect = inspect.getsource(OffPolicyAlgorithm.collect_rollouts)
    assert collect.index("callback.on_rollout_start()") < collect.index("env.step("), CHECKPOINT_ADVICE
    learn = inspect.getsource(OffPolicyAlgorithm.learn)
    loop = learn[learn.index("while self.num_timesteps < total_timesteps") :]
    assert loop.index("self.collect_rollouts(") < loop.index("self.train("), CHECKPOINT_ADVICE


@pytest.mark.parametrize(
    "buffer_class",
    [
        buffers.ReplayBuffer,
        buffers.NStepReplayBuffer,
        buffers.DictReplayBuffer,
        HerReplayBuffer,
        ContiguousReplayBuffer,
    ],
)
def test_checkpoints_know_everything_that_sb3s_buffers_remember(buffer_class: type[buffers.ReplayBuffer]) -> None:
    env: Any = BitFlippingEnv(n_bits=2, continuous=False)
    is_dictionary = issubclass(buffer_class, buffers.DictReplayBuffer)
    space = env.observation_space if is_dictionary else env.observation_space["observation"]
    kwargs = {"env": env} if buffer_class is HerReplayBuffer else {}
    buffer = buffer_class(10, space, env.action_space, **kwargs)
    assert stores_rows_as_sb3(buffer), f"{buffer_class.__name__} would be saved whole: {CHECKPOINT_ADVICE}"


def test_callbacks_and_loggers_have_the_attributes_that_checkpoints_name() -> None:
    class Callback(BaseCallback):
        def _on_step(self) -> bool:
            return True

    assert {"locals", "globals", "parent"} <= set(vars(Callback())) & NOT_A_CALLBACKS_OWN, CHECKPOINT_ADVICE
    assert set(LOGGER_STATE) <= set(vars(Logger(None, []))), CHECKPOINT_ADVICE
    assert "results_writer" in vars(Monitor(gymnasium.make("CartPole-v1"))), CHECKPOINT_ADVICE


def test_asking_whether_an_environment_is_wrapped_reaches_it() -> None:
    asked = []

    class Asks:
        def __instancecheck__(self, env: Any) -> bool:
            asked.append(env)
            return True

    env = Monitor(gymnasium.make("CartPole-v1"))
    assert env_util.is_wrapped(env, Asks())  # type: ignore[arg-type]
    assert asked == [env], "vec_env_state.insert_recorders must find another way into SubprocVecEnv"
