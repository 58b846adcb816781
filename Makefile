# `make quickstart` and `make test` set up everything they need; `make help` lists the rest.
# PYTHON=... chooses the interpreter that .venv is made from, ARGS=... is handed on to the command.

.DEFAULT_GOAL := help
.PHONY: help quickstart demo-adapters test test-all test-ecosystem test-matrix test-triton-matrix test-sanitize \
	peft-suite bench gpu-report lint native setup setup-dev setup-ecosystem clean

# The first of these that runs, is 3.10 or newer and can make a virtual environment; 3.14 and later only if named.
FIND_PYTHON = for p in python3 python3.13 python3.12 python3.11 python3.10; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' >/dev/null 2>&1 \
	&& { echo $$p; exit; }; done; echo no-python
PYTHON ?= $(shell $(FIND_PYTHON))
ARGS ?=
PART ?=
WORKERS ?= 2
VENV_PYTHON = .venv/bin/python
BUILD_NATIVE = $(VENV_PYTHON) setup.py -q build_native
# Without the CUDA sources, a third of the build, where no GPU could run them and PEFT_KERNELS_CUDA=1 does not ask.
BUILD_FOR_HERE = $(BUILD_NATIVE) --for-this-machine
SETUP = @case "$(PYTHON)" in no-python) \
	echo "error: no Python 3.10 to 3.13 with venv found (on Debian: the package python3-venv); name one with PYTHON=..."; \
	exit 1;; esac; $(PYTHON) tools/setup_env.py

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' Makefile

quickstart: setup ## set up, then fine-tune a small model with QLoRA: before and after side by side, in runs/quickstart
	@$(BUILD_FOR_HERE)
	@.venv/bin/fastpeft quickstart $(ARGS)

demo-adapters: setup ## set up, then train three adapters at once: their styles side by side, in runs/demo-adapters
	@$(BUILD_FOR_HERE)
	@.venv/bin/fastpeft demo-adapters $(ARGS)

PYTEST = $(VENV_PYTHON) -m pytest -q -n $(WORKERS) --dist worksteal --durations=30 --durations-min=3

test: lint ## set up, then lint and run every test, the longest ones in a short form
	@$(BUILD_NATIVE)
	@$(PYTEST) $(ARGS)

# The parts are those of tests/tools/forms.py.
test-all: lint ## every test in full; PART= kernels, simt, triton, fuzz, methods, files, families, models, training, serve or project
	@$(BUILD_NATIVE)
	@$(PYTEST) --full $(foreach part,$(PART),--part $(part)) $(ARGS)

test-ecosystem: setup-ecosystem ## the tests with TRL, diffusers and datasets, which it installs into .venv
	@$(BUILD_NATIVE)
	@$(PYTEST) --ecosystem -m ecosystem $(ARGS)

MATRIX = transformers==5.23 transformers==5.24 peft==0.18.1 peft==0.19.1 peft==0.20.0 peft==0.21.2

test-matrix: setup-ecosystem ## the tests with several versions of transformers and of PEFT; MATRIX=peft==0.18.1 for one
	@$(BUILD_NATIVE)
	@$(VENV_PYTHON) tools/test_matrix.py $(MATRIX) -- $(ARGS)

# A folder with versions that need not be installed, see tools/test_matrix.py.
VERSIONS ?=

test-triton-matrix: setup-dev ## the Triton kernels as machine code, under four versions of Triton
	@$(VENV_PYTHON) tools/test_matrix.py triton $(if $(VERSIONS),--versions $(VERSIONS)) -- $(ARGS)

# Files of PEFT's tests, as test_config; all of them by default.
FILES ?=

peft-suite: ## PEFT's own tests with fastpeft in its place, FILES=test_config for one; results in docs/compatibility.md
	$(SETUP) demo test lint peft-suite
	@$(BUILD_FOR_HERE)
	@$(VENV_PYTHON) tools/peft_suite $(FILES) $(ARGS)

test-sanitize: setup-dev ## the CPU library under ASan, UBSan and TSan, on recorded calls of its whole C ABI
	@$(BUILD_FOR_HERE)
	@$(VENV_PYTHON) -m pytest -q --full tests/test_sanitize.py $(ARGS)

bench: setup-dev ## the benches of the ops and of the whole model; results under bench/results
	@$(BUILD_NATIVE)
	@$(VENV_PYTHON) -m bench $(if $(ARGS),$(ARGS),--suite qlora)

# .venv or else the Python of the machine; nothing is installed, and what it lacks is named in the answer sheet.
gpu-report: ## tests and rows of times on this machine's GPU; results in runs/gpu, ARGS=--resume goes on with them
	@$(or $(wildcard .venv/bin/python),$(PYTHON)) tools/gpu_run.py --out runs/gpu $(ARGS)

lint: setup-dev ## style (ruff) and types (mypy, strict)
	@$(VENV_PYTHON) -m ruff check .
	@$(VENV_PYTHON) -m mypy

native: setup ## build the native library, where there is a compiler
	@$(BUILD_NATIVE)

setup: ## .venv with what the quickstart needs
	$(SETUP) demo

setup-dev: ## .venv with what the tests need, too
	$(SETUP) demo test lint

setup-ecosystem: ## .venv with TRL, diffusers and datasets, too
	$(SETUP) demo test lint ecosystem

clean: ## remove what was built; .venv and runs stay
	rm -rf build dist *.egg-info peft_kernels/lib .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find peft_kernels python tests bench tools -name __pycache__ -type d -exec rm -rf {} +
