# The commands people need; each makes .venv first when it is missing or out of date.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: setup serve test check format tiny bench llama triton clean

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
	$(BIN)/python benchmarks/convert.py
	$(BIN)/python benchmarks/onnx_speed.py

llama:  ## llama.cpp, prebuilt for node, for tests of GGUF files
	mkdir -p .llama && cd .llama && npm install --silent --no-fund --no-audit --ignore-scripts node-llama-cpp@3.22.1

# A venv of its own: Triton's python backend needs numpy < 2.
triton:  ## a Triton server for CPU, for tests of model repositories and `mpt serve --model triton://`
	test -x .triton/bin/python || $(PYTHON) -m venv .triton
	.triton/bin/python -m pip install --quiet --disable-pip-version-check -r conversion/triton_repository/requirements.txt

clean:
	rm -rf $(VENV) .llama .triton .mypy_cache .ruff_cache .pytest_cache
