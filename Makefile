# make demo | test | test-peers | lint | bench | wheel | clean
# Everything lives in .venv; a stamp file per extra keeps a second call from installing again.

PYTHON ?= python3
PYTEST_ARGS ?=
PYTEST_WORKERS ?= 2

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip
INSTALL := $(PIP) install --disable-pip-version-check -c constraints.txt
PINS := pyproject.toml constraints.txt
BENCHMARKS = $(filter-out benchmarks/_%,$(sort $(wildcard benchmarks/*.py)))
CODE = $(wildcard src tests scripts benchmarks)

.PHONY: help demo test test-peers lint bench wheel clean
.DELETE_ON_ERROR:

help:
	@echo 'make demo        install into .venv and run the bundled example (writes demo-run/)'
	@echo 'make test        the whole test suite'
	@echo 'make test-peers  build and install the peers (needs a C++ compiler), run tests/peers'
	@echo 'make lint        ruff, mypy, import-linter, file lengths'
	@echo 'make bench       every script under benchmarks/, one after another'
	@echo 'make wheel       dist/: a wheel with the CPU kernels, and the source distribution'
	@echo 'make clean       remove .venv, caches and demo-run/'

demo: $(VENV)/.installed
	rm -rf demo-run
	$(BIN)/graft demo --out demo-run

# Tests against peers that are not installed skip themselves and say so. A file's tests stay with one
# worker, which makes their fixtures once.
test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n $(PYTEST_WORKERS) --dist loadfile $(PYTEST_ARGS)

test-peers: $(VENV)/.installed-test $(VENV)/.installed-peers
	$(BIN)/python -m pytest tests/peers $(PYTEST_ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/mypy
	$(BIN)/lint-imports
	@find $(CODE) -name '*.py' -exec wc -l {} + | awk \
	  '$$2 != "total" && $$1 > 400 { print $$2 ": " $$1 " lines; the limit is 400"; bad = 1 } END { exit bad }'

bench: $(VENV)/.installed
	@set -e; for script in $(BENCHMARKS); do \
	  echo "== $$script"; $(BIN)/python "$$script"; \
	done

# One wheel for every Python and every instruction set; without a compiler there is none to make.
# `pip wheel` makes the wheel of what lies here, setuptools the source distribution.
wheel: $(VENV)/.installed
	rm -rf build dist
	$(PIP) wheel --disable-pip-version-check --no-deps --wheel-dir dist .
	@! ls dist/*-any.whl 2>/dev/null || { echo 'this wheel has no kernels: install a C++17 compiler'; exit 1; }
	$(BIN)/python -c 'from setuptools.build_meta import build_sdist; build_sdist("dist")' >/dev/null

clean:
	rm -rf $(VENV) build dist demo-run src/*.egg-info
	rm -f src/graft/kernels/backend/_native.*
	rm -rf .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find $(CODE) -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("graft needs Python 3.11 or \
	newer, this is " + sys.version.split()[0] + "; name another one: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(PINS) | $(BIN)/python
	$(INSTALL) -e .
	@touch $@

$(VENV)/.installed-%: $(VENV)/.installed
	$(INSTALL) -e '.[$*]'
	@touch $@
