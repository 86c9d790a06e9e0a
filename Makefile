# The daily commands of the Stable-Baselines3 house.
.PHONY: train test lint type format

train:
	sh examples/train_lunar_lander.sh

test:
	sh tests/run.sh

lint:
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

type:
	sh .ci/types.sh

format:
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .
