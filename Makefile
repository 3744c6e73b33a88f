# Two commands do everything on a machine with Python 3.11 and no GPU: `make demo` and `make test`.
PYTHON ?= python3.11
BIN := .venv/bin
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

.PHONY: help setup demo test test-unit test-vectors check proto lock

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' Makefile | sed -E 's/:.*## /\t/' | expand -t 16

setup: .venv/ready  ## make .venv with everything the project needs (about two minutes, 3.4 GB)

.venv/ready: requirements/cpu.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --extra-index-url $(TORCH_INDEX) torch==2.13.0+cpu
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --requirement requirements/cpu.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable . && touch $@
