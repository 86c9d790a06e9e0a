#!/bin/sh
# mypy --strict. The last numpy for Python 3.10 has no defaults for an array's type arguments, so there they may be left out.
set -eu
cd "$(dirname "$0")/.."
is_310='import sys; raise SystemExit(sys.version_info[:2] != (3, 10))'
if .venv/bin/python -c "$is_310"; then
    exec .venv/bin/mypy --allow-any-generics
fi
exec .venv/bin/mypy
