# Everything runs from .venv on an installed copy: the checkout's folders are never imported.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --quiet --quiet --disable-pip-version-check
PACKAGES := $(addprefix -p qroam.,partition indexer kernels runtime)
# Folders are listed too: their time stamp tells of a deleted file.
SOURCES := $(shell find partition indexer kernels runtime -not -path '*__pycache__*')

# Two workers; tests that start processes with deadlines stay on one of them.
PYTEST := $(BIN)/pytest -n 2 --dist loadgroup

.PHONY: test test-all demo bench fuzz lint types install clean

# The quick tests: at most 5 minutes on two cores. tests/conftest.py says what that leaves out.
test: install
	$(PYTEST)

test-all: install
	$(PYTEST) --full

demo: install
	$(BIN)/qroam demo

bench: install
	$(BIN)/python benchmarks/step_cpu.py
	$(BIN)/python benchmarks/service.py
	$(BIN)/python benchmarks/snapshot.py

fuzz: install
	PYTHONPATH=tests/support $(BIN)/python tests/fuzz/fuzz.py

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: install
	$(BIN)/mypy $(PACKAGES)
	$(BIN)/mypy tests examples benchmarks

install: .venv/installed

.venv/bin/python:
	$(PYTHON) -m venv .venv

# The pinned setuptools builds the package; a stale build/ would carry deleted files into it.
.venv/installed: .venv/bin/python pyproject.toml constraints.txt README.md LICENSE $(SOURCES)
	rm -rf build *.egg-info
	$(PIP) install -c constraints.txt setuptools
	$(PIP) install -c constraints.txt --no-build-isolation '.[metrics,models,test]'
	rm -rf build *.egg-info
	touch $@

clean:
	rm -rf .venv build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
