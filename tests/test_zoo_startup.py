"""What Python's start-up does for the zoo: little, quietly, and not at all when switched off or uninstalled."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from sb3_lecture_dqn.zoo import SWITCH

PROJECT = Path(__file__).parent.parent


def run(*command: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True, check=False, timeout=900
    )


def modules_after_start(folder: Path, **environment: str) -> set[str]:
    result = run(sys.executable, "-c", "import sys; print(*sys.modules)", folder=folder, **environment)
    assert result.stderr == ""
    return set(result.stdout.split())


def test_the_hook_loads_one_small_module_and_nothing_else(tmp_path: Path) -> None:
    with_hook = modules_after_start(tmp_path)
    assert "sb3_lecture_dqn_zoo_startup" in with_hook
    assert not {"torch", "stable_baselines3", "gymnasium", "numpy", "typing", "sb3_lecture_dqn"} & with_hook
    # -S leaves out what every normal start loads, `os` among it; what the hook loads beyond that shows here
    script = f"""
import os, sys
sys.path.append({sysconfig.get_paths()["purelib"]!r})
before = set(sys.modules)
import sb3_lecture_dqn_zoo_startup
print(*set(sys.modules) - before)
"""
    loaded = run(sys.executable, "-S", "-c", script, folder=tmp_path)
    assert loaded.stdout.split() == ["sb3_lecture_dqn_zoo_startup"]


def finders(folder: Path, **environment: str) -> str:
    result = run(sys.executable, "-c", "import sys; print(sys.meta_path)", folder=folder, **environment)
    assert result.stderr == ""
    return result.stdout


def test_the_switch_keeps_the_finder_out(tmp_path: Path) -> None:
    assert "ZooFinder" in finders(tmp_path)
    assert "ZooFinder" not in finders(tmp_path, **{SWITCH: "0"})
    assert "ZooFinder" in finders(tmp_path, **{SWITCH: "1"})


# whole: the project's name alone may stand in the path of any traceback
WARNING = "sb3-lecture-dqn: rl_zoo3 does not know lecture_dqn in this process"


def write_package(folder: Path, utils: str) -> None:
    (folder / "rl_zoo3").mkdir()
    (folder / "rl_zoo3" / "__init__.py").touch()
    (folder / "rl_zoo3" / "utils.py").write_text(utils)


TALKATIVE = """
class Algorithms:
    def __contains__(self, name):
        raise RuntimeError("first line\\nsecond line")

ALGOS = Algorithms()
"""
#: Imports the zoo's module with a loader whose methods cannot be replaced.
IMPORT_WITH_A_FROZEN_LOADER = """
from importlib.machinery import ModuleSpec, PathFinder

class Loader:
    __slots__ = ()
    create_module = exec_module = lambda self, module: None

find_spec = PathFinder.find_spec
PathFinder.find_spec = lambda name, *args: ModuleSpec(name, Loader()) if "utils" in name else find_spec(name, *args)
import rl_zoo3.utils
"""


@pytest.mark.parametrize(
    ("utils", "script", "reason"),
    [
        ("ALGORITHMS = {}\n", "import rl_zoo3.utils", "AttributeError: "),
        ("ALGORITHMS = {}\n", "import rl_zoo3.utils, rl_zoo3.exp_manager", "AttributeError: "),
        (TALKATIVE, "import rl_zoo3.utils", "RuntimeError: first line)"),
        ("", IMPORT_WITH_A_FROZEN_LOADER, "AttributeError: "),
    ],
    ids=["another table", "two modules", "two lines", "another loader"],
)
def test_a_zoo_of_another_shape_is_a_warning_of_one_line(utils: str, script: str, reason: str, tmp_path: Path) -> None:
    write_package(tmp_path, utils)
    (tmp_path / "rl_zoo3" / "exp_manager.py").touch()
    result = run(sys.executable, "-c", f"{script}\nprint('still here')", folder=tmp_path)
    assert (result.returncode, result.stdout) == (0, "still here\n"), result.stderr
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"{WARNING} ({reason}")


def test_a_zoo_without_one_of_its_modules_says_so_itself(tmp_path: Path) -> None:
    write_package(tmp_path, "")
    result = run(sys.executable, "-c", "import rl_zoo3.exp_manager", folder=tmp_path)
    assert result.stderr.splitlines()[-1] == "ModuleNotFoundError: No module named 'rl_zoo3.exp_manager'"
    assert WARNING not in result.stderr


def test_an_error_of_the_zoos_own_stays_as_it_is(tmp_path: Path) -> None:
    write_package(tmp_path, "raise RuntimeError('broken zoo')\n")
    result = run(sys.executable, "-c", "import rl_zoo3.utils", folder=tmp_path)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == "RuntimeError: broken zoo"
    assert WARNING not in result.stderr


def test_without_the_zoo_nothing_happens(tmp_path: Path) -> None:
    script = "import sys; sys.path[:] = [p for p in sys.path if 'site-packages' not in p]; import rl_zoo3.utils"
    result = run(sys.executable, "-c", script, folder=tmp_path)
    assert result.stderr.splitlines()[-1] == "ModuleNotFoundError: No module named 'rl_zoo3'"
    assert WARNING not in result.stderr


@pytest.fixture
def other_environment(tmp_path: Path) -> Path:
    """A virtual environment that sees this one's packages, but not its start-up files."""
    folder = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    scheme = {"base": str(folder), "platbase": str(folder)}
    site_packages = Path(sysconfig.get_path("purelib", vars=scheme))
    (site_packages / "packages_of_the_tests.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return folder


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", str(folder), str(PROJECT)]
    subprocess.run(command, check=True, capture_output=True)
    (built,) = folder.iterdir()
    return built


@pytest.mark.parametrize("kind", ["wheel", "plain", "editable"])
def test_each_kind_of_installation_brings_the_algorithm_and_takes_it_away(
    kind: str, wheel: Path, other_environment: Path, tmp_path: Path
) -> None:
    python = str(other_environment / "bin" / "python")
    assert "ZooFinder" not in run(python, "-c", "import sys; print(sys.meta_path)", folder=tmp_path).stdout
    what = {"wheel": [str(wheel)], "plain": [str(PROJECT)], "editable": ["--editable", str(PROJECT)]}[kind]
    # --ignore-installed: pip sees this environment's own copy through the path, and must leave it alone
    install = ["-m", "pip", "install", "--no-deps", "--no-build-isolation", "--ignore-installed", *what]
    result = run(python, *install, folder=tmp_path)
    assert result.returncode == 0, result.stderr
    script = """
import sys
import rl_zoo3, sb3_lecture_dqn
from rl_zoo3.exp_manager import ExperimentManager
from argparse import Namespace
print(sb3_lecture_dqn.__file__)
print(ExperimentManager(Namespace(), "lecture_dqn", "LunarLander-v2", "logs").config)
"""
    result = run(python, "-c", script, folder=tmp_path)
    assert result.returncode == 0, result.stderr
    package, config = (Path(line) for line in result.stdout.splitlines())
    home = PROJECT if kind == "editable" else other_environment
    assert package.is_relative_to(home)
    assert config.is_relative_to(home)
    assert config.exists()

    result = run(python, "-m", "pip", "uninstall", "--yes", "sb3-lecture-dqn", folder=tmp_path)
    assert result.returncode == 0, result.stderr
    left = list(other_environment.rglob("*lecture_dqn*"))
    assert left == []
    assert "ZooFinder" not in run(python, "-c", "import sys; print(sys.meta_path)", folder=tmp_path).stdout
