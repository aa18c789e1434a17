# Needs python3 (3.11 or later) and make. Everything else goes into .venv at the first call of a target that uses it;
# a stamp per extra makes later calls skip the set-up until setup.cfg or pyproject.toml changes.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS :=

ARVIZ1_VENV := .venv-arviz1
ARVIZ1_TESTS := tests/inference/diagnostics tests/reports/test_html.py
# Tried in order; make test-arviz1 PYTHON312=/path/to/python names another.
PYTHON312 ?= python3.12 python3.13 python3.14 python3

DEMO := runs/demo

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help test test-slow test-arviz1 lint format demo bench clean clean-all

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "%-12s  %s\n", $$1, $$2 }' Makefile
	@echo "PYTHON=... chooses the interpreter of a new .venv; ARGS='-k hmc' goes to pytest."

test: $(VENV)/.stamp-test  ## fast tests (ARGS='...' goes to pytest)
	$(BIN)/python -m pytest $(ARGS)

test-slow: $(VENV)/.stamp-test  ## the tests marked slow
	$(BIN)/python -m pytest -m slow $(ARGS)

test-arviz1:  ## diagnostics and report under arviz 1.x (optional; needs Python 3.12 or later, PYTHON312=... names it)
	@for python in $(PYTHON312); do \
		if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null; then \
			exec $(MAKE) --no-print-directory test-arviz1-with PYTHON="$$python" VENV=$(ARVIZ1_VENV); \
		fi; \
	done; \
	echo "Skipped: arviz 1.x needs Python 3.12 or later, and none of '$(PYTHON312)' is that; set PYTHON312=."

.PHONY: test-arviz1-with
test-arviz1-with: $(VENV)/.stamp-test
	@$(BIN)/python -c 'from importlib.metadata import version as v; n = v("arviz"); \
		print("arviz", n); raise SystemExit(n.startswith("0.") and "arviz 1.x was expected here, found " + n)'
	$(BIN)/python -m pytest $(ARVIZ1_TESTS) $(ARGS)

lint: $(VENV)/.stamp-dev  ## ruff check, ruff format --check, mypy
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(VENV)/.stamp-dev  ## rewrite the files as ruff wants them
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

demo: $(VENV)/.stamp-base  ## fit, sample, evaluate, diagnose and compare on 25 Gaussians; replaces runs/demo
	rm -rf $(DEMO)
	$(BIN)/python -m ppl_vaebm.fit --recipe gaussians25 --stage svi --run $(DEMO)
	$(BIN)/python -m ppl_vaebm.fit --stage ebm --run $(DEMO)
	$(BIN)/python -m ppl_vaebm.sample $(DEMO)
	$(BIN)/python -m ppl_vaebm.evaluate $(DEMO)
	$(BIN)/python -m ppl_vaebm.diagnose $(DEMO)
	$(BIN)/python -m ppl_vaebm.compare $(DEMO) --kernels langevin,mala,hmc,pcn,mixture,tempered
	@echo "The report is $(DEMO)/report.html: open it in a browser."

bench: $(VENV)/.stamp-base  ## run every script of benchmarks/; they print and never gate
	@set -e; for name in $(sort $(notdir $(basename $(shell grep -l __main__ benchmarks/*.py)))); do \
		echo "$(BIN)/python -m benchmarks.$$name"; OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.$$name; \
	done

clean:  ## remove caches and build products
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis docs/_build
	find . -name ".venv*" -prune -o -name __pycache__ -prune -exec rm -rf {} +

clean-all: clean  ## remove the environments and runs/demo too; other runs and data stay
	rm -rf .venv $(ARVIZ1_VENV) $(DEMO)

$(BIN)/python:
	@command -v "$(PYTHON)" >/dev/null || { echo "Python 3.11 or later is needed, found no '$(PYTHON)'; set PYTHON=."; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "Python 3.11 or later is needed, found $$("$(PYTHON)" -V 2>&1); set PYTHON= to a newer one."; exit 1; }
	"$(PYTHON)" -m venv $(VENV) || { rm -rf $(VENV); exit 1; }
	@# uv halves the time of the installation; without it pip does the same work.
	-$(BIN)/python -m pip install --quiet uv

# $(call install,what): an editable install; uv does not read pip's configuration, so pip has the second try.
# Without compiled files, imports of torch and Pyro cost 11 s of CPU in every process that cannot write them, with them
# 4 s; pip compiles by default, uv on request.
install = $(BIN)/uv pip install --compile-bytecode --python $(BIN)/python -e '$(1)' || $(BIN)/python -m pip install -e '$(1)'

$(VENV)/.stamp-base: setup.cfg pyproject.toml | $(BIN)/python
	$(call install,.)
	@touch $@

$(VENV)/.stamp-%: setup.cfg pyproject.toml | $(BIN)/python
	$(call install,.[$*])
	@touch $@
