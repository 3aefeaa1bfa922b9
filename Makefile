# make serve   installs what serving needs into .venv/, starts the server with the shipped model
# make test    installs what the tests need as well, runs them
# make check   lints, types and import rules
# make production-check   what is claimed of production and can be shown without a GPU and without Docker, as a table
# make audit   installed packages against the known advisories; fails too where they cannot be looked up
# make bench   ours beside HyperGen 0.1.0, diffusers, OpenVINO GenAI and stable-diffusion.cpp on this machine; ARGS=--quick
# ARGS="…"     is passed on: make serve ARGS="--port 9000", make test ARGS="-k batching"

.DELETE_ON_ERROR:
.PHONY: help setup setup-dev serve test check production-check audit bench clean

PYTHON ?= $(shell command -v python3.11 || command -v python3)
# The release that the project is developed with; a range would let another package pull a different build.
TORCH ?= torch==2.13.0
BIN := .venv/bin
ARGS ?=

help:
	@sed -n 's/^# //p' Makefile

setup: .venv/.serve
setup-dev: .venv/.dev

serve: setup
	@$(BIN)/hypergen serve $(ARGS)

# Two processes with a thread each: threads of torch that wait for each other spin, and take the other's core.
test: setup-dev
	@echo "Running the tests"
	@OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile $(ARGS)

check: setup-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/pytest -q tests/test_imports.py $(ARGS)

production-check: setup-dev
	@.ci/tools
	@$(BIN)/pytest -n 2 --dist loadfile -q -m claim --claims $(ARGS)

audit: setup-dev
	@.ci/audit

bench: setup-dev
	@command -v wrk >/dev/null || PYTHON="$(PYTHON)" sh .ci/system-packages wrk
	@$(BIN)/python tests/benchmarks/side_by_side.py $(ARGS)

clean:
	rm -rf .venv build dist .mypy_cache .ruff_cache .pytest_cache

.venv/.python:
	@PYTHON="$(PYTHON)" sh .ci/system-packages
	@echo "Creating .venv with $(PYTHON)"
	@$(PYTHON) -m venv .venv
	@touch $@

.venv/.serve: .venv/.python pyproject.toml
	@echo "Installing HyperGen, Triton and torch into .venv (a minute or two)"
	@$(BIN)/pip install --quiet --disable-pip-version-check "$(TORCH)" -e ".[all]"
	@touch $@

.venv/.dev: .venv/.serve pyproject.toml
	@echo "Installing what the tests and checks need into .venv"
	@$(BIN)/pip install --quiet --disable-pip-version-check "$(TORCH)" -e ".[dev]"
	@touch $@
