# Each target sets up what it needs: a virtual environment of its own, torch first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# torch is installed before everything else, so that nothing else decides which build it is. Where pip would
# fetch a CUDA build and you want none: make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test test-versions check bench bench-gpu compare tables docs format clean

demo: $(VENV)/run.stamp
	$(BIN)/nest demo --out nest-demo --overwrite

test: $(VENV)/dev.stamp
	$(BIN)/python -m pytest

# The suite on every supported Python, torch and triton that can be had here, some 30 minutes. Some of
# it: make test-versions ONLY="py3.13-pip triton3.6"
test-versions: .venv-nox/nox.stamp
	.venv-nox/bin/nox $(if $(ONLY),--session $(ONLY))

check: $(VENV)/dev.stamp
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	MYPYPATH=.:$(VENV)/types $(BIN)/mypy -p nest -p nest_kernels
	PYTHONPATH=.:$(VENV)/types $(BIN)/lint-imports

# Speed and memory against others' methods, on an idle machine. Some of it: make bench ONLY=R1,R8
bench: $(VENV)/bench.stamp
	$(BIN)/python -m experiments.benchmarks.run $(if $(ONLY),--only $(ONLY))
	$(BIN)/python -m experiments.benchmarks.tables

bench-gpu: $(VENV)/bench.stamp
	$(BIN)/python -m experiments.benchmarks.run --device cuda $(if $(ONLY),--only $(ONLY))
	$(BIN)/python -m experiments.benchmarks.tables

# The comparison of README's tables: every method on every world, hours on two cores. It goes on where it was
# interrupted.
compare: $(VENV)/dev.stamp
	$(BIN)/nest compare --config experiments/compare/worlds.toml --out experiments/compare/results/worlds --final
	$(MAKE) tables

# What is written from the code itself: the README's tree, and docs/commands.md from the settings.
docs: $(VENV)/dev.stamp
	$(BIN)/python -m experiments.tree
	$(BIN)/python -m experiments.commands

# README's tables anew, from the committed result files.
tables: $(VENV)/dev.stamp
	$(BIN)/python -m experiments.compare.tables
	$(BIN)/python -m experiments.real.judging.tables
	$(BIN)/python -m experiments.benchmarks.tables

format: $(VENV)/dev.stamp
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) .venv-nox .nox build dist *.egg-info nest-demo

$(VENV)/torch.stamp: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	touch $@

$(VENV)/run.stamp: $(VENV)/torch.stamp setup.py
	$(PIP) -e .
	touch $@

$(VENV)/bench.stamp: $(VENV)/run.stamp setup.py
	$(PIP) -e ".[bench]"
	touch $@

$(VENV)/dev.stamp: $(VENV)/run.stamp setup.py
	$(PIP) -e ".[dev]"
	# mypy does not follow setup.py's package_dir: it finds nest_kernels by this link.
	mkdir -p $(VENV)/types && ln -sfn ../../kernels $(VENV)/types/nest_kernels
	touch $@

.venv-nox/nox.stamp: constraints.txt
	$(PYTHON) -m venv .venv-nox
	.venv-nox/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt nox
	touch $@
