# The commands people need; each makes .venv first when it is missing or out of date.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

EXTRAS ?= dev

.PHONY: setup serve cluster test check types packages format tiny bench llama peers triton clients lowest promtool clean

setup: $(READY)

# pip says what it collects and shows a bar for each download: minutes of silence look like a command that hangs.
$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[$(EXTRAS)]'
	touch $(READY)

serve: setup  ## the four mpt-tiny models on http://127.0.0.1:8000
	$(BIN)/mpt serve

cluster: setup  ## the same four on a local Ray, each with replicas of its own
	$(BIN)/mpt cluster

# Files go whole to one of two to four processes: the tests of a file share servers and models.
test: setup  ## everything that needs no GPU and no network
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

check: setup promtool  ## format, lint, types, every manifest of k8s/ against its schema, and what pip would install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(MAKE) --jobs=2 --output-sync=line types packages

# Side by side: mypy takes one core, and what pip would install waits for the index.
types: setup
	$(BIN)/mypy

packages: setup promtool
	$(BIN)/python -m pytest -m 'not slow and not gpu' -rs -n 2 --dist loadfile tests/k8s tests/test_install.py tests/test_wheel.py

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

tiny: setup  ## train the mpt-tiny family again, from fixed seeds (an hour to an hour and a half on two cores)
	$(BIN)/train tiny

bench: setup  ## every number of docs/benchmarks.md
	$(BIN)/python -m benchmarks.engine --shapes 125m 1b
	$(BIN)/python benchmarks/speculation.py --draft
	$(BIN)/python benchmarks/long_context.py
	$(BIN)/python benchmarks/kv_cache.py
	$(BIN)/python benchmarks/speed.py
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/train.py
	$(BIN)/python benchmarks/convert.py
	$(BIN)/python benchmarks/onnx_speed.py
	$(BIN)/python benchmarks/cluster.py

llama:  ## llama.cpp, prebuilt for node, for tests of GGUF files
	mkdir -p .llama && cd .llama && npm install --silent --no-fund --no-audit --ignore-scripts node-llama-cpp@3.22.1

# A venv of its own: optimum-intel, which exports MPT for OpenVINO, takes no newer transformers. It asks for torchvision
# too, which it does without, and which does not load beside a torch of another index.
peers:  ## CTranslate2 and OpenVINO, for the ladder of benchmarks/engine.py
	test -x .peers/bin/python || $(PYTHON) -m venv .peers
	echo '*' > .peers/.gitignore
	.peers/bin/python -m pip install --quiet --disable-pip-version-check ctranslate2==4.8.5 openvino==2026.4.1 \
		openvino-genai==2026.4.1.0 optimum-intel==2.2.0 nncf==3.4.0 torch==2.13.0 transformers==5.5.4
	.peers/bin/python -m pip uninstall --quiet --yes torchvision

# A venv of its own: Triton's python backend needs numpy < 2.
triton:  ## a Triton server for CPU, for tests of model repositories and `mpt serve --model triton://`
	test -x .triton/bin/python || $(PYTHON) -m venv .triton
	.triton/bin/python -m pip install --quiet --disable-pip-version-check -r conversion/triton_repository/requirements.txt

# A venv of its own: these clients do not install beside each pin of constraints.txt. Where node is, Vercel's AI SDK too.
clients:  ## the real clients that tests/clients asks a server with
	test -x .clients/bin/python || $(PYTHON) -m venv .clients
	echo '*' > .clients/.gitignore
	.clients/bin/python -m pip install --quiet --disable-pip-version-check -r tests/clients/requirements.txt
	! command -v npm > /dev/null || npm install --prefix .clients --silent --no-fund --no-audit --ignore-scripts \
		ai@6.0.326 @ai-sdk/openai@3.0.141 @ai-sdk/anthropic@3.0.140

# A venv of its own: every direct dependency at the lower bound of pyproject.toml. Its torch is the CUDA build, of 3 GB.
lowest: setup  ## whether the lower bounds of pyproject.toml are true
	test -x .lowest/bin/python || $(PYTHON) -m venv .lowest
	echo '*' > .lowest/.gitignore
	$(BIN)/uv pip install --quiet --python .lowest/bin/python --resolution lowest-direct -e '.[dev,data,tracking,s3]'
	.lowest/bin/python -m pytest tests/mpt tests/conversion/test_convert.py tests/conversion/test_onnx.py \
		tests/serving/test_server.py tests/training/test_loop.py tests/training/test_trackers.py tests/training/test_mirror.py

promtool: .promtool/promtool  ## Prometheus' own checker, out of Debian's package; tests say so where there is none

.promtool/promtool:
	mkdir -p .promtool
	-cd .promtool && apt-get download -qq prometheus && dpkg -x prometheus_*.deb . && mv usr/bin/promtool promtool
	rm -rf .promtool/usr .promtool/etc .promtool/lib .promtool/var .promtool/prometheus_*.deb

clean:
	rm -rf $(VENV) .llama .peers .triton .clients .lowest .promtool .mypy_cache .ruff_cache .pytest_cache
