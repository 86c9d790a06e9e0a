"""
Make ``lecture_dqn`` known to rl_zoo3 when rl_zoo3 is imported, and do nothing until then.

The installed copy of this file is a module of its own, ``sb3_lecture_dqn_zoo_startup``, and a ``.pth`` file beside it imports
it whenever Python starts. So it must be fast and quiet: it imports nothing that Python has not loaded by then.

``SB3_LECTURE_DQN_ZOO=0`` in the environment switches it off.
"""

import os
import sys

TYPE_CHECKING = False  # typing's own would cost the start-up a quarter of its time
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

has_warned = False


class ZooFinder:
    """Finds the zoo's modules as Python would, and has ``sb3_lecture_dqn.zoo`` extend each right after its own code ran."""

    modules = frozenset({"rl_zoo3.utils", "rl_zoo3.hyperparams_opt", "rl_zoo3.exp_manager"})

    @classmethod
    def find_spec(
        cls, name: str, path: "Sequence[str] | None" = None, target: "ModuleType | None" = None
    ) -> "ModuleSpec | None":
        """
        Python's finder protocol.

        :param name: Full name of the module to import
        :param path: Search path of its package
        :param target: Module to reload, if any
        :return: The module's spec, or ``None`` for a module that is not the zoo's
        """
        if name not in cls.modules:
            return None
        from importlib.machinery import PathFinder

        spec = PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return spec
        run_module_code = spec.loader.exec_module

        def run_module_code_and_extend(module: "ModuleType") -> None:
            run_module_code(module)
            extend(module)

        try:
            spec.loader.exec_module = run_module_code_and_extend  # type: ignore[method-assign]
        except AttributeError as error:
            warn(error)
        return spec


def extend(module: "ModuleType") -> None:
    """
    Add ``lecture_dqn`` to a module of the zoo; a failure is a warning, never an error of the zoo's.

    :param module: The module, after its own code ran
    """
    try:
        from sb3_lecture_dqn import zoo

        zoo.EXTENSIONS[module.__name__](module)
    except Exception as error:
        warn(error)


def warn(error: Exception) -> None:
    """
    Say in one line that the zoo goes on without ``lecture_dqn``, when the first of its modules fails.

    :param error: Why
    """
    global has_warned
    if has_warned:
        return
    has_warned = True
    reason = f"{type(error).__name__}: {error}".splitlines()[0]
    sys.stderr.write(f"sb3-lecture-dqn: rl_zoo3 does not know lecture_dqn in this process ({reason})\n")


if os.environ.get("SB3_LECTURE_DQN_ZOO") != "0":
    sys.meta_path.insert(0, ZooFinder)
