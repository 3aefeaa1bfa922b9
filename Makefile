# make serve             install what serving needs into .venv/ and serve the small model of the project on port 8000
# make test              install what the tests need as well, and run them
# make quick             the tests that start no Triton, browser, Node or torch
# make check             lint, types and import rules
# make production-check  what can be proved of production without a GPU and without Docker, as a table
# make images            build the container images with podman and run them, as root; minutes
# make audit             hold the installed packages against the known advisories
# make bench             this project beside HyperGen 0.1 (PyTorch) and others on this machine; ARGS=--quick is shorter
# make clients           run client libraries, each in an environment of its own, against the shipped model
# make installs          install and serve in the ways that people have, each from nothing, as root
# make clean             remove .venv/ and whatever was built
#
# ARGS is passed on:     make serve ARGS="--port 9000"        make test ARGS="-k batching"
# PYTHON is the Python:  make serve PYTHON=/usr/bin/python3.12 (3.10, 3.11 or 3.12)

# Images for containers often set it; without caches, each of the tests' processes compiles everything anew.
unexport PYTHONDONTWRITEBYTECODE

.DELETE_ON_ERROR:
.PHONY: help setup setup-dev serve test quick check production-check images audit bench clients installs clean

# The first of those that the embedded Triton runs on, 3.11 as the project is developed with it.
PYTHON ?= $(shell for name in python3.11 python3.12 python3.10 python3; do \
	$$name -c "" 2>/dev/null && command -v $$name && break; done)
# The release that the project is developed with; a range would let another package pull a different build.
TORCH ?= torch==2.13.0
BIN := .venv/bin
ARGS ?=

help:
	@sed -n '/^$$/q; s/^# \{0,1\}//p' Makefile

setup: .venv/.serve
setup-dev: .venv/.dev

serve: setup
	@$(BIN)/hypergen serve $(ARGS)

# Three processes on two cores, as tests of servers also wait; with a thread each, for threads of torch that wait for each
# other spin, and take the other's core.
test: setup-dev
	@sh .ci/test-tools
	@echo "Running the tests"
	@OMP_NUM_THREADS=1 $(BIN)/pytest -n 3 --dist loadfile --no-loadscope-reorder $(ARGS)

quick: setup-dev
	@OMP_NUM_THREADS=1 $(BIN)/pytest -n 3 -q --quick $(ARGS)

check: setup-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/pytest -q tests/test_imports.py $(ARGS)

production-check: setup-dev
	@.ci/tools
	@.ci/with-podman $(BIN)/pytest -n 2 --dist loadfile -q -m claim --claims --images $(ARGS)

images: setup-dev
	@.ci/with-podman $(BIN)/pytest -n 0 -q --images tests/images $(ARGS)

audit: setup-dev
	@.ci/audit

bench: setup-dev
	@command -v wrk >/dev/null || PYTHON="$(PYTHON)" sh .ci/system-packages wrk
	@$(BIN)/python tests/benchmarks/side_by_side.py $(ARGS)

clients: setup-dev
	@command -v npm >/dev/null || PYTHON="$(PYTHON)" sh .ci/system-packages nodejs npm
	@command -v javac >/dev/null || PYTHON="$(PYTHON)" sh .ci/system-packages default-jdk-headless
	@$(BIN)/python tests/clients/check.py $(ARGS)

installs: setup-dev
	@$(BIN)/python tests/installs/check.py $(ARGS)

clean:
	rm -rf .venv build dist .mypy_cache .ruff_cache .pytest_cache

.venv/.python:
	@$(if $(PYTHON),,echo "Python 3.10, 3.11 or 3.12 is needed, and none was found"; exit 1)
	@$(PYTHON) .ci/check-python
	@PYTHON="$(PYTHON)" sh .ci/system-packages
	@echo "Creating .venv with $(PYTHON)"
	@$(PYTHON) -m venv .venv
	@touch $@

.venv/.serve: .venv/.python pyproject.toml
	@$(BIN)/python .ci/check-python
	@echo "Installing HyperGen, Triton and torch into .venv (a minute or two)"
	@$(BIN)/pip install --quiet --disable-pip-version-check "$(TORCH)" -e ".[all]"
	@touch $@

.venv/.dev: .venv/.serve pyproject.toml
	@echo "Installing what the tests and checks need into .venv"
	@$(BIN)/pip install --quiet --disable-pip-version-check "$(TORCH)" -e ".[dev]"
	@touch $@
