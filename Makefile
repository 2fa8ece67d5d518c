# The commands people need; each makes .venv first when it is missing or out of date.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: setup serve test check format tiny bench clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(READY)

serve: setup  ## the four mpt-tiny models on http://127.0.0.1:8000
	$(BIN)/mpt serve

test: setup  ## everything that needs no GPU and no network
	$(BIN)/python -m pytest

check: setup  ## format, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

tiny: setup  ## train the mpt-tiny family again, from fixed seeds (about an hour on two cores)
	$(BIN)/train tiny

bench: setup  ## every number of docs/benchmarks.md
	$(BIN)/python benchmarks/speed.py
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/train.py

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache
