# Every target starts from nothing: it makes the environment in .venv and installs what it needs.
PYTHON ?= python3
BIN := .venv/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test test-all lint types docs bench bench-speed methods clean

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

demo: .venv/.installed  ## train dense, small-dense, Static, SET and RigL on handwritten digits
	$(BIN)/python examples/digits.py --output outputs/digits

test: .venv/.installed  ## the developer's suite
	$(BIN)/python -m pytest -m "not slow"

test-all: .venv/.installed  ## the suite and its slow rows
	$(BIN)/python -m pytest

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/.installed
	$(BIN)/mypy

docs: .venv/.installed
	$(BIN)/mkdocs build --strict

bench: .venv/.installed  ## the cost of masking, of one update and of counting, stored under benchmarks/results
	$(BIN)/python benchmarks/overhead.py
	$(BIN)/python benchmarks/flops.py

bench-speed: .venv/.installed  ## sparse products beside dense ones: training, inference, files (half an hour)
	$(BIN)/python benchmarks/training_speed.py mlp
	$(BIN)/python benchmarks/training_speed.py vit --rounds 3
	$(BIN)/python benchmarks/where_time_goes.py
	$(BIN)/python benchmarks/training_losses.py
	$(BIN)/python benchmarks/no_gain.py
	$(BIN)/python benchmarks/inference_speed.py mlp
	$(BIN)/python benchmarks/inference_speed.py vit
	$(BIN)/python benchmarks/checkpoint_size.py

methods: .venv/.installed  ## the studies of all methods: make methods STUDY=all DATA_DIR=folder (each under 90 minutes)
	$(BIN)/python benchmarks/methods.py $(STUDY) --data-dir $(DATA_DIR)

clean:
	rm -rf .venv build dist site outputs *.egg-info
