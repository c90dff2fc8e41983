"""The tables of docs/blackwell.md are those that its script makes, from instructions that the emulator still counts."""

import importlib.util
import json
import shutil

import count_instructions
import pytest

from jax_moe.kernels.sm100 import program

PAPER = count_instructions.FILE.with_name("blackwell_paper.py")


def _paper():
    spec = importlib.util.spec_from_file_location("blackwell_paper", PAPER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_has_the_tables_of_the_script():
    paper = _paper()
    text = paper.PAGE.read_text()
    assert paper.page(text) == text
    assert text.count("| qwen3-235b-a22b |") == 2 * len(paper.TOKENS)


def test_every_config_is_counted():
    names = {
        f"{precision} {config.name} {width}"
        for precision, configs in program.CONFIGS.items()
        for config in configs
        for width in (config.granule, config.token_tile)
    }
    assert names == set(json.loads(count_instructions.FILE.read_text()))


@pytest.mark.skipif(importlib.util.find_spec("cutlass") is None, reason="nvidia-cutlass-dsl is not installed")
@pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator is compiled with g++, which is not here")
@pytest.mark.parametrize(("precision", "place"), [("w4a4", 0), ("w4a4", -1), ("w4a16", 1)])
def test_the_counts_are_those_of_the_kernels(precision, place):
    config = program.CONFIGS[precision][place]
    recorded = json.loads(count_instructions.FILE.read_text())
    found = count_instructions.counts(precision, config, config.granule)
    assert found == recorded[f"{precision} {config.name} {config.granule}"], "run tests/count_instructions.py"
