# make setup   create .venv with everything pinned        make test   the fast tests
# make demo    learn and generate with the small model    make lint, make format, make clean

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: setup demo test test-slow lint format clean

setup: $(INSTALLED)
	@:

$(INSTALLED): pyproject.toml requirements.lock
	@echo "Installing the pinned packages into $(VENV); the first time this takes some minutes."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c requirements.lock -e '.[dev,metrics]'
# Alone: the quantizer that the tests use needs only torch, and torchvision does not import beside a CPU build of it.
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps -c requirements.lock taming-transformers-rom1504
	@touch $@

demo: setup
	@$(BIN)/python scripts/demo.py

# One thread: two spinning threads on a busy machine are many times slower than one.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "not gpu and not slow"

# Twenty kills of one run, a thousand generations, and Stable Diffusion v1 at its real size with random weights, which
# needs 8 GB of memory and 3 GB of disk.
test-slow: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "slow and not gpu"

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Runs (logs/, outputs/) and weights stay.
clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
