# make demo: export the shipped models and run them.   make test: the whole suite.   Both create .venv first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --constraint constraints.txt

.PHONY: demo test lint types ci clean

demo: $(VENV)/.demo
	$(BIN)/edgekit demo

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n auto

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/mypy

ci: lint types test demo

# torch first and alone: its CPU build is found wherever pip is told to look, and nothing later replaces it.
$(VENV)/.demo: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) --editable ".[cpu,torch]"
	touch $@

$(VENV)/.dev: $(VENV)/.demo
	$(PIP) --editable ".[cpu,torch,dev]"
	touch $@

clean:
	rm -rf $(VENV) demo build dist .pytest_cache .mypy_cache .ruff_cache
