"""``inspect`` and ``convert`` on the command line."""

from pathlib import Path

import checkpoint_writer as writer
import jax
import numpy as np
import pytest
from typer.testing import CliRunner

from jax_moe import checkpoints
from jax_moe.__main__ import app
from jax_moe.checkpoints import files

DATA = Path(__file__).parent / "data"
CASES = sorted(path.name for path in DATA.iterdir())


def run(*arguments) -> tuple[int, str]:
    result = CliRunner(env={"COLUMNS": "250"}).invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, result.output


@pytest.mark.parametrize("case", CASES)
def test_inspect_shows_every_layer(case):
    status, output = run("inspect", DATA / case)
    assert status == 0
    for layer in checkpoints.list_layers(DATA / case):
        experts = checkpoints.load_experts(DATA / case, layer)
        _, parts, intermediate, half = experts.gate_up.payload.shape
        row = next(line for line in output.splitlines() if line.startswith(f"│ {layer} "))
        assert f"{parts} x [{intermediate}, {2 * half}]" in row
        assert f"{float(experts.down.global_scale.max()):.3g}" in row
        assert ("none" in row) == (experts.gate_up.input_scale is None)


def test_inspect_says_how_far_gate_and_up_differ(tmp_path):
    layer = writer.checkpoint(tmp_path)[0]
    scales = [[float(matrix.global_scale) for matrix in matrices] for matrices in layer.gate_up]
    _, output = run("inspect", tmp_path)
    assert f"up to {max(max(pair) / min(pair) for pair in scales):.3g}x" in output


def test_inspect_names_what_is_wrong_and_shows_the_rest(tmp_path):
    writer.checkpoint(tmp_path, layers=(0, 1), shards=1)
    raw = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(
        raw.replace(b'layers.1.mlp.experts.2.up_proj.weight"', b'layers.1.mlp.experts.2.up_proj.weighs"')
    )
    status, output = run("inspect", tmp_path)
    assert status == 1
    assert "│ 0 " in output
    assert "layers.1.mlp.experts.2.up_proj.weight: found no such tensor" in output
    status, output = run("inspect", tmp_path / "absent")
    assert (status, "found no directory" in output) == (1, True)


def test_convert_continues_and_reports_errors(tmp_path):
    writer.checkpoint(tmp_path / "in", layers=(0, 1))
    assert run("convert", tmp_path / "in", tmp_path / "out")[0] == 0
    assert "2 layers, 0 written" in run("convert", tmp_path / "in", tmp_path / "out")[1]
    status, output = run("convert", tmp_path / "in", tmp_path / "out", "--layout", "sm_90a")
    assert status == 1
    assert "jax_moe.json: layout" in output
    assert run("convert", tmp_path / "in", tmp_path / "other", "--layout", "what")[0] == 1


def test_convert_takes_some_layers(tmp_path):
    writer.checkpoint(tmp_path / "in", layers=(0, 1, 3, 4))
    status, output = run("convert", tmp_path / "in", tmp_path / "out", "--layers", "0,3-4")
    assert (status, "3 layers, 3 written" in output) == (0, True)
    assert checkpoints.list_layers(tmp_path / "out") == [0, 3, 4]
    status, output = run("convert", tmp_path / "in", tmp_path / "out", "--layers", "1-2")
    assert (status, "no experts in layer 2" in output) == (1, True)
    status, output = run("convert", tmp_path / "in", tmp_path / "out", "--layers", "-1")
    assert (status, "--layers: got '-1', needs numbers from 0" in output) == (1, True)


def test_a_layer_in_another_format_is_shown_and_left_out(tmp_path):
    layer = writer.per_expert(writer.random_layer(0, 4, 2, 32, 48), "qwen3_moe", "modelopt", 0)
    for name in [name for name in layer if name.endswith(".weight")]:
        shape = (32, 48) if "down_proj" in name else (48, 32)
        layer[name.replace("layers.0", "layers.1")] = np.ones(shape, writer.BF16)
    writer.write(tmp_path / "in", writer.config_of("qwen3_moe", 4, 32, 48), layer)
    status, output = run("convert", tmp_path / "in", tmp_path / "out")
    assert status == 0
    assert "warning: layers left out: 1; " in output
    assert "1 layers, 1 written" in output
    status, output = run("inspect", tmp_path / "in")
    assert status == 1
    assert "│ 0 " in output
    assert "model.layers.0.mlp.gate.weight: found no such tensor" in output  # and the experts are shown all the same
    assert "the experts of model.layers.1.mlp are not in NVFP4 or MXFP4" in output


def test_inspect_names_a_block_scale_that_is_no_number(tmp_path):
    tensors = writer.per_expert(writer.random_layer(0, 4, 2, 32, 48), "qwen3_moe", "modelopt", 0)
    name = "model.layers.0.mlp.experts.3.down_proj.weight_scale"
    tensors[name] = np.array(tensors[name])
    tensors[name][5, 2] = np.nan
    writer.write(tmp_path, writer.config_of("qwen3_moe", 4, 32, 48), tensors)
    status, output = run("inspect", tmp_path)
    assert status == 1
    assert f"{name}: expert 3: found a block scale of nan" in output


@pytest.mark.parametrize(("case", "cells"), [
    ("modelopt-qwen3_moe", ["4", "2", "Softmax(renormalize=True)", "no"]),
    ("llmcompressor-deepseek_v3", [
        "8", "3", "DeepSeekV3(num_groups=4, top_groups=2, scaling_factor=2.5, renormalize=True, scores='sigmoid'), "
        "selection bias", "2 x [32, 64]",
    ]),
    ("modelopt-nemotron_h", ["4", "2", "DeepSeekV3(num_groups=1, top_groups=1, scaling_factor=2.5, renormalize=True, "
                             "scores='sigmoid'), selection bias", "1 x [48, 64]"]),
    ("modelopt-llama4_text", ["4", "1", "Llama4()", "2 x [96, 64]"]),
], ids=lambda value: value if isinstance(value, str) else "")  # fmt: skip
def test_inspect_says_how_many_experts_by_which_rule_and_the_shared_one(case, cells):
    _, output = run("inspect", DATA / case)
    table = [[cell.strip() for cell in line.strip("│┃").replace("┃", "│").split("│")] for line in output.splitlines()]
    headings = next(row for row in table if row[0] == "layer")
    (row,) = (dict(zip(headings, row, strict=True)) for row in table if row[0].isdecimal())
    assert [row[name] for name in ("E", "K", "router", "shared expert")] == cells


def test_inspect_says_that_a_shared_expert_has_a_gate():
    _, output = run("inspect", Path(__file__).parent / "blocks" / "qwen2_moe")
    assert ", behind a gate" in output


def test_a_missing_directory_says_what_to_download_and_how(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    status, output = run("inspect", "~/my models/x")
    assert status == 1
    assert (
        f"pip install huggingface_hub`, then `hf download OWNER/MODEL --local-dir '{tmp_path}/my models/x'`" in output
    )
    (tmp_path / "file").touch()
    status, output = run("inspect", "~/file")
    assert (status, "found a file, expected a directory" in output) == (1, True)
    (tmp_path / "empty").mkdir()
    status, output = run("inspect", "~/empty")
    assert (status, "hf download" in output) == (1, True)


def test_home_is_expanded_everywhere(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    writer.checkpoint(tmp_path / "in")
    assert run("inspect", "~/in")[0] == 0
    assert run("convert", "~/in", "~/out")[0] == 0
    assert checkpoints.list_layers("~/out") == [0]
    assert checkpoints.load_experts("~/out", 0).down.payload.shape == (4, 32, 24)
    assert checkpoints.load_tensor("~/in", "model.layers.0.mlp.gate.weight").shape == (4, 32)
    status, output = run("inspect", "~nobody-of-that-name/in")
    assert (status, "found no such home directory" in output) == (1, True)


def test_an_open_checkpoint_takes_the_place_of_its_directory(tmp_path, monkeypatch):
    writer.checkpoint(tmp_path, layers=(0, 1), shards=3)
    opened, read = checkpoints.open_model(tmp_path), []
    header = files.read_header
    monkeypatch.setattr(files, "read_header", lambda path: (read.append(path), header(path))[1])
    for load in (
        checkpoints.load_experts,
        checkpoints.load_router,
        checkpoints.load_shared_expert,
        checkpoints.moe_options,
    ):
        for layer in (0, 1):
            ours, theirs = load(opened, layer), load(tmp_path, layer)
            assert jax.tree.all(jax.tree.map(lambda a, b: (np.asarray(a) == np.asarray(b)).all(), ours, theirs))
    assert checkpoints.list_layers(opened) == [0, 1]
    module = "model.layers.1.mlp.experts.2.up_proj"
    np.testing.assert_array_equal(checkpoints.load_linear(opened, module), checkpoints.load_linear(tmp_path, module))
    assert opened.settings().integer("hidden_size") == 32
    read.clear()
    checkpoints.load_tensor(opened, "model.layers.0.mlp.gate.weight")
    assert not read  # each file's header was read before
