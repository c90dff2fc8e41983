"""What a model family is: the names of its modules, and how its configuration sets its router and activation."""

from collections.abc import Callable
import dataclasses

from jax_moe import activations, routing
from jax_moe.checkpoints.settings import Settings

# The number of experts, and how many a token goes to: families and releases of transformers name them differently.
NUM_EXPERTS = ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts")
TOP_K = ("num_experts_per_tok", "num_experts_per_token", "experts_per_token", "moe_k", "moe_top_k", "top_k_experts")

GATED = ("gate_proj", "up_proj", "down_proj")


def hidden_act(settings: Settings, key: str = "hidden_act", default: str = "silu") -> activations.Activation:
    """The activation that ``hidden_act`` names, or ``default``."""
    known = {"silu": activations.SwiGLU(), "swish": activations.SwiGLU(), "gelu_pytorch_tanh": activations.GeGLU()}
    settings.only("swiglu_limit", None)
    name = settings.choice(key, known=tuple(known), default=default)
    return known[name]


def latent(settings: Settings) -> str | None:
    """Why the MoE module is more than its parts if ``moe_latent_size`` is set (Nemotron 3), otherwise None."""
    size = settings.value("moe_latent_size")
    return None if size is None else f"the experts stand between linear layers to and from {size} values"


@dataclasses.dataclass(frozen=True)
class Family:
    """One entry of the table of model families; :func:`jax_moe.checkpoints.register_family` adds one.

    Names of modules are relative to the MoE module, "../" being the layer around it. Each entry of a tuple of names, or
    of ``projections``, is a possibility: writers and releases differ.

    Attributes:
      name: for messages and tables.
      model_types: the ``model_type`` values of ``config.json``, or of the text model's part of it.
      blocks: the MoE module within ``layers.N`` (a sparse MoE block in transformers), which has the ``experts``; "" is
        the layer itself.
      top_k: experts per token, where the configuration does not say; None if it must.
      intermediate_size: key of I in the config; the dense layers' size often has the obvious one.
      method: the routing method, from the :class:`~jax_moe.checkpoints.settings.Settings` of a layer.
      activation: the experts' activation, likewise.
      projections: names of an expert's linear layers: gate and up (or only up), and down.
      router: the router's module.
      router_bias: its linear layer has a bias.
      selection_bias: the tensor added to the scores for selection. DeepSeekV3's method needs it, others refuse it.
      normalized_router: Gemma 4's router: it normalises its input itself, with ``<router>.scale``, its linear layer is
        ``<router>.proj``, and ``<router>.per_expert_scale`` multiplies the weights.
      token_table: the tensor of the experts of each token id if this layer routes by token ids, otherwise None.
      shared_expert: the module of the expert that every token visits; () if the family has none.
      shared_expert_gate: the linear layer to one number whose sigmoid multiplies the shared expert, or None.
      shared_activation: the shared expert's activation; None if it is that of the experts.
      others: further modules in the MoE module, which are left to the caller.
      apart: why router, experts and shared expert do not make up the MoE module by themselves, or None if they do.
      roots: where the text model's layers stand, if another model in the same files has experts too.
      interleaved: a fused ``gate_up`` tensor alternates gate and up, instead of gate first.
      weight_on: where the routing weight is applied, as in :func:`jax_moe.fused_moe`.
    """

    name: str
    model_types: tuple[str, ...]
    blocks: tuple[str, ...]
    intermediate_size: str
    method: Callable[[Settings], routing.Method]
    top_k: int | None = None
    activation: Callable[[Settings], activations.Activation] = hidden_act
    projections: tuple[tuple[str, ...], ...] = (GATED,)
    router: tuple[str, ...] = ("gate",)
    router_bias: bool = False
    selection_bias: tuple[str, ...] = ()
    normalized_router: bool = False
    token_table: Callable[[Settings], str | None] = lambda settings: None
    shared_expert: tuple[str, ...] = ()
    shared_expert_gate: str | None = None
    shared_activation: Callable[[Settings], activations.Activation] | None = None
    others: tuple[str, ...] = ()
    apart: Callable[[Settings], str | None] = latent
    roots: tuple[str, ...] = ()
    interleaved: bool = False
    weight_on: str = "output"


def full_name(module: str, name: str) -> str:
    """Of a module that a family names relative to its MoE ``module``."""
    return f"{module.rpartition('.')[0]}.{name[3:]}" if name.startswith("../") else f"{module}.{name}"
