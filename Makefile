# `make demo` and `make test` need only Python 3.11 or newer and access to PyPI.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo latents test test-slow test-cluster test-image lint bench gpu theory results clean

demo: $(INSTALLED)  ## pack scikit-learn's digits, train a DCGAN on them, evaluate it and draw samples
	$(BIN)/python tools/demo.py

latents: $(INSTALLED)  ## train an autoencoder of digits and a GAT on its latents, decode, evaluate and draw both
	$(BIN)/python tools/latents.py

test: $(INSTALLED)  ## run all tests that are not marked slow, about 15 minutes on two cores
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -n 2 --dist loadfile --no-loadscope-reorder

test-slow: $(INSTALLED)  ## run the tests that are marked slow, including those of test-cluster and test-image
	$(BIN)/python -m pytest tests -m slow --timeout 3600

# Needs root and the Debian packages slurmctld, slurmd, slurm-client, munge and iproute2. Tests skip without them.
test-cluster: $(INSTALLED)  ## test with a real Slurm, two simulated hosts, cut links and a soak test, half an hour
	$(BIN)/python -m pytest tests/cluster -m slow --timeout 3600 --ignore tests/cluster/test_image.py

# Needs root and the Debian packages buildah and debootstrap.
test-image: $(INSTALLED)  ## build the container image on a base image made here, and test it
	$(BIN)/python -m pytest tests/cluster/test_image.py -m slow --timeout 3600

lint: $(INSTALLED)  ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(INSTALLED)  ## run every benchmark of tools/bench; compare ratios, because times depend on the machine
	for script in tools/bench/*.py; do echo "== $$script"; $(BIN)/python $$script || exit 1; done

gpu: $(INSTALLED)  ## on one GPU: run tests/gpu and write docs/benchmarks-gpu.md, in at most eight minutes
	$(BIN)/python tools/gpu.py

theory: $(INSTALLED)  ## run the experiments on GAN theory and draw their figures in docs/theory/
	$(BIN)/python tools/theory.py

results: $(INSTALLED)  ## train every CPU recipe on the same budget; write a table and pictures to docs/results/
	$(BIN)/python tools/results.py

$(INSTALLED): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	touch $@

clean:
	rm -rf $(VENV) runs datasets
