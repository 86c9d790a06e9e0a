"""Files of models and replay buffers: written whole or not at all, and checked before anything in them is used."""

import hashlib
import io
import json
import os
import re
import uuid
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stable_baselines3.common.save_util import json_to_data, open_path

from sb3_lecture_dqn.processes import here, is_alive

#: Member of a model file with the SHA-256 of each other member.
CHECKSUMS = "checksums.json"

#: Stands behind the pickle of a replay buffer, where its readers stop, and before the SHA-256 of the pickle.
CHECKSUM_MARK = b"sb3-lecture-dqn SHA-256 "


class MissingPolicyError(ValueError):
    """The policy of a model file is of a class that cannot be imported."""


@contextmanager
def replace_when_written(target: Path) -> Iterator[Path]:
    """
    Write a file beside its target and rename it at the end, so that a failure leaves the previous file whole.

    What a process left that was killed here is removed by the next that writes the same target.

    :param target: The file to replace, or a link to it, which stays a link; its folder is made if it is missing
    :return: The path to write to, in the same folder and with the same ending as the target
    :raises OSError: if it cannot be written or renamed
    """
    target = target.resolve() if target.is_symlink() else target
    target.parent.mkdir(parents=True, exist_ok=True)
    # in the name: who writes it, and that no two threads of a process do
    prefix = f".{target.stem}-{hashlib.sha256(here().encode()).hexdigest()[:8]}-"
    _remove_leftovers(target, prefix)
    unfinished = target.with_name(f"{prefix}{os.getpid()}-{uuid.uuid4().hex}{target.suffix}")
    try:
        yield unfinished
        with unfinished.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(unfinished, target)
    except OSError as error:
        if error.errno is not None and error.filename is None:  # the system's error of a full disk names none
            error.filename = str(target)
        raise
    finally:
        unfinished.unlink(missing_ok=True)


def with_ending(path: str | Path, ending: str) -> Path:
    """
    A file's path as SB3 completes it.

    :param path: The path that the user gave
    :param ending: The ending, for instance ``".zip"``
    :return: The path, with the ending if it had none
    """
    return Path(path) if Path(path).suffix else Path(f"{path}{ending}")


def _remove_leftovers(target: Path, prefix: str) -> None:
    for path in target.parent.iterdir():
        parts = re.fullmatch(rf"{re.escape(prefix)}(\d+)-[0-9a-f]{{32}}{re.escape(target.suffix)}", path.name)
        if parts and not is_alive(int(parts[1])):
            path.unlink(missing_ok=True)


def add_checksums(path: Path) -> None:
    """
    Add the SHA-256 of each member to a model file, so that members of several files cannot be mixed.

    :param path: The zip file
    """
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(CHECKSUMS, json.dumps(_member_checksums(archive)))


def file_sha256(path: Path, n_bytes: int | None = None) -> str:
    """
    The SHA-256 of a file.

    :param path: The file
    :param n_bytes: How many of its first bytes; ``None`` for all
    :return: In hexadecimal
    """
    digest = hashlib.sha256()
    n_left = path.stat().st_size if n_bytes is None else n_bytes
    with path.open("rb") as file:
        while block := file.read(min(1 << 20, n_left)):
            digest.update(block)
            n_left -= len(block)
    return digest.hexdigest()


def add_checksum_behind(path: Path) -> None:
    """
    Add the SHA-256 of a pickle behind it; whatever reads pickles, SB3 too, stops before that.

    :param path: The file
    """
    checksum = file_sha256(path).encode()
    with path.open("ab") as file:
        file.write(CHECKSUM_MARK + checksum)


def check_replay_buffer_file(path: str | Path) -> Path:
    """
    Check that the file of a replay buffer is what was written, before anything in it is unpickled.

    :param path: The file, as SB3's ``load_replay_buffer`` takes it; one without a checksum, as SB3 writes it, is not checked
    :return: The file that was found
    :raises FileNotFoundError: if there is no such file
    :raises ValueError: if its checksum is another
    """
    with open_path(path, "r", suffix="pkl") as file:
        found = Path(file.name)
        n_bytes = found.stat().st_size - len(CHECKSUM_MARK) - 2 * hashlib.sha256().digest_size
        file.seek(max(n_bytes, 0))
        mark, checksum = file.read(len(CHECKSUM_MARK)), file.read()
    if mark == CHECKSUM_MARK and checksum != file_sha256(found, n_bytes).encode():
        raise ValueError(f"path must be a whole replay buffer, got {path}: it is damaged")
    return found


def check_model_file(
    path: str | Path | io.BufferedIOBase,
    policy_class: type,
    algorithm_name: str,
    custom_objects: Mapping[str, Any] | None = None,
) -> None:
    """
    Check that a file is a whole model of an algorithm.

    :param path: The file, as SB3's ``load`` takes it
    :param policy_class: The class that the saved policy must derive from
    :param algorithm_name: The algorithm's name, for the errors
    :param custom_objects: What is used in the place of saved objects, maybe a ``policy_class``
    :raises FileNotFoundError: if there is no such file
    :raises ValueError: if it is truncated, damaged, not a zip file, or saved by another algorithm
    :raises MissingPolicyError: if it is whole, but the class of its policy cannot be imported
    """
    file: Any = open_path(path, "r", suffix="zip")
    try:
        data = _read_checked_data(file)
        saved_class = (custom_objects or {}).get("policy_class") or _unpickle_policy_class(data)
    except ImportError as error:
        raise MissingPolicyError(
            f'path must be a model whose policy can be imported, or custom_objects give a "policy_class", got {path}: {error}'
        ) from error
    except Exception as error:  # a damaged file makes zipfile, json and pickle raise almost anything
        raise ValueError(f"path must be a whole model file of {algorithm_name}, got {path}: {error}") from error
    finally:
        if isinstance(path, (str, Path)):
            file.close()
        else:
            file.seek(0)
    if not issubclass(saved_class, policy_class):
        raise ValueError(f"path must be a model of {algorithm_name}, got {path} with the policy {saved_class.__name__}")


def _read_checked_data(file: io.BufferedIOBase) -> dict[str, Any]:
    with zipfile.ZipFile(file) as archive:
        damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"{damaged} is damaged")
        if CHECKSUMS in archive.namelist() and json.loads(archive.read(CHECKSUMS)) != _member_checksums(archive):
            raise ValueError("its members are not those that were saved together")
        data: dict[str, Any] = json.loads(archive.read("data"))
    return data


def _unpickle_policy_class(data: dict[str, Any]) -> type:
    saved: type | None = json_to_data(json.dumps({"policy_class": data["policy_class"]})).get("policy_class")
    if saved is None:  # SB3 warns of a class that its module does not have any more
        raise ImportError("its class is not where it was")
    return saved


def _member_checksums(archive: zipfile.ZipFile) -> dict[str, str]:
    names = (name for name in archive.namelist() if name != CHECKSUMS)
    return {name: hashlib.sha256(archive.read(name)).hexdigest() for name in names}
