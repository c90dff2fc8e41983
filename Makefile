# The two commands of the README, and what developers use. Everything is installed into .venv and nowhere else.

PYTHON ?= python3
VENV ?= .venv
# Optional dependencies of the tests; CI adds `kernels` (CuTe DSL) to compile every GPU kernel.
EXTRAS ?= dev
BIN := $(VENV)/bin

.PHONY: demo test lint clean

demo: $(VENV)/.installed
	$(BIN)/python examples/quickstart.py
	$(BIN)/python examples/language_model.py --short

test: $(VENV)/.installed-$(EXTRAS)
	$(BIN)/pytest

lint: $(VENV)/.installed-$(EXTRAS)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	git ls-files '*.h' '*.cc' | xargs $(BIN)/clang-format --dry-run --Werror

# Installed again whenever something that the wheel is made of has changed.
SOURCES := pyproject.toml $(shell git ls-files jax_moe ffi)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$@ -m pip install --quiet --upgrade pip

$(VENV)/.installed: $(BIN)/python $(SOURCES)
	$(BIN)/python -m pip install --quiet .
	touch $@

$(VENV)/.installed-$(EXTRAS): $(BIN)/python $(SOURCES)
	$(BIN)/python -m pip install --quiet '.[$(EXTRAS)]'
	touch $@

clean:
	rm -rf $(VENV) build dist
