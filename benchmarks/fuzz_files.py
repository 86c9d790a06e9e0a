"""
Damage files at random, and load them: each must be refused with a clear error, or give exactly what was saved.

    python benchmarks/fuzz_files.py --files 10000

Damaged are model files (SB3's zip, safetensors) and the files of checkpoints, by flipped bits, truncation, overwritten and
inserted blocks, and by members that were swapped with those of another file.
"""

import argparse
import hashlib
import random
import shutil
import signal
import tempfile
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch as th

from sb3_lecture_dqn import LectureDQN, ResumableCheckpointCallback, load_safetensors, save_safetensors
from sb3_lecture_dqn.resume.checkpoint_files import Checkpoint, UnreadableCheckpointError, newest_checkpoint, read_checkpoint

SECONDS_TO_HANG = 20


def flip_bits(content: bytes, generator: random.Random) -> bytes:
    """Flip one to eight bits."""
    damaged = bytearray(content)
    for _ in range(generator.randint(1, 8)):
        damaged[generator.randrange(len(damaged))] ^= 1 << generator.randrange(8)
    return bytes(damaged)


def truncate(content: bytes, generator: random.Random) -> bytes:
    """Cut the end off."""
    return content[: generator.randrange(len(content))]


def overwrite(content: bytes, generator: random.Random) -> bytes:
    """Write noise over a block."""
    start = generator.randrange(len(content))
    block = generator.randbytes(min(generator.randint(1, 512), len(content) - start))
    return content[:start] + block + content[start + len(block) :]


def insert(content: bytes, generator: random.Random) -> bytes:
    """Put noise between."""
    start = generator.randint(0, len(content))
    return content[:start] + generator.randbytes(generator.randint(1, 64)) + content[start:]


DAMAGES = (flip_bits, truncate, overwrite, insert)


class Fuzzer:
    """
    The undamaged files, and what they hold.

    :param folder: Where to put them
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.models = [self._train(folder / f"run_{seed}", seed) for seed in (0, 1)]
        for index, model in enumerate(self.models):
            model.save(folder / f"{index}.zip")
            save_safetensors(model, folder / f"{index}.safetensors")
        self.expected = {kind: load(folder / f"0{kind}") for kind, load in LOADERS.items()}
        self.expected_checkpoints = self._checkpoints(folder / "run_0")

    def _train(self, folder: Path, seed: int) -> LectureDQN:
        settings: dict[str, Any] = {"learning_starts": 20, "batch_size": 8, "policy_kwargs": {"net_arch": [16]}}
        model = LectureDQN("MlpPolicy", "CartPole-v1", seed=seed, device="cpu", **settings)
        return model.learn(60, callback=ResumableCheckpointCallback(20, folder))

    def _checkpoints(self, folder: Path) -> dict[int, str]:
        paths = folder.glob("checkpoint_*")
        return {int(path.name.partition("_")[2]): checkpoint_digest(read_checkpoint(path)) for path in paths}

    def model_file(self, kind: str, generator: random.Random) -> str:
        """Damage a model file, and say what came of it."""
        damaged = self.folder / f"damaged{kind}"
        if kind == ".zip" and generator.random() < 0.25:
            swap_members(self.folder / "0.zip", self.folder / "1.zip", damaged, generator)
        else:
            content = (self.folder / f"0{kind}").read_bytes()
            damaged.write_bytes(generator.choice(DAMAGES)(content, generator))
        try:
            return "the same" if LOADERS[kind](damaged) == self.expected[kind] else "SILENTLY DIFFERENT"
        except ValueError as error:
            if not str(error).startswith("path must be "):
                raise  # it is not clear
            return "refused"

    def checkpoint(self, generator: random.Random) -> str:
        """Damage a file of a folder of checkpoints, and say what came of it."""
        folder = self.folder / "damaged_run"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.folder / "run_0", folder)
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        path = generator.choice(files)
        if generator.random() < 0.25:
            other = generator.choice(sorted(path for path in (self.folder / "run_1").rglob("*") if path.is_file()))
            path.write_bytes(other.read_bytes())
        else:
            path.write_bytes(generator.choice(DAMAGES)(path.read_bytes(), generator))
        try:
            checkpoint = newest_checkpoint(folder)
        except UnreadableCheckpointError:
            return "refused"
        if checkpoint is None or checkpoint_digest(checkpoint) != self.expected_checkpoints[checkpoint.num_timesteps]:
            return "SILENTLY DIFFERENT"
        return "the same" if checkpoint.num_timesteps == max(self.expected_checkpoints) else "the one before"


def checkpoint_digest(checkpoint: Checkpoint) -> str:
    """A hash of what a checkpoint holds."""
    digest = hashlib.sha256(repr((checkpoint.num_timesteps, checkpoint.facts)).encode())
    for name in sorted(checkpoint.files):
        digest.update(checkpoint.file(name).read_bytes())
    for record in checkpoint.shared_files:
        digest.update(checkpoint.shared_file(record).read_bytes())
    return digest.hexdigest()


def swap_members(first: Path, second: Path, target: Path, generator: random.Random) -> None:
    """Write a zip file with some members of another one, or with two of its own swapped."""
    with zipfile.ZipFile(first) as a, zipfile.ZipFile(second) as b, zipfile.ZipFile(target, "w") as out:
        names = a.namelist()
        contents, others = ({name: archive.read(name) for name in names} for archive in (a, b))
        different = [name for name in names if contents[name] != others[name]]
        if generator.random() < 0.5:
            # not all that differ: that would be the other model, and whole
            for name in generator.sample(different, generator.randint(1, len(different) - 1)):
                contents[name] = others[name]
        else:
            x, y = generator.sample(names, 2)
            contents[x], contents[y] = contents[y], contents[x]
        for name in names:
            out.writestr(name, contents[name])


def model_digest(model: LectureDQN) -> str:
    """A hash of what a user sees of a model."""
    digest = hashlib.sha256(repr((model.gamma, model.num_timesteps, str(model.observation_space))).encode())
    for name, tensor in sorted(model.policy.state_dict().items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


LOADERS: dict[str, Callable[[Path], str]] = {
    ".zip": lambda path: model_digest(LectureDQN.load(path, device="cpu")),
    ".safetensors": lambda path: model_digest(load_safetensors(path, device="cpu")),
}


def main() -> None:
    """Print what came of the files; an error that is not clear ends the program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    th.set_num_threads(1)
    outcomes: Counter[tuple[str, str]] = Counter()
    with tempfile.TemporaryDirectory() as temporary:
        fuzzer = Fuzzer(Path(temporary))
        for number in range(arguments.files):
            generator = random.Random(f"{arguments.seed} {number}")
            kind = (".zip", ".safetensors", "checkpoint")[number % 3]
            signal.alarm(SECONDS_TO_HANG)  # ends the program
            outcome = fuzzer.checkpoint(generator) if kind == "checkpoint" else fuzzer.model_file(kind, generator)
            signal.alarm(0)
            outcomes[kind, outcome] += 1
    for (kind, outcome), count in sorted(outcomes.items()):
        print(f"{kind}: {count} {outcome}")
    n_different = sum(count for (_, outcome), count in outcomes.items() if outcome == "SILENTLY DIFFERENT")
    print(f"{arguments.files} files, {n_different} loaded with another content, none hung, none with an unclear error")


if __name__ == "__main__":
    main()
