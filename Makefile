# `make` alone lists the targets. Each one builds the environment it needs.

PYTHON ?= python3
WORKERS ?= 2
PYENV_ROOT ?= $(HOME)/.pyenv

VENV := .venv
NEWEST := .venv-newest
PIP_INSTALL := -m pip install -qq --disable-pip-version-check

.DEFAULT_GOAL := help

.PHONY: help
help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

.PHONY: install
install: $(VENV)/.installed ## Build .venv with the library and the development tools

.PHONY: test
test: $(VENV)/.installed ## Run the tests (WORKERS=2 processes)
	$(VENV)/bin/python -m pytest -n $(WORKERS)

.PHONY: test-all
test-all: $(VENV)/.installed ## Run all of the tests, every case of the large tables
	$(VENV)/bin/python -m pytest -n $(WORKERS) --all

.PHONY: demo
demo: $(VENV)/.installed ## Run the demonstration
	$(VENV)/bin/bilevel demo

.PHONY: lint
lint: $(VENV)/.installed ## Check style, format and types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

.PHONY: format
format: $(VENV)/.installed ## Rewrite the code in the project's format
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

.PHONY: bench
bench: $(VENV)/.installed-bench ## Run the quick benchmarks and a small study
	$(VENV)/bin/python -m benchmarks
	rm -rf benchmarks/results/quick
	$(VENV)/bin/python -m benchmarks study --problems ridge logistic kfold --seeds 0 --seconds 1 --out benchmarks/results/quick
	$(VENV)/bin/python -m benchmarks report benchmarks/results/quick

.PHONY: test-newest
test-newest: $(NEWEST)/.installed ## Run the tests on the newest Python found (3.12 or later)
	$(NEWEST)/bin/python -m pytest -n $(WORKERS)

.PHONY: clean
clean: ## Remove caches and build products (the environments stay)
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -path './.venv*' -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp is written last, so that an interrupted installation starts again.
$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: Python 3.11 or newer is needed, and '$(PYTHON)' is not; name one with: make PYTHON=python3.12" >&2; \
	  exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python $(PIP_INSTALL) --upgrade pip
	$(VENV)/bin/python $(PIP_INSTALL) -e '.[dev]'
	@touch $@

$(VENV)/.installed-bench: $(VENV)/.installed
	$(VENV)/bin/python $(PIP_INSTALL) -e '.[bench]'
	@touch $@

# A candidate counts only if it starts and is the version its name says: a pyenv shim may do neither.
$(NEWEST)/.installed: pyproject.toml
	@for minor in 14 13 12; do \
	  for python in python3.$$minor $$(ls -d "$(PYENV_ROOT)"/versions/3.$$minor.*/bin/python 2>/dev/null | sort -rV); do \
	    if "$$python" -c "import sys; sys.exit(sys.version_info[:2] != (3, $$minor))" 2>/dev/null; then \
	      echo "$$python -m venv --clear $(NEWEST)"; \
	      exec "$$python" -m venv --clear $(NEWEST); \
	    fi; \
	  done; \
	done; \
	echo "error: none of python3.14, python3.13 and python3.12 was found on PATH or under $(PYENV_ROOT)" >&2; \
	exit 1
	$(NEWEST)/bin/python $(PIP_INSTALL) --upgrade pip
	$(NEWEST)/bin/python $(PIP_INSTALL) -e '.[dev]'
	@touch $@
