"""Tests that need a Hopper GPU: ``pytest -m gpu``. Without one, each says that it has not run, and why."""

import os
import pathlib
import sys
import tempfile

# Where the handler writes the graphs that it is captured into; it looks once, at its first captured call.
GRAPH_FOLDER = tempfile.mkdtemp(prefix="jax_moe_graphs.")
os.environ["JAX_MOE_GRAPH_DUMP"] = GRAPH_FOLDER

sys.path.insert(0, str(pathlib.Path(__file__).parent))  # as tests/conftest.py does for its folder

import calls  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import pytest  # noqa: E402


def _why_not() -> str | None:
    if calls.COMPILE_ONLY:
        return None
    try:
        devices = jax.devices("gpu")
    except RuntimeError as error:
        return f"needs an NVIDIA GPU of compute capability 9.0: {error}"
    capability = devices[0].compute_capability
    return None if capability == "9.0" else f"needs a GPU of compute capability 9.0, this one has {capability}"


def pytest_collection_modifyitems(items):
    """Marks this folder's tests, and skips them all with one reason where there is no GPU."""
    here = pathlib.Path(__file__).parent
    mine = [item for item in items if here in item.path.parents]
    reason = _why_not() if mine else None
    for item in mine:
        item.add_marker(pytest.mark.gpu)
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))


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
        if calls.COMPILE_ONLY:
            return
        # Freed as soon as it is ready: the allocator gives the same memory to the calls that come next.
        jnp.full((int(gigabytes * 2**28),), jnp.nan, jnp.float32).block_until_ready().delete()

    return fill
