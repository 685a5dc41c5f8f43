# Each target that needs the virtual environment makes it first. A later run leaves it alone, unless one of the
# files that say what belongs in it has changed.
#
#   make test PYTHON=python3.13 VENV=/tmp/venv     with this Python, in an environment of its own
#   make demo SYSTEM_TORCH=1                       with the PyTorch that PYTHON has, without a download of one
#   make demo UV=                                  with pip, also where uv is installed

VENV         ?= .venv
READY        := $(VENV)/.ready
BIN          := $(VENV)/bin
ARGS         ?=
WORKERS      ?= auto
PYTHON       ?= python3 python3.14 python3.13 python3.12 python3.11
UV           ?= $(shell command -v uv 2>/dev/null)
SYSTEM_TORCH ?=

# Each candidate is run, not only looked up: it may be too old, or lack ensurepip or the headers, which distributions
# package separately. torch.compile builds its kernels against the headers.
USABLE := import ensurepip, pathlib, sys, sysconfig; \
          headers = pathlib.Path(sysconfig.get_path("include"), "Python.h").exists(); \
          sys.exit(sys.version_info < (3, 11) or not headers)
BASE    = $(firstword $(foreach name,$(PYTHON),$(shell $(name) -c '$(USABLE)' 2>/dev/null && echo $(name))))

# torch.compile itself looks only for g++ (clang++ on a Mac), unless CXX names another.
override CXX := $(firstword $(foreach name,$(CXX) g++ clang++,$(shell command -v $(name) 2>/dev/null)))
export CXX

.PHONY: help environment demo test lint types docs wheel examples zoo stress clean compiler

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-14s%s\n", $$1, $$2 }' Makefile

environment: $(READY)  ## make the virtual environment, and nothing else

demo: compiler $(READY)  ## train a network of 1,024 blocks in four ways, and show what was gained
	$(BIN)/python examples/train_resnet.py $(ARGS)

# A file is run by one process, since its tests share what they compile.
test: compiler $(READY)  ## run the tests, or some of them: make test ARGS="-k layering"
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(ARGS)

lint: $(READY)  ## check the style of the code and its format
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(READY)  ## check the types of the package
	$(BIN)/mypy

docs: $(READY)  ## build the documentation site, build/site/index.html; a warning or a broken link is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

wheel: $(READY)  ## build dist/*.tar.gz, and from it dist/*.whl
	rm -rf dist
	$(BIN)/python -m build --quiet

examples: compiler $(READY)  ## run every example in its short form
	@set -e; for example in examples/*.py; do echo "$$example --quick"; $(BIN)/python "$$example" --quick; done

zoo: $(READY)  ## print which chains are found in other people's models
	@PYTHONPATH=tests $(BIN)/python -m zoo

stress: compiler $(READY)  ## interrupt, kill and fork, and call from many threads, for half an hour: make stress ARGS=calls
	@PYTHONPATH=.:tests $(BIN)/python -m stress $(ARGS)

clean:  ## remove the virtual environment and everything built
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis examples/out

compiler:
	@: $(if $(CXX),,$(error torch.compile needs a C++ compiler: install g++ or clang++, or name one in CXX))

$(READY): pyproject.toml constraints.txt tools/environment.py
	@: $(if $(BASE),,$(error no Python >= 3.11 with venv and headers (on Debian: python3-venv, python3-dev) among: $(PYTHON)))
	@echo "Setting up $(VENV) with $(BASE): some minutes the first time."
	@$(BASE) tools/environment.py $(VENV) $(if $(UV),--installer $(UV)) $(if $(SYSTEM_TORCH),--system-torch)
