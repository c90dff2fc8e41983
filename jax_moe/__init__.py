"""NVFP4 mixture-of-experts for JAX: ``jax_moe.fused_moe`` is one XLA FFI custom call."""

from jax_moe import ffi as ffi, nvfp4 as nvfp4, reference as reference
from jax_moe.activations import Activation as Activation, GeGLU as GeGLU, ReLU2 as ReLU2, SiTU as SiTU, SwiGLU as SwiGLU
from jax_moe.checkpoints import load_experts as load_experts
from jax_moe.experts import Experts as Experts, Projection as Projection
from jax_moe.ffi import export_checks as export_checks
from jax_moe.layers import HashRouter as HashRouter, Router as Router, SharedExpert as SharedExpert
from jax_moe.moe import fused_moe as fused_moe
from jax_moe.parallel import expert_shardings as expert_shardings, sharded_moe as sharded_moe
from jax_moe.preparation import prepare as prepare, unprepare as unprepare
from jax_moe.problem import Combine as Combine, Precision as Precision, WeightOn as WeightOn
from jax_moe.quantize import calibrate as calibrate, quantize_experts as quantize_experts
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

__version__ = "0.1.0"
ffi.register()
