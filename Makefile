# make help

PYTHON ?= python3
VENV ?= .venv
# Another build of torch, for instance TORCH=torch==2.13.0+cpu or a wheel's path: for a new .venv.
TORCH ?= $(shell sed -n 's/^\(torch==[^ ]*\).*/\1/p' constraints.txt)
PIP_ARGS ?=
PYTEST_ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS)
PYTEST := $(BIN)/python -m pytest
# Clones of peers for the benchmarks; BENCH_ARGS: suites and further options.
BENCH = $(if $(NANOGPT),--nanogpt "$(NANOGPT)") $(if $(WLM),--wlm "$(WLM)") $(BENCH_ARGS)
# Two files at a time; what one test makes for the others of its file stays together.
TWO := -n 2 --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help demo test coverage test-fast soak check format bench bench-full options screenshots wheel clean
.DELETE_ON_ERROR:

help: ## This list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/.installed ## Train on the built-in corpus, report and sample, in two minutes
	$(BIN)/lm demo

test: $(VENV)/.installed-test ## The whole suite, two files at a time
	$(PYTEST) $(TWO) --durations=15 $(PYTEST_ARGS)

coverage: $(VENV)/.installed-test ## The whole suite, and which lines it reaches: a third slower
	$(PYTEST) --cov --cov-report=term $(PYTEST_ARGS)

test-fast: $(VENV)/.installed-test ## What takes milliseconds: less than a minute
	$(PYTEST) $(TWO) -m "not slow and not soak" $(PYTEST_ARGS)

soak: $(VENV)/.installed-test ## The checks that take minutes
	$(PYTEST) -m soak --durations=0 $(PYTEST_ARGS)

check: $(VENV)/.installed-dev ## Lint, format, types, the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.installed-dev ## Put the code into shape
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.installed-bench ## Ours beside peers, in slices: 20 minutes; NANOGPT=PATH WLM=PATH name the clones
	$(BIN)/python -m benchmarks $(BENCH)

bench-full: $(VENV)/.installed-bench ## The same with whole recipes: hours
	$(BIN)/python -m benchmarks --full $(BENCH)

options: $(VENV)/.installed ## docs/options.md, from the fields that declare the options
	$(BIN)/python docs/make_options.py

screenshots: $(VENV)/.installed-test ## docs/images, from the page in a real browser
	$(BIN)/python docs/make_screenshots.py

wheel: $(VENV)/.installed-test ## Source distribution and wheel under dist/
	$(BIN)/python -m build --no-isolation

clean: ## Remove the venv and what tools left behind; runs stay
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache .coverage .coverage.*
	find lm cli serve tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# -- the pinned install: torch first, then the rest, which then finds torch there and leaves it alone ----------

$(VENV)/.torch: constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Inkling needs Python 3.11 or newer, $(PYTHON) is " + sys.version.split()[0] + ": make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	grep -v '^torch==' constraints.txt > $(VENV)/constraints.txt
	$(PIP) -c $(VENV)/constraints.txt "$(TORCH)" nanobind scikit-build-core
	@touch $@

# Without isolation, so that the build uses the pinned backend too. What the kernels are made of is part of an install.
NATIVE := CMakeLists.txt $(wildcard lm/kernels/native/*)
INSTALL = $(PIP) -c $(VENV)/constraints.txt --no-build-isolation -e

$(VENV)/.installed: pyproject.toml $(NATIVE) $(VENV)/.torch
	$(INSTALL) .
	@touch $@

$(VENV)/.installed-bench: pyproject.toml $(NATIVE) $(VENV)/.torch
	$(INSTALL) ".[bench]"
	@touch $@ $(VENV)/.installed

$(VENV)/.installed-test: pyproject.toml $(NATIVE) $(VENV)/.torch
	$(INSTALL) ".[test]"
	@touch $@ $(VENV)/.installed

$(VENV)/.installed-dev: pyproject.toml $(NATIVE) $(VENV)/.torch
	$(INSTALL) ".[dev]"
	@touch $@ $(VENV)/.installed-test $(VENV)/.installed
