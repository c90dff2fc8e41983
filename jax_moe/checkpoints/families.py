"""The model families whose expert layers can be loaded: one table entry each, told apart by ``config.json``.

Defaults of settings are those of each family's configuration class in transformers 5.24, whose modelling code is also
the source of the rules, where nothing else is said. ``docs/checkpoint-formats.md`` has what an entry rests on.
"""

from collections.abc import Callable
import dataclasses
import functools

from jax_moe import activations, arguments, routing
from jax_moe.checkpoints.family import Family as Family, GATED, hidden_act, NUM_EXPERTS as NUM_EXPERTS
from jax_moe.checkpoints.files import brief, CheckpointError
from jax_moe.checkpoints.settings import Config as Config, Settings

_Method = Callable[[Settings], routing.Method]

_MIXTRAL = ("w1", "w3", "w2")
_BIAS = "gate.e_score_correction_bias"


def _softmax(renormalize: bool) -> _Method:
    """Softmax, the k largest; ``renormalize``: where the configuration does not say."""

    def method(settings: Settings) -> routing.Method:
        settings.only("scoring_func", "softmax")
        return routing.Softmax(renormalize=settings.flag("norm_topk_prob", default=renormalize))

    return method


def _renormalized(settings: Settings) -> routing.Method:
    """Softmax over the k largest, in families without a setting for it; some runtimes read one nevertheless."""
    settings.only("scoring_func", "softmax")
    settings.only("norm_topk_prob", True)
    return routing.Softmax(renormalize=True)


def _grouped(
    *,
    groups: int | None = 1,
    top_groups: int | None = 1,
    renormalize: bool = True,
    scaling_factor: float = 1.0,
    scores: routing.Scores = "sigmoid",
    topk_method: str = "noaux_tc",
) -> _Method:
    """DeepSeek's rules, by ``topk_method``; the arguments are the values where the configuration does not say.

    Without ``groups`` and ``top_groups`` a configuration that wants groups must say how many.
    """

    def method(settings: Settings) -> routing.Method:
        rule = settings.choice("topk_method", known=("noaux_tc", "group_limited_greedy", "greedy"), default=topk_method)
        number, best = 1, 1
        if rule != "greedy":
            number = settings.integer("n_group", "num_expert_group", default=groups)
            best = settings.integer("topk_group", default=top_groups)
            experts = settings.integer(*NUM_EXPERTS)
            if experts % number:
                raise settings.error(
                    settings.key("n_group", "num_expert_group"), number, f"a divisor of the {experts} experts"
                )
            if best > number:
                raise settings.error("topk_group", best, f"at most the {number} groups")
        values = {
            "num_groups": number,
            "top_groups": best,
            "scaling_factor": settings.number("routed_scaling_factor", default=scaling_factor),
            "renormalize": settings.flag("norm_topk_prob", "moe_renormalize", default=renormalize),
            "scores": settings.choice(
                "scoring_func",
                "moe_router_activation_func",
                known=("sigmoid", "softmax"),
                default=scores,
            ),
        }
        return routing.DeepSeekV3(**values) if rule == "noaux_tc" else routing.DeepSeekV2(**values)

    return method


def _deepseek_v2(settings: Settings) -> routing.Method:
    # Renormalised weights are not scaled by DeepSeek's own code, and never renormalised by transformers.
    settings.only("norm_topk_prob", False)
    settings.choice("topk_method", known=("greedy", "group_limited_greedy"), default="greedy")
    defaults = {"groups": None, "top_groups": None, "renormalize": False, "topk_method": "greedy"}
    return _grouped(**defaults, scores="softmax")(settings)


def _dots1(settings: Settings) -> routing.Method:
    # The published configuration has the name of the selection's method here; llama.cpp's converter knows no other.
    if settings.config.get("scoring_func") == "noaux_tc":
        settings = dataclasses.replace(settings, config=settings.config | {"scoring_func": "sigmoid"})
    return _grouped(renormalize=False)(settings)


def _biased(*, scaling_factor: float | str = 1.0, default: float = 1.0, scores: routing.Scores = "sigmoid") -> _Method:
    """The k largest biased scores, always renormalised, times a factor or the setting that has it."""

    def method(settings: Settings) -> routing.Method:
        for key in ("scoring_func", "moe_router_activation"):
            settings.only(key, scores)
        for key in (
            "use_routing_bias",
            "use_moe_router_bias",
            "moe_use_aux_free",
            "norm_topk_prob",
            "norm_expert_weight",
        ):
            settings.only(key, True)
        factor = settings.number(scaling_factor, default=default) if isinstance(scaling_factor, str) else scaling_factor
        return routing.DeepSeekV3(1, 1, factor, renormalize=True, scores=scores)

    return method


def _deepseek_v4(settings: Settings) -> routing.Method:
    # A softmax is renormalised by transformers and not by DeepSeek's own code, so it is no choice here.
    scores = settings.choice("scoring_func", known=("sqrtsoftplus", "sigmoid"), default="sqrtsoftplus")
    settings.only("topk_method", "noaux_tc")
    settings.only("norm_topk_prob", True)
    factor = settings.number("routed_scaling_factor", default=1.5)
    return routing.DeepSeekV3(1, 1, factor, renormalize=True, scores=scores)


def _deepseek_v4_table(settings: Settings) -> str | None:
    """The first layers route by token ids: as ``mlp_layer_types`` says, or as many as ``num_hash_layers``."""
    types = settings.config.get("mlp_layer_types")
    layer = settings.layer or 0
    if isinstance(types, list):
        by_hash = layer < len(types) and types[layer] == "hash_moe"
    else:
        by_hash = layer < settings.integer("num_hash_layers", default=3, least=0)
    return "gate.tid2eid" if by_hash else None


def _clamped(*, alpha: float = 1.0, beta: float = 0.0, limit: float) -> Callable[[Settings], activations.Activation]:
    """SwiGLU clamped before the SiLU; alpha and limit are the values where the configuration does not say."""

    def activation(settings: Settings) -> activations.Activation:
        settings.choice("hidden_act", known=("silu", "swigluoai"), default="silu")
        alpha_here = alpha if alpha == 1.0 else settings.number("swiglu_alpha", default=alpha)
        return activations.SwiGLU(alpha_here, beta, settings.number("swiglu_limit", default=limit))

    return activation


# From here on, silu(L) is L within half a unit in the last place of bfloat16: L * exp(-L) / (1 + exp(-L)) <= L * 2**-9.
_LEAST_STEP_LIMIT = 6.25


def _step_activation(key: str) -> Callable[[Settings], activations.Activation]:
    """Step's SwiGLU with a clamp in some layers: of gate *after* the SiLU, which SwiGLU does before it.

    For a limit L the two differ only where gate exceeds L, by less than L * exp(-L): for the published 7 and 16 that
    vanishes in the rounding of the intermediate to bfloat16. A smaller limit is an error.
    """

    def activation(settings: Settings) -> activations.Activation:
        settings.only("hidden_act", "silu")
        limit = settings.value(key)
        if not limit:
            return activations.SwiGLU()
        if settings.number(key) < _LEAST_STEP_LIMIT:
            raise settings.error(
                key, limit, f"no limit or one of at least {_LEAST_STEP_LIMIT}: the clamp follows the SiLU"
            )
        return activations.SwiGLU(limit=float(limit))

    return activation


def _ernie(settings: Settings) -> routing.Method:
    # The sum of the weights is at least moe_norm_min: no matter while that is far below any softmax that is chosen.
    if settings.number("moe_norm_min", default=1e-12) > 1e-6:
        raise settings.error("moe_norm_min", settings.value("moe_norm_min"), "a positive number of at most 1e-6")
    return _biased(scores="softmax")(settings)


def _phimoe(settings: Settings) -> routing.Method:
    return routing.SparseMixer(settings.number("router_jitter_noise", default=0.01, least=0))


def _relu2(settings: Settings) -> activations.Activation:
    settings.only("mlp_hidden_act", "relu2")
    return activations.ReLU2()


def _gemma4(settings: Settings) -> str | None:
    return "the router sees the layer's residual and the experts a norm of it"


_DEEPSEEK_V3 = Family(
    name="deepseek-v3",
    model_types=("deepseek_v3", "deepseek_v32", "kimi_k2", "kimi_k25"),
    top_k=8,
    blocks=("mlp",),
    intermediate_size="moe_intermediate_size",
    method=_grouped(groups=8, top_groups=4, scaling_factor=2.5),
    selection_bias=(_BIAS,),
    shared_expert=("shared_experts",),
)
_QWEN3_MOE = Family(
    name="qwen3-moe",
    model_types=("qwen3_moe",),
    top_k=8,
    blocks=("mlp",),
    intermediate_size="moe_intermediate_size",
    method=_softmax(renormalize=False),
)
_QWEN2_MOE = dataclasses.replace(
    _QWEN3_MOE,
    name="qwen2-moe",
    model_types=("qwen2_moe",),
    top_k=4,
    shared_expert=("shared_expert",),
    shared_expert_gate="shared_expert_gate",
)
_MIXTRAL_FAMILY = Family(
    name="mixtral",
    model_types=("mixtral", "minimax"),
    top_k=2,
    blocks=("block_sparse_moe",),
    intermediate_size="intermediate_size",
    method=_renormalized,
    projections=(_MIXTRAL, GATED),
)

FAMILIES = (
    _QWEN3_MOE,
    _QWEN2_MOE,
    dataclasses.replace(
        _QWEN2_MOE, name="qwen3-next", model_types=("qwen3_next",), top_k=10, method=_softmax(renormalize=True)
    ),
    dataclasses.replace(
        _QWEN2_MOE, name="qwen3.5-moe", model_types=("qwen3_5_moe", "qwen3_5_moe_text"), top_k=8, method=_renormalized
    ),
    dataclasses.replace(
        _QWEN3_MOE,
        name="qwen3-vl-moe",
        model_types=("qwen3_vl_moe", "qwen3_vl_moe_text"),
        top_k=4,
        method=_renormalized,
    ),
    dataclasses.replace(
        _QWEN3_MOE,
        name="qwen3-omni-moe",
        model_types=("qwen3_omni_moe", "qwen3_omni_moe_thinker", "qwen3_omni_moe_text"),
        method=_softmax(renormalize=True),
        roots=("thinker.model.",),  # beside the thinker, the talker has experts
    ),
    dataclasses.replace(_QWEN3_MOE, name="olmoe", model_types=("olmoe",), intermediate_size="intermediate_size"),
    dataclasses.replace(
        _DEEPSEEK_V3,
        name="deepseek-v2",
        model_types=("deepseek_v2",),
        top_k=None,
        method=_deepseek_v2,
        selection_bias=(),
    ),
    _DEEPSEEK_V3,
    Family(
        name="deepseek-v4",
        model_types=("deepseek_v4",),
        top_k=6,
        blocks=("ffn", "mlp"),
        intermediate_size="moe_intermediate_size",
        method=_deepseek_v4,
        activation=_clamped(limit=10.0),
        projections=(_MIXTRAL, GATED),
        selection_bias=("gate.bias", _BIAS),
        token_table=_deepseek_v4_table,
        shared_expert=("shared_experts",),
    ),
    dataclasses.replace(_DEEPSEEK_V3, name="glm4-moe", model_types=("glm4_moe",), method=_grouped()),
    dataclasses.replace(
        _DEEPSEEK_V3,
        name="glm4-moe-lite",
        model_types=("glm4_moe_lite",),
        top_k=4,
        method=_grouped(scaling_factor=1.8),
    ),
    dataclasses.replace(
        _DEEPSEEK_V3, name="glm-moe-dsa", model_types=("glm_moe_dsa",), method=_grouped(scaling_factor=2.5)
    ),
    dataclasses.replace(_DEEPSEEK_V3, name="dots1", model_types=("dots1",), top_k=None, method=_dots1),
    dataclasses.replace(
        _DEEPSEEK_V3,
        name="exaone-moe",
        model_types=("exaone_moe",),
        method=_grouped(scaling_factor=2.5),
        selection_bias=("e_score_correction_bias", _BIAS),
    ),
    dataclasses.replace(
        _DEEPSEEK_V3,
        name="kimi-linear",
        model_types=("kimi_linear",),
        blocks=("block_sparse_moe", "mlp"),
        method=_grouped(scaling_factor=2.446),
        projections=(_MIXTRAL, GATED),
    ),
    _MIXTRAL_FAMILY,
    dataclasses.replace(
        _MIXTRAL_FAMILY,
        name="minimax-m2",
        model_types=("minimax_m2",),
        top_k=8,
        method=_biased(),
        selection_bias=("e_score_correction_bias",),
    ),
    dataclasses.replace(
        _MIXTRAL_FAMILY,
        name="minimax-m3",
        model_types=("minimax_m3", "minimax_m3_vl", "minimax_m3_vl_text"),
        top_k=4,
        blocks=("block_sparse_moe", "mlp"),
        method=_biased(scaling_factor="routed_scaling_factor", default=2.0),
        activation=_clamped(alpha=1.702, beta=1.0, limit=7.0),
        selection_bias=("e_score_correction_bias", _BIAS),
        shared_expert=("shared_experts",),
    ),
    Family(
        name="ernie4.5-moe",
        model_types=("ernie4_5_moe",),
        top_k=6,
        blocks=("mlp",),
        intermediate_size="moe_intermediate_size",
        method=_ernie,
        selection_bias=("moe_statics.e_score_correction_bias", "gate.moe_statics.e_score_correction_bias"),
        shared_expert=("shared_experts",),
    ),
    Family(
        name="step3.5",
        model_types=("step3p5", "step3p7"),
        top_k=8,
        blocks=("moe", "mlp"),
        intermediate_size="moe_intermediate_size",
        method=_biased(scaling_factor="moe_router_scaling_factor"),
        activation=_step_activation("swiglu_limits"),
        selection_bias=("router_bias", _BIAS),
        shared_expert=("../share_expert", "shared_experts"),
        shared_activation=_step_activation("swiglu_limits_shared"),
    ),
    Family(
        name="phimoe",
        model_types=("phimoe",),
        top_k=2,
        blocks=("block_sparse_moe", "mlp"),
        intermediate_size="intermediate_size",
        method=_phimoe,
        projections=(_MIXTRAL, GATED),
        router=("gate", "router"),
    ),
    Family(
        name="granitemoe",
        model_types=("granitemoe",),
        top_k=2,
        blocks=("block_sparse_moe",),
        intermediate_size="intermediate_size",
        method=_renormalized,
        router=("router.layer", "router"),
    ),
    Family(
        name="gemma4",
        model_types=("gemma4", "gemma4_text"),
        blocks=("", "moe"),
        intermediate_size="moe_intermediate_size",
        method=_renormalized,
        activation=functools.partial(hidden_act, key="hidden_activation", default="gelu_pytorch_tanh"),
        router=("router", "../router"),
        normalized_router=True,
        apart=_gemma4,
    ),
    Family(
        name="nemotron-h",
        model_types=("nemotron_h",),
        top_k=2,
        blocks=("mixer",),
        intermediate_size="moe_intermediate_size",
        method=_grouped(),
        activation=_relu2,
        projections=(("up_proj", "down_proj"),),
        selection_bias=(_BIAS,),
        shared_expert=("shared_experts",),
        others=("fc1_latent_proj", "fc2_latent_proj"),
    ),
    Family(
        name="llama-4",
        model_types=("llama4", "llama4_text"),
        top_k=1,
        blocks=("feed_forward",),
        intermediate_size="intermediate_size",
        method=lambda settings: routing.Llama4(),
        router=("router",),
        shared_expert=("shared_expert",),
        weight_on="input",
    ),
    Family(
        name="gpt-oss",
        model_types=("gpt_oss",),
        top_k=4,
        blocks=("mlp",),
        intermediate_size="intermediate_size",
        method=_renormalized,
        activation=_clamped(alpha=1.702, beta=1.0, limit=7.0),
        router=("router",),
        router_bias=True,
        interleaved=True,
    ),
)

_registered: list[Family] = []


def register_family(family: Family) -> None:
    """Adds a model family of one's own; it goes before those of the table with the same ``model_type``.

    Raises:
      TypeError: ``family`` is not a Family.
    """
    arguments.instance("family", family, Family)
    _registered.insert(0, family)


# Where a model of several parts keeps the text model's configuration.
_PARTS = ("thinker_config", "text_config", "llm_config", "language_config")


def family_of(config: Config, where: str) -> tuple[Family, Config]:
    """The family of a model, and its text model's part of the config.

    Raises:
      CheckpointError: the model type is not in the table; ``where`` names the file.
    """
    types = [config.get("model_type")]
    while (part := next((part for part in _PARTS if config.get(part) is not None), None)) is not None:
        if not isinstance(config[part], dict):
            raise CheckpointError(f"{where}: {part}: found {type(config[part]).__name__}, expected an object")
        config = config[part]
        types.append(config.get("model_type"))
    families = (*_registered, *FAMILIES)
    # The whole model's type first: it says how to read the text part, whatever type that part names.
    for model_type in types:
        for family in families:
            if model_type in family.model_types:
                return family, config
    known = ", ".join(dict.fromkeys(model_type for family in families for model_type in family.model_types))
    found = next((model_type for model_type in reversed(types) if model_type is not None), None)
    raise CheckpointError(
        f"{where}: model_type: found {brief(found)}, expected one of {known}, or one that register_family adds"
    )
