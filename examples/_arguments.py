"""What the programs that play trained models share: checks of their arguments, so that a mistake is one line and at once."""

import argparse
from collections.abc import Callable
from pathlib import Path

from huggingface_sb3 import EnvironmentName
from rl_zoo3.utils import get_model_path


def integer_at_least(low: int) -> Callable[[str], int]:
    """
    A ``type`` for argparse.

    :param low: Smallest allowed value
    :return: Turns text into an integer, or says what it may be
    """

    def convert(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if value < low:
            raise argparse.ArgumentTypeError(f"must be an integer of at least {low}, got {text}")
        return value

    return convert


def gif_file(text: str) -> Path:
    """
    A ``type`` for argparse: a file for a GIF.

    :param text: Its name
    :return: The file, whose folder exists then
    """
    file = Path(text)
    if file.suffix != ".gif" or file.is_dir():
        raise argparse.ArgumentTypeError(f"must be a file that ends in .gif, got {text}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"must be in a folder that can be made, got {text}: {error.strerror}") from None
    return file


def find_training(parser: argparse.ArgumentParser, env_id: str, folder: str) -> tuple[Path, Path]:
    """
    Find the latest training of an environment.

    :param parser: Ends the program with one line if there is none
    :param env_id: Environment id
    :param folder: The zoo's log folder
    :return: The model, and the folder of the settings that it was trained with
    """
    env_name = EnvironmentName(env_id)
    try:
        _, model_path, run_folder = get_model_path(0, folder, "lecture_dqn", env_name)
    except (AssertionError, ValueError):  # no folder, or a training that is not over
        parser.error(
            f"no finished training of {env_id} in {folder}: train first, "
            f"python -m rl_zoo3.train --algo lecture_dqn --env {env_id} -f {folder}"
        )
    return Path(model_path), Path(run_folder, env_name)
