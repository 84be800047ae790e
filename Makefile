# A plain environment in .venv: `make demo` and `make test` install what they need, and nothing else is needed.
.PHONY: help demo test test-long lint types bench clean
.DEFAULT_GOAL := help

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.14 python; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)

help:
	@echo "make demo       install, run configs/quickstart.yaml, print the matrix"
	@echo "make test       install if needed; lint, types, all tests but the long ones"
	@echo "make test-long  the tests that take minutes to hours"
	@echo "make lint | types | bench | clean"

# Made again when the requirements change; the first time takes minutes (torch alone is gigabytes).
.venv/ready: pyproject.toml
	@test -n "$(PYTHON)" || { echo "No Python 3.11 or newer with its venv module was found. Install one \
	(Debian: apt install python3-venv), or name it: make PYTHON=/path/to/python3"; exit 1; }
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --editable ".[dev]"
	@touch $@

demo: .venv/ready
	.venv/bin/deepenc run configs/quickstart.yaml --out runs/quickstart --workers 2

# One thread a process: several on few cores wait for each other more than they compute.
test test-long: export OMP_NUM_THREADS ?= 1

test: lint types
	.venv/bin/python -m pytest -m "not long" --durations=10

test-long: .venv/ready
	.venv/bin/python -m pytest -m long

lint: .venv/ready
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

types: .venv/ready
	.venv/bin/mypy

bench: .venv/ready
	.venv/bin/python -m pip install --quiet --editable ".[benchmarks]"
	for name in structure matrix language gain tuning coverage; do .venv/bin/python benchmarks/$$name.py || exit 1; done

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +
