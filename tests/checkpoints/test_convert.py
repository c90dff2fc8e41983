"""``convert``: what it writes loads back bit for bit, and no kill loses a finished layer."""

import os
from pathlib import Path
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
from jax_moe import checkpoints

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
    with pytest.raises(checkpoints.CheckpointError, match=r"jax_moe\.json: (digest|layers)"):
        checkpoints.convert(tmp_path / "b", tmp_path / "out")
    with pytest.raises(checkpoints.CheckpointError, match=r"jax_moe\.json: layout"):
        checkpoints.convert(tmp_path / "a", tmp_path / "out", layout="sm_90a")
    with pytest.raises(ValueError, match="layout: got"):
        checkpoints.convert(tmp_path / "a", tmp_path / "out", layout="sm_1")
    with pytest.raises(checkpoints.CheckpointError, match="found a checkpoint"):
        checkpoints.convert(tmp_path / "a", tmp_path / "b")


def test_what_cannot_be_converted_leaves_no_output(tmp_path):
    writer.checkpoint(tmp_path / "in", layers=(0, 1), shards=1)
    checkpoints.convert(tmp_path / "in", tmp_path / "canonical")
    checkpoints.convert(tmp_path / "canonical", tmp_path / "sm_90a", layout="sm_90a")
    with pytest.raises(ValueError, match=r"layout: got 'canonical', but .*sm_90a holds experts in layout 'sm_90a'"):
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


@pytest.mark.parametrize("damage", ["layout", "shape", "missing"])
def test_a_damaged_conversion_is_named(tmp_path, damage):
    writer.checkpoint(tmp_path / "in")
    checkpoints.convert(tmp_path / "in", tmp_path / "out")
    file = tmp_path / "out" / "layer-00000.safetensors"
    raw = file.read_bytes()
    old, new = {
        "layout": (b'"layout":"canonical"', b'"layout":"sm_1000a_"'),
        "shape": (
            b'experts.down.payload":{"dtype":"U8","shape":[4,32,24]',
            b'experts.down.payload":{"dtype":"U8","shape":[4,24,32]',
        ),
        "missing": (b"experts.down.global_scale", b"experts.down.global_scalf"),
    }[damage]
    assert old in raw
    file.write_bytes(raw.replace(old, new))
    with pytest.raises(checkpoints.CheckpointError, match=str(tmp_path)):
        checkpoints.load_experts(tmp_path / "out", 0)
