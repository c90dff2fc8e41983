"""Files that are wrong: an error that names the file and the tensor, nothing half-loaded, no crash."""

import json
import os
from pathlib import Path
import struct

import checkpoint_writer as writer
import helpers
import numpy as np
import pytest

from jax_moe import checkpoints

GATE = "model.layers.0.mlp.experts.1.gate_proj."
FILE = "model.safetensors"


def read_file(path: Path) -> tuple[dict, bytes]:
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def write_file(path: Path, header: dict | bytes, data: bytes) -> None:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)


def edit_header(directory: Path, edit) -> None:
    header, data = read_file(directory / FILE)
    edit(header)
    write_file(directory / FILE, header, data)


def edit_tensors(directory: Path, edit, model_type: str = "qwen3_moe", tool: str = "modelopt") -> None:
    """Rewrites the checkpoint with other tensors."""
    layer = writer.random_layer(0, 4, 2, 32, 48)
    tensors = writer.fused(layer, model_type, 0) if tool == "fused" else writer.per_expert(layer, model_type, tool, 0)
    edit(tensors)
    writer.write(directory, writer.config_of(model_type, 4, 32, 48), tensors)


def edit_json(path: Path, edit) -> None:
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def swap(tensors: dict, name: str, array) -> None:
    assert name in tensors
    tensors[name] = array


HEADERS = {
    "truncated data": (lambda d: os.truncate(d / FILE, (d / FILE).stat().st_size - 1), FILE, "bytes"),
    "truncated header": (lambda d: os.truncate(d / FILE, 100), FILE, "header length"),
    "seven bytes": (lambda d: os.truncate(d / FILE, 7), FILE, "7 bytes"),
    "empty": (lambda d: os.truncate(d / FILE, 0), FILE, "0 bytes"),
    "trailing bytes": (lambda d: (d / FILE).write_bytes((d / FILE).read_bytes() + b"\0"), FILE, "ends there"),
    "header of 2^63 bytes": (lambda d: (d / FILE).write_bytes(struct.pack("<Q", 2**63) + b"{}"), FILE, "header length"),
    "header is a list": (lambda d: write_file(d / FILE, b"[]", b""), FILE, "object"),
    "header is not JSON": (lambda d: write_file(d / FILE, b"{" * 9, b""), FILE, "JSON"),
    "header is not text": (lambda d: write_file(d / FILE, b"\xff" * 9, b""), FILE, "JSON"),
    "header nests deeply": (lambda d: write_file(d / FILE, b'{"a":' * 99999, b""), FILE, "JSON"),
    "integer of many digits": (lambda d: write_file(d / FILE, b'{"a":' + b"9" * 9999 + b"}", b""), FILE, "JSON"),
    "repeated name": (
        lambda d: write_file(d / FILE, b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":1}', b""),
        FILE,
        "repeats",
    ),
    "entry is a number": (lambda d: edit_header(d, lambda h: h.update({GATE + "weight": 5})), GATE, "expected a dtype"),
    "negative shape": (lambda d: edit_header(d, lambda h: h[GATE + "weight"].update(shape=[-48, -16])), GATE, "shape"),
    "float shape": (lambda d: edit_header(d, lambda h: h[GATE + "weight"].update(shape=[48.0, 16])), GATE, "shape"),
    "bool shape": (lambda d: edit_header(d, lambda h: h[GATE + "weight_scale_2"].update(shape=[True])), GATE, "shape"),
    "huge shape": (
        lambda d: edit_header(d, lambda h: h[GATE + "weight"].update(shape=[2**62, 2**62])),
        GATE,
        "expected",
    ),
    "a million axes": (
        lambda d: edit_header(d, lambda h: h[GATE + "weight"].update(shape=[2**62] * 10**6)),
        GATE,
        "shape",
    ),
    "shape and bytes disagree": (
        lambda d: edit_header(d, lambda h: h[GATE + "weight"].update(shape=[48, 15])),
        GATE,
        "bytes",
    ),
    "offsets beyond the file": (
        lambda d: edit_header(d, lambda h: h[GATE + "weight"].update(data_offsets=[2**40, 2**40 + 768])),
        GATE,
        "truncated",
    ),
    "offsets reversed": (
        lambda d: edit_header(d, lambda h: h[GATE + "weight"]["data_offsets"].reverse()),
        GATE,
        "in order",
    ),
    "offsets negative": (
        lambda d: edit_header(d, lambda h: h[GATE + "weight"].update(data_offsets=[-768, 0])),
        GATE,
        "data_offsets",
    ),
    "overlap": (
        lambda d: edit_header(
            d, lambda h: h[GATE + "weight"].update(data_offsets=[o - 16 for o in h[GATE + "weight"]["data_offsets"]])
        ),
        "gate_proj",
        "overlaps",
    ),
    "same data twice": (
        lambda d: edit_header(
            d,
            lambda h: h[GATE + "weight"].update(data_offsets=h[GATE.replace("gate", "up") + "weight"]["data_offsets"]),
        ),
        "_proj",
        "leaves a hole",
    ),
    "a name of a megabyte": (lambda d: edit_header(d, lambda h: h.update({"x" * 10**6: {}})), FILE, "tensor name"),
    "a name that moves the cursor": (
        lambda d: edit_header(d, lambda h: h.update({"\x1b[2J": {}})),
        FILE,
        "tensor name",
    ),
    "a name that is no text": (lambda d: edit_header(d, lambda h: h.update({"\ud800": {}})), FILE, "tensor name"),
    "metadata is a list": (lambda d: edit_header(d, lambda h: h.update(__metadata__=[1])), FILE, "__metadata__"),
    "unknown dtype": (lambda d: edit_header(d, lambda h: h[GATE + "weight"].update(dtype="F4")), GATE, "expected U8"),
    "payload is I8": (lambda d: edit_header(d, lambda h: h[GATE + "weight"].update(dtype="I8")), GATE, "expected U8"),
    "scale is U8": (lambda d: edit_header(d, lambda h: h[GATE + "weight_scale"].update(dtype="U8")), GATE, "F8_E4M3"),
    "transposed payload": (
        lambda d: edit_header(d, lambda h: h[GATE + "weight"].update(shape=[16, 48])),
        GATE,
        r"\[48, 16\]",
    ),
}
TENSORS = {
    "missing expert": (lambda t: [t.pop(n) for n in list(t) if ".experts.3." in n], "experts.3", "no such tensor"),
    "missing scale": (lambda t: t.pop(GATE + "weight_scale"), GATE, "no such tensor"),
    "missing global scale": (lambda t: t.pop(GATE + "weight_scale_2"), GATE, "no such tensor"),
    "an expert too many": (
        lambda t: t.update({n.replace("experts.1", "experts.4"): t[n] for n in list(t) if "experts.1." in n}),
        r"experts\.4",
        "does not have",
    ),
    "an unexplained tensor": (
        lambda t: t.update({GATE + "pre_quant_scale": np.ones(32, np.float32)}),
        GATE,
        "does not have",
    ),
    "negative scale": (lambda t: swap(t, GATE + "weight_scale_2", np.float32(-1).reshape(())), GATE, "-1.0"),
    "NaN scale": (lambda t: swap(t, GATE + "weight_scale_2", np.float32(np.nan).reshape(())), GATE, "nan"),
    "two scales": (lambda t: swap(t, GATE + "weight_scale_2", np.ones(2, np.float32)), GATE, r"of 1 value"),
    "integer scale": (lambda t: swap(t, GATE + "weight_scale_2", np.ones((), np.int64)), GATE, "I64"),
    "one expert in bf16": (
        lambda t: (swap(t, GATE + "weight", np.zeros((48, 32), writer.BF16)), t.pop(GATE + "weight_scale")),
        GATE,
        "BF16",
    ),
    "a layer in bf16": (
        lambda t: [
            t.update({n: np.zeros((48, 32), writer.BF16)}) if n.endswith(".weight") else t.pop(n) for n in list(t)
        ],
        "BF16",
        "NVFP4 or MXFP4",
    ),
    "a layer in fp8": (
        lambda t: [t.update({n: np.zeros((48, 32), writer.E4M3)}) if n.endswith(".weight") else None for n in list(t)],
        "F8_E4M3",
        "not in NVFP4 or MXFP4",
    ),
}


def with_byte(array: np.ndarray, byte: int) -> np.ndarray:
    """A copy of an array of bytes, the last of which is another."""
    copy = np.array(array, order="C")
    copy.reshape(-1).view(np.uint8)[-1] = byte
    return copy


BLOCK_SCALES = {0x7F: "nan", 0xFF: "nan", 0x81: "-0.00", 0xFE: "-448"}


@pytest.mark.parametrize("byte", BLOCK_SCALES)
@pytest.mark.parametrize("tool", [*writer.SUFFIXES, "fused"])
@pytest.mark.parametrize("projection", ["gate_up", "down"])
def test_a_block_scale_that_is_no_scale_is_named(tmp_path, tool, byte, projection):
    """NaN, and numbers below zero: Blackwell reads scales without their sign, other arithmetic with it."""
    model_type = "llama4_text" if tool == "fused" else "qwen3_moe"
    of_an_expert = {"gate_up": "3.up_proj.weight_scale", "down": "3.down_proj.weight_scale"}[projection]
    last = f"{projection}_proj_weight_scale" if tool == "fused" else of_an_expert
    name = f"{writer.BLOCKS[model_type].format(0)}.experts.{last}"
    edit_tensors(tmp_path, lambda t: t.update({name: with_byte(t[name], byte)}), model_type, tool)
    for load in (
        lambda: checkpoints.load_experts(tmp_path, 0),
        lambda: checkpoints.load_experts(tmp_path, 0, experts=slice(3, 4)),
        lambda: checkpoints.convert(tmp_path, tmp_path / "out"),
    ):
        reason = f"expert 3: found a block scale of {BLOCK_SCALES[byte]}"
        with pytest.raises(checkpoints.CheckpointError, match=reason) as error:
            load()
        assert f"{tmp_path / FILE}: {name}: " in str(error.value)
    assert not list((tmp_path / "out").glob("layer-*"))
    checkpoints.load_experts(tmp_path, 0, experts=slice(0, 3))  # the others are whole


@pytest.mark.parametrize("byte", [0x00, 0x80])
def test_a_block_scale_of_zero_is_a_scale(tmp_path, byte):
    name = GATE + "weight_scale"
    edit_tensors(tmp_path, lambda t: t.update({name: with_byte(t[name], byte)}))
    assert np.asarray(checkpoints.load_experts(tmp_path, 0).gate_up.block_scale)[1, 0, -1, -1] == 0


# A global scale of compressed-tensors is divided by: of zero and infinity, and of numbers with no float32 reciprocal.
@pytest.mark.parametrize("scale", [0.0, -0.0, np.inf, -np.inf, np.nan, -2.0, 1e-39, 1e-45])
def test_a_scale_without_a_reciprocal_is_named(tmp_path, scale):
    value = np.full((1,), scale, np.float32)
    name = GATE + "weight_global_scale"
    edit_tensors(tmp_path, lambda t: swap(t, name, value), tool="compressed-tensors")
    with pytest.raises(checkpoints.CheckpointError, match=r"found a scale of .* \(its reciprocal is") as error:
        checkpoints.load_experts(tmp_path, 0)
    assert name in str(error.value)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("fused", [False, True])
def test_a_bias_that_is_not_finite_is_named(tmp_path, fused, value):
    tool, name = ("fused", "down_proj_bias") if fused else ("modelopt", "2.down_proj.bias")
    prefix = "model.layers.0.mlp.experts."
    experts = {f"{e}.{n}_proj.bias": (s,) for e in range(4) for n, s in (("gate", 48), ("up", 48), ("down", 32))}
    shapes = {"gate_up_proj_bias": (4, 96), "down_proj_bias": (4, 32)} if fused else experts

    def edit(tensors: dict) -> None:
        tensors |= {prefix + n: np.zeros(shape, writer.BF16) for n, shape in shapes.items()}
        tensors[prefix + name].reshape(-1)[-1] = value

    edit_tensors(tmp_path, edit, "gpt_oss", tool)
    with pytest.raises(checkpoints.CheckpointError, match=rf"{name}: found {value}, expected finite"):
        checkpoints.load_experts(tmp_path, 0)


def test_a_bias_of_one_expert_only_is_an_error(tmp_path):
    edit_tensors(tmp_path, lambda t: t.update({GATE + "bias": np.zeros(48, np.float32)}))
    with pytest.raises(checkpoints.CheckpointError, match=r"experts\.0\.gate_proj\.bias: found no such tensor"):
        checkpoints.load_experts(tmp_path, 0)


@pytest.mark.parametrize("name", HEADERS)
def test_a_malformed_file_is_named(tmp_path, name):
    writer.checkpoint(tmp_path)
    damage, tensor, reason = HEADERS[name]
    damage(tmp_path)
    with pytest.raises(checkpoints.CheckpointError, match=reason) as error:
        checkpoints.load_experts(tmp_path, 0)
    assert tensor in str(error.value)
    assert str(tmp_path) in str(error.value)
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize("name", TENSORS)
def test_wrong_tensors_are_named(tmp_path, name):
    edit, tensor, reason = TENSORS[name]
    edit_tensors(tmp_path, edit)
    with pytest.raises(checkpoints.CheckpointError, match=reason) as error:
        checkpoints.load_experts(tmp_path, 0)
    assert str(tmp_path) in str(error.value)
    assert tensor.replace("\\", "") in str(error.value)


@pytest.mark.parametrize(
    "entry", ["../x.safetensors", "/etc/passwd", "a/../../x", "..", "", ".", "linked/x", "a\\b", "a\0b", "no"]
)
def test_an_index_entry_cannot_leave_the_directory(tmp_path, entry):
    inside = tmp_path / "checkpoint"
    writer.checkpoint(inside, shards=2)
    (tmp_path / "x").write_bytes((inside / "model-00001-of-00002.safetensors").read_bytes())
    (tmp_path / "x.safetensors").write_bytes((tmp_path / "x").read_bytes())
    (inside / "linked").symlink_to("..")
    index = inside / "model.safetensors.index.json"
    edit_json(index, lambda i: i["weight_map"].update({n: entry for n, f in i["weight_map"].items() if "00001" in f}))
    with pytest.raises(
        checkpoints.CheckpointError, match="no such file" if entry == "no" else "model.safetensors.index.json"
    ):
        checkpoints.load_experts(inside, 0)


@pytest.mark.parametrize("content", ["[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 5}}', "{", ""])
def test_a_malformed_index_is_named(tmp_path, content):
    writer.checkpoint(tmp_path, shards=2)
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(checkpoints.CheckpointError, match=r"model\.safetensors\.index\.json"):
        checkpoints.load_experts(tmp_path, 0)


def test_a_missing_shard_is_named(tmp_path):
    writer.checkpoint(tmp_path, shards=3)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(checkpoints.CheckpointError, match=r"model-00002-of-00003\.safetensors: found no such file"):
        checkpoints.load_experts(tmp_path, 0)


def test_an_absolute_index_entry_is_refused_even_inside(tmp_path):
    writer.checkpoint(tmp_path, shards=2)
    index = tmp_path / "model.safetensors.index.json"
    edit_json(index, lambda i: i["weight_map"].update({n: str(tmp_path / f) for n, f in i["weight_map"].items()}))
    with pytest.raises(checkpoints.CheckpointError, match="found the file name"):
        checkpoints.load_experts(tmp_path, 0)


def test_an_index_that_names_the_wrong_shard(tmp_path):
    writer.checkpoint(tmp_path, shards=2)
    edit_json(
        tmp_path / "model.safetensors.index.json",
        lambda i: i["weight_map"].update(
            {GATE + "weight": sorted(set(i["weight_map"].values()) - {i["weight_map"][GATE + "weight"]})[0]}
        ),
    )
    with pytest.raises(checkpoints.CheckpointError, match=r"gate_proj\.weight: found no such tensor, but the index"):
        checkpoints.load_experts(tmp_path, 0)


def test_a_pipe_in_place_of_a_shard_does_not_hang(tmp_path):
    writer.checkpoint(tmp_path)
    (tmp_path / FILE).unlink()
    os.mkfifo(tmp_path / FILE)
    with pytest.raises(checkpoints.CheckpointError, match="not a regular file"):
        checkpoints.load_experts(tmp_path, 0)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model_type": "llama"}, "model_type"),
        ({"model_type": None}, "model_type"),
        ({"model_type": ["qwen3_moe"]}, "model_type"),
        ({"num_experts": 2**31 - 1}, "experts"),
        ({"num_experts": 2**70}, "num_experts"),
        ({"num_experts": "4"}, "num_experts"),
        ({"num_experts": 0}, "num_experts"),
        ({"hidden_size": 64}, r"\[48, 32\]"),
        ({"hidden_size": 24}, "multiple of 16"),
        ({"hidden_size": None}, "hidden_size"),
        ({"text_config": 5}, "text_config"),
        (
            {
                "quantization_config": {
                    "transform_config": {
                        "config_groups": {"R4": {"apply": [{"location": "input", "targets": ["re:.*down_proj$"]}]}}
                    }
                }
            },
            "transform",
        ),
    ],
)
def test_a_config_that_does_not_fit_is_named(tmp_path, change, reason):
    writer.checkpoint(tmp_path)
    edit_json(tmp_path / "config.json", lambda c: c.update(change))
    with pytest.raises(checkpoints.CheckpointError, match=reason):
        checkpoints.load_experts(tmp_path, 0)


@pytest.mark.parametrize("model_type", ["llama4_text", "gpt_oss"])
def test_a_fused_tensor_with_too_few_experts(tmp_path, model_type):
    prefix = f"{writer.BLOCKS[model_type].format(0)}.experts."
    edit_tensors(tmp_path, lambda t: swap(t, prefix + "down_proj", t[prefix + "down_proj"][:3]), model_type, "fused")
    with pytest.raises(
        checkpoints.CheckpointError, match=r"down_proj: found U8 \[3, 24, 32\], expected U8 \[4, 24, 32\]"
    ):
        checkpoints.load_experts(tmp_path, 0)


def test_no_directory_no_config_no_experts_no_layer(tmp_path):
    with pytest.raises(checkpoints.CheckpointError, match="no directory"):
        checkpoints.load_experts(tmp_path / "absent", 0)
    with pytest.raises(checkpoints.CheckpointError, match=r"no \*\.safetensors"):
        checkpoints.load_experts(tmp_path, 0)
    writer.checkpoint(tmp_path, layers=(1,))
    for layer in (0, -1, 2**80):
        with pytest.raises(checkpoints.CheckpointError, match=r"no experts in layer .*\(1\)"):
            checkpoints.load_experts(tmp_path, layer)
    (tmp_path / "config.json").unlink()
    with pytest.raises(checkpoints.CheckpointError, match=r"config\.json"):
        checkpoints.load_experts(tmp_path, 1)


@pytest.mark.parametrize("load", [checkpoints.load_experts, checkpoints.load_router, checkpoints.load_shared_expert])
@pytest.mark.parametrize("model_type", ["qwen3_moe", "deepseek_v3"])  # without and with a shared expert
def test_a_layer_is_a_number_of_a_moe_layer(tmp_path, load, model_type):
    writer.checkpoint(tmp_path, model_type, layers=(1,))
    for layer in ("1", 1.0, None, True):
        with pytest.raises(TypeError, match=f"^layer: got {layer!r}, needs an int$"):
            load(tmp_path, layer)
    with pytest.raises(checkpoints.CheckpointError, match=r"no experts in layer 0, .*\(1\)"):
        load(tmp_path, 0)
    load(tmp_path, np.int64(1))


def test_five_thousand_mutated_files(tmp_path):
    """In a process of its own, so that a crash is seen as one, with its peak memory measured."""
    path = os.pathsep.join([str(Path(__file__).parent), str(helpers.PACKAGE_FOLDER)])
    report = helpers.run_python("import fuzz; fuzz.main()", tmp_path, 5000, 0, PYTHONPATH=path)
    outcome = json.loads(report.splitlines()[-1])
    assert outcome["mutants"] == 5000
    assert outcome["refused"] > 2500, outcome
    assert outcome["growth_mib"] < 100, outcome


def test_a_router_that_does_not_fit_is_named(tmp_path):
    writer.checkpoint(tmp_path)
    edit_json(tmp_path / "config.json", lambda c: c.update(num_experts_per_tok=5))
    with pytest.raises(checkpoints.CheckpointError, match="num_experts_per_tok: found 5"):
        checkpoints.load_router(tmp_path, 0)
    writer.checkpoint(tmp_path)
    edit_header(tmp_path, lambda h: h["model.layers.0.mlp.gate.weight"].update(shape=[32, 4]))
    with pytest.raises(checkpoints.CheckpointError, match=r"gate\.weight: found BF16 \[32, 4\], expected .* \[4, 32\]"):
        checkpoints.load_router(tmp_path, 0)
    with pytest.raises(checkpoints.CheckpointError, match="no such tensor"):
        checkpoints.load_tensor(tmp_path, "model.norm.weight")
    with pytest.raises(checkpoints.CheckpointError, match=r"gate_proj\.weight: found no such tensor"):
        checkpoints.load_linear(tmp_path, "model.layers.0.mlp.shared_experts.gate_proj")
