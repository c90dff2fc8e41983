"""The snippets of docs/using-a-checkpoint.md run, in order, and the commands on it exist and work."""

import dataclasses
import importlib.util
from pathlib import Path
import re
import shutil

import jax.numpy as jnp
import pytest
from typer.testing import CliRunner

import jax_moe
from jax_moe.__main__ import app

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "using-a-checkpoint.md").read_text()
TINY = Path(__file__).parent / "data" / "modelopt-deepseek_v3"


def snippets(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def test_the_python_snippets_run_in_order(tmp_path, capsys):
    names = {"directory": shutil.copytree(TINY, tmp_path / "tiny"), "output": tmp_path / "out"}
    without_flax = importlib.util.find_spec("flax") is None
    ran = 0
    for snippet in snippets("python"):
        if without_flax and "nnx" in snippet:
            continue
        exec(snippet, names)
        ran += 1
    assert ran >= 8
    printed = capsys.readouterr().out.strip()
    promised = re.search(r"print\(error\)  # \.\.\.(.*)", PAGE)
    assert promised
    assert printed.endswith(promised[1])


def test_every_call_gets_prepared_experts(tmp_path, monkeypatch):
    """On a CPU nobody would notice: here ``prepare`` leaves a mark, which the op wants and ``calibrate`` refuses."""

    def marked(experts):
        assert experts.layout == "canonical"
        return dataclasses.replace(experts, layout="prepared")

    calls = []

    def op(x, experts, *_, **__):
        calls.append(experts.layout)
        return jnp.zeros_like(x)

    def calibrate(experts, *_, **__):
        assert experts.layout == "canonical"
        return experts

    for name, stand_in in (("prepare", marked), ("fused_moe", op), ("sharded_moe", op), ("calibrate", calibrate)):
        monkeypatch.setattr(jax_moe, name, stand_in)
    names = {"directory": shutil.copytree(TINY, tmp_path / "tiny"), "output": tmp_path / "out"}
    for snippet in snippets("python"):
        if "nnx" not in snippet:  # MoE.from_checkpoint prepares by itself: tests/test_nn.py
            exec(snippet, names)
    assert calls == ["prepared"] * 4


@pytest.mark.parametrize("command", snippets("sh"))
def test_the_commands_run(tmp_path, command):
    arguments = (
        command.strip().removeprefix("python -m jax_moe ").replace("DIR", str(TINY)).replace("OUT", str(tmp_path / "o"))
    )
    result = CliRunner().invoke(app, arguments.split())
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("page", ["using-a-checkpoint.md", "checkpoint-formats.md"])
def test_the_files_that_a_page_names_exist(page):
    for name in re.findall(r"`((?:docs|tests|examples|jax_moe)/[\w/.-]+)`", (ROOT / "docs" / page).read_text()):
        assert (ROOT / name).exists(), name
