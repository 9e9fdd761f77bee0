# make demo       a real Llama on a simulated accelerator: broken, repaired, checked against the CPU
# make test       the whole suite (under 20 minutes on 2 cores);  make test-fast: the quick part (under 2)
# make opinfo     torch's own operator and module tests on the simulated device, all of them; writes docs/operators.md
# make lint       ruff, mypy, import layers;  make bench: benchmarks, as JSON under build/bench
# Python 3.11 or newer and make are all it needs.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-fast nightly opinfo lint format bench clean

demo: .venv/ready
	$(BIN)/python examples/llama_on_musa.py

test: .venv/ready
	$(BIN)/python -m pytest

test-fast: .venv/ready
	HYPOTHESIS_PROFILE=fast $(BIN)/python -m pytest -m "not slow"

nightly: .venv/ready
	HYPOTHESIS_PROFILE=nightly $(BIN)/python -m pytest

opinfo: .venv/ready
	PYTHONPATH=tests FXPATCH_AUTOLOAD=0 $(BIN)/python -m opinfo

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: .venv/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: .venv/ready
	mkdir -p build/bench
	$(BIN)/python benchmarks/codegen.py --json build/bench/codegen.json
	$(BIN)/python benchmarks/import_time.py --json build/bench/import_time.json
	$(BIN)/python benchmarks/simulator.py --json build/bench/simulator.json

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), f"fxpatch needs Python 3.11 or newer, this is {sys.version}"'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt pip setuptools wheel
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv build dist *.egg-info
