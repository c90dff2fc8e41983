"""Eight virtual CPU devices, and how tests find what they share.

pyproject.toml puts ``tests/``, ``tests/gpu`` and ``tests/checkpoints`` on the path, so that a test says ``import
helpers`` (cases, the comparison, programs in a fresh process) or ``import statement`` (the definitions in plain NumPy).
"""

import os
import pathlib

import hypothesis
import jax
import pytest

# Most of the time of a test is compiling, which XLA does faster where it need not do it well; no bound depends on it.
# `XLA_FLAGS= pytest` compiles as users do: .ci/run does for the newest jax, and for two files with the oldest. Where
# there is a GPU nothing is set, because these flags reach its programs too.
if not pathlib.Path("/dev/nvidiactl").exists():
    os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true")

pytest.register_assert_rewrite("helpers")

# Before anything starts a backend. Does nothing to a GPU.
jax.config.update("jax_num_cpu_devices", 8)

# Compiling takes most of an example's time, so a deadline would measure the machine. Derandomised: a failure on one
# machine is a failure on all; `pytest --hypothesis-profile=explore` looks further.
hypothesis.settings.register_profile("suite", deadline=None, derandomize=True, database=None)
hypothesis.settings.register_profile("explore", deadline=None, max_examples=1000, print_blob=True)
hypothesis.settings.load_profile("suite")
