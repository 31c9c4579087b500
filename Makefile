# One verb each: serve, test, chaos, check, proto, native, bench, gpu, clean. CI calls the same verbs.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

VENV ?= .venv
BIN := $(VENV)/bin
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
# On a machine without a GPU, TORCH_INDEX=https://download.pytorch.org/whl/cpu avoids the CUDA packages.
TORCH_INDEX ?=
PIP := $(BIN)/python -m pip --disable-pip-version-check -q
PIP_INSTALL := $(PIP) install -c constraints.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
PACKAGES := heedful_kernels heedful_store heedful_server heedful_trainer heedful
PROTOS := $(wildcard proto/heedful_proto/v1/*.proto)
ARGS ?=

# What runs `make gpu`: an installation that has torch with CUDA. WHEELS brings what it lacks.
GPU_PYTHON ?= python3
WHEELS ?= wheels

.PHONY: help serve test chaos check format proto native model bench wheel gpu gpu-wheels clean install-serve install-dev

help:  ## Show this list.
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' \
	  || { echo "heedful needs Python 3.11 or 3.12; found $$($(PYTHON) --version 2>&1). Set PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.serve: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing heedful[serve] into $(VENV) (some minutes the first time)"
	$(PIP_INSTALL) torch
	$(PIP_INSTALL) -e '.[serve]'
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing heedful[all,dev] into $(VENV) (some minutes the first time)"
	$(PIP_INSTALL) torch
	$(PIP_INSTALL) -e '.[all,dev]'
	@touch $@ $(VENV)/.serve

install-serve: $(VENV)/.serve
install-dev: $(VENV)/.dev

native: | $(BIN)/python  ## Build the native CPU kernels, where there is a C++ compiler.
	@$(BIN)/python -m heedful_kernels.cpu.build

model: $(VENV)/.serve  ## Get the default model.
	@$(BIN)/heedful-server model pull

serve: $(VENV)/.serve native  ## Install, get the default model and serve it. ARGS="--model PATH" passes flags on.
	@exec $(BIN)/heedful-server serve $(ARGS)

test: $(VENV)/.dev native  ## Install and run the tests. ARGS="-k name" passes flags on.
	@$(BIN)/python -P -m pytest $(ARGS)

chaos: $(VENV)/.dev  ## Kill the feedback service at random and compare its log. ARGS="--kills 20".
	@$(BIN)/python -P tests/chaos/feedback_chaos.py $(ARGS)

check: $(VENV)/.dev  ## Lint, types, architecture, contract.
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy $(foreach package,$(PACKAGES),-p $(package))
	$(BIN)/lint-imports
	$(BIN)/buf lint
	$(BIN)/buf breaking --against proto/released.binpb
	$(BIN)/python -P tools/proto.py --check
	$(BIN)/python -P tools/docs.py --check

format: $(VENV)/.dev  ## Format the code.
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

proto: $(VENV)/.dev  ## Regenerate the code of the contract.
	$(BIN)/python -P tools/proto.py

bench: $(VENV)/.dev native  ## Benchmark serving on this machine, beside the peers that are installed.
	$(BIN)/python -P benchmarks/serving_cpu.py $(ARGS)

gpu:  ## Test and measure the GPU's kernels on this machine, without network. ARGS="--only decode".
	@$(GPU_PYTHON) -P benchmarks/gpu.py --wheels $(WHEELS) $(ARGS)

wheel: $(VENV)/.serve native  ## Build a wheel in dist/ that holds the native kernels for this platform.
	$(BIN)/python -m pip wheel --no-deps --wheel-dir dist .

gpu-wheels: $(VENV)/.serve  ## Get the wheels that `make gpu` may lack elsewhere (Python 3.12, x86-64).
	$(PIP) download -d $(WHEELS) --no-deps --only-binary=:all: --python-version 312 \
	  --platform manylinux_2_28_x86_64 --platform manylinux_2_24_x86_64 --platform manylinux_2_17_x86_64 \
	  pytest pluggy iniconfig pygments packaging scipy msgspec structlog psutil xgrammar apache-tvm-ffi peft accelerate bitsandbytes

clean:  ## Remove the environment and what was built.
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache kernels/heedful_kernels/cpu/_lib
