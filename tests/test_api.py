"""docs/api.md is the list of what is public, and docs/glossary.md has each term once."""

import ast
import dataclasses
import importlib
import inspect
import pathlib
import re

import pytest

import jax_moe
from jax_moe import problem

DOCS = pathlib.Path(__file__).parents[1] / "docs"
PAGE = (DOCS / "api.md").read_text()
SECTIONS = dict(re.findall(r"^## `([\w.]+)`\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE))


def listed(name: str) -> set[str]:
    """What the section of a module lists: each name of these has a page of the site, made of its docstring."""
    return {entry for block in re.findall(r"```{eval-rst}\n(.*?)```", SECTIONS[name], re.DOTALL)
            for entry in re.findall(r"^   (\w+)$", block, re.MULTILINE)}  # fmt: skip


def exports(module) -> set[str]:
    """``__all__``; or what a module defines, and what an ``__init__`` imports under its own name."""
    if hasattr(module, "__all__"):
        return set(module.__all__)
    defined = {name for name, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__}
    imports = [node for node in ast.walk(ast.parse(inspect.getsource(module))) if isinstance(node, ast.ImportFrom)]
    names = {alias.asname for node in imports for alias in node.names if alias.asname == alias.name}
    return names | {name for name in defined if name[0] != "_"} | ({"__version__"} & set(vars(module)))


@pytest.mark.parametrize("name", SECTIONS)
def test_the_page_has_what_a_module_exports(name):
    if name == "jax_moe.nn":
        pytest.importorskip("flax", reason="flax is not installed")
    module = importlib.import_module(name)
    text = re.sub(r"```.*?```", "", SECTIONS[name], flags=re.DOTALL)
    assert listed(name) | set(re.findall(r"`(\w+)`", text)) == exports(module)
    for exported in exports(module):
        value = getattr(module, exported)
        documented = inspect.isfunction(value) or inspect.isclass(value)
        assert not documented or inspect.getdoc(value), f"{exported} has no docstring"


def test_the_page_has_the_public_modules():
    modules = {value.__name__ for name in exports(jax_moe) if inspect.ismodule(value := getattr(jax_moe, name))}
    assert modules <= set(SECTIONS)
    assert set(SECTIONS) - modules == {"jax_moe", "jax_moe.nn"}


def test_the_glossary_has_each_term_once():
    rows = re.findall(r"^\| ([^|]+) \|", (DOCS / "glossary.md").read_text(), re.MULTILINE)
    terms = [term for row in rows for term in row.split(", ") if term not in ("term", "letter")]
    assert len(terms) > 50
    assert sorted(set(terms)) == sorted(terms)


def test_the_glossary_has_the_sizes_and_options_of_a_problem():
    text = (DOCS / "glossary.md").read_text()
    fields = {field.name for field in dataclasses.fields(problem.Problem)} - {"absent"}
    assert {name for name in fields if f"`{name}`" not in text and f"| {name} |" not in text} == set()


@pytest.mark.parametrize("page", ["README.md", "docs/architecture.md", "docs/api.md"])
def test_pages_lead_to_the_glossary(page):
    path = DOCS.parent / page
    links = re.findall(r"\]\(([^)#:]+)\)", path.read_text())
    assert (DOCS / "glossary.md") in [(path.parent / link).resolve() for link in links]
