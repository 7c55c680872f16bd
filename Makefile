# Everything here needs only Python >= 3.11 and make. `make help` lists the targets.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

VENV ?= .venv
PYTHON ?= $(firstword $(foreach candidate,python3 python3.13 python3.12 python3.11 python,$(shell \
	$(candidate) -c 'import sys; sys.version_info >= (3, 11) and print("$(candidate)")' 2>/dev/null)))
EXTRAS ?= dev

# What `pip install` is asked for as PyTorch, before anything else asks for it.
#   a GPU that nvidia-smi can see: the registry's own build, which carries CUDA;
#   none:                          one fixed version, so that a CPU build beside it in your indexes is taken.
# On Linux the public registry carries only CUDA builds. To get a CPU build there, add the CPU index that
# pytorch.org names for your platform to pip (PIP_EXTRA_INDEX_URL or pip.conf) and say
#   make install TORCH='torch==2.13.0+cpu'
# For another CUDA or ROCm version do the same with that index, e.g. TORCH='torch==2.13.0+cu128'.
# Any requirement pip understands will do; pyproject.toml wants torch>=2.6,<3.
TORCH ?= $(shell if nvidia-smi >/dev/null 2>&1; then echo torch; else echo torch==2.13.0; fi)

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# A process per core with one thread each beats one process with many threads on models this small.
TEST_ENV := HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1
WORKERS ?= 2
BENCH_ENV := HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 TOKENIZERS_PARALLELISM=false

BENCHMARKS ?= loss few_rows direction_search depth growth end_to_end evaluation_overhead

.PHONY: help install demo test bench check format clean

help:  ## this list
	@echo "make demo     align the bundled testbed model and show what changed (minutes, on a CPU)"
	@echo "make test     run the tests"
	@echo "make bench    measure speed and memory beside plain PyTorch and TRL (20 minutes)"
	@echo "make check    lint, formatting and types"
	@echo "make format   rewrite the files as 'make check' wants them"
	@echo "make install  build $(VENV) (the other targets do it when it is missing)"
	@echo "make clean    remove $(VENV) and caches"

install: $(STAMP)  ## the virtual environment with safesteer in it

$(STAMP): pyproject.toml
	@if [ -z "$(PYTHON)" ]; then \
		echo "safesteer needs Python 3.11 or newer and found none on PATH; install one or name it: make PYTHON=/path/to/python3" >&2; exit 2; fi
	@echo "--- Building $(VENV) with $(PYTHON): PyTorch ('$(TORCH)'), then safesteer[$(EXTRAS)]. Once; some minutes."
	@[ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check '$(TORCH)'
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$(EXTRAS)]'
	@$(BIN)/python -c 'import torch; print(f"--- Installed. PyTorch {torch.__version__} computes on", "the GPU." if torch.cuda.is_available() else "the CPU.")'
	@touch $@

demo: $(STAMP)  ## align the testbed
	@echo "--- Aligning the bundled testbed model with 100 harmful prompts, then measuring it before and after."
	@$(BIN)/safesteer demo

test: $(STAMP)  ## the tests
	@echo "--- Running the tests in $(WORKERS) processes."
	@$(TEST_ENV) $(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal $(PYTEST_ARGS)

bench: $(STAMP)  ## speed and memory, side by side
	@for name in $(BENCHMARKS); do echo "--- benchmarks/$$name.py"; $(BENCH_ENV) $(BIN)/python benchmarks/$$name.py; done
	@$(BIN)/python benchmarks/table.py --write docs/benchmarks.md

check: $(STAMP)  ## lint, formatting, types
	@echo "--- ruff, formatting, mypy."
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: $(STAMP)
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache build dist
