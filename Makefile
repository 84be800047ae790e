# Everything that is installed goes into a folder of the user's cache, shared by all checkouts with the same
# requirements. A checkout's own .venv holds no more than the package's metadata and a path to that folder, so
# that two checkouts used in turn, or at once, never run each other's code.
.PHONY: help demo test test-long lint types bench clean
.DEFAULT_GOAL := help

PYTHON := $(or $(PYTHON),$(shell for p in python3 python3.13 python3.12 python3.11 python3.14 python; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done))
ifeq ($(PYTHON),)
$(error No Python 3.11 or newer with its venv module was found. Install one (Debian: apt install python3-venv), or name it: make PYTHON=/path/to/python3)
endif

CACHE := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/deepenc
REQUIREMENTS := import tomllib; all = tomllib.load(open("pyproject.toml", "rb")); project = all["project"]; \
	print(*project["dependencies"], *project["optional-dependencies"]["dev"], *all["build-system"]["requires"], sep="\n")
DIGEST := import hashlib, sys; where = sys.version + sys.base_prefix; \
	print(hashlib.sha256(sys.stdin.buffer.read() + where.encode()).hexdigest()[:12])
DEPENDENCIES := $(CACHE)/venv-$(shell ($(PYTHON) -c '$(REQUIREMENTS)'; cat Makefile) | $(PYTHON) -c '$(DIGEST)')
PEER := $(shell $(PYTHON) -c 'import tomllib; \
	print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["benchmarks"])')
READY := .venv/ready-$(shell (pwd; cat pyproject.toml Makefile) | $(PYTHON) -c '$(DIGEST)')

# An environment that was cleaned away is made again; one in use stays young, see `find` below.
$(shell if [ -e "$(DEPENDENCIES)/ready" ]; then touch "$(DEPENDENCIES)"; else rm -f "$(READY)"; fi)

# Whoever comes second waits and finds the work done; without flock (macOS) nobody waits.
LOCK := $(if $(shell command -v flock),flock "$(CACHE)/lock")

define SETUP
set -e
if [ ! -e "$(DEPENDENCIES)/ready" ]; then
	echo "Installing the dependencies into $(DEPENDENCIES): once, some minutes."
	find "$(CACHE)" -maxdepth 1 -name 'venv-*' -mtime +30 -exec rm -rf {} +
	$(PYTHON) -m venv --clear "$(DEPENDENCIES)"
	$(PYTHON) -c '$(REQUIREMENTS)' > "$(DEPENDENCIES)/requirements.txt"
	"$(DEPENDENCIES)/bin/python" -m pip install --requirement "$(DEPENDENCIES)/requirements.txt"
	touch "$(DEPENDENCIES)/ready"
fi
"$(DEPENDENCIES)/bin/python" -m venv --clear --without-pip .venv
.venv/bin/python -c 'import sys, sysconfig; print("import site; site.addsitedir(" + repr(sys.argv[1]) + ")", \
	file=open(sysconfig.get_path("purelib") + "/dependencies.pth", "w"))' \
	"$$("$(DEPENDENCIES)/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
.venv/bin/python -m pip install --quiet --no-deps --no-index --no-build-isolation --editable .
touch "$(READY)"
endef
export SETUP

help:
	@echo "make demo       install, run configs/quickstart.yaml, print the matrix"
	@echo "make test       install if needed; lint, types, all tests but the long ones"
	@echo "make test-long  the tests that take minutes"
	@echo "make lint | types | bench | clean"

$(READY):
	@mkdir -p "$(CACHE)"
	@$(LOCK) $(SHELL) -c "$$SETUP"

demo: $(READY)
	.venv/bin/deepenc run configs/quickstart.yaml --out runs/quickstart --workers 2

# One thread a process: several on few cores wait for each other more than they compute.
test test-long: export OMP_NUM_THREADS ?= 1

test: lint types
	.venv/bin/python -m pytest -m "not long" --durations=10

test-long: $(READY)
	.venv/bin/python -m pytest -m long

lint: $(READY)
	"$(DEPENDENCIES)/bin/ruff" check .
	"$(DEPENDENCIES)/bin/ruff" format --check .

types: $(READY)
	.venv/bin/python -m mypy

bench: $(READY)
	"$(DEPENDENCIES)/bin/python" -m pip install --quiet $(PEER)
	.venv/bin/python benchmarks/structure.py
	.venv/bin/python benchmarks/matrix.py
	.venv/bin/python benchmarks/language.py
	.venv/bin/python benchmarks/gain.py
	.venv/bin/python benchmarks/tuning.py

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +
