"""Published NVFP4 and MXFP4 checkpoints: from a directory of safetensors files to :class:`jax_moe.Experts`.

``docs/checkpoint-formats.md`` says what is understood, ``docs/using-a-checkpoint.md`` how to use it.
"""

from jax_moe.checkpoints.conversion import convert as convert
from jax_moe.checkpoints.families import register_family as register_family
from jax_moe.checkpoints.family import Family as Family
from jax_moe.checkpoints.files import CheckpointError as CheckpointError
from jax_moe.checkpoints.load import (
    list_layers as list_layers,
    load_experts as load_experts,
    load_linear as load_linear,
    load_projection as load_projection,
    load_router as load_router,
    load_shared_expert as load_shared_expert,
    load_tensor as load_tensor,
    moe_options as moe_options,
)
from jax_moe.checkpoints.model import Model as Model, open_model as open_model
from jax_moe.checkpoints.settings import Settings as Settings
from jax_moe.checkpoints.summary import LayerSummary as LayerSummary, summarize as summarize, Summary as Summary
from jax_moe.layers import HashRouter as HashRouter, Router as Router, SharedExpert as SharedExpert
