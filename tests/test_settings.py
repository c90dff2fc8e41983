"""The ``JAX_MOE_*`` variables: one list, which the sources, their page and doctor agree with."""

import pathlib
import re

import pytest

import jax_moe
from jax_moe import settings

REPOSITORY = pathlib.Path(__file__).parents[1]
NAMES = {setting.name for setting in settings.SETTINGS}


def _readers() -> dict[str, set[str]]:
    """Files of the package and of the FFI library by each variable that they name in quotes, as one does to read it."""
    python = pathlib.Path(jax_moe.__file__).parent.rglob("*.py")
    library = (path for folder in ("cpu", "cuda", ".") for path in (REPOSITORY / "ffi" / folder).glob("*.*"))
    readers = {}
    for path in (*python, *library):
        for name in re.findall(r"""["'](JAX_MOE_[A-Z_]+)["']""", path.read_text()):
            readers.setdefault(name, set()).add(path.name)
    return readers


def test_the_list_has_what_the_sources_read():
    assert set(_readers()) == NAMES


def test_python_reads_them_in_one_place():
    python = {file for files in _readers().values() for file in files if file.endswith(".py")}
    assert python == {"settings.py"}


def test_their_page_lists_them():
    table = re.search(r"\| in the environment .*\n(?:\|.*\n)+", (REPOSITORY / "docs" / "settings.md").read_text())
    _, _, *rows = table[0].splitlines()
    assert rows == [f"| `{each.name}` | {each.meaning} | {each.default} |" for each in settings.SETTINGS]


@pytest.mark.parametrize(("value", "on"), [(None, False), ("", False), ("0", False), ("1", True), ("yes", True)])
def test_debugging(monkeypatch, value, on):
    if value is None:
        monkeypatch.delenv("JAX_MOE_DEBUG", raising=False)
    else:
        monkeypatch.setenv("JAX_MOE_DEBUG", value)
    assert settings.debugging() is on


@pytest.mark.parametrize("empty", [True, False])
def test_paths(monkeypatch, tmp_path, empty):
    """An empty variable is none: ``JAX_MOE_CACHE_DIR= python ...`` is how a shell leaves one out."""
    for name in ("JAX_MOE_CACHE_DIR", "JAX_MOE_FFI_LIBRARY"):
        monkeypatch.setenv(name, "" if empty else str(tmp_path))
    assert settings.ffi_library() == (None if empty else tmp_path)
    assert (settings.cache_folder() == tmp_path) is not empty
    assert settings.cache_folder().is_absolute()
