"""
Measure what the start-up hook adds to Python's start: its import and, for comparison, the whole start, with the hook and with
the hook switched off (it is imported then too, and does nothing).

    python benchmarks/startup.py
"""

import os
import statistics
import subprocess
import sys
import time

MODULE = "sb3_lecture_dqn_zoo_startup"
ROUNDS = 40


def start_seconds(switch: str) -> float:
    """Wall time of one start of Python that does nothing."""
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-c", ""], check=True, env={**os.environ, "SB3_LECTURE_DQN_ZOO": switch})
    return time.perf_counter() - begin


def import_microseconds() -> int:
    """What ``-X importtime`` says of the hook's module, with all that it imports."""
    command = [sys.executable, "-X", "importtime", "-c", ""]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stderr.splitlines()
    (line,) = [line for line in lines if line.endswith(f" {MODULE}")]
    return int(line.split("|")[1])


def main() -> None:
    """Print medians and ranges of alternating rounds."""
    imports = [import_microseconds() for _ in range(ROUNDS)]
    starts = {"1": [], "0": []}  # type: dict[str, list[float]]
    for _ in range(ROUNDS):
        for switch, seconds in starts.items():
            seconds.append(start_seconds(switch))
    print(f"import of the hook: median {statistics.median(imports) / 1000:.2f} ms (from {min(imports) / 1000:.2f})")
    for switch, name in (("1", "with the finder"), ("0", "switched off")):
        print(f"start of Python, {name}: median {statistics.median(starts[switch]) * 1000:.1f} ms")


if __name__ == "__main__":
    main()
