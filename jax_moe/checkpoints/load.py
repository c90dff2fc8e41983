"""The public loaders, for published checkpoints and for what ``convert`` wrote."""

import os
from typing import Any

import jax
import numpy as np

from jax_moe import placement
from jax_moe.checkpoints import leaves, linear, quantization, router, shared_expert
from jax_moe.checkpoints.files import CheckpointError, Files, read_rows
from jax_moe.checkpoints.layer import open_experts
from jax_moe.checkpoints.model import Model, open_model
from jax_moe.experts import Experts, Projection
from jax_moe.layers import HashRouter, Router, SharedExpert

Directory = str | os.PathLike[str] | Model
"""A checkpoint directory, or what :func:`jax_moe.checkpoints.open_model` returned for it."""


def _model(directory: Directory) -> Model:
    return directory if isinstance(directory, Model) else open_model(directory)


def _files(directory: Directory) -> Files:
    return directory.files if isinstance(directory, Model) else Files(directory)


def load_experts(
    directory: Directory,
    layer: int,
    *,
    experts: slice | range | None = None,
    mesh: jax.sharding.Mesh | None = None,
    expert_axis: placement.Axis = "expert",
    tensor_axis: placement.Axis = "tensor",
    quantize: bool = False,
    progress: bool = True,
) -> Experts:
    """Loads the experts of one MoE layer of a checkpoint.

    Understands ModelOpt and compressed-tensors NVFP4, and MXFP4 where NVFP4 represents it exactly, of the families
    that ``docs/checkpoint-formats.md`` lists, and the directories that :func:`jax_moe.checkpoints.convert` writes.
    Everything that the files' headers say is checked before any weight is read. Weights are read through memory
    maps, an expert at a time: memory holds the result and two experts.

    Args:
      directory: holds ``config.json`` and safetensors files, with or without an index; or what ``open_model``
        returned for it, which all loaders of this module take: each call then saves reading the headers again.
      layer: number of the layer, as in the tensors' names.
      experts: only these (expert parallelism by hand: use ``expert_offset=experts.start`` in ``fused_moe``). The
        input scale of x is the maximum over all experts even so.
      mesh: shard over this mesh, as :func:`jax_moe.expert_shardings` says; each process reads only what its own
        devices hold.
      expert_axis, tensor_axis: the mesh axes over E and I.
      quantize: quantise a layer that the checkpoint keeps in bfloat16 or FP8, as :func:`jax_moe.quantize_experts` would
        (FP8 is first rounded to bfloat16). Each weight is read three times.
      progress: show a progress bar on a terminal, if it takes longer than a second.

    Returns:
      Canonical experts, or for a converted directory in the layout that it was converted to. Input scales are set
      where the checkpoint has them, biases likewise (float32).

    Raises:
      CheckpointError: (a ValueError) the checkpoint is malformed, incomplete, or not in a known format; the message
        names the file, the tensor, what was found and what was expected.
      TypeError: ``layer`` is not an int, or ``experts`` neither slice nor range.
      ValueError: ``experts`` is not a contiguous part of the layer's experts, or the mesh does not divide E or I.
    """
    source = open_experts(_model(directory), layer, quantize=quantize)
    chosen = _chosen(experts, source.num_experts)
    return leaves.to_jax(source.leaves(chosen), mesh, expert_axis, tensor_axis, progress)


def load_router(directory: Directory, layer: int) -> Router | HashRouter:
    """Loads the router of one MoE layer, with its rule: ``router(x)`` is the Routing of ``x``.

    A layer that routes by token ids (the first ones of DeepSeek-V4) has a HashRouter: ``router(x, token_ids)``.

    Raises:
      CheckpointError: as :func:`load_experts`; a setting of the router is not one of its family's; a tensor that its
        rule needs is missing, or one that it has no use for is there.
      TypeError: as :func:`load_experts`.
    """
    model = _model(directory)
    name = router.router_module(model, layer)
    quantization.refuse_online_transforms(model.files, [name], [model.module(layer)])
    return router.open_router(model, layer)


def load_shared_expert(directory: Directory, layer: int) -> SharedExpert | None:
    """Loads the expert that every token visits, dequantised to bfloat16; None if the layer has none.

    Raises:
      CheckpointError, TypeError: as :func:`load_experts`.
    """
    return shared_expert.open_shared_expert(_model(directory), layer)


def load_tensor(directory: Directory, name: str) -> jax.Array:
    """Loads any tensor by its name in the files, as it is stored: for the parts of a model outside its MoE layers.

    Raises:
      CheckpointError: as :func:`load_experts`.
    """
    return jax.device_put(np.array(read_rows(_files(directory).info(name))))


def load_linear(directory: Directory, module: str) -> jax.Array:
    """Loads the weight of any linear layer ("model.layers.0.self_attn.q_proj") in bfloat16: float, FP8, NVFP4 or MXFP4.

    Its bias, if it has one, is ``load_tensor(directory, f"{module}.bias")``.

    Raises:
      CheckpointError: as :func:`load_experts`.
    """
    return jax.device_put(linear.read_linear(_files(directory), module).weight)


def load_projection(directory: Directory, module: str) -> Projection:
    """Loads a 4-bit linear layer as it is stored, for :func:`jax_moe.linear`; :func:`load_linear` would widen it.

    Returns:
      Canonical ``[N, C]`` without lead axes; with its input scale (what ``precision="w4a4"`` needs) and its bias, where
      the file has them. On a GPU it goes through :func:`jax_moe.prepare`.

    Raises:
      CheckpointError: as :func:`load_experts`, or the layer is in another format, which the message names.
    """
    return jax.tree.map(jax.device_put, linear.read_projection(_files(directory), module))


def moe_options(directory: Directory, layer: int | None = None) -> dict[str, Any]:
    """What :func:`jax_moe.fused_moe` has to be told about the model: ``activation`` and ``weight_on``.

    Args:
      directory: as for :func:`load_experts`.
      layer: number of the layer. None is enough unless the options depend on it, as in Step-3.5.

    Raises:
      CheckpointError: as :func:`load_experts`, or the options depend on the layer.
      TypeError: as :func:`load_experts`.
    """
    model = _model(directory)
    if layer is not None:
        model.module(layer)
    return {"activation": model.family.activation(model.settings(layer)), "weight_on": model.family.weight_on}


def check_whole_module(directory: Directory, layer: int) -> None:
    """Refuses a layer whose MoE module has more to it than a router, experts and a shared expert of one x.

    Raises:
      CheckpointError: the reason, and what can be loaded.
    """
    model = _model(directory)
    reason = model.family.apart(model.settings(layer))
    if reason is not None:
        raise CheckpointError(
            f"{model.files.directory}: layer {layer} of {model.family.name}: found that {reason}, expected a module "
            "that is a function of one x; load_experts, load_router and load_shared_expert load its parts one by one"
        )


def list_layers(directory: Directory) -> list[int]:
    """The numbers of the layers that have experts.

    Raises:
      CheckpointError: as :func:`load_experts`.
    """
    return list(_model(directory).modules)


def _chosen(experts: slice | range | None, num_experts: int) -> range:
    everything = range(num_experts)
    if experts is None:
        return everything
    if isinstance(experts, slice):
        chosen = everything[experts]
    elif isinstance(experts, range):
        chosen = experts
    else:
        raise TypeError(f"experts: got {type(experts).__name__}, needs a slice, a range or None")
    inside = len(chosen) > 0 and chosen[0] >= 0 and chosen[-1] < num_experts
    if chosen.step != 1 or not inside:
        raise ValueError(f"experts: got {experts}, needs a contiguous, non-empty part of {num_experts} experts")
    return chosen
