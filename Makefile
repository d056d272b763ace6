# `make demo` and `make test` set up everything they need in .venv; only Python 3.11 or 3.12 with pip is expected.
PYTHON ?= python3
TORCH ?= torch==2.13.0
# An index of torch wheels, e.g. of CPU builds; empty: where pip looks by itself.
TORCH_INDEX ?=
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Files are compiled when they are first imported, which is fewer than there are; and only once, also where a shell says otherwise.
export PYTHONDONTWRITEBYTECODE =
PIP_INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: help demo test lint types unit timed slow bench lines clean

help:
	@echo "make demo    train a small MoE language model on four CPU ranks"
	@echo "make test    lint, types and tests"
	@echo "make slow    the long stress tests, most faults put into kernels and models, sm_100, most of sm_80, further cases"
	@echo "make bench   time dispatch and combine against torch.distributed (ARGS=... are passed on)"
	@echo "make clean   remove the environment and what runs leave behind"

$(READY): requirements-dev.txt pyproject.toml Makefile
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) --no-compile $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$(TORCH)"
	$(PIP_INSTALL) --no-compile -r requirements-dev.txt
	$(PIP_INSTALL) --no-deps --no-build-isolation --editable .
	touch $(READY)

demo: $(READY)
	$(BIN)/python -m tokenferry demo $(ARGS)

bench: $(READY)
	$(BIN)/python -m tokenferry bench $(ARGS)

test: lint
	$(MAKE) --no-print-directory --jobs 2 types unit
	$(MAKE) --no-print-directory timed
	$(MAKE) --no-print-directory lines

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

unit: $(READY)
	$(BIN)/python -m pytest -q -m "not slow and not timed" -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -q -n 2 tests/kernels

timed: $(READY)
	$(BIN)/python -m pytest -q -m "timed and not slow" $$(grep -lr --include='test_*.py' 'mark\.timed' tests)

slow: $(READY)
	$(BIN)/python -m pytest -q -m slow $(ARGS)
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -q -n 2 -m slow tests/kernels

lines:
	@echo "package: $$(find tokenferry -name '*.py' | xargs cat | wc -l) lines, tests: $$(find tests -name '*.py' | xargs cat | wc -l) lines"

clean:
	rm -rf $(VENV) build dist *.egg-info demo-out bench-out .pytest_cache .mypy_cache .ruff_cache .hypothesis
