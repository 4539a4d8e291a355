# `make demo` and `make test` need nothing but make and Python: they create .venv, install into it, and run.
# A second call starts at once; a changed pyproject.toml is installed again. `make help` lists the rest.

SHELL := /bin/bash
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help demo test lint types format clean evidence evidence-smoke

VENV ?= .venv
ARGS ?=
PIP = $(VENV)/bin/python -m pip install --disable-pip-version-check
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
# Without an NVIDIA GPU the CPU build of torch is pinned, so that no gigabytes of CUDA come. macOS has no other build.
CPU_ONLY := $(shell [ "$$(uname)" = Linux ] && ! nvidia-smi -L >/dev/null 2>&1 && echo yes)
CONSTRAINTS := $(if $(CPU_ONLY),-c constraints-cpu.txt)

help:
	@echo 'make demo    the page; prints its address. Options: make demo ARGS="--port 7861"'
	@echo 'make test    every test this machine can run; says what it skipped. Options: make test ARGS="-k hub"'
	@echo 'make lint    ruff: rules and layout          make format   mend the layout'
	@echo 'make types   mypy                            make clean    remove .venv and caches'
	@echo 'make evidence         redoes docs/results.md from nothing: hours, goes on where it stopped; needs ../shared, espeak-ng and flite'
	@echo 'make evidence-smoke   the same path in a temporary folder: minutes; its figures mean nothing'

demo: $(VENV)/.demo
	$(VENV)/bin/whisper-moe-demo $(ARGS)

test: $(VENV)/.all
	$(VENV)/bin/python -m pytest -n auto --maxprocesses 4 --dist loadfile $(ARGS)

lint: $(VENV)/.all
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

format: $(VENV)/.all
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

types: $(VENV)/.all
	$(VENV)/bin/mypy

define evidence-of
	$(VENV)/bin/python -m recipes.evidence run $(1) $(ARGS)
	$(VENV)/bin/python -m recipes.evidence collect $(1) $(ARGS)
endef
# Each step keeps what is there, so a second call goes on. The encoder can be adapted on the pocket alone.
evidence: $(VENV)/.all
	$(VENV)/bin/python -m recipes.synthetic_speech
	$(VENV)/bin/python -m recipes.own_decoder
	$(call evidence-of,--ground own-decoder)
	$(call evidence-of,--ground own-decoder --variant longer)
	$(call evidence-of,--ground pocket --only beyond-layouts)
	$(VENV)/bin/python -m recipes.evidence page

evidence-smoke: $(VENV)/.all
	folder=$$(mktemp -d) && trap "rm -rf $$folder" EXIT && HF_HUB_OFFLINE=1 $(VENV)/bin/python -m recipes.evidence smoke --out $$folder $(ARGS)

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis

# The first Python from 3.10 on that can make an environment. It is tried, not looked up: Debian's python3 may lack venv,
# and a pyenv shim may have no version behind it.
$(VENV)/bin/python:
	@for python in $(PYTHON) python3.11 python3 python3.13 python3.12 python3.10; do \
	  if "$$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then \
	    echo "Creating $(VENV) with $$("$$python" --version)"; exec "$$python" -m venv $(VENV); \
	  fi; \
	done; \
	echo 'No Python 3.10 or newer with venv was found. Debian, Ubuntu: sudo apt-get install python3-venv' >&2; \
	echo 'Another Python: make PYTHON=/path/to/python3 ...' >&2; exit 1

# The CPU build comes from the configured package index where that has it, else from PyTorch's own.
$(VENV)/.torch: constraints-cpu.txt | $(VENV)/bin/python
ifdef CPU_ONLY
	@echo 'No NVIDIA GPU: installing the CPU build of torch'
	$(PIP) --quiet $(CONSTRAINTS) torch 2>$(VENV)/torch.log || $(PIP) $(CONSTRAINTS) --index-url $(TORCH_INDEX) torch || \
	  { cat $(VENV)/torch.log >&2; exit 1; }
endif
	@touch $@

$(VENV)/.demo: pyproject.toml $(VENV)/.torch
	$(PIP) $(CONSTRAINTS) -e '.[demo]'
	@touch $@

$(VENV)/.all: pyproject.toml $(VENV)/.torch
	$(PIP) $(CONSTRAINTS) -e '.[demo,train,ray,test,e2e,dev]'
	@touch $(VENV)/.demo $@
