# Each target makes the virtual environment it needs, and uses it again while pyproject.toml and constraints.txt
# stay what they are.
PYTHON ?= python3
BIN := .venv/bin
SIZE ?= 2GiB

# Kernels are built beforehand, as an installed package has them: else each process would compile those that it calls.
# Tests of a group share what takes long to make, so one process takes them all.
PYTEST := kernels=$$($(BIN)/python tests/built_kernels.py .venv/kernels) && CKPTDIFF_KERNELS=$$kernels \
	$(BIN)/pytest --numprocesses logical --maxprocesses 8 --dist loadgroup

# Some containers set it; then each process would compile all the sources of the tests that it imports once more.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-slow test-nvrtc lint docs bench mutants clean

demo: .venv/demo.stamp
	mkdir -p build
	$(BIN)/ckptdiff diff fixtures/addition/base fixtures/addition/tuned -o build/addition.h5

test: .venv/test.stamp
	$(PYTEST) -m 'not slow'

test-slow: .venv/test.stamp
	$(PYTEST) -m slow

# What users with a GPU compile with, which takes no GPU.
test-nvrtc: export CKPTDIFF_NEED_GPU := 1
test-nvrtc: .venv/nvrtc.stamp
	$(PYTEST) -m nvrtc

lint: .venv/test.stamp .venv/lint.stamp
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

docs: .venv/docs.stamp
	$(BIN)/sphinx-build -E -W --keep-going -q -b html -d build/doctrees docs build/docs
	@echo "build/docs/index.html"

bench: .venv/bench.stamp
	$(BIN)/python bench/compare.py --size $(SIZE) --json build/bench.json

mutants: .venv/test.stamp
	$(BIN)/python tests/cuda/mutants.py

clean:
	rm -rf .venv build dist

.venv/demo.stamp: EXTRAS =
.venv/test.stamp: EXTRAS = [parquet,test]
.venv/nvrtc.stamp: EXTRAS = [parquet,test,cuda13]
.venv/lint.stamp: EXTRAS = [lint]
.venv/docs.stamp: EXTRAS = [docs]
.venv/bench.stamp: EXTRAS = [bench]

.venv/%.stamp: pyproject.toml constraints.txt | .venv/bin/python
	@echo "Installing ckptdiff$(EXTRAS) into .venv; the first time takes minutes."
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.$(EXTRAS)'
	touch $@

.venv/bin/python:
	$(PYTHON) -m venv .venv
