# `make` lists the targets.  Every variable can be set on the command line: make train NPROC=2
DATA   ?= data/stdlib
OUT    ?= runs/tiny
PRESET ?= tiny
NPROC  ?=
ARGS   ?=
BIN    := .venv/bin
# llama.cpp in a wheel, for consumers.
LLAMA  := build/consumers/llama
LLAMA_PACKAGES := cyllama==0.7.0 numpy

# The long files of tests/functional_tests first, and the short ones fill up the end.
IN_PARALLEL := -n 2 --dist loadfile --no-loadscope-reorder

# Else every process compiles the modules it imports, see scripts/bootstrap.sh.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup train test test-all consumers lint gpu-check clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile
	@echo '  Variables of train: DATA=$(DATA) OUT=$(OUT) PRESET=$(PRESET) NPROC=$(NPROC) ARGS=$(ARGS)'

setup: ## find a Python, make .venv, install everything (again: nothing to do)
	@sh scripts/bootstrap.sh

train: setup ## prepare the data and train (tiny preset, on the CPU if there is no GPU)
	test -f $(DATA)/manifest.json || $(BIN)/trinity-megatron prepare-data --out $(DATA)
	$(BIN)/trinity-megatron train --preset $(PRESET) --data $(DATA) --out $(OUT) \
		$(if $(NPROC),--nproc $(NPROC)) $(ARGS)

test: setup ## the tests that need no GPU; of what is repeated in many layouts a sample
	$(BIN)/python -m pytest tests -m "not gpu and not te" $(IN_PARALLEL) $(ARGS)

test-all: setup ## the same with every layout, signal and kill (an hour)
	TRINITY_TESTS=all $(MAKE) test

consumers: setup ## hand exports to llama.cpp, in an environment of its own (a minute)
	test -x $(LLAMA)/bin/python || $(BIN)/python -m venv $(LLAMA)
	$(LLAMA)/bin/python -m pip install --quiet $(LLAMA_PACKAGES)
	TRINITY_LLAMA_PYTHON=$(abspath $(LLAMA)/bin/python) \
		$(BIN)/python -m pytest tests/consumers -m consumers -s $(ARGS)

lint: setup ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy trinity_megatron

gpu-check: setup ## check this machine's GPUs and the GPU path
	$(BIN)/trinity-megatron gpu-check $(ARGS)

clean: ## remove .venv and caches; data/ and runs/ stay
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find trinity_megatron tests examples -name __pycache__ -type d -prune -exec rm -rf {} + || true
