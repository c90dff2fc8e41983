"""What is in a checkpoint, without reading its weights: for ``python -m jax_moe inspect``."""

import dataclasses
import math
import os

import jax
import numpy as np

from jax_moe.checkpoints.files import CheckpointError
from jax_moe.checkpoints.layer import open_experts
from jax_moe.checkpoints.model import Model, open_model, Sizes
from jax_moe.checkpoints.router import open_router
from jax_moe.checkpoints.shared_expert import describe_shared_expert
from jax_moe.experts import Experts
from jax_moe.layers import HashRouter

Range = tuple[float, float]


@dataclasses.dataclass(frozen=True)
class LayerSummary:
    """One MoE layer.

    Attributes:
      layer: its number.
      format: of its experts.
      experts: E.
      parts: P.
      intermediate: I; for prepared layers that of the config.
      hidden: H, likewise.
      top_k: K; None if the router cannot be loaded.
      router: its rule, as a text; or the error that loading it would raise.
      shared_expert: its sizes, as a text; None if the layer has none; or the error that loading it would raise.
      gate_up_scale: smallest and largest global scale.
      down_scale: likewise.
      part_ratio: how far the global scales of gate and up of one expert differ at most; 1 where they are equal.
      gate_up_input_scale: smallest and largest, or None if there are none.
      down_input_scale: likewise.
      nbytes: of the experts in memory.
    """

    layer: int
    format: str
    experts: int
    parts: int
    intermediate: int
    hidden: int
    top_k: int | None
    router: str | CheckpointError
    shared_expert: str | CheckpointError | None
    gate_up_scale: Range
    down_scale: Range
    part_ratio: float
    gate_up_input_scale: Range | None
    down_input_scale: Range | None
    nbytes: int


@dataclasses.dataclass(frozen=True)
class Summary:
    """A checkpoint directory.

    Attributes:
      family: name in the family table.
      model_type: of the config.
      layers: each MoE layer, or the error that loading it would raise.
    """

    family: str
    model_type: str
    layers: dict[int, LayerSummary | CheckpointError]


def summarize(directory: str | os.PathLike[str]) -> Summary:
    """Reads headers, scales and biases of every MoE layer, all of the experts but their codes, and its router.

    Raises:
      CheckpointError: the directory, its config or its index cannot be read.
    """
    model = open_model(directory)
    layers: dict[int, LayerSummary | CheckpointError] = {}
    for number in model.modules:
        try:
            source = open_experts(model, number)
            leaves = source.leaves(range(source.num_experts))
            layers[number] = _summarize_layer(model, number, source.format, leaves, source.sizes)
        except CheckpointError as error:
            layers[number] = error
    return Summary(model.family.name, str(model.config.get("model_type")), layers)


def _summarize_layer(model: Model, number: int, format: str, leaves: Experts, sizes: Sizes) -> LayerSummary:
    gate_up, down = leaves.gate_up.global_scale.read(), leaves.down.global_scale.read()
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = gate_up.max(1) / gate_up.min(1)
    for leaf in jax.tree.leaves([(p.block_scale, p.bias) for p in (leaves.gate_up, leaves.down)]):
        for expert in range(leaf.shape[0]):
            leaf.row(expert, (slice(None),) * (len(leaf.shape) - 1))  # which checks what it reads
    nbytes = 0
    for projection in (leaves.gate_up, leaves.down):
        for field in dataclasses.fields(projection):
            leaf = getattr(projection, field.name)
            nbytes += 0 if leaf is None else math.prod(leaf.shape) * leaf.dtype.itemsize
    top_k, rule = _router(model, number)
    return LayerSummary(
        layer=number,
        format=format,
        experts=sizes.num_experts,
        parts=gate_up.shape[1],
        intermediate=sizes.intermediate,
        hidden=sizes.hidden,
        top_k=top_k,
        router=rule,
        shared_expert=_shared_expert(model, number),
        gate_up_scale=_range(gate_up),
        down_scale=_range(down),
        part_ratio=float(ratios.max()),
        gate_up_input_scale=_range_of(leaves.gate_up.input_scale),
        down_input_scale=_range_of(leaves.down.input_scale),
        nbytes=nbytes,
    )


def _router(model: Model, number: int) -> tuple[int | None, str | CheckpointError]:
    """K, and the rule: the method as it is written in Python, and what a method does not say."""
    try:
        router = open_router(model, number)
    except CheckpointError as error:
        return None, error
    if isinstance(router, HashRouter):
        return router.token_table.shape[1], f"by token id, {router.method!r}"
    biased = "" if router.selection_bias is None else ", selection bias"
    return router.k, f"{router.method!r}{biased}"


def _shared_expert(model: Model, number: int) -> str | CheckpointError | None:
    try:
        return describe_shared_expert(model, number)
    except CheckpointError as error:
        return error


def _range(values: np.ndarray) -> Range:
    return float(values.min()), float(values.max())


def _range_of(leaf) -> Range | None:
    return None if leaf is None else _range(leaf.read())
