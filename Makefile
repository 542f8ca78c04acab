# make demo       train the embedded default three ways and leave a picture in runs/demo/
# make test       run the tests, about 12 minutes on 2 cores
# make quick      arithmetic, windows, single, DDP, wrong input: at most 90 seconds
# make test-long  measurements of memory and traffic, many launchers, the rest of the long grids
# make check      ruff, mypy and a strict build of the site
# make docs       the documentation as a site in build/site, which needs no server and no network
# make bench      benchmarks against peers (installs them)
# make gpu        what only a GPU can show, in 20 minutes at most: benchmarks/results/gpu-<name>.md
# make clean      remove what was built; runs/ stays
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test quick test-long check docs bench gpu clean

demo: $(INSTALLED)
	$(BIN)/python examples/demo.py

# With a number of workers. Three on two cores: tests wait for processes, signals and files.
PYTEST := $(BIN)/python -m pytest --dist loadfile --no-loadscope-reorder -n

test: $(INSTALLED)
	$(PYTEST) 3 -m "not long"

quick: $(INSTALLED)
	$(PYTEST) 2 -m "quick and not long"

test-long: $(INSTALLED)
	$(PYTEST) 3 -m long

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python docs/site.py

docs: $(INSTALLED)
	$(BIN)/python docs/site.py

bench: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[bench]'
	$(BIN)/python benchmarks/overhead.py
	$(BIN)/python benchmarks/exactness.py

# Parts that have a result are not run again: ARGS=--again runs all, ARGS="--parts waits --again" one.
gpu: $(INSTALLED)
	$(BIN)/python -m benchmarks.gpu $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info .cache .pytest_cache .mypy_cache .ruff_cache

# torch first and alone: with it in place nothing else brings another build of it.
$(INSTALLED): setup.cfg pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@
