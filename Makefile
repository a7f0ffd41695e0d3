PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test test-all lint docs clean

demo: .venv/demo  ## Co-train two language models on text that is on your machine already (about 5 minutes)
	$(BIN)/codistill train quickstart --fresh

test: .venv/test  ## The ordinary tests
	$(BIN)/pytest -n 2 -m "not slow"

test-all: .venv/test  ## The long tests too
	$(BIN)/pytest -n 2

lint: .venv/test  ## Format, lint, types, and whether generated documentation is current
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python docs/generate_cli.py --check

docs: .venv/test  ## Write the generated documentation anew, and build the site from it
	$(BIN)/python docs/generate_cli.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf .venv runs site

# torch goes first and alone, so that pip may take a build without CUDA where the machine offers one.
.venv/torch: constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("codistill needs Python 3.11 or newer" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(PIP) torch
	touch $@

.venv/demo: .venv/torch pyproject.toml
	$(PIP) -e '.[report]'
	touch $@

.venv/test: .venv/torch pyproject.toml
	$(PIP) -e '.[dev]'
	touch $@
