"""Spellings of the router's settings that a published ``config.json`` may have, by the family's rule.

Each is a change of the text model's part of ``minimal.json`` (see ``generate_blocks.py``): a key set, None being
``null``, or removed where its value is REMOVE.
"""

REMOVE = "(remove)"
_SCALED = ({"routed_scaling_factor": 1.75}, {"routed_scaling_factor": 2}, {"routed_scaling_factor": None})
_NORM = ({"norm_topk_prob": True}, {"norm_topk_prob": False}, {"norm_topk_prob": None})
_K = ({"num_experts_per_tok": 3}, {"num_experts_per_tok": 1}, {"num_experts_per_tok": None})
_GROUPED = (
    *_K,
    *_SCALED,
    *_NORM,
    {"n_group": 1, "topk_group": 1},
    {"n_group": 3, "topk_group": 2, "num_experts_per_tok": 2},
    {"n_group": 4},
    {"n_group": 2, "topk_group": 2},
    {"n_group": None},
    {"topk_group": None},
    {"n_group": None, "topk_group": None},
)
_EXPERTS = {
    "n_routed_experts": ({"n_routed_experts": REMOVE, "num_local_experts": 12},),
    "num_local_experts": ({"num_local_experts": REMOVE, "num_experts": 12},),
    "num_experts": ({"num_experts": REMOVE, "num_local_experts": 12},),
}
_LIMITS = ({"swiglu_limit": 4.0}, {"swiglu_limit": 3}, {"swiglu_limit": None})
_ALPHA = ({"swiglu_alpha": 1.0}, {"swiglu_alpha": None})
_ACT = ({"hidden_act": "gelu_pytorch_tanh"}, {"hidden_act": "swish"}, {"hidden_act": "gelu"}, {"hidden_act": None})
_NO_TYPE = {"model_type": REMOVE}  # of the text model: the whole model's type says which it is
_FORCED = (*_K, {"norm_topk_prob": False}, *_ACT)

VARIANTS = {
    "deepseek_v3": (
        *_K,
        *_SCALED,
        *_NORM,
        *_ACT,
        {"n_routed_experts": REMOVE, "num_local_experts": 24},
        {"n_routed_experts": 24, "num_local_experts": 24},
        {"n_group": 4, "topk_group": 2},
        {"n_group": 1, "topk_group": 1},
        {"n_group": 4},
        {"topk_group": 8},
        {"n_group": None},
        {"topk_group": None},
        {"scoring_func": "sigmoid", "topk_method": "noaux_tc"},
    ),
    "deepseek_v32": (*_SCALED, *_NORM, {"n_group": 4, "topk_group": 2}, {"n_group": None}),
    "deepseek_v4": (
        *_K,
        *_SCALED,
        *_NORM,
        *_LIMITS,
        *_EXPERTS["n_routed_experts"],
        {"scoring_func": "sigmoid"},
        {"scoring_func": "softmax"},
        {"scoring_func": None},
        {"n_group": 4, "topk_group": 2},
        {"num_hash_layers": 2},
        {"moe_intermediate_size": REMOVE, "intermediate_size": 32},
    ),
    "deepseek_v4-hash": (
        {"num_hash_layers": 2},
        {"num_hash_layers": 3},
        {"mlp_layer_types": ["moe", "hash_moe", "moe", "moe"]},
        {"routed_scaling_factor": 1.75},
    ),
    "glm4_moe": (*_GROUPED, *_EXPERTS["n_routed_experts"]),
    "glm4_moe_lite": _GROUPED,
    "glm_moe_dsa": (*_GROUPED, {"n_routed_experts": REMOVE, "num_experts": 12}),
    # The published config: what selects is named where others name what scores.
    "dots1": (*_GROUPED, {"n_shared_experts": 2}, {"scoring_func": "noaux_tc"}, {"scoring_func": "sigmoid"}),
    "exaone_moe": _GROUPED,
    "kimi_linear": (
        *_GROUPED,
        {"num_experts_per_token": 3},
        {"num_experts_per_token": 8, "num_experts_per_tok": 2},
        {"moe_renormalize": False},
        {"moe_renormalize": None},
        {"moe_renormalize": True, "norm_topk_prob": False},
        {"norm_topk_prob": False, "moe_renormalize": True},
        {"num_expert_group": 3, "topk_group": 2, "num_experts_per_token": 2},
        {"num_expert_group": 1, "n_group": 2, "topk_group": 1, "num_experts_per_token": 2},
        *_EXPERTS["num_experts"],
    ),
    "nemotron_h": (*_GROUPED, {"mlp_hidden_act": "relu2"}, {"mlp_hidden_act": "silu"}, *_EXPERTS["n_routed_experts"]),
    "qwen2_moe": (*_K, *_NORM, *_ACT),
    "qwen3_moe": (*_K, *_NORM, *_EXPERTS["num_experts"], {"num_experts": 12, "num_local_experts": 12}),
    "qwen3_next": (*_K, *_NORM),
    "qwen3_5_moe": (*_K, *_NORM, _NO_TYPE),
    "qwen3_vl_moe": (*_K, *_NORM, *_EXPERTS["num_experts"], _NO_TYPE),
    "qwen3_omni_moe": (*_K, *_NORM, _NO_TYPE),
    "olmoe": (*_K, *_NORM, *_EXPERTS["num_experts"]),
    "mixtral": (*_FORCED, *_EXPERTS["num_local_experts"]),
    "minimax": (*_FORCED, *_EXPERTS["num_local_experts"]),
    "minimax_m2": (
        *_FORCED,
        *_EXPERTS["num_local_experts"],
        {"scoring_func": "sigmoid", "use_routing_bias": True},
        {"routed_scaling_factor": 2.0},
    ),
    "minimax_m3": (
        *_K,
        *_SCALED,
        *_LIMITS,
        *_ALPHA,
        {"hidden_act": "gelu"},
        *_EXPERTS["num_local_experts"],
        _NO_TYPE,
        {"model_type": "minimax_m2"},
    ),
    "ernie4_5_moe": (
        {"moe_k": 3},
        {"moe_k": REMOVE, "num_experts_per_tok": 3},
        {"moe_k": 6, "num_experts_per_tok": 3},
        {"moe_num_experts": REMOVE, "num_experts": 12},
        {"moe_norm_min": 0.9},
        {"moe_norm_min": None},
        {"moe_num_shared_experts": 2},
    ),
    "phimoe": (*_K, {"router_jitter_noise": 0.2}, {"router_jitter_noise": 0}, {"router_jitter_noise": None}),
    "granitemoe": _FORCED,
    "gemma4": ({"top_k_experts": 2}, {"top_k_experts": None}, {"rms_norm_eps": 1.0}, _NO_TYPE),
    "step3p7": (
        {"moe_router_scaling_factor": 3.0},
        {"moe_router_scaling_factor": None},
        {"num_experts_per_tok": REMOVE, "moe_top_k": 3},
        {"num_experts_per_tok": 8, "moe_top_k": 3},
        {"moe_top_k": 3, "num_experts_per_tok": 8},
        {"n_routed_experts": REMOVE, "moe_num_experts": 12},
        {"swiglu_limits": [None, None, None, None]},
        {"swiglu_limits": [7, 7, 7, 0]},
        {"swiglu_limits": None},
        _NO_TYPE,
        {"model_type": "step3p7"},
    ),
    "llama4": (*_K, *_ACT),
    "gpt_oss": (*_K, *_LIMITS, *_ALPHA, *_EXPERTS["num_local_experts"], {"norm_topk_prob": False}),
}

_IGNORED = {"norm_topk_prob": False}  # by transformers, which renormalises all the same; other runtimes may not
_UNKNOWN = {"hidden_act": "gelu"}  # GELU without the approximation
_UNFIT = {"n_group": 4}  # and one group kept, of fewer experts than a token goes to: transformers takes any then
_REFUSED = {
    "deepseek_v4": (_IGNORED, {"moe_intermediate_size": REMOVE, "intermediate_size": 32}),
    "kimi_linear": (
        {"num_experts_per_tok": 3},
        {"num_experts_per_tok": 1},
        {"n_group": 3, "topk_group": 2, "num_experts_per_tok": 2},
        {"num_experts_per_token": 8, "num_experts_per_tok": 2},
        {"moe_renormalize": True, "norm_topk_prob": False},
        {"num_expert_group": 1, "n_group": 2, "topk_group": 1, "num_experts_per_token": 2},
    ),
    "nemotron_h": ({"mlp_hidden_act": "silu"},),
    "ernie4_5_moe": ({"moe_k": 6, "num_experts_per_tok": 3}, {"moe_norm_min": 0.9}),
    # SparseMixer always chooses two, and transformers does not look at the number.
    "phimoe": ({"num_experts_per_tok": 3}, {"num_experts_per_tok": 1}),
    "step3p7": ({"num_experts_per_tok": 8, "moe_top_k": 3},),
    **dict.fromkeys(("qwen3_5_moe", "qwen3_vl_moe", "mixtral", "minimax", "minimax_m2"), (_IGNORED,)),
    **dict.fromkeys(("granitemoe", "gpt_oss"), (_IGNORED,)),
}
# Exceptions: another name has the value, and transformers' own default is null.
_TAKEN = {
    "kimi_linear": ({"num_experts_per_tok": None},),
    "step3p7": ({"swiglu_limits": None},),
}


def refused(case: str, change: dict) -> bool:
    """Whether we refuse what transformers takes: a null, a contradiction, or what would be another model's numbers."""
    if change in _TAKEN.get(case, ()):
        return False
    grouped = case not in ("deepseek_v3", "nemotron_h") and change == _UNFIT
    return grouped or None in change.values() or change == _UNKNOWN or change in _REFUSED.get(case, ())
