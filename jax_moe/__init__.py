"""NVFP4 mixture-of-experts for JAX: ``jax_moe.fused_moe`` is one XLA FFI custom call."""

import importlib
from typing import Any, TYPE_CHECKING

from jax_moe import ffi as ffi, nvfp4 as nvfp4, reference as reference
from jax_moe.activations import Activation as Activation, GeGLU as GeGLU, ReLU2 as ReLU2, SiTU as SiTU, SwiGLU as SwiGLU
from jax_moe.experts import Experts as Experts, PreparedProjection as PreparedProjection, Projection as Projection
from jax_moe.ffi import export_checks as export_checks
from jax_moe.layers import HashRouter as HashRouter, Router as Router, SharedExpert as SharedExpert
from jax_moe.moe import fused_moe as fused_moe
from jax_moe.placement import expert_shardings as expert_shardings
from jax_moe.preparation import prepare as prepare, unprepare as unprepare
from jax_moe.problem import Combine as Combine, Precision as Precision, WeightOn as WeightOn
from jax_moe.product.op import linear as linear, ragged_dot as ragged_dot
from jax_moe.quantize import (
    calibrate as calibrate,
    quantize_experts as quantize_experts,
    quantize_projection as quantize_projection,
)
from jax_moe.routing import (
    DeepSeekV2 as DeepSeekV2,
    DeepSeekV3 as DeepSeekV3,
    Llama4 as Llama4,
    route as route,
    Routing as Routing,
    Sigmoid as Sigmoid,
    Softmax as Softmax,
    SparseMixer as SparseMixer,
)
from jax_moe.sharded import sharded_moe as sharded_moe

if TYPE_CHECKING:
    from jax_moe import checkpoints as checkpoints
    from jax_moe.checkpoints import load_experts as load_experts

__version__ = "0.1.0"
if ffi.is_built():
    ffi.register()


def __getattr__(name: str) -> Any:
    """Import ``jax_moe.checkpoints`` when it is first used: many programs load none, and it would slow their start."""
    if name not in ("checkpoints", "load_experts"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    checkpoints = importlib.import_module("jax_moe.checkpoints")
    return checkpoints if name == "checkpoints" else checkpoints.load_experts


def __dir__() -> list[str]:
    return sorted({*globals(), "checkpoints", "load_experts"})
