# make setup   create .venv with everything pinned        make test   the fast tests
# make demo    learn and generate with the small model    make lint, make format, make clean
# make small-model   train a model like models/demo from scratch (1 h 40 min on two cores); resumes where it stopped
# make concepts   learn the concepts of models/demo/concepts again (after the small model has changed)
# make notebook   open ProSpect.ipynb                     make test-page   the page in a real browser (Debian's Chromium)
# make test-slow: at real size                            make test-offline: the tests with the network cut off

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
SUPPORTED := import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))

.PHONY: setup notebook test-page demo concepts small-model test test-slow test-offline lint format clean

setup: $(INSTALLED)
	@:

$(INSTALLED): pyproject.toml requirements.lock
	@echo "Installing the pinned packages into $(VENV); the first time this takes some minutes."
	@$(BIN)/python -c 'import pip; $(SUPPORTED)' 2>/dev/null || { \
	  $(PYTHON) -c '$(SUPPORTED)' || { echo "Python 3.10 to 3.13 is needed, as in: make setup PYTHON=python3.12" >&2; exit 1; }; \
	  $(PYTHON) -m venv --clear $(VENV); }
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c requirements.lock -e '.[dev,metrics,cluster,page,jupyter]'
# Alone: the quantizer that the tests use needs only torch, and torchvision does not import beside a CPU build of it.
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps -c requirements.lock taming-transformers-rom1504
	@touch $@

demo: setup
	@$(BIN)/python scripts/demo.py

notebook: setup
	@$(BIN)/jupyter lab ProSpect.ipynb

concepts: setup
	@$(BIN)/python scripts/demo.py --concepts

# The parts one after the other, the U-Net upon the first two. What was started is resumed, what is complete ends at once.
small-model: setup
	@for part in autoencoder text diffusion classifier; do \
	  run=logs/small/$$part; start="--base configs/demo/$$part.yaml -p $$run"; \
	  if ls $$run/configs/*-lightning.yaml >/dev/null 2>&1; then start="-r $$run"; fi; \
	  $(BIN)/python main.py $$start -t || exit; \
	done

# A process for each core, of one thread: two spinning threads on a busy machine are many times slower than one. Tests of
# a file share what is expensive and stay together, until a process has none left and takes some from another.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist worksteal -m "not gpu and not slow and not browser"

# Twenty kills of one run, a thousand generations, and Stable Diffusion v1 at its real size with random weights, which
# needs 8 GB of memory and 3 GB of disk.
test-slow: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "slow and not gpu"

# Without any network, loopback included; needs the right to make namespaces (Linux).
test-offline: setup
	@unshare -rn true || { echo "unshare -rn is not permitted here; nothing was tested." >&2; exit 1; }
	OMP_NUM_THREADS=1 unshare -rn $(BIN)/python -m pytest -q -m "not gpu and not slow and not browser"

# With Chromium, which is installed where it is missing (Debian, as root).
test-page: setup
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c requirements.lock -e '.[browser]'
	@command -v chromium >/dev/null || { apt-get update -qq && apt-get install -y -qq chromium; }
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m browser tests/page

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy ldm evaluation scripts main.py
	$(BIN)/codespell

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Runs (logs/, outputs/) and weights stay.
clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
