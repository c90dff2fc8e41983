"""The model families whose expert layers can be loaded: one table entry each, told apart by ``config.json``."""

from collections.abc import Callable
import dataclasses
from typing import Any

from jax_moe import activations, routing
from jax_moe.checkpoints.files import brief, CheckpointError

Config = dict[str, Any]

# Where the text model's layers stand, by writer and by whether the model has a vision part too.
ROOTS = ("model.", "backbone.", "model.language_model.", "language_model.model.", "")


# The number of experts; transformers has renamed it between releases, for the same family.
NUM_EXPERTS = ("num_experts", "n_routed_experts", "num_local_experts")
TOP_K = ("num_experts_per_tok", "experts_per_token")


@dataclasses.dataclass(frozen=True)
class Family:
    """What differs between the model families.

    Attributes:
      name: for messages and tables.
      model_types: the ``model_type`` values of ``config.json``, or of the text model's part of it.
      block: the module of the MoE layer within ``layers.N``.
      projections: names of gate and up (or only up) and down; writers differ, so each entry is a possibility.
      intermediate_size: its key in the config; the dense layers' size often has the obvious one.
      method: the routing method, from the config.
      router: the router's module within the block.
      shared_expert: the module of the expert that every token visits, or None.
      interleaved: a fused ``gate_up`` tensor alternates gate and up, instead of gate first.
      weight_on: where the routing weight is applied, as in :func:`jax_moe.fused_moe`.
    """

    name: str
    model_types: tuple[str, ...]
    block: str
    intermediate_size: str
    method: Callable[[Config], routing.Method]
    activation: Callable[[Config], activations.Activation]
    projections: tuple[tuple[str, ...], ...] = (("gate_proj", "up_proj", "down_proj"),)
    router: str = "gate"
    shared_expert: str | None = None
    interleaved: bool = False
    weight_on: str = "output"


def _hidden_act(config: Config) -> activations.Activation:
    name = config.get("hidden_act", config.get("mlp_hidden_act", "silu"))
    known = {"silu": activations.SwiGLU(), "swish": activations.SwiGLU(), "gelu_pytorch_tanh": activations.GeGLU()}
    if not isinstance(name, str) or name not in known:
        raise CheckpointError(f"config.json: hidden_act: found {brief(name)}, expected one of {', '.join(known)}")
    return known[name]


def _relu2(config: Config) -> activations.Activation:
    name = config.get("mlp_hidden_act", "relu2")
    if name != "relu2":
        raise CheckpointError(f"config.json: mlp_hidden_act: found {brief(name)}, expected 'relu2'")
    return activations.ReLU2()


def _grouped(config: Config) -> routing.Method:
    return routing.DeepSeekV3(
        num_groups=config.get("n_group") or 1,
        top_groups=config.get("topk_group") or 1,
        scaling_factor=config.get("routed_scaling_factor", 1.0),
        renormalize=config.get("norm_topk_prob", True),
    )


FAMILIES = (
    Family(
        name="qwen3-moe",
        model_types=("qwen3_moe",),
        block="mlp",
        intermediate_size="moe_intermediate_size",
        method=lambda config: routing.Softmax(renormalize=config.get("norm_topk_prob", False)),
        activation=_hidden_act,
    ),
    Family(
        name="deepseek-v3",
        model_types=("deepseek_v3", "kimi_k2"),
        block="mlp",
        intermediate_size="moe_intermediate_size",
        method=_grouped,
        activation=_hidden_act,
        shared_expert="shared_experts",
    ),
    Family(
        name="mixtral",
        model_types=("mixtral",),
        block="block_sparse_moe",
        intermediate_size="intermediate_size",
        method=lambda config: routing.Softmax(renormalize=True),
        activation=_hidden_act,
        projections=(("w1", "w3", "w2"), ("gate_proj", "up_proj", "down_proj")),
    ),
    Family(
        name="nemotron-h",
        model_types=("nemotron_h",),
        block="mixer",
        intermediate_size="moe_intermediate_size",
        method=_grouped,
        activation=_relu2,
        projections=(("up_proj", "down_proj"),),
        shared_expert="shared_experts",
    ),
    Family(
        name="llama-4",
        model_types=("llama4", "llama4_text"),
        block="feed_forward",
        intermediate_size="intermediate_size",
        method=lambda config: routing.Llama4(),
        activation=_hidden_act,
        router="router",
        shared_expert="shared_expert",
        weight_on="input",
    ),
    Family(
        name="gpt-oss",
        model_types=("gpt_oss",),
        block="mlp",
        intermediate_size="intermediate_size",
        method=lambda config: routing.Softmax(renormalize=True),
        activation=lambda config: activations.SwiGLU(alpha=1.702, beta=1.0, limit=config.get("swiglu_limit", 7.0)),
        router="router",
        interleaved=True,
    ),
)


def family_of(config: Config, where: str) -> tuple[Family, Config]:
    """The family of a model, and its text model's part of the config.

    Raises:
      CheckpointError: the model type is not in the table; ``where`` names the file.
    """
    text = config.get("text_config", config)
    if not isinstance(text, dict):
        raise CheckpointError(f"{where}: text_config: found {type(text).__name__}, expected an object")
    types = (text.get("model_type"), config.get("model_type"))
    for family in FAMILIES:
        if any(model_type in family.model_types for model_type in types):
            return family, text
    known = ", ".join(model_type for family in FAMILIES for model_type in family.model_types)
    raise CheckpointError(f"{where}: model_type: found {brief(types[0])}, expected one of {known}")


def size(config: Config, where: str, *keys: str) -> int:
    """A positive integer of the config, under the first of ``keys`` that it has.

    Raises:
      CheckpointError: it is missing or something else.
    """
    key = next((key for key in keys if config.get(key) is not None), keys[0])
    value = config.get(key)
    if type(value) is not int or not 0 < value < 2**31:
        raise CheckpointError(f"{where}: {key}: found {brief(value)}, expected a positive integer")
    return value
