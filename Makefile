# `make demo` and `make test` need Python 3.11 or newer and the package registry, nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test test-slow test-cluster test-image lint bench gpu theory results clean

demo: $(INSTALLED)  ## pack scikit-learn's digits, train a DCGAN on them, and show what came of it
	$(BIN)/python tools/demo.py

test: $(INSTALLED)  ## the whole suite, about ten minutes on two cores
	$(BIN)/python -m pytest tests

test-slow: $(INSTALLED)  ## the longer proofs
	$(BIN)/python -m pytest tests -m slow --timeout 3600

# Needs root, and of Debian: slurmctld slurmd slurm-client munge iproute2; without them the tests say what they miss.
test-cluster: $(INSTALLED)  ## a real Slurm, two hosts, cut links, and a soak test: half an hour
	$(BIN)/python -m pytest tests/cluster -m slow --timeout 3600 --ignore tests/cluster/test_image.py

# Needs root, and of Debian: buildah debootstrap.
test-image: $(INSTALLED)  ## the container image, built and tried on a base made here
	$(BIN)/python -m pytest tests/cluster/test_image.py -m slow --timeout 3600

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(INSTALLED)  ## every benchmark; figures depend on the machine, ratios less so
	for script in tools/bench/*.py; do echo "== $$script"; $(BIN)/python $$script || exit 1; done

gpu: $(INSTALLED)  ## on one GPU: tests/gpu, then its benchmarks as docs/benchmarks-gpu.md, in at most eight minutes
	$(BIN)/python tools/gpu.py

theory: $(INSTALLED)  ## the theory as experiments, drawn into docs/theory/
	$(BIN)/python tools/theory.py

results: $(INSTALLED)  ## every recipe on the same budget, as a table with pictures in docs/results/
	$(BIN)/python tools/results.py

$(INSTALLED): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	touch $@

clean:
	rm -rf $(VENV) runs datasets
