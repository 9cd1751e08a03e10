# `make` alone lists the targets. Each one builds the environment it needs.

PYTHON ?= python3
WORKERS ?= 2
PYENV_ROOT ?= $(HOME)/.pyenv

VENV := .venv
NEWEST := .venv-newest
PEERS := .venv-peers
DOCS := .venv-docs
SITE := build/site
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
bench: $(VENV)/.installed-bench ## Run the quick benchmarks and the quick comparison of methods
	$(VENV)/bin/python -m benchmarks
	rm -rf benchmarks/results/quick
	$(VENV)/bin/python -m benchmarks run --quick --output benchmarks/results/quick
	$(VENV)/bin/python -m benchmarks report benchmarks/results/quick

REPORT_TEST := benchmarks/results/report-test
.PHONY: report-test
report-test: $(VENV)/.installed-bench ## Check the page of a small comparison in headless Chromium
	@$(VENV)/bin/python -c 'from benchmarks import browser; print(browser.find())'
	rm -rf $(REPORT_TEST)
	$(VENV)/bin/python -m benchmarks run --problems ridge kfold --methods default soba random --seeds 0 1 --seconds 0.3 --output $(REPORT_TEST)
	$(VENV)/bin/python -m benchmarks report $(REPORT_TEST)
	$(VENV)/bin/python -m benchmarks.browser $(REPORT_TEST)/report.html $(REPORT_TEST)

.PHONY: docs
docs: $(DOCS)/.installed ## Build the documentation site in build/site (warnings are errors)
	rm -rf $(SITE)
	$(DOCS)/bin/python -m sphinx -E -W --keep-going -q -b html docs $(SITE)
	@echo "open $(SITE)/index.html"

.PHONY: docs-test
docs-test: docs $(VENV)/.installed ## Build the site, check its links, run all examples of pages and docstrings
	$(DOCS)/bin/python docs/check_site.py $(SITE)
	$(VENV)/bin/python -m pytest -n $(WORKERS) tests/test_site.py tests/test_docs.py tests/test_doctests.py

.PHONY: notebooks
notebooks: $(VENV)/.installed-notebooks ## Execute the notebooks and write them anew
	$(VENV)/bin/python notebooks/build.py

.PHONY: test-newest
test-newest: $(NEWEST)/.installed ## Run the tests on the newest Python found (3.12 or later)
	$(NEWEST)/bin/python -m pytest -n $(WORKERS)

.PHONY: peers
peers: $(PEERS)/.installed ## Build .venv-peers for python -m benchmarks peers

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

$(DOCS)/.installed: pyproject.toml
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python $(PIP_INSTALL) --upgrade pip
	$(DOCS)/bin/python $(PIP_INSTALL) -e '.[docs]'
	@touch $@

$(VENV)/.installed-notebooks: $(VENV)/.installed
	$(VENV)/bin/python $(PIP_INSTALL) -e '.[notebooks]'
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

# The last two ask for older Pythons and for a torch with drivers of GPUs; they run without. A package that
# cannot be installed here is missing from the table, which says so.
$(PEERS)/.installed: pyproject.toml
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python $(PIP_INSTALL) --upgrade pip
	$(PEERS)/bin/python $(PIP_INSTALL) -e '.[bench]' cmaes
	@for package in torch==2.13.0 jaxopt==0.8.5 'optimistix==0.1.0 lineax==0.1.1' gradhpo==0.1.3 higher==0.2.1 torchopt==0.7.3; do \
	  $(PEERS)/bin/python $(PIP_INSTALL) $$package || echo "cannot install $$package" >&2; \
	done
	@for package in betty-ml==0.2.1 hypergrad==0.0.1; do \
	  $(PEERS)/bin/python $(PIP_INSTALL) --no-deps --ignore-requires-python $$package || echo "cannot install $$package" >&2; \
	done
	@touch $@
