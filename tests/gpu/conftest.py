"""Tests that need a GPU that a target is for: ``pytest -m gpu``. Without one each goes as far as it can and says so."""

import os
import pathlib
import tempfile

# Where the handler writes the graphs that it is captured into; it looks once, at its first captured call.
GRAPH_FOLDER = tempfile.mkdtemp(prefix="jax_moe_graphs.")
os.environ["JAX_MOE_GRAPH_DUMP"] = GRAPH_FOLDER

import calls  # noqa: E402
import cuda_call  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import pytest  # noqa: E402


def pytest_collection_modifyitems(items):
    """Marks this folder's tests."""
    here = pathlib.Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(autouse=True)
def stand_in_kernels(monkeypatch):
    """Where nothing can run, programs are lowered with stand-ins for kernels: test_kernels_compile.py compiles those.

    Only ``JAX_MOE_COMPILE_ONLY`` makes all that these tests ask for: 160 more, in some minutes.
    """
    if calls.why_not_run() and not calls.COMPILE_ONLY:
        cuda_call.stand_in_compiler(monkeypatch)


@pytest.fixture(autouse=True)
def planned_card():
    with calls.planned():
        yield


@pytest.fixture(scope="session")
def build_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("build")


@pytest.fixture
def graphs():
    """Graphs dumped since the test began, each as the text that ``dot`` reads."""
    folder = pathlib.Path(GRAPH_FOLDER)
    for path in folder.iterdir():
        path.unlink()
    return lambda: [path.read_text() for path in sorted(folder.iterdir())]


@pytest.fixture
def poison():
    """Fills free GPU memory with NaN, so that whoever reads what it has not written shows it."""

    def fill(gigabytes: float = 4):
        if calls.why_not_run():
            return
        # Freed as soon as it is ready: the allocator gives the same memory to the calls that come next.
        jnp.full((int(gigabytes * 2**28),), jnp.nan, jnp.float32).block_until_ready().delete()

    return fill
