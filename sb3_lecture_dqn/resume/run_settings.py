"""What makes a run another run: its settings, in words that are the same in every process, and how they are compared."""

import hashlib
from collections.abc import Collection, Mapping, Set
from pathlib import Path
from typing import Any

import gymnasium

from sb3_lecture_dqn.validation import NUMERIC_ARGUMENTS

#: Attributes of a model that have to be the same in the run that goes on; otherwise it would be another run.
SETTINGS = (
    *NUMERIC_ARGUMENTS,
    "learning_rate",
    "train_freq",
    "replay_buffer_class",
    "replay_buffer_kwargs",
    "optimize_memory_usage",
    "policy_class",
    "policy_kwargs",
    "seed",
    "n_envs",
    "observation_space",
    "action_space",
)
#: Words longer than this, of a large array for instance, are kept as a checksum.
LONGEST_WORDS = 500
NOT_GIVEN = "not given"


def in_words(value: Any) -> str:
    """
    A setting in words that are the same in every process.

    :param value: The setting
    :return: The words; of an object that has none of its own, the name of its type
    """
    has_its_own = isinstance(value, (str, gymnasium.Space))  # some spaces are collections
    if isinstance(value, Mapping) and not has_its_own:
        items = sorted(value.items(), key=lambda item: str(item[0]))
        return "{" + ", ".join(f"{name}: {in_words(item)}" for name, item in items) + "}"
    if isinstance(value, Collection) and not has_its_own and getattr(value, "shape", None) != ():
        words = map(in_words, value)
        return "[" + ", ".join(sorted(words) if isinstance(value, Set) else words) + "]"
    shown = repr(value)
    return type(value).__name__ if " at 0x" in shown else shown


def in_few_words(value: Any) -> str:
    """
    A setting of any size in words that are the same in every process.

    :param value: The setting
    :return: As :func:`in_words`, or the beginning and the SHA-256 of that
    """
    words = in_words(value)
    if len(words) <= LONGEST_WORDS:
        return words
    return f"{words[:100]}... (SHA-256 {hashlib.sha256(words.encode()).hexdigest()})"


def check_same_run(saved: Mapping[str, str], settings: Mapping[str, str], folder: Path) -> None:
    """
    Check that a run has the settings of the one that it is to continue.

    :param saved: That run's, by name, in words; what is not in it is not compared
    :param settings: This run's
    :param folder: Where that run's checkpoints are, for the error
    :raises ValueError: if one of them differs
    """
    for name, words in saved.items():
        given = settings.get(name, NOT_GIVEN)
        if given != words:
            message = (
                f"{name} must be {words}, with which the run in {folder} was started, got {given}; another run needs another "
                "folder"
            )
            raise ValueError(" ".join(message.split()))
