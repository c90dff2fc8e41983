# The two commands of the README, and what developers use. Everything is installed into .venv and nowhere else.

PYTHON ?= python3
VENV ?= .venv
# Optional dependencies of the tests; CI adds `kernels` (CuTe DSL) to compile every GPU kernel.
EXTRAS ?= dev
# For CI: a version of jax and of CuTe DSL instead of the newest, and the tests to run instead of all.
JAX ?=
DSL ?=
TESTS ?=
# Processes that run tests side by side, a file in one of them; 0: all in pytest's own, as where tests use a GPU.
WORKERS ?= 2
BIN := $(VENV)/bin

.PHONY: demo test install lint typecheck docs docs-links clean

demo: $(VENV)/.installed
	$(BIN)/python examples/quickstart.py
	$(BIN)/python examples/language_model.py --short

test: install
	$(BIN)/pytest --numprocesses=$(WORKERS) --dist=loadfile --no-loadscope-reorder $(TESTS)

install: $(VENV)/.installed-$(EXTRAS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	git ls-files '*.h' '*.cc' '*.cu' | xargs $(BIN)/clang-format --dry-run --Werror

typecheck: install
	$(BIN)/pyright --pythonpath $(BIN)/python

# The site as a folder, build/docs; and every link that leaves it, followed.
docs docs-links: install
	$(BIN)/python -m sphinx -q -W --keep-going -n -b $(if $(filter docs,$@),html,linkcheck) docs build/$@

# Installed again whenever something that the wheel is made of has changed.
SOURCES := pyproject.toml $(shell git ls-files jax_moe ffi)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$@ -m pip install --quiet --upgrade pip

# Built once for all environments: the library is C++ alone, and the wheel is any Python's.
build/wheel/.built: $(SOURCES) | $(BIN)/python
	rm -rf build/wheel
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir build/wheel .
	touch $@

# pip keeps an installed wheel of the same version unless it is told not to.
REINSTALL = $(BIN)/python -m pip install --quiet --no-deps --force-reinstall build/wheel/*.whl

$(VENV)/.installed: $(BIN)/python build/wheel/.built
	$(REINSTALL)
	$(BIN)/python -m pip install --quiet build/wheel/*.whl
	touch $@

$(VENV)/.installed-$(EXTRAS): $(BIN)/python build/wheel/.built
	$(REINSTALL)
	$(BIN)/python -m pip install --quiet "$$(echo build/wheel/*.whl)[$(EXTRAS)]" $(if $(JAX),jax==$(JAX) jaxlib==$(JAX)) $(if $(DSL),nvidia-cutlass-dsl==$(DSL))
	touch $@

clean:
	rm -rf $(VENV) build dist
