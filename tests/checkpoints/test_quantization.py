"""Transforms that are left to run time: refused where they touch what is loaded, ignored where they do not."""

import json

import checkpoint_writer as writer
import numpy as np
import pytest

from jax_moe import checkpoints

BLOCK = "model.layers.0.mlp"
LINEAR = "model.layers.0.self_attn.o_proj"
LOADERS = {
    "experts": lambda directory: checkpoints.load_experts(directory, 0),
    "router": lambda directory: checkpoints.load_router(directory, 0),
    "shared": lambda directory: checkpoints.load_shared_expert(directory, 0),
    "linear": lambda directory: checkpoints.load_linear(directory, LINEAR),
}
BESIDE = ("router", "shared", "linear")


def checkpoint(directory, section: dict | None = None, **config) -> None:
    """DeepSeek-V3 with a shared expert and an attention's linear layer; ``section``: its quantization_config."""
    tensors = writer.per_expert(writer.random_layer(0, 4, 2, 32, 48), "deepseek_v3", "modelopt", 0)
    tensors |= writer.router("deepseek_v3", 0, 4, 32)
    for name, shape in (("gate_proj", (48, 32)), ("up_proj", (48, 32)), ("down_proj", (32, 48))):
        tensors[f"{BLOCK}.shared_experts.{name}.weight"] = np.ones(shape, writer.BF16)
    tensors[f"{LINEAR}.weight"] = np.ones((32, 32), writer.BF16)
    config = writer.config_of("deepseek_v3", 4, 32, 48) | config
    writer.write(directory, config | ({} if section is None else {"quantization_config": section}), tensors)


def refused(directory) -> set[str]:
    """The loaders that refuse, each with an error that names the file and a key."""
    errors = {}
    for name, load in LOADERS.items():
        try:
            load(directory)
        except checkpoints.CheckpointError as error:
            errors[name] = str(error)
    for text in errors.values():
        assert str(directory) in text
        assert ".json: " in text
        assert len(text) < 1000
    return set(errors)


def transform(targets, ignore=(), location="input") -> dict:
    """As compressed-tensors writes it, with an offline part beside it."""
    apply = [
        {"targets": targets, "location": location, "inverse": False, "ignore": ignore},
        {"targets": ["Linear"], "location": "weight_input", "inverse": True, "ignore": []},
        {"targets": ["re:.*self_attn$"], "location": "q_attn", "inverse": False, "ignore": []},
    ]
    groups = {"R4": {"type": "hadamard", "apply": apply, "randomize": False, "head_dim": None}}
    return {"quant_method": "compressed-tensors", "transform_config": {"config_groups": groups}}


ALL = set(LOADERS)
TARGETS = [
    (["re:.*down_proj$"], (), {"experts", "shared"}),
    (["re:.*(gate|up)_proj$"], (), {"experts", "shared"}),
    (["re:.*proj$"], (), {"experts", "shared", "linear"}),
    (["re:.*experts.*"], (), {"experts", "shared"}),
    (["re:.*shared_experts.*"], (), {"shared"}),
    (["re:.*mlp.*"], (), {"experts", "router", "shared"}),
    (["re:.*"], (), ALL),
    (["re:.*gate$"], (), {"router"}),
    (["re:.*gate"], (), {"router", "experts", "shared"}),  # a pattern matches from the start, not to the end
    (["re:down_proj"], (), set()),  # and nowhere else
    ([r"re:model\.layers\.\d+\.mlp\.experts\.\d+\..*"], (), {"experts"}),
    ([r"re:model\.layers\.[1-9]\.mlp\..*"], (), set()),  # of other layers
    ([f"{BLOCK}.experts.2.up_proj"], (), {"experts"}),
    ([f"{BLOCK}.experts.4.up_proj"], (), set()),  # there are four
    ([BLOCK], (), {"experts", "router"}),
    (["re:.*mlp$"], (), {"experts", "router"}),
    ([r"re:.*experts\.\d+$"], (), {"experts"}),
    ("Linear", (), ALL),
    (["Linear"], "lm_head", ALL),
    (["Linear"], ["re:.*gate$", "re:.*self_attn.*"], {"experts", "shared"}),
    (["Linear"], ["re:.*experts.*"], {"router", "linear"}),
    (["re:.*"], [r"re:.*\.experts\..*"], {"router", "shared", "linear"}),
    (["re:.*proj"], ["Linear"], set()),
    (["DeepseekV3MLP"], (), {"experts", "router"}),  # a class of ours, for all that is known
    (["DeepseekV3Attention"], (), set()),
    (["re:.*q_proj$", "re:.*self_attn.*"], (), {"linear"}),
    (["lm_head"], (), set()),
    ([], (), set()),
]


@pytest.mark.parametrize("location", ["input", "output"])
@pytest.mark.parametrize(("targets", "ignore", "wanted"), TARGETS)
def test_targets_of_compressed_tensors(tmp_path, targets, ignore, wanted, location):
    checkpoint(tmp_path, transform(targets, list(ignore) if isinstance(ignore, tuple) else ignore, location))
    assert refused(tmp_path) == wanted


@pytest.mark.parametrize("location", ["weight_input", "weight_output", "k_cache", "q_attn"])
def test_what_is_in_the_weights_or_in_the_attention_needs_nothing(tmp_path, location):
    checkpoint(tmp_path, transform(["re:.*"], location=location))
    assert refused(tmp_path) == set()


@pytest.mark.parametrize(
    ("targets", "ignore", "loads"),
    [
        (["re:.*mlp.*"], [], False),
        ([r"re:model\.layers\.0\.mlp\.experts\.3\.down_proj$"], [], False),
        (["model.layers.0.mlp.experts.3.down_proj"], [], False),
        (["re:.*w2$"], [], False),
        (["Linear"], ["re:.*mlp.*"], True),
        (["Linear"], ["re:.*block_sparse_moe.*"], True),
        (["re:.*mlp.experts.4.*", "re:model.layers.1.*", "re:.*self_attn"], [], True),
    ],
)
def test_modules_go_by_their_names_in_memory_too(tmp_path, targets, ignore, loads):
    """transformers calls Mixtral's ``block_sparse_moe.experts.3.w2`` ``mlp.experts.3.down_proj``; tools match that."""
    tensors = writer.per_expert(writer.random_layer(0, 4, 2, 32, 48), "mixtral", "modelopt", 0)
    config = writer.config_of("mixtral", 4, 32, 48) | {"quantization_config": transform(targets, ignore)}
    writer.write(tmp_path, config, tensors)
    if loads:
        checkpoints.load_experts(tmp_path, 0)
    else:
        with pytest.raises(checkpoints.CheckpointError, match="transform_config: found"):
            checkpoints.load_experts(tmp_path, 0)


@pytest.mark.parametrize(
    "setting",
    ["R4", [], {"config_groups": []}, {"groups": {}}, {"config_groups": {"R4": {"apply": "down_proj"}}}],
)
def test_transforms_that_cannot_be_understood(tmp_path, setting):
    checkpoint(tmp_path, {"transform_config": setting})
    assert refused(tmp_path) == (ALL if setting else set())


def test_a_pattern_that_is_none_is_named(tmp_path):
    checkpoint(tmp_path, transform(["re:.*(proj"]))
    with pytest.raises(checkpoints.CheckpointError, match=r"found 're:\.\*\(proj', expected a regular expression"):
        checkpoints.load_experts(tmp_path, 0)


HADAMARD = {"algorithm": "hadamard", "backend": "transform", "block_size": 32, "hadamard_type": "hadamard"}
QUARK = {"name": "rotation", "r1": True, "r2": True, "r3": False, "r4": False, "online_r1_rotation": False}
SECTIONS = {
    "AutoRound, Hadamard": ({"rotation_config": HADAMARD}, ALL),
    "AutoRound, by name": ({"rotation_config": "quarot"}, ALL),
    "AutoRound, none": ({"rotation_config": None}, set()),
    "AutoRound, fused": ({"rotation_config": HADAMARD | {"fuse_online_to_weight": True}}, set()),
    "AutoRound, not fused": ({"rotation_config": HADAMARD | {"fuse_online_to_weight": False}}, ALL),
    "AutoRound, offline": ({"rotation_config": HADAMARD | {"allow_online_rotation": False}}, set()),
    "SpinQuant, defaults": ({"rotation_config": {"algorithm": "spinquant", "r1": True, "r2": True}}, ALL),
    "SpinQuant, offline R1": ({"rotation_config": {"algorithm": "spinquant", "online_r1_rotation": False}}, set()),
    "SpinQuant, R4": ({"spinquant_config": {"r1": False, "r4": True}}, ALL),
    "SpinQuant, R2 and R3": ({"spinquant_config": {"r1": False, "r2": True, "r3": True}}, set()),
    "Quark, fused": ({"algo_config": [QUARK]}, set()),
    "Quark, R4": ({"algo_config": [QUARK | {"r4": True}]}, ALL),
    "Quark, one of two": ({"algo_config": [{"name": "gptq"}, QUARK | {"online_r1_rotation": True}]}, ALL),
    "Quark, no list": ({"algo_config": QUARK | {"name": "quarot", "r4": True}}, ALL),
    "Quark, no rotation": ({"algo_config": [{"name": "awq"}, {"name": "smooth"}]}, set()),
    "Quark, layers": (
        {
            "algo_config": [
                QUARK
                | {"online_r1_rotation": True, "online_config": {"online_rotation_layers": [f"{BLOCK}.experts.*"]}}
            ]
        },
        {"experts"},
    ),
    "Quark, e8m0": ({"global_quant_config": {"weight": {"dtype": "fp4", "scale_format": "e8m0"}}}, set()),
    "Quark, e5m3": ({"global_quant_config": {"weight": [{"dtype": "fp4", "scale_format": "e5m3"}]}}, ALL),
    "GPTQModel": ({"rotation": "hadamard"}, ALL),
    "nobody's": ({"extra": {"activations": {"online_hadamard": True}}}, ALL),
    "nobody's, off": ({"extra": {"rotation": False, "smooth_quant": None, "hadamard": {}}}, set()),
    "another layer's": ({"layers": {"model.layers.0.self_attn.q_proj": {"rotation": True}}}, set()),
    "an expert's": ({"layers": {f"{BLOCK}.experts.1.up_proj": {"rotation": True}}}, {"experts"}),
    "a version": ({"transformers_version": "5.0"}, set()),
}


@pytest.mark.parametrize("name", SECTIONS)
def test_rotations_of_other_tools(tmp_path, name):
    section, wanted = SECTIONS[name]
    checkpoint(tmp_path, {"quant_method": "x"} | section)
    assert refused(tmp_path) == wanted


@pytest.mark.parametrize(
    "place", ["text_config", "compression_config", "thinker_config", "hf_quant_config", "quantize_config"]
)
def test_every_place_that_a_tool_writes_to(tmp_path, place):
    section = {"rotation_config": HADAMARD}
    nested = {"quantization_config": section}
    if place == "text_config":
        text = writer.config_of("deepseek_v3", 4, 32, 48)
        checkpoint(tmp_path, text_config=text | nested)
    elif place == "thinker_config":
        checkpoint(tmp_path, thinker_config={"audio": nested})
    elif place == "compression_config":
        checkpoint(tmp_path, compression_config=section)
    else:
        checkpoint(tmp_path)
        content = {"quantization": section} if place == "hf_quant_config" else section
        (tmp_path / f"{place}.json").write_text(json.dumps(content))
    assert refused(tmp_path) == ALL


def test_a_converted_directory_keeps_its_configuration(tmp_path):
    """Files that were converted before anybody looked at the configuration are refused when they are loaded."""
    checkpoint(tmp_path / "in")
    checkpoints.convert(tmp_path / "in", tmp_path / "out")
    (tmp_path / "out" / "config.json").write_text(
        json.dumps(writer.config_of("deepseek_v3", 4, 32, 48) | {"quantization_config": {"rotation": "hadamard"}})
    )
    assert refused(tmp_path / "out") == ALL


@pytest.mark.parametrize("targets", [["re:.*experts.0.down_proj"], ["re:.*shared_experts.*"], ["re:.*gate$"]])
def test_convert_refuses_what_any_loader_would(tmp_path, targets):
    checkpoint(tmp_path / "in", transform(targets))
    with pytest.raises(checkpoints.CheckpointError, match="transform_config: found"):
        checkpoints.convert(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_configuration_of_hundreds_of_levels(tmp_path):
    deep = {"rotation": True}
    for _ in range(400):
        deep = {"a": deep}
    checkpoint(tmp_path, deep)
    with pytest.raises(checkpoints.CheckpointError, match="nested deeper"):
        checkpoints.load_experts(tmp_path, 0)
