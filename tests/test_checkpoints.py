"""Checkpoints on disk: whole or not at all, incremental, and never trusted unseen."""

import errno
import json
import os
import random
import re
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gymnasium import spaces
from resuming import differences, kills, load_benchmark, run
from scripted_envs import CountingEnv
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv

from sb3_lecture_dqn import LectureDQN, ResumableCheckpointCallback
from sb3_lecture_dqn.resume import checkpoint_files, checkpoints
from sb3_lecture_dqn.resume.checkpoint_files import (
    SHARED_FOLDER,
    DamagedCheckpointError,
    UnreadableCheckpointError,
    delete_all_but_last,
    newest_checkpoint,
    read_checkpoint,
    write_checkpoint,
    write_shared_file,
)
from sb3_lecture_dqn.resume.replay_buffer_rows import ReplayBufferFiles
from sb3_lecture_dqn.resume.run_settings import in_few_words


def small_model() -> LectureDQN:
    return LectureDQN(
        "MlpPolicy",
        "CartPole-v1",
        buffer_size=250,
        learning_starts=50,
        batch_size=16,
        policy_kwargs={"net_arch": [8]},
        seed=3,
        device="cpu",
    )


def write(folder: Path, num_timesteps: int, content: bytes = b"content", shared: Any = ()) -> None:
    write_checkpoint(folder, num_timesteps, {"file": lambda file: file.write(content)}, shared, {"note": "a fact"})


def test_a_checkpoint_is_read_as_it_was_written(tmp_path: Path) -> None:
    shared = write_shared_file(tmp_path, "rows", lambda file: file.write(b"rows"))
    write(tmp_path, 10, shared=[shared])
    checkpoint = newest_checkpoint(tmp_path)
    assert checkpoint is not None
    assert (checkpoint.num_timesteps, checkpoint.facts) == (10, {"note": "a fact"})
    assert checkpoint.file("file").read_bytes() == b"content"
    assert checkpoint.shared_file(checkpoint.shared_files[0]).read_bytes() == b"rows"


def test_an_empty_folder_has_no_checkpoint(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path) is None
    assert newest_checkpoint(tmp_path / "missing") is None


def test_only_the_last_ones_and_what_they_need_are_kept(tmp_path: Path) -> None:
    records = [write_shared_file(tmp_path, f"rows_{i}", lambda file: file.write(b"rows")) for i in range(4)]
    for i in range(4):
        write(tmp_path, i, shared=records[max(0, i - 1) : i + 1])
    (tmp_path / "checkpoint_9.unfinished").mkdir()
    delete_all_but_last(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint_2", "checkpoint_3", SHARED_FOLDER]
    assert sorted(path.name for path in (tmp_path / SHARED_FOLDER).iterdir()) == sorted(r.name for r in records[1:])


@pytest.mark.parametrize("name", ["replay_buffer/buffer.pkl", "replay_buffer/rows.npz", "checkpoint_notes.deleted/notes.txt"])
def test_what_is_not_ours_is_never_deleted(tmp_path: Path, name: str) -> None:
    users = tmp_path / name
    users.parent.mkdir(exist_ok=True)
    users.write_text("the user's own")
    for num_timesteps in (0, 1):
        write(tmp_path, num_timesteps, shared=[write_shared_file(tmp_path, "rows", lambda file: file.write(b"rows"))])
        delete_all_but_last(tmp_path, 1)
    assert users.read_text() == "the user's own"
    assert len(list((tmp_path / SHARED_FOLDER).glob("rows_*"))) == 1


@pytest.mark.parametrize("victim", ["file", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path: Path, victim: str, damage: str) -> None:
    write(tmp_path, 10)
    write(tmp_path, 20)
    path = tmp_path / "checkpoint_20" / victim
    content = path.read_bytes()
    if damage == "remove":
        path.unlink()
    else:
        path.write_bytes(content[:-3] if damage == "truncate" else content[:2] + bytes([content[2] ^ 4]) + content[3:])
    with pytest.warns(UserWarning, match=r"checkpoint_20 is damaged: .*; the checkpoint before it is used"):
        checkpoint = newest_checkpoint(tmp_path)
    assert checkpoint is not None
    assert checkpoint.num_timesteps == 10
    newest_checkpoint(tmp_path)  # set aside: not named again, and not counted among the last ones


@pytest.mark.filterwarnings("ignore:.*is damaged")
def test_a_damaged_checkpoint_stays_for_what_can_be_saved_by_hand(tmp_path: Path) -> None:
    write(tmp_path, 10)
    write(tmp_path, 20, b"parameters")
    (tmp_path / "checkpoint_20" / "manifest.json").write_bytes(b"")
    newest_checkpoint(tmp_path)
    for num_timesteps in (20, 30, 40):
        write(tmp_path, num_timesteps)
        delete_all_but_last(tmp_path, 1)
    (damaged,) = tmp_path.glob("*.damaged")
    assert (damaged / "file").read_bytes() == b"parameters"


@pytest.mark.filterwarnings("ignore:.*is damaged")
def test_a_folder_with_nothing_but_damage_is_an_error_and_not_a_new_run(tmp_path: Path) -> None:
    write(tmp_path, 10)
    (tmp_path / "checkpoint_10" / "file").write_bytes(b"other")
    with pytest.raises(DamagedCheckpointError, match="holds no checkpoint that is whole"):
        newest_checkpoint(tmp_path)


def make_unreadable(path: Path, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a checkpoint be of another format, or its disk fail."""
    if reason == "format":
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint_files, "FORMAT_VERSION", 99)
            write(path.parent, int(path.name.partition("_")[2]))
        return
    open_file = Path.open

    def failing_open(file: Path, *args: Any, **kwargs: Any) -> Any:
        if path in file.parents:
            raise OSError(getattr(errno, reason), os.strerror(getattr(errno, reason)), str(file))
        return open_file(file, *args, **kwargs)

    monkeypatch.setattr(Path, "open", failing_open)


@pytest.mark.parametrize("reason", ["EIO", "ESTALE", "EACCES", "format"])
def test_a_checkpoint_that_cannot_be_read_is_passed_over_and_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    write(tmp_path, 10)
    write(tmp_path, 20)
    make_unreadable(tmp_path / "checkpoint_20", reason, monkeypatch)
    with pytest.warns(
        UserWarning, match=r"checkpoint_20 (cannot be read|has the format 99).*; the checkpoint before it is used"
    ):
        checkpoint = newest_checkpoint(tmp_path)
    delete_all_but_last(tmp_path, 3)
    monkeypatch.undo()
    assert checkpoint is not None
    assert checkpoint.num_timesteps == 10
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint_10", "checkpoint_20"]


@pytest.mark.filterwarnings("ignore:.*the checkpoint before it is used")
def test_a_folder_of_which_nothing_can_be_read_is_an_error_and_not_a_new_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, 10)
    make_unreadable(tmp_path / "checkpoint_10", "EIO", monkeypatch)
    with pytest.raises(
        UnreadableCheckpointError, match=r"holds no checkpoint that can be read: .*checkpoint_10 cannot be read"
    ):
        newest_checkpoint(tmp_path)


def test_files_of_two_checkpoints_cannot_be_swapped(tmp_path: Path) -> None:
    write(tmp_path, 10, b"first")
    write(tmp_path, 20, b"other")
    os.replace(tmp_path / "checkpoint_10" / "file", tmp_path / "checkpoint_20" / "file")
    with pytest.raises(DamagedCheckpointError, match="file is not what was written"):
        read_checkpoint(tmp_path / "checkpoint_20")


def test_another_format_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_files, "FORMAT_VERSION", 99)
    write(tmp_path, 10)
    monkeypatch.undo()
    with pytest.raises(UnreadableCheckpointError, match="has the format 99, this version reads 3"):
        read_checkpoint(tmp_path / "checkpoint_10")


def test_a_renamed_checkpoint_is_refused(tmp_path: Path) -> None:
    write(tmp_path, 10)
    os.replace(tmp_path / "checkpoint_10", tmp_path / "checkpoint_99")
    with pytest.raises(DamagedCheckpointError, match="it is the checkpoint of step 10"):
        read_checkpoint(tmp_path / "checkpoint_99")


@pytest.mark.filterwarnings("ignore:.*is damaged")
def test_damaged_files_are_refused_or_hold_what_was_saved(tmp_path: Path) -> None:
    fuzzer: Any = load_benchmark("fuzz_files").Fuzzer(tmp_path)
    outcomes = [fuzzer.checkpoint(random.Random(number)) for number in range(40)]
    for kind in (".zip", ".safetensors"):
        outcomes += [fuzzer.model_file(kind, random.Random(number)) for number in range(60)]
    assert set(outcomes) <= {"refused", "the same", "the one before"}
    assert outcomes.count("refused") > 100


# --- Incremental ----------------------------------------------------------------------------------------------------------


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_a_checkpoint_writes_what_is_new_and_not_the_buffer_again(tmp_path: Path) -> None:
    model = LectureDQN("MlpPolicy", "CartPole-v1", buffer_size=20_000, learning_starts=10**6, seed=0, device="cpu")
    model.learn(10_000)
    buffer, files = model.replay_buffer, ReplayBufferFiles()
    assert buffer is not None
    files.write_new_rows(tmp_path, buffer, 10_000)
    first = folder_bytes(tmp_path)
    model.learn(100, reset_num_timesteps=False)
    files.write_new_rows(tmp_path, buffer, 10_100)
    assert folder_bytes(tmp_path) - first < first / 50


@pytest.mark.parametrize("n_new", [0, 1, 3, 9, 10, 11, 25])
def test_the_ring_is_read_as_it_was_wherever_it_stood(n_new: int, tmp_path: Path) -> None:
    def model() -> LectureDQN:
        env = DummyVecEnv([CountingEnv, CountingEnv])
        return LectureDQN("MlpPolicy", env, buffer_size=20, learning_starts=10**6, seed=0, device="cpu")

    files, saved = ReplayBufferFiles(), model()
    total = 0
    for n_rows in (4, n_new, 2):
        if n_rows:
            saved.learn(2 * n_rows, reset_num_timesteps=total == 0)
        total += 2 * n_rows
        assert saved.replay_buffer is not None
        records = files.write_new_rows(tmp_path, saved.replay_buffer, total)
    state = files.state(saved.replay_buffer)
    checkpoint = write_checkpoint(tmp_path, total, {}, records, {})
    restored = model().replay_buffer
    assert restored is not None
    ReplayBufferFiles().restore(checkpoint, state, restored)
    for name in ("observations", "next_observations", "actions", "rewards", "dones"):
        assert np.array_equal(getattr(restored, name), getattr(saved.replay_buffer, name)), name
    assert (restored.pos, restored.full) == (saved.replay_buffer.pos, saved.replay_buffer.full)


def test_old_rows_are_given_up_when_no_checkpoint_needs_them(tmp_path: Path) -> None:
    run(small_model, 1_000, tmp_path, save_freq=50)
    # two checkpoints of 250 rows, 50 apart, and no more
    assert len(list((tmp_path / SHARED_FOLDER).iterdir())) <= 7


# --- Disks and crashes ----------------------------------------------------------------------------------------------------


def test_a_full_disk_is_a_warning_and_the_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = run(small_model, 400, tmp_path / "reference")
    write_file = checkpoint_files._write_file

    def full_at_step_100(path: Path, writer: Any) -> Any:
        if "checkpoint_100" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        return write_file(path, writer)

    monkeypatch.setattr(checkpoint_files, "_write_file", full_at_step_100)
    with pytest.warns(
        UserWarning, match=r"no checkpoint was saved at step 100 \(.*No space left on device\); the run goes on"
    ):
        model = run(small_model, 400, tmp_path / "run")
    assert differences(model, expected) == []
    checkpoint = newest_checkpoint(tmp_path / "run")
    assert checkpoint is not None
    assert checkpoint.num_timesteps == 300
    monkeypatch.undo()
    assert differences(run(small_model, 400, tmp_path / "run"), expected) == []


@pytest.mark.parametrize("number", ["ENOSPC", "EDQUOT"])
def test_a_disk_that_is_full_at_the_first_step_is_a_warning_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: str
) -> None:
    write_file = checkpoint_files._write_file

    def full_at_first(path: Path, writer: Any) -> Any:
        if "checkpoint_0" in str(path):
            raise OSError(getattr(errno, number), "the disk is full")
        return write_file(path, writer)

    monkeypatch.setattr(checkpoint_files, "_write_file", full_at_first)
    with pytest.warns(UserWarning, match=r"no checkpoint was saved at step 0 \(.*the disk is full\)"):
        run(small_model, 150, tmp_path)
    assert (tmp_path / "checkpoint_100").exists()


@pytest.mark.parametrize("folder", ["file", "file/runs"])
def test_a_folder_that_can_never_be_written_to_ends_the_run_at_its_first_step(tmp_path: Path, folder: str) -> None:
    (tmp_path / "file").touch()
    model = small_model()
    with pytest.raises(ValueError, match=f"folder must be one in which checkpoints can be written, got .*/{folder} ") as error:
        model.learn(400, callback=ResumableCheckpointCallback(100, tmp_path / folder))
    assert "\n" not in str(error.value)
    assert model.num_timesteps == 0


def monitored_model(folder: Path, vec_env_cls: type[DummyVecEnv | SubprocVecEnv]) -> LectureDQN:
    env = make_vec_env("CartPole-v1", seed=1, monitor_dir=str(folder), vec_env_cls=vec_env_cls)
    return LectureDQN("MlpPolicy", env, buffer_size=250, learning_starts=10**6, seed=3, device="cpu")


class HidesFile(BaseCallback):
    """
    Takes a file away for a while.

    :param file: The file
    :param steps: From which step on, and until which
    """

    def __init__(self, file: Path, steps: tuple[int, int]) -> None:
        super().__init__()
        self.file, self.steps = file, steps
        self.hidden = file.with_suffix(".hidden")

    def _on_step(self) -> bool:
        if self.num_timesteps == self.steps[0]:
            os.replace(self.file, self.hidden)
        if self.num_timesteps == self.steps[1]:
            os.replace(self.hidden, self.file)
        return True


@pytest.mark.parametrize("vec_env_cls", [DummyVecEnv, SubprocVecEnv])
def test_a_run_goes_on_without_a_checkpoint_while_a_file_of_its_own_cannot_be_read(
    tmp_path: Path, vec_env_cls: type[DummyVecEnv | SubprocVecEnv]
) -> None:
    model = monitored_model(tmp_path, vec_env_cls)
    callbacks = [ResumableCheckpointCallback(100, tmp_path / "run"), HidesFile(tmp_path / "0.monitor.csv", (150, 250))]
    with pytest.warns(UserWarning, match=r"no checkpoint was saved at step 200 \(.*0\.monitor\.csv'\); the run goes on"):
        model.learn(400, callback=callbacks)
    model.env.close()  # type: ignore[union-attr]
    checkpoints = sorted(path.name for path in (tmp_path / "run").glob("checkpoint_*"))
    assert checkpoints == ["checkpoint_0", "checkpoint_100", "checkpoint_300"]


@pytest.mark.parametrize("vec_env_cls", [DummyVecEnv, SubprocVecEnv])
def test_a_file_of_the_run_that_cannot_be_read_at_its_first_step_is_named(
    tmp_path: Path, vec_env_cls: type[DummyVecEnv | SubprocVecEnv]
) -> None:
    model = monitored_model(tmp_path, vec_env_cls)
    (tmp_path / "0.monitor.csv").unlink()
    with pytest.raises(
        ValueError, match=r"files of the logger and of Monitor must be readable, got .*0\.monitor\.csv"
    ) as error:
        model.learn(400, callback=ResumableCheckpointCallback(100, tmp_path / "run"))
    model.env.close()  # type: ignore[union-attr]
    assert "\n" not in str(error.value)
    assert model.num_timesteps == 0


def save_and_die(folder: Path, point: int) -> None:
    """Save in a process that ends at the given file operation, as a power cut would end it."""
    operations = 0

    def until_the_point(operation: Any) -> Any:
        def counted(*args: Any, **kwargs: Any) -> Any:
            nonlocal operations
            operations += 1
            if operations == point:
                os._exit(9)
            return operation(*args, **kwargs)

        return counted

    for name in ("fsync", "replace", "unlink"):
        setattr(os, name, until_the_point(getattr(os, name)))
    Path.open = until_the_point(Path.open)  # type: ignore[method-assign]
    Path.unlink = until_the_point(Path.unlink)  # type: ignore[method-assign]
    Path.mkdir = until_the_point(Path.mkdir)  # type: ignore[method-assign]
    run(small_model, 400, folder)


@pytest.mark.parametrize("point", [1, 23, 37, 44])
def test_a_crash_in_the_middle_of_a_save_leaves_a_checkpoint_to_continue_from(point: int, tmp_path: Path) -> None:
    assert not kills.in_new_process(save_and_die, tmp_path / "run", point)
    for leftover in (tmp_path / "run").glob("checkpoint_*"):
        assert checkpoint_files._LEFTOVER.fullmatch(leftover.name) or read_checkpoint(leftover)
    expected = run(small_model, 400, tmp_path / "reference")
    assert differences(run(small_model, 400, tmp_path / "run"), expected) == []


def test_kill_9_in_the_middle_of_a_save_leaves_a_checkpoint_to_continue_from(tmp_path: Path) -> None:
    process = kills.PROCESSES.Process(target=run, args=(small_model, 100_000, tmp_path / "run"), kwargs={"save_freq": 4})
    process.start()
    while newest_unchecked(tmp_path / "run") < 60:
        time.sleep(0.01)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    checkpoint = newest_checkpoint(tmp_path / "run")
    assert checkpoint is not None
    assert checkpoint.num_timesteps >= 60


def newest_unchecked(folder: Path) -> int:
    names = [path.name.partition("_")[2] for path in folder.glob("checkpoint_*")]
    return max((int(name) for name in names if name.isdecimal()), default=-1)


def test_the_manifest_is_readable_and_says_what_the_run_was(tmp_path: Path) -> None:
    run(small_model, 60, tmp_path)
    manifest = json.loads((tmp_path / "checkpoint_0" / "manifest.json").read_text())
    assert manifest["facts"]["settings"]["gamma"] == "0.99"
    assert set(manifest["facts"]["versions"]) >= {"PyTorch", "Stable-Baselines3"}


def test_a_run_that_goes_on_with_another_version_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(small_model, 60, tmp_path)
    versions = {**checkpoints._versions(), "numpy": "0.0"}
    monkeypatch.setattr(checkpoints, "_versions", lambda: versions)
    with pytest.warns(UserWarning, match=rf"made with numpy {re.escape(np.__version__)} and this is 0\.0: the run goes on"):
        run(small_model, 60, tmp_path)


# --- Settings -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"b": [1, 2.5], "a": None}, "{a: None, b: [1, 2.5]}"),
        ({"a string", "another"}, "['a string', 'another']"),
        (np.array(3), "array(3)"),
        (object(), "object"),
        (spaces.Dict({"a": spaces.Discrete(2)}), "Dict('a': Discrete(2))"),
    ],
)
def test_settings_have_the_same_words_in_every_process(value: Any, words: str) -> None:
    assert in_few_words(value) == words


def test_a_large_setting_is_told_from_another_by_a_few_words() -> None:
    large = np.arange(10_000)
    words = in_few_words({"prices": large})
    assert len(words) < 300
    assert words == in_few_words({"prices": large.copy()})
    assert words != in_few_words({"prices": np.where(large == 9_999, 0, large)})
