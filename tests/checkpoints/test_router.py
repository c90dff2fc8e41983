"""Routers and shared experts as read from files that a test wrote, against NumPy in float64."""

import json
import shutil

import checkpoint_writer as writer
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from statement import sigmoid
from test_against_transformers import BLOCKS

import jax_moe
from jax_moe import checkpoints
from jax_moe.checkpoints import CheckpointError, families, HashRouter, Router, SharedExpert

EXPERTS, HIDDEN, WIDTH, TOP, VOCABULARY = 8, 32, 48, 3, 20
DEEPSEEK = {"n_routed_experts": EXPERTS, "moe_intermediate_size": WIDTH}
QWEN = {"num_experts": EXPERTS, "moe_intermediate_size": WIDTH}


def write(directory, model_type, block, tensors, **config):
    """A checkpoint whose experts are no more than a name; ``tensors`` are named relative to the block."""
    config = {"model_type": model_type, "hidden_size": HIDDEN, "num_experts_per_tok": TOP, **config}
    tensors = {f"{block}.{name}": tensor for name, tensor in tensors.items()}
    writer.write(directory, config, tensors | {f"{block}.experts.0.down_proj.weight": np.zeros((2, 2), np.uint8)})
    return directory


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def normal(rng, *shape, dtype=np.float32):
    return rng.normal(size=shape).astype(dtype)


def deepseek(rng, **tensors):
    gate = {"gate.weight": normal(rng, EXPERTS, HIDDEN), "gate.e_score_correction_bias": normal(rng, EXPERTS)}
    return gate | tensors


def close(routing, ids, weights):
    """Bound: a float32 product over HIDDEN moves a score by some 1e-6 of it, and renormalising adds no more."""
    np.testing.assert_array_equal(routing.expert_ids, ids)
    np.testing.assert_allclose(routing.weights, weights, rtol=1e-5)


def best(scores, k=TOP):
    return np.argsort(-scores, axis=-1, kind="stable")[..., :k]


def softmax(logits):
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


SCORES = {"sigmoid": sigmoid, "softmax": softmax, "sqrtsoftplus": lambda z: np.sqrt(np.logaddexp(z, 0))}


@pytest.mark.parametrize("scores", ["sigmoid", "softmax"])
@pytest.mark.parametrize("topk_method", ["noaux_tc", "group_limited_greedy", "greedy"])
@pytest.mark.parametrize("model_type", ["deepseek_v3", "glm4_moe"])
def test_scoring_func_and_topk_method_are_honoured(tmp_path, rng, scores, topk_method, model_type):
    tensors = deepseek(rng)
    if topk_method != "noaux_tc":
        del tensors["gate.e_score_correction_bias"]
    config = {"scoring_func": scores, "topk_method": topk_method, "n_group": 4, "topk_group": 2}
    config |= {"norm_topk_prob": False, "routed_scaling_factor": 1.5}
    router = checkpoints.load_router(write(tmp_path, model_type, "layers.0.mlp", tensors, **DEEPSEEK, **config), 0)
    x = normal(rng, 20, HIDDEN)
    score = SCORES[scores](x.astype(np.float64) @ tensors["gate.weight"].T.astype(np.float64))
    chosen = score + tensors.get("gate.e_score_correction_bias", 0)
    if topk_method != "greedy":
        groups = np.sort(chosen.reshape(20, 4, 2), -1)
        groups = groups.sum(-1) if topk_method == "noaux_tc" else groups[..., -1]
        kept = (np.arange(EXPERTS) // 2 == best(groups, 2)[..., None]).any(1)
        chosen = np.where(kept, chosen, -np.inf)
    ids = best(chosen)
    close(router(jnp.asarray(x)), ids, 1.5 * np.take_along_axis(score, ids, -1))


@pytest.mark.parametrize(
    ("model_type", "config", "message"),
    [
        ("deepseek_v3", {"scoring_func": "sqrtsoftplus"}, "scoring_func: found 'sqrtsoftplus', expected 'sigmoid' or"),
        ("deepseek_v3", {"scoring_func": None}, "scoring_func: found None"),
        ("deepseek_v3", {"topk_method": "best"}, "topk_method: found 'best', expected 'noaux_tc' or"),
        ("deepseek_v3", {"n_group": 3}, "n_group: found 3, expected a divisor of the 8 experts"),
        ("deepseek_v3", {"n_group": None}, "n_group: found None, expected a positive integer"),
        ("deepseek_v3", {"n_group": 2, "topk_group": 3}, "topk_group: found 3, expected at most the 2 groups"),
        ("deepseek_v3", {"n_group": 8, "topk_group": 2}, "num_experts_per_tok: found 3, expected at most the 2"),
        ("deepseek_v3", {"routed_scaling_factor": "2.5"}, "routed_scaling_factor: found '2.5', expected a"),
        ("deepseek_v3", {"routed_scaling_factor": 0}, "routed_scaling_factor: found 0"),
        ("deepseek_v3", {"norm_topk_prob": 1}, "norm_topk_prob: found 1, expected True or False"),
        ("deepseek_v3", {"num_experts_per_tok": 9}, "num_experts_per_tok: found 9, expected at most the"),
        ("deepseek_v2", {"topk_method": "noaux_tc"}, "topk_method: found 'noaux_tc'"),
        ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob: found True, expected False"),
        ("deepseek_v2", {"topk_method": "group_limited_greedy"}, "n_group: found None"),
        ("deepseek_v4", {"scoring_func": "softmax"}, "scoring_func: found 'softmax', expected 'sqrtsoftplus' or"),
        ("qwen3_moe", {"scoring_func": "sigmoid"}, "scoring_func: found 'sigmoid', expected 'softmax'"),
        ("qwen3_5_moe", {"norm_topk_prob": False}, "norm_topk_prob: found False, expected True"),
        ("ernie4_5_moe", {"moe_norm_min": 0.25}, "moe_norm_min: found 0.25"),
        ("phimoe", {"num_experts_per_tok": 3}, "num_experts_per_tok: found 3, expected 2"),
        ("phimoe", {"num_experts_per_tok": 2, "router_jitter_noise": -1}, "router_jitter_noise: found -1"),
    ],
)  # fmt: skip
def test_router_settings_are_checked(tmp_path, rng, model_type, config, message):
    (block,) = [family.blocks[0] for family in families.FAMILIES if model_type in family.model_types]
    groups = {"n_group": 1, "topk_group": 1} if model_type == "deepseek_v3" else {}
    write(tmp_path, model_type, f"layers.0.{block}", deepseek(rng), **DEEPSEEK, **groups | config)
    with pytest.raises(CheckpointError, match=f"config.json: {message}"):
        checkpoints.load_router(tmp_path, 0)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    ("model_type", "name", "shape"),
    [
        ("deepseek_v3", "gate.weight", (EXPERTS, HIDDEN)),
        ("deepseek_v3", "gate.e_score_correction_bias", (EXPERTS,)),
        ("gpt_oss", "router.bias", (EXPERTS,)),
    ],
)
def test_what_is_not_finite_is_refused(tmp_path, rng, model_type, name, shape, value):
    good = deepseek(rng) if model_type == "deepseek_v3" else {"router.weight": normal(rng, EXPERTS, HIDDEN)}
    bad = normal(rng, *shape, dtype=writer.BF16)
    bad.reshape(-1)[3] = value
    write(tmp_path, model_type, "layers.0.mlp", good | {name: bad}, n_group=1, topk_group=1, **DEEPSEEK)
    with pytest.raises(CheckpointError, match=rf"layers\.0\.mlp\.{name}: found {value}, expected finite"):
        checkpoints.load_router(tmp_path, 0)


@pytest.mark.parametrize("config", [{}, {"topk_method": "noaux_tc"}])
def test_a_selection_bias_that_is_missing_is_an_error(tmp_path, rng, config):
    tensors = deepseek(rng)
    del tensors["gate.e_score_correction_bias"]
    write(tmp_path, "deepseek_v3", "layers.0.mlp", tensors, n_group=1, topk_group=1, **config, **DEEPSEEK)
    with pytest.raises(CheckpointError, match=r"layers\.0\.mlp\.gate\.e_score_correction_bias"):
        checkpoints.load_router(tmp_path, 0)


@pytest.mark.parametrize(
    ("model_type", "extra", "config"),
    [
        ("deepseek_v3", None, {"topk_method": "greedy"}),  # selects without the bias that is there
        ("qwen3_moe", "gate.e_score_correction_bias", {}),
        ("qwen3_moe", "gate.bias", {}),
        ("qwen3_moe", "shared_expert.up_proj.weight", {}),
        ("qwen2_moe", "shared_experts.up_proj.weight", {}),
        ("glm4_moe", "e_score_correction_bias", {}),
        ("glm4_moe", "gate.tid2eid", {}),
        ("deepseek_v3", "pre_quant_scale", {"n_group": 1, "topk_group": 1}),
    ],
)
def test_tensors_of_the_block_that_nothing_reads_are_refused(tmp_path, rng, model_type, extra, config):
    tensors = {"gate.weight": normal(rng, EXPERTS, HIDDEN)}
    if model_type in ("deepseek_v3", "glm4_moe"):
        tensors = deepseek(rng)
    write(tmp_path, model_type, "layers.0.mlp", tensors, **DEEPSEEK, **config)
    if extra is not None:
        checkpoints.load_router(tmp_path, 0)
        write(tmp_path, model_type, "layers.0.mlp", {**tensors, extra: normal(rng, EXPERTS)}, **DEEPSEEK, **config)
    with pytest.raises(CheckpointError, match=(extra or "correction_bias") + ".*could change the result"):
        checkpoints.load_router(tmp_path, 0)


def test_ernie_selects_by_a_bias_of_one_row(tmp_path, rng):
    bias, weight, x = normal(rng, 1, EXPERTS), normal(rng, EXPERTS, HIDDEN), normal(rng, 9, HIDDEN)
    tensors = {"gate.weight": weight, "moe_statics.e_score_correction_bias": bias}
    config = {"moe_num_experts": EXPERTS, "moe_k": TOP, "moe_intermediate_size": WIDTH}
    router = checkpoints.load_router(write(tmp_path, "ernie4_5_moe", "layers.0.mlp", tensors, **config), 0)
    score = softmax(x.astype(np.float64) @ weight.T.astype(np.float64))
    ids = best(score + bias)
    weights = np.take_along_axis(score, ids, -1)
    close(router(jnp.asarray(x)), ids, weights / weights.sum(-1, keepdims=True))


@pytest.mark.parametrize("place", ["layers.0", "layers.0.moe"])
def test_gemma_4_normalises_and_scales(tmp_path, rng, place):
    proj, scale, factor = normal(rng, EXPERTS, HIDDEN), normal(rng, HIDDEN), normal(rng, EXPERTS)
    config = {"num_experts": EXPERTS, "moe_intermediate_size": WIDTH, "top_k_experts": TOP, "rms_norm_eps": 0.1}
    write(tmp_path, "gemma4_text", place, {}, **config)
    tensors = {"proj.weight": proj, "scale": scale, "per_expert_scale": factor}
    tensors = {f"layers.0.router.{name}": tensor for name, tensor in tensors.items()}
    writer.write_file(tmp_path / "more.safetensors", tensors | {"layers.0.mlp.up_proj.weight": proj})
    writer.write_file(tmp_path / "model.safetensors", {f"{place}.experts.0.up_proj.weight": proj})
    index = {name: "more.safetensors" for name in (*tensors, "layers.0.mlp.up_proj.weight")}
    index[f"{place}.experts.0.up_proj.weight"] = "model.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    x = normal(rng, 2, 9, HIDDEN).astype(np.float64)
    router = checkpoints.load_router(tmp_path, 0)
    normed = x / np.sqrt((x**2).mean(-1, keepdims=True) + 0.1) * scale / np.sqrt(HIDDEN)
    score = softmax(normed @ proj.T)
    ids = best(score)
    weights = np.take_along_axis(score, ids, -1)
    close(router(jnp.asarray(x, jnp.float32)), ids, weights / weights.sum(-1, keepdims=True) * factor[ids])


def test_no_tensor_of_gemma_4s_moe_is_left_out(tmp_path, rng):
    """What stands in the layer beside it is the layer's: attention, norms, a dense MLP."""
    config = {"num_experts": EXPERTS, "moe_intermediate_size": WIDTH, "top_k_experts": TOP}
    router = {"router.proj.weight": (EXPERTS, HIDDEN), "router.scale": (HIDDEN,), "router.per_expert_scale": (EXPERTS,)}
    tensors = {name: normal(rng, *shape) for name, shape in router.items()} | {"mlp.up_proj.weight": normal(rng, 2, 2)}
    config |= {"model_type": "gemma4_text", "hidden_size": HIDDEN}
    for place, extra in (("experts", "router.bias"), ("moe.experts", "moe.gate.weight")):
        whole = tensors | {f"{place}.0.up_proj.weight": np.zeros((2, 2), np.uint8)}
        writer.write(tmp_path, config, {f"layers.0.{name}": tensor for name, tensor in whole.items()})
        checkpoints.load_router(tmp_path, 0)
        whole[extra] = normal(rng, EXPERTS)
        writer.write(tmp_path, config, {f"layers.0.{name}": tensor for name, tensor in whole.items()})
        with pytest.raises(CheckpointError, match=rf"{extra}: .*could change the result"):
            checkpoints.load_router(tmp_path, 0)


def v4(rng):
    return {
        "gate.weight": normal(rng, EXPERTS, HIDDEN),
        "gate.tid2eid": rng.integers(0, EXPERTS, (VOCABULARY, TOP)),
    }


def test_hash_routing_is_by_token_id(tmp_path, rng):
    tensors = v4(rng)
    router = checkpoints.load_router(write(tmp_path, "deepseek_v4", "layers.2.ffn", tensors, **DEEPSEEK), 2)
    assert isinstance(router, HashRouter)
    x, token_ids = normal(rng, 2, 9, HIDDEN), rng.integers(0, VOCABULARY, (2, 9))
    ids = tensors["gate.tid2eid"][token_ids]
    score = SCORES["sqrtsoftplus"](x.astype(np.float64) @ tensors["gate.weight"].T.astype(np.float64))
    weights = np.take_along_axis(score, ids, -1)
    close(router(jnp.asarray(x), token_ids), ids, 1.5 * weights / weights.sum(-1, keepdims=True))


def test_deepseek_v4_has_other_routers_after_its_hash_layers(tmp_path, rng):
    """``gate.bias`` selects and is not added to the logits; the configuration says which layers are which."""
    tensors = {"gate.weight": normal(rng, EXPERTS, HIDDEN), "gate.bias": normal(rng, EXPERTS)}
    for config in ({}, {"num_hash_layers": 2}, {"mlp_layer_types": ["hash_moe"] * 3 + ["moe"]}):
        write(tmp_path, "deepseek_v4", "layers.3.ffn", tensors, **DEEPSEEK, **config)
        router = checkpoints.load_router(tmp_path, 3)
        assert isinstance(router, Router)
        assert router.bias is None
        np.testing.assert_array_equal(router.selection_bias, tensors["gate.bias"])
        assert router.method == jax_moe.DeepSeekV3(1, 1, 1.5, renormalize=True, scores="sqrtsoftplus")
    write(tmp_path, "deepseek_v4", "layers.3.ffn", tensors, **DEEPSEEK, num_hash_layers=4)
    with pytest.raises(CheckpointError, match=r"layers\.3\.ffn\.gate\.tid2eid"):
        checkpoints.load_router(tmp_path, 3)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (np.full((VOCABULARY, TOP), EXPERTS), r"found experts outside \[0, 8\)"),
        (np.full((VOCABULARY, TOP), -1), r"found experts outside \[0, 8\)"),
        (np.zeros((VOCABULARY, TOP + 1), int), r"found I64 \[20, 4\], expected I64 or I32 \[V, 3\]"),
        (np.zeros((VOCABULARY, TOP), np.float32), r"found F32 \[20, 3\], expected I64"),
    ],
)
def test_tables_of_tokens_are_checked(tmp_path, rng, table, message):
    write(tmp_path, "deepseek_v4", "layers.0.ffn", v4(rng) | {"gate.tid2eid": table}, **DEEPSEEK)
    with pytest.raises(CheckpointError, match=rf"layers\.0\.ffn\.gate\.tid2eid: {message}"):
        checkpoints.load_router(tmp_path, 0)


def test_a_table_has_a_row_for_each_token_of_the_vocabulary(tmp_path, rng):
    write(tmp_path, "deepseek_v4", "layers.0.ffn", v4(rng), vocab_size=VOCABULARY, **DEEPSEEK)
    checkpoints.load_router(tmp_path, 0)
    write(tmp_path, "deepseek_v4", "layers.0.ffn", v4(rng), vocab_size=VOCABULARY + 1, **DEEPSEEK)
    with pytest.raises(CheckpointError, match=r"tid2eid: found I64 \[20, 3\], expected I64 or I32 \[21, 3\]"):
        checkpoints.load_router(tmp_path, 0)


@pytest.fixture
def hash_router(rng):
    table = jnp.asarray(rng.integers(0, EXPERTS, (VOCABULARY, TOP)), jnp.int32)
    return HashRouter(jnp.asarray(normal(rng, EXPERTS, HIDDEN)), table, method=jax_moe.DeepSeekV3(1, 1))


def test_token_ids_outside_the_vocabulary_go_to_no_expert(hash_router):
    token_ids = jnp.asarray([0, -1, VOCABULARY, VOCABULARY - 1, -VOCABULARY - 1])
    routing = hash_router(jnp.ones((5, HIDDEN)), token_ids)
    np.testing.assert_array_equal((routing.expert_ids == -1).all(-1), [False, True, True, False, True])
    np.testing.assert_array_equal(routing.expert_ids[3], hash_router.token_table[-1])
    assert np.isfinite(routing.weights).all()


@pytest.mark.parametrize(
    ("x", "token_ids", "error", "message"),
    [
        (np.ones((2, HIDDEN), np.float32), np.zeros(3, np.int32), ValueError, r"token_ids: got shape \(3,\)"),
        (np.ones((2, HIDDEN), np.float32), np.zeros(2, np.float32), TypeError, "token_ids: got dtype float32"),
        (np.ones((2, HIDDEN), np.float32), [0, 1], TypeError, "token_ids: got list, needs an array"),
        (np.ones((2, 5), np.float32), np.zeros(2, np.int32), ValueError, r"x: got shape \(2, 5\), needs \[..., 32\]"),
    ],
)  # fmt: skip
def test_hash_routers_check_their_arguments(hash_router, x, token_ids, error, message):
    with pytest.raises(error, match=f"^{message}"):
        hash_router(x, token_ids)


def test_hash_routers_are_exported(hash_router):
    x, token_ids = jnp.ones((4, HIDDEN)), jnp.arange(4)
    compiled = jax.jit(lambda router, x, ids: router(x, ids))
    loaded = jax.export.deserialize(bytearray(jax.export.export(compiled)(hash_router, x, token_ids).serialize()))
    jax.tree.map(helpers.assert_bit_equal, loaded.call(hash_router, x, token_ids), compiled(hash_router, x, token_ids))


def shared_expert(rng, module, names=("gate_proj", "up_proj", "down_proj"), biases=()):
    tensors = {}
    for name in names:
        rows, columns = (HIDDEN, WIDTH) if name == names[-1] else (WIDTH, HIDDEN)
        tensors[f"{module}.{name}.weight"] = normal(rng, rows, columns, dtype=writer.BF16) / 8
        if name in biases:
            tensors[f"{module}.{name}.bias"] = normal(rng, rows, dtype=writer.BF16)
    return tensors


def statement(x, tensors, module, act, names=("gate_proj", "up_proj", "down_proj")):
    """The expert in float64; a bias that is not there is 0."""

    def linear(x, name):
        bias = tensors.get(f"{module}.{name}.bias", 0)
        return x @ tensors[f"{module}.{name}.weight"].astype(np.float64).T + np.asarray(bias, np.float64)

    return linear(act(*(linear(x, name) for name in names[:-1])), names[-1])


def swiglu(gate, up):
    return gate * sigmoid(gate) * up


def assert_close(y, want):
    """x is exact, and the intermediate is rounded once to bfloat16, each value by at most 2^-9 of it."""
    assert np.linalg.norm(np.asarray(y) - want) < 2**-9 * np.linalg.norm(want)


@pytest.mark.parametrize("biases", [("gate_proj", "up_proj", "down_proj"), ("up_proj",), ("down_proj",), ()])
def test_biases_of_a_shared_expert_are_added(tmp_path, rng, biases):
    tensors = shared_expert(rng, "shared_experts", biases=biases)
    write(tmp_path, "ernie4_5_moe", "layers.0.mlp", tensors, **QWEN)
    shared = checkpoints.load_shared_expert(tmp_path, 0)
    x = normal(rng, 2, 5, HIDDEN, dtype=writer.BF16)
    want = statement(x.astype(np.float64), tensors, "shared_experts", swiglu)
    assert_close(shared(jnp.asarray(x), jax_moe.SwiGLU()), want)
    assert (shared.gate_up_bias is None) == (set(biases) <= {"down_proj"})
    assert (shared.down_bias is None) == ("down_proj" not in biases)


def test_the_gate_of_a_shared_expert_multiplies_it(tmp_path, rng):
    tensors = shared_expert(rng, "shared_expert") | {"shared_expert_gate.weight": normal(rng, 1, HIDDEN)}
    write(tmp_path, "qwen3_next", "layers.0.mlp", tensors, **QWEN)
    shared = checkpoints.load_shared_expert(tmp_path, 0)
    x = normal(rng, 6, HIDDEN, dtype=writer.BF16)
    wide = x.astype(np.float64)
    gate = sigmoid(wide @ tensors["shared_expert_gate.weight"].astype(writer.BF16).astype(np.float64).T)
    assert_close(shared(jnp.asarray(x), jax_moe.SwiGLU()), gate * statement(wide, tensors, "shared_expert", swiglu))


def test_a_shared_expert_may_have_a_clamp_of_its_own(tmp_path, rng):
    """Step-3.5, whose shared expert stands beside the block: 6.25 is the least limit."""
    limits = {"swiglu_limits": [None], "swiglu_limits_shared": [6.25]}
    write(tmp_path, "step3p5", "layers.0.moe", {}, moe_num_experts=EXPERTS, moe_intermediate_size=WIDTH, **limits)
    tensors = shared_expert(rng, "layers.0.share_expert")
    tensors = {name: (tensor * 16).astype(writer.BF16) for name, tensor in tensors.items()}
    writer.write_file(
        tmp_path / "model.safetensors", {**tensors, "layers.0.moe.experts.0.up_proj.weight": np.zeros((2, 2), np.uint8)}
    )
    shared = checkpoints.load_shared_expert(tmp_path, 0)
    x = normal(rng, 6, HIDDEN, dtype=writer.BF16)

    def clamped(gate, up):
        assert (gate > 6.25).any()
        return np.minimum(gate * sigmoid(gate), 6.25) * np.clip(up, -6.25, 6.25)

    y = shared(jnp.asarray(x), checkpoints.moe_options(tmp_path, 0)["activation"])
    want = statement(x.astype(np.float64), tensors, "layers.0.share_expert", clamped)
    # Beside the rounding of the intermediate, the clamp before the SiLU instead of after it: 2^-9 of a value each.
    assert np.linalg.norm(np.asarray(y) - want) < 2**-8 * np.linalg.norm(want)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shared_expert_gate.weight": None}, r"layers\.0\.mlp\.shared_expert_gate"),
        ({"shared_expert_gate.weight": (2, HIDDEN)}, r"shared_expert_gate: found \[2, 32\], expected \[1, 32\]"),
        ({"shared_expert_gate.bias": (1,)}, r"shared_expert_gate: found .*, expected \[1, 32\], no bias"),
        ({"shared_expert.up_proj.bias": (3,)}, r"shared_expert\.up_proj\.bias: found F32 \[3\], expected"),
        ({"shared_expert.norm.weight": (3,)}, r"shared_expert\.norm\.weight: found a tensor that"),
        ({"shared_expert.up_proj.weight": (WIDTH, 16)}, r"up_proj: found \[48, 16\], expected \[48, 32\]"),
    ],
)  # fmt: skip
def test_shared_experts_are_checked(tmp_path, rng, change, message):
    tensors = shared_expert(rng, "shared_expert") | {"shared_expert_gate.weight": normal(rng, 1, HIDDEN)}
    for name, shape in change.items():
        if shape is None:
            del tensors[name]
        else:
            tensors[name] = normal(rng, *shape)
    write(tmp_path, "qwen2_moe", "layers.0.mlp", tensors, **QWEN)
    with pytest.raises(CheckpointError, match=message):
        checkpoints.load_shared_expert(tmp_path, 0)


def test_a_shared_expert_that_the_configuration_has_and_the_files_do_not_is_an_error(tmp_path, rng):
    write(tmp_path, "glm4_moe", "layers.0.mlp", deepseek(rng), **DEEPSEEK)
    assert checkpoints.load_shared_expert(tmp_path, 0) is None
    write(tmp_path, "glm4_moe", "layers.0.mlp", deepseek(rng), n_shared_experts=1, **DEEPSEEK)
    with pytest.raises(CheckpointError, match=r"n_shared_experts: found 1, .*layers\.0\.mlp\.shared_experts"):
        checkpoints.load_shared_expert(tmp_path, 0)


def test_a_shared_expert_made_by_hand_is_checked_when_it_is_called():
    shared = SharedExpert(jnp.ones((2, 16, 32)), jnp.ones((32, 16)), gate_up_bias=jnp.ones((2, 8)))
    with pytest.raises(ValueError, match=r"SharedExpert\.gate_up_bias: got shape \(2, 8\), needs \[2, 16\]"):
        shared(jnp.ones((3, 32)), jax_moe.SwiGLU())
    shared = SharedExpert(jnp.ones((2, 16, 32)), jnp.ones((32, 16)), gate=jnp.ones((32, 1)))
    with pytest.raises(ValueError, match=r"SharedExpert\.gate: got shape \(32, 1\), needs \[1, 32\]"):
        shared(jnp.ones((3, 32)), jax_moe.SwiGLU())


@pytest.mark.parametrize("name", ["step3p7-limits", "deepseek_v4-hash", "gemma4", "qwen3_next", "ernie4_5_moe"])
def test_routers_and_shared_experts_go_along_in_a_conversion(tmp_path, name):
    """Also where they stand beside the block, or the block is the layer."""
    shutil.copy(BLOCKS / name / "config.json", tmp_path)
    shutil.copy(BLOCKS / name / "model.safetensors", tmp_path)
    checkpoints.convert(tmp_path, tmp_path / "out")
    (layer,) = checkpoints.list_layers(tmp_path / "out")
    for load in (checkpoints.load_router, checkpoints.load_shared_expert, checkpoints.load_experts):
        before, after = load(tmp_path, layer), load(tmp_path / "out", layer)
        assert jax.tree.structure(before) == jax.tree.structure(after)
        jax.tree.map(helpers.assert_bit_equal, before, after)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nemotron_h-latent", "the experts stand between linear layers to and from .* values"),
        ("gemma4", "the router sees the layer's residual and the experts a norm of it"),
    ],
)
def test_a_module_of_a_block_that_is_no_function_of_one_x_is_refused(name, message):
    nn = pytest.importorskip("jax_moe.nn")
    (layer,) = checkpoints.list_layers(BLOCKS / name)
    with pytest.raises(CheckpointError, match=f"{message}.*one by one"):
        nn.MoE.from_checkpoint(BLOCKS / name, layer)


@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.int8, jnp.uint16, jnp.int16, jnp.uint32, jnp.int32], ids=str)
def test_token_ids_of_any_integer_type(dtype):
    """A vocabulary is larger than a narrow type holds: comparing in that type would lose every expert."""
    table = jnp.arange(70_000, dtype=jnp.int32)[:, None] % 4
    router = HashRouter(jnp.ones((4, 32)), table, method=jax_moe.DeepSeekV3(1, 1))
    ids = jnp.asarray([0, 3, 102], dtype)
    routing = router(jnp.ones((3, 32)), ids)
    np.testing.assert_array_equal(routing.expert_ids[:, 0], np.array([0, 3, 102]) % 4)


def test_leaves_may_be_numpy_arrays():
    x = jnp.ones((3, 32))
    hashed = HashRouter(np.ones((4, 32), np.float32), np.zeros((9, 2), np.int32), method=jax_moe.DeepSeekV3(1, 1))
    assert hashed(x, np.arange(3)).expert_ids.shape == (3, 2)
    scaled = Router(np.ones((4, 32), np.float32), expert_scale=np.full(4, 2.0, np.float32), k=2)
    assert scaled(x).weights.sum() == 6
