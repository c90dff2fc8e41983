"""``convert``: what it writes loads back bit for bit, of one checkpoint only, and no kill loses a finished layer."""

import json
import os
from pathlib import Path
import shutil
import signal
import subprocess
import sys
import time

import checkpoint_writer as writer
import helpers
import jax
from jax.sharding import Mesh
import numpy as np
import pytest

import jax_moe
from jax_moe import checkpoints, layouts

DATA = Path(__file__).parent / "data"
LAYOUTS = ("canonical", "sm_90a")


def assert_same(got, want) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert ours.dtype == theirs.dtype
        assert ours.shape == theirs.shape
        assert np.asarray(ours).tobytes() == np.asarray(theirs).tobytes()


def converted(experts: jax_moe.Experts, layout: str) -> jax_moe.Experts:
    return experts if layout == "canonical" else jax_moe.prepare(experts, layout, progress=False)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "case",
    [
        "modelopt-deepseek_v3",
        "llmcompressor-gpt_oss",
        "modelopt-gpt_oss-openai",
        "modelopt-nemotron_h",
        "modelopt-llama4",
    ],
)
def test_what_was_written_loads_back(tmp_path, case, layout):
    source = DATA / case
    layers = checkpoints.list_layers(source)
    assert checkpoints.convert(source, tmp_path / "out", layout=layout) == layers
    assert checkpoints.list_layers(tmp_path / "out") == layers
    assert checkpoints.moe_options(tmp_path / "out") == checkpoints.moe_options(source)
    for layer in layers:
        want = checkpoints.load_experts(source, layer)
        assert_same(checkpoints.load_experts(tmp_path / "out", layer), converted(want, layout))
        assert_same(checkpoints.load_router(tmp_path / "out", layer), checkpoints.load_router(source, layer))
        shared = checkpoints.load_shared_expert(source, layer)
        assert_same(checkpoints.load_shared_expert(tmp_path / "out", layer), shared)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_parts_of_a_converted_layer(tmp_path, layout):
    writer.checkpoint(tmp_path / "in", experts=4, hidden=64, intermediate=128)
    checkpoints.convert(tmp_path / "in", tmp_path / "out", layout=layout)
    whole = checkpoints.load_experts(tmp_path / "out", 0)
    local = checkpoints.load_experts(tmp_path / "out", 0, experts=slice(1, 3))
    assert_same(local, converted(checkpoints.load_experts(tmp_path / "in", 0, experts=slice(1, 3)), layout))
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("expert", "tensor"))
    sharded = checkpoints.load_experts(tmp_path / "out", 0, mesh=mesh)
    assert_same(sharded, whole)
    assert sharded.gate_up.payload.addressable_shards[0].data.shape[0] == 2


def test_a_second_run_writes_only_what_is_missing(tmp_path):
    source, out = tmp_path / "in", tmp_path / "out"
    writer.checkpoint(source, layers=(0, 1, 2))
    assert checkpoints.convert(source, out) == [0, 1, 2]
    files = {path: path.stat().st_mtime_ns for path in out.glob("layer-*")}
    assert checkpoints.convert(source, out) == []
    os.truncate(out / "layer-00001.safetensors", 5000)  # as a disk might after a power cut
    (out / "layer-00002.safetensors").unlink()
    for leftover in ("layer-00000.safetensors.tmp", "layer-00002.safetensors.tmp"):
        (out / leftover).write_bytes(b"half")
    assert checkpoints.convert(source, out) == [1, 2]
    assert (out / "layer-00000.safetensors").stat().st_mtime_ns == files[out / "layer-00000.safetensors"]
    assert sorted(path.name for path in out.iterdir()) == [
        ".lock", "config.json", "jax_moe.json",
        "layer-00000.safetensors", "layer-00001.safetensors", "layer-00002.safetensors",
    ]  # fmt: skip


def test_another_conversion_is_not_continued(tmp_path):
    writer.checkpoint(tmp_path / "a")
    writer.checkpoint(tmp_path / "b", layers=(1,))
    checkpoints.convert(tmp_path / "a", tmp_path / "out")
    with pytest.raises(checkpoints.CheckpointError, match=r"layer-00000\.safetensors: found a layer that was not made"):
        checkpoints.convert(tmp_path / "b", tmp_path / "out")
    with pytest.raises(checkpoints.CheckpointError, match=r"jax_moe\.json: layout"):
        checkpoints.convert(tmp_path / "a", tmp_path / "out", layout="sm_90a")
    with pytest.raises(ValueError, match="layout: got"):
        checkpoints.convert(tmp_path / "a", tmp_path / "out", layout="sm_1")
    with pytest.raises(checkpoints.CheckpointError, match="found a checkpoint"):
        checkpoints.convert(tmp_path / "a", tmp_path / "b")


def flip(directory: Path, tensor: str) -> None:
    """Changes one bit of a tensor's last byte, and neither the size nor the time of the file that has it."""
    file = directory / "model.safetensors"
    status, raw = file.stat(), bytearray(file.read_bytes())
    length = int.from_bytes(raw[:8], "little")
    raw[8 + length + json.loads(raw[8 : 8 + length])[tensor]["data_offsets"][1] - 1] ^= 1
    file.write_bytes(raw)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


TENSORS = [
    "experts.3.up_proj.weight",
    "experts.0.down_proj.weight_scale",
    "experts.2.gate_proj.weight_scale_2",
    "experts.1.down_proj.input_scale",
    "gate.weight",
    "gate.e_score_correction_bias",
]


@pytest.mark.parametrize("tensor", TENSORS)
def test_a_checkpoint_with_another_bit_is_another_one(tmp_path, tensor):
    """Under the same path, with the same headers; no layer of the one comes to stand beside layers of the other."""
    source, out = tmp_path / "in", tmp_path / "out"
    writer.checkpoint(source, "deepseek_v3", layers=(0, 1))
    checkpoints.convert(source, out)
    (out / "layer-00000.safetensors").unlink()
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    flip(source, f"model.layers.1.mlp.{tensor}")
    with pytest.raises(checkpoints.CheckpointError, match=r"layer-00001\.safetensors: found a layer that was not made"):
        checkpoints.convert(source, out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    flip(source, f"model.layers.1.mlp.{tensor}")
    assert checkpoints.convert(source, out) == [0]


@pytest.mark.parametrize("file", ["config.json", "hf_quant_config.json"])
def test_another_configuration_is_another_checkpoint(tmp_path, file):
    source, out = tmp_path / "in", tmp_path / "out"
    writer.checkpoint(source)
    checkpoints.convert(source, out)
    content = json.loads((source / file).read_text()) if file == "config.json" else {"quantization": {}}
    (source / file).write_text(json.dumps(content | {"norm_topk_prob": False}))
    with pytest.raises(checkpoints.CheckpointError, match=r"jax_moe\.json: config"):
        checkpoints.convert(source, out)


def test_the_same_bytes_elsewhere_are_the_same_checkpoint(tmp_path):
    """Moved, and with its tensors in other files."""
    writer.checkpoint(tmp_path / "in", layers=(0, 1))
    checkpoints.convert(tmp_path / "in", tmp_path / "out")
    shutil.rmtree(tmp_path / "in")
    writer.checkpoint(tmp_path / "moved", layers=(0, 1), shards=3)
    (tmp_path / "out" / "layer-00001.safetensors").unlink()
    assert checkpoints.convert(tmp_path / "moved", tmp_path / "out") == [1]
    assert checkpoints.convert(tmp_path / "moved", tmp_path / "out") == []


def test_some_layers_first_and_others_later(tmp_path):
    source, out = tmp_path / "in", tmp_path / "out"
    writer.checkpoint(source, layers=(0, 1, 2, 5))
    assert checkpoints.convert(source, out, layers=range(1, 3)) == [1, 2]
    assert checkpoints.list_layers(out) == [1, 2]
    assert checkpoints.convert(source, out, layers=[5, 1, np.int64(5)]) == [5]
    assert checkpoints.convert(source, out) == [0]
    for layer in (0, 1, 2, 5):
        assert_same(checkpoints.load_experts(out, layer), checkpoints.load_experts(source, layer))
    with pytest.raises(checkpoints.CheckpointError, match="no experts in layer 3"):
        checkpoints.convert(source, out, layers=[3])
    with pytest.raises(TypeError, match="layer: got '1', needs an int"):
        checkpoints.convert(source, out, layers=["1"])
    with pytest.raises(ValueError, match="layers: got none"):
        checkpoints.convert(source, out, layers=[])


def with_a_dense_layer(directory: Path, number: int = 1, others: tuple[int, ...] = (0, 2)) -> None:
    """DeepSeek-V3 as ModelOpt leaves it: the layer that predicts further tokens stays in bfloat16."""
    tensors = writer.router("deepseek_v3", number, 4, 32)
    for n in others:
        tensors |= writer.per_expert(writer.random_layer(n, 4, 2, 32, 48), "deepseek_v3", "modelopt", n)
        tensors |= writer.router("deepseek_v3", n, 4, 32)
    for expert in range(4):
        for name, shape in (("gate_proj", (48, 32)), ("up_proj", (48, 32)), ("down_proj", (32, 48))):
            dense = np.random.default_rng(expert).normal(size=shape).astype(writer.BF16)
            tensors[f"model.layers.{number}.mlp.experts.{expert}.{name}.weight"] = dense
    writer.write(directory, writer.config_of("deepseek_v3", 4, 32, 48), tensors)


def test_a_layer_in_bfloat16_is_left_out_with_a_warning(tmp_path):
    source, out = tmp_path / "in", tmp_path / "out"
    with_a_dense_layer(source)
    with pytest.warns(UserWarning, match=r"layers left out: 1; .*layers\.1\.mlp\.experts\..*quantize=True"):
        assert checkpoints.convert(source, out) == [0, 2]
    assert checkpoints.list_layers(out) == [0, 2]
    for layer in (0, 2):
        assert_same(checkpoints.load_experts(out, layer), checkpoints.load_experts(source, layer))
    assert checkpoints.convert(source, out, layers=[0]) == []  # no warning: it was not asked for
    with pytest.raises(checkpoints.CheckpointError, match=r"layers\.1\.mlp.* are not in NVFP4 or MXFP4"):
        checkpoints.convert(source, out, layers=[0, 1])


def test_a_checkpoint_of_nothing_but_bfloat16_is_refused(tmp_path):
    with_a_dense_layer(tmp_path / "in", others=())
    with pytest.raises(checkpoints.CheckpointError, match="are not in NVFP4 or MXFP4"):
        checkpoints.convert(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_broken_layer_is_no_dense_one(tmp_path):
    writer.checkpoint(tmp_path / "in", layers=(0, 1))
    file = tmp_path / "in" / "model.safetensors"
    file.write_bytes(file.read_bytes().replace(b'1.mlp.experts.2.up_proj.weight"', b'1.mlp.experts.2.up_proj.weighs"'))
    with pytest.raises(checkpoints.CheckpointError, match=r"layers\.1\.mlp\.experts\.2\.up_proj"):
        checkpoints.convert(tmp_path / "in", tmp_path / "out")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_version_0_1_0_wrote_early_still_loads(tmp_path, layout):
    """Written at 9c126a9 from ``writer.checkpoint`` of these arguments; prepared experts had empty block scales."""
    old = Path(__file__).parent / "converted_by_9c126a9" / layout
    writer.checkpoint(tmp_path, "deepseek_v3", layers=(1,), experts=4)
    want = converted(checkpoints.load_experts(tmp_path, 1), layout)
    assert_same(checkpoints.load_experts(old, 1), want)
    assert_same(checkpoints.load_router(old, 1), checkpoints.load_router(tmp_path, 1))
    part = checkpoints.load_experts(old, 1, experts=slice(1, 3))
    assert_same(part.down.payload, want.down.payload[1:3])
    copy = shutil.copytree(old, tmp_path / "copy")
    with pytest.raises(checkpoints.CheckpointError, match=r"jax_moe\.json: version: found '1', expected '2'"):
        checkpoints.convert(tmp_path, copy, layout=layout)


def test_a_layout_may_be_renamed(tmp_path, monkeypatch):
    """Files and manifests keep the names that layouts had when they were written."""
    source, out = tmp_path / "in", tmp_path / "out"
    writer.checkpoint(source, layers=(1, 2), experts=4)
    checkpoints.convert(source, out, layers=[1], layout="sm_90a")
    want = checkpoints.load_experts(out, 1)
    renamed = [path for path in out.iterdir() if path.suffix in (".json", ".safetensors")]
    for path in renamed:
        path.write_bytes(path.read_bytes().replace(want.layout.encode(), b"x" * len(want.layout)))
    with pytest.raises(checkpoints.CheckpointError, match=r"layer-00001.*layout 'x+', expected .* a known layout"):
        checkpoints.load_experts(out, 1)
    with pytest.raises(checkpoints.CheckpointError, match=r"jax_moe\.json: layout: found 'x+'"):
        checkpoints.convert(source, out, layout="sm_90a")
    monkeypatch.setattr(layouts.get(want.layout), "former_names", ("x" * len(want.layout),))
    assert_same(checkpoints.load_experts(out, 1), want)
    assert checkpoints.convert(source, out, layout="sm_90a") == [2]


def test_what_cannot_be_converted_leaves_no_output(tmp_path):
    writer.checkpoint(tmp_path / "in", layers=(0, 1), shards=1)
    checkpoints.convert(tmp_path / "in", tmp_path / "canonical")
    checkpoints.convert(tmp_path / "canonical", tmp_path / "sm_90a", layout="sm_90a")
    with pytest.raises(ValueError, match=r"layout: got 'canonical', but .*sm_90a holds experts in layout 'wgmma_v1'"):
        checkpoints.convert(tmp_path / "sm_90a", tmp_path / "out")
    file = tmp_path / "in" / "model.safetensors"
    file.write_bytes(file.read_bytes().replace(b'1.mlp.experts.2.up_proj.weight"', b'1.mlp.experts.2.up_proj.weighs"'))
    with pytest.raises(checkpoints.CheckpointError, match=r"layers\.1\.mlp\.experts\.2\.up_proj"):
        checkpoints.convert(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# A disk that takes its time, so that the kill finds a layer half-way on any machine.
CONVERT = """
import os, sys, time
from jax_moe import checkpoints
flush = os.fsync
os.fsync = lambda descriptor: (time.sleep(0.1), flush(descriptor))
print(checkpoints.convert(sys.argv[1], sys.argv[2]))
"""


def start(source: Path, out: Path) -> subprocess.Popen:
    env = os.environ | {"PYTHONPATH": str(helpers.PACKAGE_FOLDER), "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(
        [sys.executable, "-c", CONVERT, str(source), str(out)], env=env, stdout=subprocess.PIPE, text=True
    )


def test_a_killed_conversion_continues_where_it_was(tmp_path):
    """SIGKILL while a layer is being written, again and again until a run gets through."""
    source, out = tmp_path / "in", tmp_path / "out"
    layers = tuple(range(5))
    writer.checkpoint(source, layers=layers, experts=8, hidden=512, intermediate=512)
    finished: dict[Path, int] = {}
    killed_while_writing = 0
    for target in range(1, 4):
        run = start(source, out)
        while run.poll() is None and len(list(out.glob("layer-*.safetensors"))) < target:
            time.sleep(0.001)
        while run.poll() is None and not list(out.glob("layer-*.tmp")):
            time.sleep(0.0002)
        run.send_signal(signal.SIGKILL)
        run.communicate()
        killed_while_writing += bool(list(out.glob("layer-*.tmp")))
        for path, time_of_writing in finished.items():
            assert path.stat().st_mtime_ns == time_of_writing, "a finished layer was written again"
        finished = {path: path.stat().st_mtime_ns for path in out.glob("layer-*.safetensors")}
        for path in finished:  # every file that has its name is whole
            number = int(path.name[6:11])
            assert_same(checkpoints.load_experts(out, number), checkpoints.load_experts(source, number))
    assert killed_while_writing
    assert len(finished) < len(layers)
    printed, _ = start(source, out).communicate(timeout=120)
    assert eval(printed) == [number for number in layers if out / f"layer-{number:05d}.safetensors" not in finished]
    assert not list(out.glob("*.tmp"))
    for number in layers:
        assert_same(checkpoints.load_experts(out, number), checkpoints.load_experts(source, number))


def test_two_conversions_into_one_directory_are_refused(tmp_path):
    import fcntl

    writer.checkpoint(tmp_path / "in")
    checkpoints.convert(tmp_path / "in", tmp_path / "out")
    with open(tmp_path / "out" / ".lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(checkpoints.CheckpointError, match="another conversion"):
            checkpoints.convert(tmp_path / "in", tmp_path / "out")


@pytest.mark.parametrize("damage", ["layout", "shape", "missing", "unexplained", "nan", "nan_scale"])
def test_a_damaged_conversion_is_named(tmp_path, damage):
    writer.checkpoint(tmp_path / "in")
    checkpoints.convert(tmp_path / "in", tmp_path / "out")
    file = tmp_path / "out" / "layer-00000.safetensors"
    raw = file.read_bytes()
    experts = checkpoints.load_experts(tmp_path / "in", 0)
    old, new = {
        "layout": (b'"layout":"canonical"', b'"layout":"sm_1000a_"'),
        "shape": (
            b'experts.down.payload":{"dtype":"U8","shape":[4,32,24]',
            b'experts.down.payload":{"dtype":"U8","shape":[4,24,32]',
        ),
        "missing": (b"experts.down.global_scale", b"experts.down.global_scalf"),
        "unexplained": (b"mlp.gate.weight", b"mlp.experts.wei"),
        "nan": (np.asarray(experts.down.global_scale).tobytes(), np.full(4, np.nan, np.float32).tobytes()),
        "nan_scale": (np.asarray(experts.down.block_scale[3]).tobytes(), bytes([0x7F] * 96)),
    }[damage]
    assert old in raw
    assert len(old) == len(new)
    file.write_bytes(raw.replace(old, new))
    with pytest.raises(checkpoints.CheckpointError, match=str(tmp_path)):
        checkpoints.load_experts(tmp_path / "out", 0)
