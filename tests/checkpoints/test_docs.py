"""The Python of every page runs, in order and without a warning, and prints what the page says; so do its commands.

A page's snippets share their names. What else they may use: ``directory``, a tiny DeepSeek-V3 checkpoint that
nvidia-modelopt wrote, and ``output``, a directory to write. ``print(...)  # text`` promises that text; what the page
leaves out of it is an ellipsis in front. A block without a language is not run.
"""

import dataclasses
import importlib.util
from pathlib import Path
import re
import shutil

import jax.numpy as jnp
import pytest
from typer.testing import CliRunner

import jax_moe
from jax_moe import layouts
from jax_moe.__main__ import app
from jax_moe.layouts import canonical

ROOT = Path(__file__).parents[2]
TINY = Path(__file__).parent / "data" / "modelopt-deepseek_v3"
ELSEWHERE = {"several-processes.md": "tests/processes/checks.py"}
"""Pages whose snippets need more than one process, and what runs them."""


def snippets(path: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", path.read_text(), re.DOTALL)


PAGES = [
    path for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    if snippets(path, "python") and path.name not in ELSEWHERE
]  # fmt: skip
ABOUT_CHECKPOINTS = ROOT / "docs" / "using-a-checkpoint.md"


def run(path: Path, folder: Path, flax: bool = importlib.util.find_spec("flax") is not None) -> None:
    """Runs the snippets of a page, but for those that need flax where there is none."""
    names = {"directory": shutil.copytree(TINY, folder / "tiny"), "output": folder / "out"}
    for snippet in snippets(path, "python"):
        if flax or "nnx" not in snippet:
            exec(compile(snippet, path.name, "exec"), names)


def promises(path: Path) -> list[str]:
    return re.findall(r"^ *print\(.*\)  # (.*)$", "\n".join(snippets(path, "python")), re.MULTILINE)


def test_pages_with_snippets_are_found():
    assert {"README.md", "layer.md", "mesh.md", "export.md", "using-a-checkpoint.md"} <= {path.name for path in PAGES}
    for page, runner in ELSEWHERE.items():
        assert page in (ROOT / runner).read_text()


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_the_python_snippets_run_in_order(path, tmp_path, capsys):
    run(path, tmp_path)
    printed = capsys.readouterr().out.splitlines()
    promised = promises(path)
    assert len(printed) == len(promised), "each line that is printed has a promise"
    for line, promise in zip(printed, promised, strict=True):
        assert line.endswith(promise.removeprefix("...")) if promise.startswith("...") else line == promise


CALLS = re.compile(r"jax_moe\.(?:fused_moe|sharded_moe)\(")


class Prepared(canonical.Canonical):
    """Canonical weights under another name: what the pages do on a CPU, but it shows where ``prepare`` is forgotten."""

    name = "prepared"
    partition = dataclasses.replace(canonical.Canonical.partition, layout=name)


@pytest.mark.parametrize("path", [path for path in PAGES if CALLS.search(path.read_text())], ids=lambda path: path.name)
def test_every_call_gets_prepared_experts(path, tmp_path, monkeypatch):
    """On a CPU nobody would notice: here ``prepare`` leaves a mark, which the op wants and all else refuses."""

    def prepare(experts, *_, **__):
        assert experts.layout == "canonical"
        return dataclasses.replace(experts, layout="prepared")

    calls = []

    def op(x, experts, *_, out_dtype=jnp.bfloat16, **__):
        calls.append(experts.layout)
        return x.astype(out_dtype)

    def calibrate(experts, *_, **__):
        assert experts.layout == "canonical"
        return experts

    monkeypatch.setitem(layouts.LAYOUTS, "prepared", Prepared())
    for name, stand_in in (("prepare", prepare), ("fused_moe", op), ("sharded_moe", op), ("calibrate", calibrate)):
        monkeypatch.setattr(jax_moe, name, stand_in)
    run(path, tmp_path, flax=False)  # MoE.from_checkpoint prepares by itself: tests/test_nn.py
    assert set(calls) == {"prepared"}
    assert len(calls) >= len(CALLS.findall("".join(snippets(path, "python"))))


@pytest.mark.parametrize("command", snippets(ABOUT_CHECKPOINTS, "sh"))
def test_the_commands_run(tmp_path, command):
    arguments = (
        command.strip().removeprefix("python -m jax_moe ").replace("DIR", str(TINY)).replace("OUT", str(tmp_path / "o"))
    )
    result = CliRunner().invoke(app, arguments.split())
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    "path", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda path: path.name
)
def test_the_files_that_a_page_names_exist(path):
    folders = "benchmarks|docs|examples|ffi|jax_moe|tests"
    names = re.findall(rf"`(?:python )?((?:{folders})/[\w/.-]+)[^`]*`", path.read_text())
    assert [name for name in names if not (ROOT / name).exists()] == []
