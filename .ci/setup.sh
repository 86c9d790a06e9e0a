#!/bin/sh
# Make ./.venv with the tested versions of everything; $1 names the extras to install.
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
if ! "$python" -c 'import sys; raise SystemExit(not (3, 10) <= sys.version_info < (3, 14))'; then
    echo "sb3-lecture-dqn needs Python 3.10 to 3.13, got $("$python" --version 2>&1); PYTHON=python3.13 names another" >&2
    exit 1
fi
# a set-up that was interrupted, or that lacked Debian's python3-venv, leaves an environment without pip
.venv/bin/python -m pip --version >/dev/null 2>&1 || "$python" -m venv .venv
.venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[$1]"
