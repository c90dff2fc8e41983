"""Eight virtual CPU devices, and how tests find what they share.

pyproject.toml puts ``tests/``, ``tests/gpu`` and ``tests/checkpoints`` on the path, so that a test says ``import
helpers`` (cases, the comparison, programs in a fresh process) or ``import statement`` (the definitions in plain NumPy).
"""

import functools
import os
import pathlib
import shutil
import tempfile

import hypothesis
import jax
from jax._src.interpreters import mlir
import pytest

# Most of the time of a test is compiling, which XLA does faster where it need not do it well; no bound depends on it.
# `XLA_FLAGS= pytest` compiles as users do: .ci/run does for the newest jax, and for two files with the oldest. Where
# there is a GPU nothing is set, because these flags reach its programs too.
if not pathlib.Path("/dev/nvidiactl").exists():
    flags = ["--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true"]
    if jax.__version_info__ < (0, 11):  # an unknown flag ends the process, and later versions do not know these
        # With the older emitters, and in one piece, our small programs compile in two thirds of the time.
        flags += ["--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1"]
        # They make an MLIR context for each program, which takes as long as compiling a small one; later ones do not.
        mlir.make_ir_context = functools.cache(mlir.make_ir_context)
    os.environ.setdefault("XLA_FLAGS", " ".join(flags))
    # Tests make the same program again and again, each as a function of its own. A process compiles it once, and then
    # loads what it has kept. A folder of its own: JAX does not write its files whole. What a test starts afresh, in
    # another process, compiles afresh.
    _programs = tempfile.mkdtemp(prefix="jax_moe_programs.")
    jax.config.update("jax_compilation_cache_dir", _programs)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
else:
    _programs = None

pytest.register_assert_rewrite("helpers")

# Before anything starts a backend. Does nothing to a GPU.
jax.config.update("jax_num_cpu_devices", 8)

# Compiling takes most of an example's time, so a deadline would measure the machine. Derandomised: a failure on one
# machine is a failure on all; `pytest --hypothesis-profile=explore` looks further.
hypothesis.settings.register_profile("suite", deadline=None, derandomize=True, database=None)
hypothesis.settings.register_profile("explore", deadline=None, max_examples=1000, print_blob=True)
hypothesis.settings.load_profile("suite")

_LONG = (
    "test_wheels.py", "test_kernels_compile.py", "test_sm100_calls.py", "test_lint.py", "test_cuda_handler.py",
    "test_emulator.py",
    "test_sharded_moe.py", "test_prepare.py", "test_nn.py", "gpu/test_op.py", "gpu/test_sharded.py",
    "test_hostile_calls.py", "test_fused_moe.py", "test_launch_rule.py", "test_batches.py",
    "checkpoints/test_memory.py", "test_jax_citizen.py", "test_sm100_machine_code.py", "test_processes.py",
    "test_exchange.py", "test_derivative.py", "test_placement.py", "checkpoints/test_convert.py",
)  # fmt: skip
"""Files that take long. They come first: one that came last would leave the other processes without work."""


def pytest_addoption(parser):
    parser.addoption(
        "--each-value-once", default="", metavar="FILE,...",
        help="of the tests in these files run no more cases than give each parameter each of its values once",
    )  # fmt: skip


def pytest_configure(config):
    # A thread that reads what another is writing compiles for itself.
    config.addinivalue_line("filterwarnings", "ignore:Error reading persistent compilation cache entry")


def pytest_unconfigure():
    if _programs:
        shutil.rmtree(_programs, ignore_errors=True)


def pytest_collection_modifyitems(config, items):
    here = pathlib.Path(__file__).parent
    rank = {here / name: place for place, name in enumerate(_LONG)}
    items.sort(key=lambda item: rank.get(item.path, len(rank)))  # stable: else in the order of names
    if files := config.getoption("each_value_once"):
        paths = {config.invocation_params.dir / file for file in files.split(",")}
        if missing := [str(path) for path in paths if not path.exists()]:
            raise pytest.UsageError(f"--each-value-once: no file {missing}")
        left_out = _whose_values_were_seen([item for item in items if item.path in paths])
        config.hook.pytest_deselected(items=[item for item in items if item in left_out])
        items[:] = [item for item in items if item not in left_out]


def _whose_values_were_seen(items) -> set[pytest.Item]:
    """Cases of which each value of each parameter stands in an earlier case of the same test that is not among these.

    One jax runs all combinations. Which of our values another one breaks is not a matter of combinations.
    """
    seen, repeated = set(), set()
    for item in items:
        if (case := getattr(item, "callspec", None)) is None:
            continue
        test = item.path, item.cls, item.originalname
        values = {(test, name, repr(value)) for name, value in case.params.items()}
        if values <= seen:
            repeated.add(item)
        seen |= values
    return repeated
