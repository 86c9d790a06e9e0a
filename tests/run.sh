#!/bin/sh
# From nothing to a checked project: set up ./.venv, then style, types and tests. Arguments go to pytest.
set -eu
cd "$(dirname "$0")/.."
sh .ci/setup.sh dev
.venv/bin/ruff check .
.venv/bin/ruff format --check .
sh .ci/types.sh
# one thread a process: the networks are small, and two processes share two cores
OMP_NUM_THREADS=1 .venv/bin/python -m pytest --numprocesses 2 --dist loadscope "$@"
