# `make example` and `make test` set everything up themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: example check test extras lint docs bench clean

example: $(READY)
	$(BIN)/python predict.py experiment=brain_extraction

# Lint, types, and the laws that take seconds: at most 2 minutes on 2 cores.
check: lint
	$(BIN)/python -m pytest -q -m 'not slow and not processes'

# Everything, with the real command on real images: about 20 minutes on 2 cores.
test: $(READY)
	$(BIN)/python -m pytest

# MLflow, Weights & Biases and Optuna, in an environment of their own on top of .venv, which stays without their packages.
extras: .extras/.ready
	.extras/bin/python -m pytest -q tests/test_extras.py

.extras/.ready: tests/extras.txt constraints.txt | $(READY)
	$(PYTHON) -m venv .extras
	echo "import site; site.addsitedir('$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')')" \
	  > "$$(.extras/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/voxquilt.pth"
	.extras/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -r tests/extras.txt
	touch $@

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# The documentation's site, in .site/index.html, which opens from disk; its warnings are errors.
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

# About an hour. Peers that do not fit into .venv get environments of their own in .bench, once.
bench: $(READY) .bench/nnunet/.ready .bench/konfai/.ready
	$(BIN)/python benchmarks/stitching.py --json .bench/results.json
	$(BIN)/python benchmarks/files.py --json .bench/results.json
	$(BIN)/python benchmarks/plot.py .bench/results.json
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/loop.py
	$(BIN)/python benchmarks/ct.py
	$(BIN)/python benchmarks/plan.py
	$(BIN)/python benchmarks/processes.py
	$(BIN)/python benchmarks/report.py

.bench/%/.ready: benchmarks/environments/%.txt constraints.txt | $(READY)
	$(BIN)/python benchmarks/environments.py $*
	touch $@

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo 'voxquilt needs Python 3.11 or newer: make PYTHON=/path/to/python3.11'; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,docs,peers]'
	-$(BIN)/python -m voxquilt.report.niivue   # the viewer of reports, which works without it
	touch $@

clean:
	rm -rf $(VENV) .extras .bench .site outputs
