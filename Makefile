# `make demo`, `make test` and `make gpu-check` work from a bare clone: they create $(VENV), install, and run.

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
WORKERS ?= 2
OUT ?= runs/gpu-check

BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
# GPU_PYTHON=python3 checks the packages that are there, without $(VENV) and without a network.
GPU_PYTHON ?= $(BIN)/python
MKDOCS := $(VENV)/bin/mkdocs

.PHONY: help install demo test test-all gpu-check checks format docs clean

help:
	@echo "make demo      shear, train, evaluate and export a real model on this machine"
	@echo "make test      fast tests"
	@echo "make test-all  every test, slow ones too"
	@echo "make gpu-check on a GPU: test every operator, then time it; OUT=FOLDER for the reports"
	@echo "make checks    format check, lint, types"
	@echo "make format    rewrite files to the house format"
	@echo "make docs      docs/files.md, then the site in build/site"
	@echo "make clean     remove $(VENV) and tool caches (never runs/)"

install: $(INSTALLED)

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)

# torch goes first and pinned, so that no extra can pull another version in. Without isolation the
# build sees it and compiles the operators of csrc/, if there is a compiler.
$(INSTALLED): pyproject.toml setup.py $(wildcard csrc/*) | $(BIN)/python
	$(BIN)/python -m pip install "$(TORCH)" "setuptools>=77"
	$(BIN)/python -m pip install --no-build-isolation -e ".[demo,dev]" "$(TORCH)"
	@touch $@

demo: $(INSTALLED)
	$(BIN)/python -m launch.demo $(DEMO_FLAGS)

# One thread per worker: the workers already fill the cores.
test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal -m "not slow" $(TEST_FLAGS)

test-all: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal $(TEST_FLAGS)

# Eight minutes at most: the tests get five of them with their end, the timings what is left. Both
# run, whatever the tests find. A test that hangs takes its process down, and a new one goes on.
gpu-check: $(if $(filter $(BIN)/python,$(GPU_PYTHON)),$(INSTALLED))
	@mkdir -p $(OUT)
	end=$$(($$(date +%s) + 480)); \
	OMP_NUM_THREADS=1 timeout --signal INT --kill-after 30 270 \
	    $(GPU_PYTHON) -m pytest -q -m gpu -n auto --timeout 120 --timeout-method thread \
	    -p no:cacheprovider --junitxml $(OUT)/gpu-check.xml tests/trainer/kernels; \
	tested=$$?; left=$$((end - $$(date +%s))); \
	timeout --signal INT --kill-after 10 $$((left - 10)) \
	    $(GPU_PYTHON) -m launch.bench_kernels --budget-seconds $$((left - 60)) \
	    --json $(OUT)/gpu-check.json --csv $(OUT)/gpu-check.csv $(GPU_CHECK_FLAGS) && exit $$tested

checks: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(INSTALLED) $(MKDOCS)
	$(BIN)/python docs/make_files.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict -f .mkdocs.yml
	@echo "build/site/index.html"

$(MKDOCS): | $(INSTALLED)
	$(BIN)/python -m pip install "mkdocs-material>=9.5"

clean:
	rm -rf $(VENV) build *.egg-info trainer/kernels/*.so .pytest_cache .ruff_cache .mypy_cache .hypothesis
