"""Model files: the same predictions after loading, nothing lost by a failure, clear errors for bad files."""

import errno
import importlib
import io
import json
import os
import subprocess
import sys
import zipfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch as th
from stable_baselines3 import DQN, PPO
from stable_baselines3.common.env_util import make_vec_env

from sb3_lecture_dqn import LectureDQN, model_files
from sb3_lecture_dqn.model_files import replace_when_written
from sb3_lecture_dqn.policies import MlpPolicy

OBSERVATIONS = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)


@pytest.fixture(scope="module")
def trained() -> LectureDQN:
    model = LectureDQN("MlpPolicy", "CartPole-v1", learning_starts=50, train_freq=1, policy_kwargs={"net_arch": [16]}, seed=0)
    return model.learn(400)


def q_values(model: LectureDQN) -> np.ndarray:
    return model.q_net(th.as_tensor(OBSERVATIONS)).detach().numpy()


def test_a_loaded_model_predicts_the_same(trained: LectureDQN, tmp_path: Path) -> None:
    trained.save(tmp_path / "model")
    loaded = LectureDQN.load(tmp_path / "model")
    np.testing.assert_array_equal(q_values(trained), q_values(loaded))
    np.testing.assert_array_equal(*(m.predict(OBSERVATIONS, deterministic=True)[0] for m in (trained, loaded)))
    assert loaded.exploration_rate == trained.exploration_rate
    for psi, loaded_psi in zip(trained.q_net_target.parameters(), loaded.q_net_target.parameters(), strict=True):
        assert th.equal(psi, loaded_psi)


def test_a_loaded_model_goes_on_learning(trained: LectureDQN, tmp_path: Path) -> None:
    trained.save(tmp_path / "model")
    loaded = LectureDQN.load(tmp_path / "model", env=gymnasium.make("CartPole-v1"))
    updates, timesteps = loaded._n_updates, loaded.num_timesteps
    loaded.learn(100, reset_num_timesteps=False)
    assert loaded._n_updates == updates + 100
    assert loaded.num_timesteps == timesteps + 100


def test_a_model_loads_for_another_number_of_environments(trained: LectureDQN, tmp_path: Path) -> None:
    trained.save(tmp_path / "model")
    loaded = LectureDQN.load(tmp_path / "model", env=make_vec_env("CartPole-v1", n_envs=3))
    assert loaded.learn(60).replay_buffer.observations.shape[1] == 3  # type: ignore[union-attr]


def test_loading_to_play_allocates_no_replay_buffer(trained: LectureDQN, tmp_path: Path) -> None:
    trained.save(tmp_path / "model")
    loaded = LectureDQN.load(tmp_path / "model", env=gymnasium.make("CartPole-v1"))
    loaded.predict(OBSERVATIONS)
    assert loaded.__dict__["replay_buffer"] is None
    assert loaded.buffer_size == trained.buffer_size


@pytest.mark.parametrize("position", [10, 20_000, -60, -1])
def test_a_damaged_replay_buffer_is_refused_before_it_is_unpickled(
    position: int, trained: LectureDQN, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "buffer.pkl"
    trained.save_replay_buffer(path)
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)
    loaded = LectureDQN("MlpPolicy", "CartPole-v1", buffer_size=10)
    buffer = loaded.replay_buffer
    monkeypatch.setattr("pickle.load", lambda file: pytest.fail("it was unpickled"))
    with pytest.raises(ValueError, match=rf"^path must be a whole replay buffer, got {path}: it is damaged$"):
        loaded.load_replay_buffer(path)
    assert loaded.replay_buffer is buffer


@pytest.mark.parametrize("share", [0.0, 0.5, 0.999])
def test_a_truncated_replay_buffer_is_refused(share: float, trained: LectureDQN, tmp_path: Path) -> None:
    path = tmp_path / "buffer.pkl"
    trained.save_replay_buffer(path)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(ValueError, match=rf"^path must be a whole replay buffer, got {tmp_path / 'buffer'}: "):
        LectureDQN("MlpPolicy", "CartPole-v1").load_replay_buffer(tmp_path / "buffer")


def test_sb3_and_this_package_read_each_others_replay_buffers(trained: LectureDQN, tmp_path: Path) -> None:
    trained.save_replay_buffer(tmp_path / "ours")
    sb3 = DQN("MlpPolicy", "CartPole-v1")
    sb3.load_replay_buffer(tmp_path / "ours")
    sb3.save_replay_buffer(tmp_path / "theirs")
    loaded = LectureDQN("MlpPolicy", "CartPole-v1")
    loaded.load_replay_buffer(tmp_path / "theirs")
    for buffer in (sb3.replay_buffer, loaded.replay_buffer):
        assert buffer is not None
        np.testing.assert_array_equal(buffer.observations, trained.replay_buffer.observations)  # type: ignore[union-attr]


def test_the_replay_buffer_survives_its_own_file(trained: LectureDQN, tmp_path: Path) -> None:
    trained.save_replay_buffer(tmp_path / "buffer")
    loaded = LectureDQN("MlpPolicy", "CartPole-v1")
    loaded.load_replay_buffer(tmp_path / "buffer")
    assert trained.replay_buffer is not None
    assert loaded.replay_buffer is not None
    assert loaded.replay_buffer.pos == trained.replay_buffer.pos
    np.testing.assert_array_equal(loaded.replay_buffer.observations, trained.replay_buffer.observations)


def test_the_replay_buffer_can_be_included_in_the_model_file(tmp_path: Path) -> None:
    model = LectureDQN("MlpPolicy", "CartPole-v1", buffer_size=100, policy_kwargs={"net_arch": [4]}).learn(40)
    model.save(tmp_path / "model", include=["replay_buffer"])
    loaded = LectureDQN.load(tmp_path / "model")
    assert loaded.replay_buffer is not None
    assert loaded.replay_buffer.pos == 40


def test_file_objects_work_like_paths(trained: LectureDQN) -> None:
    file = io.BytesIO()
    trained.save(file)
    file.seek(0)
    np.testing.assert_array_equal(q_values(LectureDQN.load(file)), q_values(trained))


def test_set_parameters_takes_a_file_or_a_dictionary(trained: LectureDQN, tmp_path: Path) -> None:
    trained.save(tmp_path / "model")
    for source in (str(tmp_path / "model"), trained.get_parameters()):
        other = LectureDQN("MlpPolicy", "CartPole-v1", policy_kwargs={"net_arch": [16]}, seed=9)
        assert not np.array_equal(q_values(other), q_values(trained))
        other.set_parameters(source)
        np.testing.assert_array_equal(q_values(other), q_values(trained))


def test_a_name_without_an_ending_gets_zip_and_missing_folders_are_made(trained: LectureDQN, tmp_path: Path) -> None:
    trained.save(str(tmp_path / "new" / "folder" / "model"))
    assert [file.name for file in (tmp_path / "new" / "folder").iterdir()] == ["model.zip"]


def test_a_failed_save_leaves_the_old_file_and_nothing_else(trained: LectureDQN, tmp_path: Path) -> None:
    trained.save(tmp_path / "model")
    before = (tmp_path / "model.zip").read_bytes()
    model = LectureDQN.load(tmp_path / "model")
    model.unpicklable = (_ for _ in ())  # type: ignore[attr-defined]
    with pytest.raises(TypeError, match="generator"):
        model.save(tmp_path / "model")
    assert (tmp_path / "model.zip").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


KILLED_SAVE = """
import os, pathlib, signal, sys
from sb3_lecture_dqn.model_files import replace_when_written
with replace_when_written(pathlib.Path(sys.argv[1])) as unfinished:
    unfinished.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_save_left_is_removed_by_the_next_one(trained: LectureDQN, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", KILLED_SAVE, str(tmp_path / "model.zip")], check=False)
    (left,) = tmp_path.iterdir()
    assert left.read_text() == "half"
    trained.save(tmp_path / "other.zip")
    assert left.exists()
    with replace_when_written(tmp_path / "model.zip") as unfinished:
        assert not left.exists()
        trained.save(unfinished)
        with replace_when_written(tmp_path / "model.zip") as of_another_thread:
            assert unfinished.exists()
            trained.save(of_another_thread)
    assert {path.name for path in tmp_path.iterdir()} == {"model.zip", "other.zip"}


def test_what_another_machine_is_writing_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dead_process_id: int
) -> None:
    with ExitStack() as their_save:
        with monkeypatch.context() as patch:
            patch.setattr(model_files, "here", lambda: "another machine")
            patch.setattr(os, "getpid", lambda: dead_process_id)  # no process has this number here
            theirs = their_save.enter_context(replace_when_written(tmp_path / "model.zip"))
        theirs.write_text("theirs")
        with replace_when_written(tmp_path / "model.zip") as ours:
            ours.write_text("ours")
        assert (tmp_path / "model.zip").read_text() == "ours"
        assert theirs.exists()
    assert (tmp_path / "model.zip").read_text() == "theirs"


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_a_truncated_file_is_named(trained: LectureDQN, tmp_path: Path, share: float) -> None:
    trained.save(tmp_path / "model")
    content = (tmp_path / "model.zip").read_bytes()
    (tmp_path / "half.zip").write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ValueError, match=r"path must be a whole model file of LectureDQN, got .*half\.zip"):
        LectureDQN.load(tmp_path / "half.zip")


def test_a_file_that_is_not_a_zip_is_named(tmp_path: Path) -> None:
    (tmp_path / "notes.zip").write_text("no model")
    with pytest.raises(ValueError, match=r"path must be a whole model file of LectureDQN, got .*notes\.zip"):
        LectureDQN.load(tmp_path / "notes.zip")


def test_a_damaged_member_is_named(trained: LectureDQN, tmp_path: Path) -> None:
    trained.save(tmp_path / "model")
    with zipfile.ZipFile(tmp_path / "model.zip") as archive:
        start = archive.getinfo("policy.pth").header_offset + 200
    content = bytearray((tmp_path / "model.zip").read_bytes())
    content[start] ^= 0xFF
    (tmp_path / "model.zip").write_bytes(content)
    with pytest.raises(ValueError, match=r"policy\.pth"):
        LectureDQN.load(tmp_path / "model")


def test_a_zip_without_a_model_is_named(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("data", json.dumps({"hello": 1}))
    with pytest.raises(ValueError, match=r"path must be a whole model file of LectureDQN, got .*other\.zip"):
        LectureDQN.load(tmp_path / "other.zip")


@pytest.mark.parametrize("algorithm", [DQN, PPO])
def test_a_model_of_another_algorithm_is_named(tmp_path: Path, algorithm: Any) -> None:
    algorithm("MlpPolicy", "CartPole-v1").save(tmp_path / "other")
    with pytest.raises(ValueError, match=r"path must be a model of LectureDQN, got .*other with the policy"):
        LectureDQN.load(tmp_path / "other")


def test_parameters_of_another_algorithm_are_refused_and_nothing_is_changed(trained: LectureDQN, tmp_path: Path) -> None:
    before = q_values(trained)
    DQN("MlpPolicy", "CartPole-v1", policy_kwargs={"net_arch": [16]}).save(tmp_path / "other")
    with pytest.raises(ValueError, match=r"path must be a model of LectureDQN, got .*other with the policy DQNPolicy"):
        trained.set_parameters(str(tmp_path / "other"), exact_match=False)
    np.testing.assert_array_equal(q_values(trained), before)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"net_arch": [16, 16]}, r"got a parameter q_net\S*bias$"),
        ({"net_arch": [8]}, r"where q_net\S* is \(.*\), got \(.*\)$"),
    ],
)
def test_parameters_of_another_network_are_refused_in_one_line_and_nothing_is_changed(
    trained: LectureDQN, tmp_path: Path, other: dict[str, Any], message: str
) -> None:
    before = q_values(trained)
    LectureDQN("MlpPolicy", "CartPole-v1", policy_kwargs=other).save(tmp_path / "other")
    with pytest.raises(ValueError, match=r"^load_path_or_dict must hold the parameters of this policy, " + message):
        trained.set_parameters(str(tmp_path / "other"))
    np.testing.assert_array_equal(q_values(trained), before)


@pytest.fixture
def of_lost_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A model file of ours and one of SB3's DQN, whose policy classes are in a module that is not there any more."""
    source = """
from sb3_lecture_dqn.policies import LectureDQNPolicy
from stable_baselines3.dqn.policies import DQNPolicy
class Lost(LectureDQNPolicy): ...
class LostToo(DQNPolicy): ...
"""
    (tmp_path / "lost_module.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    lost = importlib.import_module("lost_module")
    settings: dict[str, Any] = {"policy_kwargs": {"net_arch": [16]}, "seed": 3}
    LectureDQN(lost.Lost, "CartPole-v1", **settings).save(tmp_path / "model.zip")
    DQN(lost.LostToo, "CartPole-v1", **settings).save(tmp_path / "other.zip")
    monkeypatch.delitem(sys.modules, "lost_module")
    (tmp_path / "lost_module.py").unlink()
    importlib.invalidate_caches()
    return tmp_path / "model.zip", tmp_path / "other.zip"


def test_a_policy_whose_class_is_gone_can_be_replaced(of_lost_classes: tuple[Path, Path]) -> None:
    ours, other = of_lost_classes
    with pytest.raises(ValueError, match=r'custom_objects give a "policy_class", got .*model\.zip: No module named'):
        LectureDQN.load(ours)
    loaded = LectureDQN.load(ours, custom_objects={"policy_class": MlpPolicy})
    model = LectureDQN("MlpPolicy", "CartPole-v1", policy_kwargs={"net_arch": [16]})
    model.set_parameters(str(ours))
    np.testing.assert_array_equal(q_values(model), q_values(loaded))
    with pytest.raises(ValueError, match="path must be a model whose policy can be imported"):
        model.set_parameters(str(other), exact_match=False)
    np.testing.assert_array_equal(q_values(model), q_values(loaded))


def test_a_failed_save_of_the_buffer_leaves_the_old_file_and_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = LectureDQN("MlpPolicy", "CartPole-v1", buffer_size=100, learning_starts=1_000).learn(50)
    model.save_replay_buffer(tmp_path / "buffer")
    before = (tmp_path / "buffer.pkl").read_bytes()

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("stable_baselines3.common.save_util.pickle.dump", fail)
    with pytest.raises(OSError, match=r"No space left on device: .*buffer\.pkl"):
        model.save_replay_buffer(tmp_path / "buffer")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("buffer.pkl", before)]


def test_a_model_saved_through_a_link_is_where_the_link_points(trained: LectureDQN, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "model.zip").symlink_to(tmp_path / "elsewhere" / "real.zip")
    trained.save(tmp_path / "model.zip")
    assert (tmp_path / "model.zip").is_symlink()
    np.testing.assert_array_equal(q_values(LectureDQN.load(tmp_path / "elsewhere" / "real.zip")), q_values(trained))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        LectureDQN.load(tmp_path / "nowhere")
