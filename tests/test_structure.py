"""What the package's files may import, name and weigh: rules of docs/architecture.md that no other tool looks at."""

import ast
import collections
import graphlib
import pathlib
import re

import pytest

from jax_moe.kernels import targets

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "jax_moe"
SOURCES = sorted(PACKAGE.rglob("*.py"))
DEVICE = [path for path in SOURCES if "device" in path.relative_to(PACKAGE).parts]
HOST = [path for path in SOURCES if path not in DEVICE]


def _imports(modules: dict[str, str]) -> dict[str, set[str]]:
    """Of each of ``modules`` (name: source) those that it imports, at the top or in a function.

    Importing a name that is no module imports where it comes from. Python runs the packages above a module too; a
    package is not counted for that.
    """
    graph = collections.defaultdict(set)
    for importer, source in modules.items():
        for node in ast.walk(ast.parse(source)):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{importer}: a relative import"
                names = [f"{node.module}.{alias.name}" for alias in node.names]
                names = [name if name in modules else node.module for name in names]
            graph[importer] |= modules.keys() & set(names)
    return graph


def _circle(modules: dict[str, str]) -> list[str] | None:
    try:
        graphlib.TopologicalSorter(_imports(modules)).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return None


def _module(path: pathlib.Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def test_no_import_goes_in_a_circle():
    modules = {_module(path): path.read_text() for path in SOURCES}
    assert len(modules) > 70
    assert len(_imports(modules)["jax_moe"]) > 10
    assert _circle(modules) is None


@pytest.mark.parametrize(
    "text", ["import p.a", "from p import a", "from p.a import thing", "def f():\n    from p import a", "import p.c"]
)
def test_a_circle_is_seen(text):
    modules = {"p": "", "p.a": "from p import b", "p.b": text, "p.c": "from p.a import (\n  thing,\n)"}
    circle = _circle(modules)
    assert circle
    assert {"p.a", "p.b"} <= set(circle)
    assert _circle(modules | {"p.b": "import os"}) is None


def test_only_device_code_and_the_compiler_import_the_dsl():
    assert len(HOST) > 30
    assert len(DEVICE) > 8
    importing = {
        path.relative_to(PACKAGE).as_posix()
        for path in HOST
        if re.search(r"\b(import|from) (cutlass|cuda)\b", path.read_text())
    }
    assert importing == {"kernels/compiler.py"}


def test_device_code_imports_device_code_only():
    for path in DEVICE:
        for module in re.findall(r"^\s*(?:from|import) (jax_moe[\w.]*)", path.read_text(), re.MULTILINE):
            assert ".device" in module, f"{path}: {module}"


FOLDERS = [path.parent for path in (PACKAGE / "kernels").glob("*/target.py")]
"""Of the targets."""


def test_only_tables_and_its_own_folder_name_a_target():
    kinds = [*targets.TARGETS.values()]
    words = [*targets.TARGETS, *(folder.name for folder in FOLDERS), *(target.generation for target in kinds)]
    words += {layout for target in kinds for layout in target.layouts.values()}
    assert len(FOLDERS) == len(kinds) > 1
    tables = {"kernels/targets.py", "layouts/__init__.py"}
    sources = [path for path in SOURCES if not any(folder in path.parents for folder in FOLDERS)]
    sources += [path for path in (ROOT / "ffi").rglob("*.[ch]*") if "tests" not in path.parts]
    naming = {path for path in sources if re.search("|".join(words), path.read_text(), re.IGNORECASE)}
    assert {path.relative_to(PACKAGE).as_posix() for path in naming if PACKAGE in path.parents} <= tables
    assert [path for path in naming if PACKAGE not in path.parents] == []


def test_no_target_imports_another():
    for folder in FOLDERS:
        others = "|".join(other.name for other in FOLDERS if other != folder)
        importing = [path for path in folder.rglob("*.py") if re.search(rf"import.*({others})\b", path.read_text())]
        assert importing == [], folder


def test_no_file_is_too_long():
    """900 lines for a kernel, 500 for everything else."""
    files = [
        path for folder in ("jax_moe", "ffi", "tests", "benchmarks", "examples") for path in (ROOT / folder).rglob("*")
    ]
    lines = {path: path.read_text().count("\n") for path in files if path.suffix in {".py", ".h", ".cc", ".cu", ".c"}}
    assert len(lines) > 150
    long = {path.relative_to(ROOT).as_posix(): n for path, n in lines.items() if n > (900 if path in DEVICE else 500)}
    assert long == {}
