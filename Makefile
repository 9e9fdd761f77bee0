# make demo       a real Llama on a simulated accelerator: broken, repaired, checked against the CPU
# make test       the whole suite (25 minutes on 2 cores);  make test-fast: without Inductor and many processes (9)
# make opinfo     torch's own operator and module tests on the simulated device, all of them; writes docs/operators.md
# make npu        the real torch_npu on stub libraries, in .venv-npu; make test then runs its tests too
# make fakes      measures the fake kernels against torch_npu's, if it is there; writes docs/fake_kernels.md
# make lint       ruff, mypy, import layers;  make docs: the site, under build/;  make bench: JSON under build/bench
# make coverage   the whole suite under coverage, processes that it starts included; the table is build/coverage/table.txt
# make mutation   mutation testing of codegen, buckets, split and registry; tables in build/mutation/
# make fuzz       codegen, profiles and artifacts under atheris; FUZZ_SECONDS each (600), corpora in build/fuzz/
# Python 3.11 or newer and make are all it needs (make npu: gcc too).

PYTHON ?= python3
BIN := .venv/bin
NPU := .venv-npu
PARALLEL := --numprocesses 2 --dist loadfile --no-loadscope-reorder # a file's tests stay in one process, with what they share

.PHONY: demo test test-fast nightly opinfo coverage mutation fuzz npu fakes lint docs format bench clean

demo: .venv/ready
	$(BIN)/python examples/llama_on_musa.py

test: .venv/ready
	$(BIN)/python -m pytest $(PARALLEL)

test-fast: .venv/ready
	HYPOTHESIS_PROFILE=fast $(BIN)/python -m pytest $(PARALLEL) -m "not slow"

nightly: .venv/ready
	HYPOTHESIS_PROFILE=nightly $(BIN)/python -m pytest $(PARALLEL)

opinfo: .venv/ready
	PYTHONPATH=tests FXPATCH_AUTOLOAD=0 $(BIN)/python -m opinfo

coverage: .venv/hardening
	rm -rf build/coverage
	$(BIN)/python -m coverage run -m pytest $(PARALLEL)
	$(BIN)/python -m coverage combine --quiet
	$(BIN)/python -m coverage report --skip-covered --show-missing > build/coverage/table.txt
	tail -1 build/coverage/table.txt

mutation: .venv/hardening
	PYTHONHASHSEED=0 FXPATCH_AUTOLOAD=0 PYTHONPATH=tests $(BIN)/python -m mutation

fuzz: .venv/hardening
	FXPATCH_AUTOLOAD=0 PYTHONPATH=tests $(BIN)/python -m fuzz

npu: $(NPU)/ready

fakes: .venv/ready
	FXPATCH_AUTOLOAD=0 $(BIN)/python tests/fakes/coverage_table.py

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: .venv/ready
	FXPATCH_AUTOLOAD=0 NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

format: .venv/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: .venv/ready
	mkdir -p build/bench
	$(BIN)/python benchmarks/codegen.py --json build/bench/codegen.json
	$(BIN)/python benchmarks/import_time.py --json build/bench/import_time.json
	$(BIN)/python benchmarks/fakes.py --json build/bench/fakes.json
	$(BIN)/python benchmarks/simulator.py --json build/bench/simulator.json
	$(BIN)/python benchmarks/piecewise.py --json build/bench/piecewise.json
	$(BIN)/python benchmarks/shadow.py --json build/bench/shadow.json
	$(BIN)/python benchmarks/layers.py --json build/bench/layers.json

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), f"fxpatch needs Python 3.11 or newer, this is {sys.version}"'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt pip setuptools wheel
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[dev,docs]'
	touch $@

.venv/hardening: .venv/ready
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[dev,hardening]'
	touch $@

# An environment of its own: torch_npu loads itself with every `import torch`. Its dependencies are a vendor's tool chain,
# which importing it does without, hence --no-deps.
$(NPU)/ready: constraints.txt tests/vendor/stub_cann.py
	$(PYTHON) -m venv $(NPU)
	$(NPU)/bin/python -m pip install --quiet --constraint constraints.txt pip setuptools
	$(NPU)/bin/python -m pip install --quiet --constraint constraints.txt torch numpy pyyaml wrapt rich
	$(NPU)/bin/python -m pip install --quiet --no-deps torch_npu==2.13.0
	$(NPU)/bin/python tests/vendor/stub_cann.py $(NPU)/stubs
	touch $@

clean:
	rm -rf .venv $(NPU) build dist *.egg-info
