# Every target sets up what it needs. MANIFEST is what to convert; ARGS goes to hubmill as it is.
MANIFEST ?= manifests/quickstart.yaml
ARGS ?=
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: help setup convert plan test test-all chaos fuzz check bench bench-kernels peers quantizers clean
.DEFAULT_GOAL := help

help: ## show this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

setup: $(READY) ## build .venv with everything, at the tested versions

# Compiled at the end, on all cores: every process starts in half the time, also where Python may not write its caches.
# torchao lies apart, for tests that put it on their path: transformers imports it, warnings and all, wherever it finds it.
# torch by name and first: on its own pip would take a CUDA build of several gigabytes where a CPU one is at hand.
$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check --upgrade pip
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check --constraint constraints.txt "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check --no-deps --upgrade --target $(VENV)/readers "$$(grep '^torchao==' constraints.txt)"
	$(BIN)/python -m compileall -q -j 0 $(VENV)/lib > /dev/null || true
	touch $@

convert: $(READY) ## convert MANIFEST (default: the quickstart)
	$(BIN)/hubmill convert $(MANIFEST) $(ARGS)

plan: $(READY) ## show what converting MANIFEST would do
	$(BIN)/hubmill plan $(MANIFEST) $(ARGS)

# Two files of tests at a time; a file stays in one process, for its tests share what is made once. Those that start Ray
# run alone: it gives its processes half a minute to come up, whatever else the cores do.
SPREAD := -n 2 --dist loadfile
test: $(READY) ## run the tests
	$(BIN)/python -m pytest -m "not slow and not ray" $(SPREAD)
	$(BIN)/python -m pytest -m "not slow and ray"

test-all: $(READY) ## run the tests and the long suites
	$(BIN)/python -m pytest -m "not ray" $(SPREAD)
	$(BIN)/python -m pytest -m "ray"

chaos: $(READY) ## inject faults into runs at random moments, ten minutes at most
	PYTHONPATH=tests $(BIN)/python -m chaos $(ARGS)

# atheris (libFuzzer) comes when it is asked for: it has wheels for Linux on x86_64 only.
fuzz: $(READY) ## feed damaged files to every reader, a minute each
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[fuzz]'
	PYTHONPATH=tests $(BIN)/python -m fuzz $(ARGS)

check: $(READY) ## lint, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY) ## measure speed, memory and error beside the peers
	for script in benchmarks/*.py; do echo "== $$script"; $(BIN)/python $$script || exit 1; done

bench-kernels: $(READY) ## measure the GGUF kernels beside ggml's
	$(BIN)/python benchmarks/ggml_kernels.py

# Found there by tests/quantize_peer.py. The package holds nothing but shared libraries for this platform.
PEER := @node-llama-cpp/linux-x64@3.22.1
peers: $(READY) ## fetch llama.cpp's quantizer for the long suites
	mkdir -p $(VENV)/peers
	cd $(VENV)/peers && tar -xzf "$$(npm pack --silent $(PEER))"

# An environment of their own: llm-compressor wants an older transformers and compressed-tensors than ours.
QUANTIZERS := $(VENV)/quantizers
quantizers: $(READY) ## install llm-compressor and auto-round for benchmarks/peers.py
	test -x $(QUANTIZERS)/bin/python || $(PYTHON) -m venv $(QUANTIZERS)
	$(QUANTIZERS)/bin/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(QUANTIZERS)/bin/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)" \
		--requirement benchmarks/quantizers/requirements.txt

clean: ## remove what was built, but not out/
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
