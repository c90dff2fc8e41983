"""Where each family's experts are found, and what of its configuration is believed; test_against_transformers.py has
what the families compute."""

import itertools
import json

import checkpoint_writer as writer
import numpy as np
import pytest

import jax_moe
from jax_moe import checkpoints
from jax_moe.checkpoints import CheckpointError, families, Family, Settings

EXPERTS, HIDDEN, WIDTH = 4, 32, 48
GATED = ("gate_proj", "up_proj", "down_proj")
MIXTRAL = ("w1", "w3", "w2")


def experts(block, names=GATED, seed=0, count=EXPERTS, intermediate=WIDTH):
    """ModelOpt's tensors of the experts of ``block``, and the payload of the last one's down projection."""
    rng, tensors = np.random.default_rng(seed), {}
    for expert, name in itertools.product(range(count), names):
        shape = (HIDDEN, intermediate) if name == names[-1] else (intermediate, HIDDEN)
        matrix = writer.random_matrix(rng, *shape)
        for suffix, leaf in zip(writer.SUFFIXES["modelopt"], vars(matrix).values(), strict=True):
            tensors[f"{block}.experts.{expert}.{name}.{suffix}"] = np.asarray(leaf)
    return tensors, matrix.payload


def config(model_type, count="num_experts", size="moe_intermediate_size", **more):
    return {
        "model_type": model_type,
        count: EXPERTS,
        size: WIDTH,
        "hidden_size": HIDDEN,
        "num_experts_per_tok": 2,
        **more,
    }


OMNI = config("qwen3_omni_moe_text")
WHERE = {  # configuration, block and names as published in 4 bits
    "deepseek_v32": (config("deepseek_v32", "n_routed_experts"), "model.layers.3.mlp", GATED),
    "kimi_k2 in kimi_k25": (
        {"model_type": "kimi_k25", "text_config": config("kimi_k2", "n_routed_experts")},
        "language_model.model.layers.3.mlp", GATED,
    ),
    "deepseek_v4": (config("deepseek_v4", "n_routed_experts"), "layers.3.ffn", MIXTRAL),
    "kimi_linear": (config("kimi_linear"), "model.layers.3.block_sparse_moe", MIXTRAL),
    "minimax_m2": (
        config("minimax_m2", "num_local_experts", "intermediate_size"), "model.layers.3.block_sparse_moe", MIXTRAL,
    ),
    "minimax_m2, by name": (
        config("minimax_m2", "num_local_experts", "intermediate_size"), "model.layers.3.block_sparse_moe", GATED,
    ),
    "minimax_m3": (
        {"model_type": "minimax_m3_vl", "text_config": config("minimax_m3", "num_local_experts", "intermediate_size")},
        "language_model.model.layers.3.block_sparse_moe", MIXTRAL,
    ),
    "ernie4_5_moe": (config("ernie4_5_moe", "moe_num_experts"), "model.layers.3.mlp", GATED),
    "step3p5": (config("step3p5", "moe_num_experts"), "model.layers.3.moe", GATED),
    "step3p7, type outside": (
        {"model_type": "step3p7", "text_config": config(None, "moe_num_experts")}, "model.layers.3.moe", GATED,
    ),
    "phimoe": (
        config("phimoe", "num_local_experts", "intermediate_size"), "model.layers.3.block_sparse_moe", MIXTRAL,
    ),
    "granitemoe": (
        config("granitemoe", "num_local_experts", "intermediate_size"), "model.layers.3.block_sparse_moe", GATED,
    ),
    "gemma4": (
        {"model_type": "gemma4", "text_config": config("gemma4_text")}, "model.language_model.layers.3", GATED,
    ),
    "gemma4, in moe": (
        {"model_type": "gemma4", "text_config": config("gemma4_text")}, "model.language_model.layers.3.moe", GATED,
    ),
    "nemotron_h_omni": (
        {"model_type": "nemotron_h_omni", "text_config": config("nemotron_h", "n_routed_experts")},
        "language_model.backbone.layers.3.mixer", ("up_proj", "down_proj"),
    ),
    "qwen3_omni_moe": (
        {"model_type": "qwen3_omni_moe", "thinker_config": {"model_type": "x", "text_config": OMNI}},
        "thinker.model.layers.3.mlp", GATED,
    ),
    "qwen3_omni_moe_thinker": (
        {"model_type": "qwen3_omni_moe_thinker", "text_config": OMNI}, "model.layers.3.mlp", GATED,
    ),
    "a root of its own": (config("qwen3_moe"), "a.b.c.layers.3.mlp", GATED),
    "multi-token prediction by number": (config("glm4_moe", num_hidden_layers=3), "model.layers.3.mlp", GATED),
    "multi-token prediction apart": (config("qwen3_next", num_hidden_layers=3), "mtp.layers.0.mlp", GATED),
    "multi-token prediction of deepseek_v4": (
        config("deepseek_v4", "n_routed_experts", num_hidden_layers=2), "mtp.1.ffn", MIXTRAL,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WHERE)
def test_experts_are_found(tmp_path, case):
    settings, block, names = WHERE[case]
    tensors, payload = experts(block, names)
    writer.write(tmp_path, settings, tensors)
    assert checkpoints.list_layers(tmp_path) == [3]
    np.testing.assert_array_equal(checkpoints.load_experts(tmp_path, 3).down.payload[-1], payload)


def test_every_model_type_has_one_entry():
    types = [model_type for family in families.FAMILIES for model_type in family.model_types]
    assert len(types) == len(set(types))


def test_layers_of_multi_token_prediction_follow_the_others(tmp_path):
    """The same number in both: no clash, and without the configuration's count the files have it."""
    tensors, payload = experts("mtp.layers.0.mlp")
    tensors |= experts("model.layers.0.mlp", seed=1)[0] | {"model.layers.4.self_attn.q_proj.weight": np.zeros((2, 2))}
    tensors = {name: np.float32(array) if array.dtype == np.float64 else array for name, array in tensors.items()}
    for more, layers in (({"num_hidden_layers": 8}, [0, 8]), ({}, [0, 5])):
        writer.write(tmp_path, config("qwen3_next", **more), tensors)
        assert checkpoints.list_layers(tmp_path) == layers
        np.testing.assert_array_equal(checkpoints.load_experts(tmp_path, layers[1]).down.payload[-1], payload)


def test_the_talker_of_qwen3_omni_is_not_its_thinker(tmp_path):
    tensors, payload = experts("thinker.model.layers.0.mlp")
    tensors |= experts("talker.model.layers.0.mlp", seed=1)[0] | experts("talker.model.layers.1.mlp", seed=2)[0]
    writer.write(tmp_path, WHERE["qwen3_omni_moe"][0], tensors)
    assert checkpoints.list_layers(tmp_path) == [0]
    np.testing.assert_array_equal(checkpoints.load_experts(tmp_path, 0).down.payload[-1], payload)


def test_two_roots_with_the_same_layer_are_refused(tmp_path):
    tensors = experts("model.layers.2.mlp")[0] | experts("draft.layers.2.mlp")[0]
    writer.write(tmp_path, config("qwen3_moe"), tensors)
    with pytest.raises(CheckpointError, match=r"layer 2: found experts in (model|draft)\..* and in (draft|model)\."):
        checkpoints.list_layers(tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.layers.0.ffn.experts.0.w1.weight", r"found model\.layers\.0\.ffn\.experts\.0\.w1\.weight and the like"),
        ("model.embed_tokens.weight", "found nothing like an expert"),
    ],
)
def test_where_no_experts_are_the_message_says_what_is(tmp_path, name, message):
    writer.write(tmp_path, config("qwen3_moe"), {name: np.zeros((2, 2), np.float32)})
    with pytest.raises(CheckpointError, match=message + r", expected the experts of qwen3-moe in layers\.N\."):
        checkpoints.list_layers(tmp_path)


def test_lists_of_settings_have_a_value_for_each_layer(tmp_path):
    """Layers of other sizes, as pruned models have."""
    tensors = experts("model.layers.0.mlp", count=3)[0] | experts("model.layers.1.mlp", count=5, intermediate=16)[0]
    writer.write(tmp_path, config("qwen3_moe") | {"num_experts": [3, 5], "moe_intermediate_size": [WIDTH, 16]}, tensors)
    assert checkpoints.load_experts(tmp_path, 0).down.payload.shape == (3, HIDDEN, WIDTH // 2)
    assert checkpoints.load_experts(tmp_path, 1).down.payload.shape == (5, HIDDEN, 8)
    writer.write(tmp_path, config("qwen3_moe") | {"num_experts": [3]}, tensors)
    with pytest.raises(CheckpointError, match="num_experts: found 1 values, expected one for layer 1"):
        checkpoints.load_experts(tmp_path, 1)


def test_a_registered_family_goes_before_the_table(tmp_path, monkeypatch):
    monkeypatch.setattr(families, "_registered", [])
    mine = Family(
        name="mine", model_types=("mine", "mixtral"), blocks=("sparse",), intermediate_size="width",
        method=lambda settings: jax_moe.Softmax(renormalize=settings.flag("normalise", default=False)),
        activation=lambda settings: jax_moe.GeGLU(), projections=(("a", "b", "c"),), router=("choose",),
    )  # fmt: skip
    tensors, payload = experts("decoder.layers.7.sparse", ("a", "b", "c"))
    tensors["decoder.layers.7.sparse.choose.weight"] = np.ones((EXPERTS, HIDDEN), np.float32)
    for model_type in mine.model_types:
        writer.write(tmp_path, config(model_type, size="width"), tensors)
        with pytest.raises(CheckpointError):
            checkpoints.load_experts(tmp_path, 7)
    checkpoints.register_family(mine)
    for model_type in mine.model_types:
        writer.write(tmp_path, config(model_type, size="width"), tensors)
        np.testing.assert_array_equal(checkpoints.load_experts(tmp_path, 7).down.payload[-1], payload)
        assert checkpoints.load_router(tmp_path, 7).method == jax_moe.Softmax(renormalize=False)
        assert checkpoints.moe_options(tmp_path) == {"activation": jax_moe.GeGLU(), "weight_on": "output"}
    with pytest.raises(TypeError, match="family: got dict, needs Family"):
        checkpoints.register_family({})


def test_an_unknown_family_is_refused_with_the_way_out(tmp_path):
    writer.write(tmp_path, {"model_type": "top", "text_config": {"model_type": "inner"}}, {})
    with pytest.raises(CheckpointError, match=r"model_type: found 'inner', .* qwen3_moe, .*register_family"):
        checkpoints.list_layers(tmp_path)


def test_options_may_depend_on_the_layer(tmp_path):
    """Step-3.5: clamped layers are known by their number; a clamp after the SiLU that would show is refused."""
    limits = [None, 0, 7, 16.0, 2.0, "7"]
    tensors = dict(itertools.chain.from_iterable(experts(f"model.layers.{n}.moe")[0].items() for n in range(6)))
    writer.write(tmp_path, config("step3p5", "moe_num_experts", swiglu_limits=limits), tensors)
    plain = jax_moe.SwiGLU()
    for layer, want in enumerate([plain, plain, jax_moe.SwiGLU(limit=7.0), jax_moe.SwiGLU(limit=16.0)]):
        assert checkpoints.moe_options(tmp_path, layer)["activation"] == want
    for layer in (4, 5):
        with pytest.raises(CheckpointError, match=f"swiglu_limits of layer {layer}: found {limits[layer]!r}"):
            checkpoints.moe_options(tmp_path, layer)
    with pytest.raises(CheckpointError, match="swiglu_limits: found a value for each layer; say which layer"):
        checkpoints.moe_options(tmp_path)
    with pytest.raises(CheckpointError, match="found no experts in layer 9"):
        checkpoints.moe_options(tmp_path, 9)


@pytest.mark.parametrize(
    ("model_type", "more", "key"),
    [
        ("deepseek_v4", {"hidden_act": "gelu"}, "hidden_act"),
        ("deepseek_v4", {"swiglu_limit": -1.0}, "swiglu_limit"),
        ("qwen3_moe", {"hidden_act": None}, "hidden_act"),
        ("qwen3_moe", {"swiglu_limit": 7.0}, "swiglu_limit"),
        ("gemma4_text", {"hidden_activation": "relu"}, "hidden_activation"),
        ("nemotron_h", {"mlp_hidden_act": "silu"}, "mlp_hidden_act"),
    ],
)
def test_activations_that_the_family_is_not_known_with_are_refused(tmp_path, model_type, more, key):
    (block,) = [family.blocks[0] for family in families.FAMILIES if model_type in family.model_types]
    name = ".".join(filter(None, ["layers.0", block, "experts.0.up_proj.weight"]))
    writer.write(tmp_path, config(model_type, **more), {name: np.zeros((2, 2), np.uint8)})
    with pytest.raises(CheckpointError, match=f"config.json: {key}: found {more[key]!r}"):
        checkpoints.moe_options(tmp_path)


READ = {
    "integer": lambda settings: settings.integer("a", "b"),
    "number": lambda settings: settings.number("a", "b"),
    "flag": lambda settings: settings.flag("a", "b"),
    "choice": lambda settings: settings.choice("a", "b", known=("x", "y")),
}
GOOD = {"integer": 3, "number": 2.5, "flag": False, "choice": "y"}
BAD = {
    "integer": [0, -1, 2**31, 1.0, True, "1", None, {}],
    "number": [0, -1.5, float("inf"), float("nan"), True, "1", None, {}],
    "flag": [0, 1, "true", None, 1.0],
    "choice": ["z", 0, None, True, {}],
}


@pytest.mark.parametrize("reader", READ)
def test_settings_are_checked(reader):
    read, good = READ[reader], GOOD[reader]
    for found in ({"a": good}, {"b": good}, {"a": good, "b": good}, {"a": None, "b": good}):
        assert read(Settings(found, "f")) == good
    assert read(Settings({"a": [None, good]}, "f", layer=1)) == good
    for bad in BAD[reader]:
        with pytest.raises(CheckpointError, match=r"^f: b: found .*, expected"):
            read(Settings({"b": bad}, "f"))
        with pytest.raises(CheckpointError, match=r"^f: a of layer 0: found .*, expected"):
            read(Settings({"a": [bad]}, "f", layer=0))
    with pytest.raises(CheckpointError, match=r"^f: a: found None, expected"):
        read(Settings({}, "f"))


def test_two_names_of_a_setting_must_agree():
    """transformers takes one, another runtime the other."""
    with pytest.raises(CheckpointError, match=r"^f: b: found 4, expected 3 as in a, which is the same setting"):
        Settings({"a": 3, "b": 4}, "f").integer("a", "b")


def test_defaults_are_for_absent_settings_only():
    assert Settings({}, "f").integer("a", default=5) == 5
    with pytest.raises(CheckpointError, match="a: found None"):
        Settings(json.loads('{"a": null}'), "f").integer("a", default=5)
