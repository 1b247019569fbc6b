# make serve   set up, start everything with the embedded models      make test        set up, the tests of a working day
# make check   lint, formatting, types, imports, generated stubs      make test-slow   tests that take minutes
# make protos  generate the stubs from the .proto files               make test-gpu    tests that need a CUDA device
# make bench   the speed table                                        make clean       remove what make made
# make bench-peers   install llama.cpp and vLLM for make bench to compare with
# make bench-acceptance   tokens per LLM step by draft, without a clock
# make bench-gpu   tree attention and a 7B-shaped step on a CUDA device
#
# PYTHON=python3.12 make serve   chooses the interpreter; ARGS="--port 9000" adds flags to `specserve up`.

# 3.11 and 3.12 come first: the Redis server that pip can install exists for them alone.
PYTHON ?= $(shell for candidate in python3.11 python3.12 python3 python; do \
	$$candidate -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	&& echo $$candidate && break; done)
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=

.PHONY: serve test test-slow test-gpu check protos bench bench-peers bench-acceptance bench-gpu clean setup
.DEFAULT_GOAL := serve

serve: setup
	@exec $(BIN)/specserve up $(ARGS)

test: setup
	$(BIN)/python -m pytest -n 2 --dist loadgroup --no-loadscope-reorder -m "not slow and not gpu" $(ARGS)

test-slow: setup
	$(BIN)/python -m pytest -m "slow and not gpu" $(ARGS)

test-gpu: setup
	$(BIN)/python -m pytest -m gpu $(ARGS)

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m protos.generate --check

protos: setup
	$(BIN)/python -m protos.generate

bench: setup
	$(BIN)/python -m benchmarks.serving $(ARGS)

bench-peers: setup
	$(BIN)/python -m benchmarks.peers.install $(ARGS)

bench-acceptance: setup
	$(BIN)/python -m benchmarks.acceptance $(ARGS)

bench-gpu: setup
	$(BIN)/python -m benchmarks.gpu $(ARGS)

setup: $(VENV)/.installed
	@$(BIN)/python -m kernels.build || true  # says itself what runs instead

# The stamp is a file in the environment: whatever removes the one removes the other.
$(VENV)/.installed: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "no Python 3.11 or later with venv found; install one, or give PYTHON=" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	@touch $@

clean:
	rm -rf $(VENV) .peers *.egg-info build kernels/_build .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
