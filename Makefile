# `make demo`: install, then draw pictures with the shipped weights. `make test`: install, then run the whole suite.
PYTHON ?= python3
BIN := .venv/bin
# the number of cores, or one pytest process for each (each test process uses one thread)
JOBS ?= $(shell nproc 2>/dev/null || echo 1)

.PHONY: demo test install lint clean

demo: .venv/installed
	$(BIN)/python tools/generate.py --rerank 16

test: .venv/tested
	$(BIN)/ruff check .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal

install: .venv/installed

lint: .venv/tested
	$(BIN)/ruff check .

.venv/bin/python:
	$(PYTHON) -m venv .venv || { rm -rf .venv; echo "Python 3.11+ with venv is needed (Debian: apt install python3-venv)"; exit 2; }

.venv/installed: pyproject.toml constraints.txt | .venv/bin/python
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

.venv/tested: .venv/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

clean:
	rm -rf .venv build *.egg-info
