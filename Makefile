# Two targets for users: demo and test. Both make the virtual environment if it is not there.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# torchvision and timm, which imports it, are for the tests alone, and a build for another torch
# breaks whatever finds it, so they lie beside the environment's packages, not among them.
REFERENCE = $(VENV)/reference

.PHONY: demo test lint docs bench clean

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[test]'
	touch $@

$(REFERENCE)/ready: $(VENV)/ready
	$(BIN)/python -m pip install --quiet --no-deps -c constraints.txt --target $(REFERENCE) torchvision timm
	touch $@

demo: $(VENV)/ready
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python examples/demo.py

test: $(REFERENCE)/ready
	$(BIN)/python -m pytest -n logical --dist worksteal

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/ready
	$(BIN)/python benchmarks/label_time.py
	$(BIN)/python benchmarks/fcn4.py
	$(BIN)/python benchmarks/command_line.py
	$(BIN)/python benchmarks/matching.py
	$(BIN)/python benchmarks/labels_single.py
	$(BIN)/python benchmarks/labels_trained.py
	$(BIN)/python benchmarks/label_counts.py
	$(BIN)/python benchmarks/labels_noise.py
	$(BIN)/python benchmarks/labels_batch.py
	$(BIN)/python benchmarks/fedavg.py
	$(BIN)/python benchmarks/train_networks.py
	$(BIN)/python benchmarks/images.py

docs: $(VENV)/ready
	$(BIN)/python docs/generate_cli.py

clean:
	rm -rf $(VENV) demo-out build *.egg-info
