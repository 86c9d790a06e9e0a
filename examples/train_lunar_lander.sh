#!/bin/sh
# From nothing to a landing: set up ./.venv, train LunarLander-v2 for its full budget, show 20 greedy episodes' mean return.
# Arguments go to the training, for instance: --seed 0
set -eu
cd "$(dirname "$0")/.."
sh .ci/setup.sh extra
.venv/bin/python -m rl_zoo3.train --algo lecture_dqn --env LunarLander-v2 "$@"
.venv/bin/python examples/evaluate.py --env LunarLander-v2 --episodes 20
