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

.PHONY: demo test install wheels zig lint typecheck docs docs-links clean

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
	if command -v actionlint >/dev/null; then actionlint; else echo "== NOT RUN: no actionlint here (github.com/rhysd/actionlint), which checks .github/workflows"; fi

typecheck: install
	$(BIN)/pyright --pythonpath $(BIN)/python

# The site as a folder, build/docs; and every link that leaves it, followed.
docs docs-links: install
	$(BIN)/python -m sphinx -q -W --keep-going -n -b $(if $(filter docs,$@),html,linkcheck) docs build/$@

# Installed again whenever something that the wheel is made of has changed.
SOURCES := pyproject.toml README.md LICENSE $(shell git ls-files jax_moe ffi)

# uv fills an environment in seconds, pip in a minute. Where uv is not to be had, or fails, pip does it: pip has a
# configuration of its own, which may name other indexes. Both compile what they install: tests make the warnings of a
# compilation errors.
UV := build/uv/bin/uv
install_with = $(UV) pip install --quiet --compile-bytecode --python $(BIN)/python $(1) || $(BIN)/python -m pip install --quiet $(1)

# Makefile and tests name the Python; uv is not to look for another, or download one.
export UV_PYTHON := $(PYTHON)
export UV_PYTHON_DOWNLOADS := never
# It trusts whom the system trusts, as pip does: a company's registry may have a certificate of its own.
export UV_SYSTEM_CERTS := 1

build/uv/.tried:
	$(PYTHON) -m venv build/uv
	build/uv/bin/python -m pip install --quiet uv || echo "uv is not to be had: pip installs"
	touch $@

$(BIN)/python: | build/uv/.tried
	$(PYTHON) -m venv $(VENV)

# Built once for all environments: the library is C++ alone, and the wheel is any Python's. This one is for this machine.
build/wheel/.built: $(SOURCES) | build/uv/.tried
	rm -rf build/wheel
	$(UV) build --quiet --wheel --out-dir build/wheel . \
	  || build/uv/bin/python -m pip wheel --quiet --no-deps --wheel-dir build/wheel .
	touch $@

# What is published: a source archive, and of it a wheel for each architecture, compiled by zig (ffi/manylinux.cmake).
# tests/test_wheels.py looks at what is here. The build folders keep `hostile_calls`, which it runs.
ARCHITECTURES := x86_64 aarch64
wheels: dist/.built

# In uv's cache, where it stays: zig does its longest work again when it lies elsewhere.
find_zig = $(UV) run --quiet --no-project --with ziglang==0.17.1 \
  python -c "import pathlib, ziglang; print(pathlib.Path(ziglang.__file__).with_name('zig'))"

zig: | build/uv/.tried
	$(find_zig)

dist/.built: $(SOURCES) | build/uv/.tried
	rm -rf dist
	$(UV) build --sdist --out-dir dist .
	export JAX_MOE_ZIG=$$($(find_zig)); builds=; for architecture in $(ARCHITECTURES); do \
	  JAX_MOE_MANYLINUX=$$architecture $(UV) build --wheel --out-dir dist \
	    --config-setting build-dir=$(CURDIR)/build/manylinux_$$architecture dist/*.tar.gz & builds="$$builds $$!"; \
	done; for build in $$builds; do wait $$build || exit 1; done
	touch $@

# MANYLINUX=x86_64 installs that wheel instead of the one for this machine.
MANYLINUX ?=
BUILT := $(if $(MANYLINUX),dist,build/wheel)
WHEEL = $(BUILT)/*$(MANYLINUX).whl

# An installed wheel of the same version is kept unless one says otherwise.
$(VENV)/.installed: $(BIN)/python $(BUILT)/.built
	$(call install_with,--no-deps --force-reinstall $(WHEEL))
	$(call install_with,$(WHEEL))
	touch $@

$(VENV)/.installed-$(EXTRAS): $(BIN)/python $(BUILT)/.built
	$(call install_with,--no-deps --force-reinstall $(WHEEL))
	$(call install_with,"$$(echo $(WHEEL))[$(EXTRAS)]" $(if $(JAX),jax==$(JAX) jaxlib==$(JAX)) $(if $(DSL),nvidia-cutlass-dsl==$(DSL)))
	touch $@

clean:
	rm -rf $(VENV) build dist
