"""
Checkpoints on disk: whole or not at all, and checked before anything in them is used.

::

    folder/
      checkpoint_10000/          one for each of the last K
        manifest.json            steps, settings, and the SHA-256 of every file that the checkpoint needs, this one included
        parameters.pt, state.pkl, ...
      checkpoint_9000.5e2a….damaged/   what was found damaged: nothing reads it, and it is never deleted
      replay_buffer/             shared: each file holds the transitions that were new when it was written
        rows_0_10000_1f0c….npz

Nothing is deleted whose name is not one of these, or of what a crash leaves of them: a folder may hold other files.

A checkpoint is written under another name, each file flushed to the disk, and renamed at the end; so whatever has the name of
a checkpoint is a whole one, unless the disk damages it later, which the checksums tell.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import uuid
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from sb3_lecture_dqn.model_files import file_sha256

FORMAT_VERSION = 3
MANIFEST = "manifest.json"
SHARED_FOLDER = "replay_buffer"
_CHECKPOINT = re.compile(r"checkpoint_(\d+)")
_LEFTOVER = re.compile(r"checkpoint_\d+(\.[0-9a-f]{32})?\.(unfinished|replaced|deleted)")
_SHARED_FILE = re.compile(r".+_[0-9a-f]{32}\.npz(\.unfinished)?")

Writer = Callable[[BinaryIO], object]


class UnreadableCheckpointError(ValueError):
    """A checkpoint on disk cannot be read, now or by this version."""


class DamagedCheckpointError(UnreadableCheckpointError):
    """A checkpoint on disk is not what was written."""


class FileRecord(NamedTuple):
    """What a manifest says of a file: its name, its size in bytes, its SHA-256."""

    name: str
    size: int
    sha256: str


class Checkpoint(NamedTuple):
    """A checkpoint that was read and found whole."""

    path: Path
    num_timesteps: int
    facts: dict[str, Any]
    files: dict[str, FileRecord]
    shared_files: list[FileRecord]

    def file(self, name: str) -> Path:
        """
        The path of a file of the checkpoint.

        :param name: Its name
        :return: Its path
        """
        return self.path / name

    def shared_file(self, record: FileRecord) -> Path:
        """
        The path of a shared file.

        :param record: One of ``shared_files``
        :return: Its path
        """
        return self.path.parent / SHARED_FOLDER / record.name


# --- Writing --------------------------------------------------------------------------------------------------------------


def write_shared_file(folder: Path, name: str, write: Writer) -> FileRecord:
    """
    Write a file that several checkpoints may refer to.

    :param folder: The folder of the checkpoints
    :param name: How its name begins; the end makes it unlike any other
    :param write: Writes the content
    :return: What a manifest says of it
    :raises OSError: if it cannot be written, for instance because the disk is full
    """
    shared = folder / SHARED_FOLDER
    shared.mkdir(parents=True, exist_ok=True)
    target = shared / f"{name}_{uuid.uuid4().hex}.npz"
    unfinished = target.with_name(f"{target.name}.unfinished")
    record = _write_file(unfinished, write)
    os.replace(unfinished, target)
    _flush_folder(shared)
    return record._replace(name=target.name)


def write_checkpoint(
    folder: Path,
    num_timesteps: int,
    writers: Mapping[str, Writer],
    shared_files: Sequence[FileRecord],
    facts: Mapping[str, Any],
) -> Checkpoint:
    """
    Write a checkpoint. Until the last operation, which gives it its name, the folder holds what it held before.

    :param folder: The folder of the checkpoints
    :param num_timesteps: The step of the run, which names the checkpoint
    :param writers: For each file of the checkpoint what writes its content
    :param shared_files: The shared files that it needs
    :param facts: What else the manifest says; anything that JSON can hold
    :return: The checkpoint
    :raises OSError: if it cannot be written, for instance because the disk is full
    """
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"checkpoint_{num_timesteps}"
    unfinished = target.with_name(f"{target.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    files = {name: _write_file(unfinished / name, write) for name, write in writers.items()}
    manifest = {
        "format": FORMAT_VERSION,
        "num_timesteps": num_timesteps,
        "facts": dict(facts),
        "files": [list(record) for record in files.values()],
        "shared_files": [list(record) for record in shared_files],
    }
    content = json.dumps({**manifest, "sha256": _manifest_sha256(manifest)}, indent=1).encode()
    _write_file(unfinished / MANIFEST, lambda file: file.write(content))
    _flush_folder(unfinished)
    if target.exists():  # a run that was resumed from an earlier checkpoint comes by again
        os.replace(target, folder / f"{target.name}.{uuid.uuid4().hex}.replaced")
    os.replace(unfinished, target)
    _flush_folder(folder)
    return Checkpoint(target, num_timesteps, dict(facts), files, list(shared_files))


def delete_all_but_last(folder: Path, n_checkpoints: int) -> None:
    """
    Delete all but the newest checkpoints, what crashes left behind, and the shared files that no checkpoint needs. What cannot
    be deleted stays, and so does what was set aside as damaged.

    :param folder: The folder of the checkpoints
    :param n_checkpoints: How many to keep
    """
    for path in _checkpoint_paths(folder)[n_checkpoints:]:
        # Renamed first: a folder that is half deleted must not have the name of a checkpoint.
        with contextlib.suppress(OSError):
            os.replace(path, path.with_name(f"{path.name}.{uuid.uuid4().hex}.deleted"))
    delete_leftovers(folder)


def delete_leftovers(folder: Path) -> None:
    """
    Delete what crashes and failed saves left behind, and the shared files that no checkpoint needs.

    :param folder: The folder of the checkpoints
    """
    for path in folder.glob("checkpoint_*"):
        if _LEFTOVER.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)
    needed: set[str] = set()
    for path in _checkpoint_paths(folder):
        try:
            needed.update(record.name for record in _read_manifest(path).shared_files)
        except (UnreadableCheckpointError, OSError):
            return  # nobody knows what it needs
    for path in (folder / SHARED_FOLDER).glob("*"):
        if path.name not in needed and _SHARED_FILE.fullmatch(path.name):
            with contextlib.suppress(OSError):
                path.unlink()


def _write_file(path: Path, write: Writer) -> FileRecord:
    with path.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    return FileRecord(path.name, path.stat().st_size, file_sha256(path))


def _flush_folder(folder: Path) -> None:
    """Make a rename last; not every system lets one open a folder."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


# --- Reading --------------------------------------------------------------------------------------------------------------


def has_checkpoints(folder: Path) -> bool:
    """
    Whether a folder holds checkpoints, be they whole or damaged.

    :param folder: The folder of the checkpoints
    :return: Whether it does
    """
    return bool(_checkpoint_paths(folder))


def newest_checkpoint(folder: Path) -> Checkpoint | None:
    """
    The newest whole checkpoint. One that cannot be read is named in a warning, and the one before it is used. Only a damaged
    one is set aside, under another name, where it stays: another may be read again, when a disk has come back or by a newer
    version.

    :param folder: The folder of the checkpoints
    :return: The checkpoint; ``None`` if there is none at all
    :raises DamagedCheckpointError: if there are checkpoints and all are damaged
    :raises UnreadableCheckpointError: if there are checkpoints and none can be read
    """
    errors: dict[Path, UnreadableCheckpointError] = {}
    for path in _checkpoint_paths(folder):
        try:
            checkpoint = read_checkpoint(path)
        except UnreadableCheckpointError as error:
            errors[path] = error
            warnings.warn(f"{error}; the checkpoint before it is used", stacklevel=2)
            continue
        _set_aside([path for path, error in errors.items() if isinstance(error, DamagedCheckpointError)])
        return checkpoint
    if not errors:
        return None
    if all(isinstance(error, DamagedCheckpointError) for error in errors.values()):
        raise DamagedCheckpointError(f"{folder} holds no checkpoint that is whole: {len(errors)} damaged, none left")
    raise UnreadableCheckpointError(f"{folder} holds no checkpoint that can be read: {next(iter(errors.values()))}")


def _set_aside(damaged: list[Path]) -> None:
    for path in damaged:
        os.replace(path, path.with_name(f"{path.name}.{uuid.uuid4().hex}.damaged"))


def read_checkpoint(path: Path) -> Checkpoint:
    """
    Read the manifest of a checkpoint and verify every file that it needs.

    :param path: The folder of the checkpoint
    :return: The checkpoint
    :raises DamagedCheckpointError: if a file is missing or not what was written
    :raises UnreadableCheckpointError: if the disk does not give a file, or the format is another version's
    """
    try:
        checkpoint = _read_manifest(path)
        for record in checkpoint.files.values():
            _verify(path, checkpoint.file(record.name), record)
        for record in checkpoint.shared_files:
            _verify(path, checkpoint.shared_file(record), record)
    except FileNotFoundError as error:
        raise DamagedCheckpointError(f"{path} is damaged: {error}") from error
    except OSError as error:
        raise UnreadableCheckpointError(f"{path} cannot be read: {error}") from error
    return checkpoint


def _read_manifest(path: Path) -> Checkpoint:
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        expected = manifest.pop("sha256")
        if _manifest_sha256(manifest) != expected:
            raise ValueError("its checksum is another")
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise DamagedCheckpointError(f"{path} is damaged: {MANIFEST} cannot be read ({error})") from error
    if manifest["format"] != FORMAT_VERSION:
        raise UnreadableCheckpointError(f"{path} has the format {manifest['format']}, this version reads {FORMAT_VERSION}")
    if path.name != f"checkpoint_{manifest['num_timesteps']}":
        raise DamagedCheckpointError(f"{path} is damaged: it is the checkpoint of step {manifest['num_timesteps']}")
    files = {record[0]: FileRecord(*record) for record in manifest["files"]}
    shared_files = [FileRecord(*record) for record in manifest["shared_files"]]
    return Checkpoint(path, manifest["num_timesteps"], manifest["facts"], files, shared_files)


def _verify(checkpoint: Path, file: Path, record: FileRecord) -> None:
    if file.stat().st_size != record.size or file_sha256(file) != record.sha256:
        raise DamagedCheckpointError(f"{checkpoint} is damaged: {file.name} is not what was written")


def _manifest_sha256(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _checkpoint_paths(folder: Path) -> list[Path]:
    """The checkpoints of a folder, the newest first."""
    found = [(int(match[1]), path) for path in folder.glob("checkpoint_*") if (match := _CHECKPOINT.fullmatch(path.name))]
    return [path for _, path in sorted(found, reverse=True)]
