# Targets for daily work; `make help` lists them. Everything runs inside .venv, made by scripts/install.sh.
SHELL := /bin/bash
PYTHON := .venv/bin/python
export PATH := $(CURDIR)/.venv/bin:$(PATH)
export TORCH_EXTENSIONS_DIR ?= $(if $(XDG_CACHE_HOME),$(XDG_CACHE_HOME),$(HOME)/.cache)/sparse_zero/torch_extensions

.DEFAULT_GOAL := help
.PHONY: help install check test test-all bench bench-check memory-study verify-memory format clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "%-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install:  ## make or update .venv
	@bash scripts/install.sh

check: install  ## lint, formatting and types
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

test: install  ## the tests that take seconds
	$(PYTHON) -m pytest -m "not slow" -n 2 --dist loadfile $(ARGS)

test-all: install  ## every test, the slow ones too
	$(PYTHON) -m pytest $(ARGS)

bench: install  ## step, memory, one linear and budgets, about ten minutes; tables and pictures in runs/bench
	$(PYTHON) scripts/bench.py $(ARGS)

bench-check: install  ## has a step become slower than the committed ratios say?
	$(PYTHON) scripts/bench_check.py $(ARGS)

memory-study: install  ## forecast and simulate how memory scales; tables and pictures in runs/memory-study
	$(PYTHON) scripts/memory_study.py --config configs/studies/memory.yaml $(ARGS)

verify-memory: install  ## forecast against simulation, on 130 jobs
	$(PYTHON) scripts/verify_memory.py --forecast $(ARGS)

format: install  ## rewrite the sources in the house's format
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

clean:  ## remove caches and build products; keeps .venv and runs
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis *.egg-info
	find . -path ./.venv -prune -o -name __pycache__ -type d -print0 | xargs -0 rm -rf
