"""What is in a checkpoint, without reading its weights: for ``python -m jax_moe inspect``."""

import dataclasses
import math
import os
from pathlib import Path

import jax
import numpy as np

from jax_moe.checkpoints.files import CheckpointError
from jax_moe.checkpoints.layer import open_experts
from jax_moe.checkpoints.model import open_model
from jax_moe.experts import Experts

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
    """Reads headers, scales and biases of every MoE layer: all of the experts but their codes.

    Raises:
      CheckpointError: the directory, its config or its index cannot be read.
    """
    model = open_model(Path(directory))
    layers: dict[int, LayerSummary | CheckpointError] = {}
    for number in model.modules:
        try:
            source = open_experts(model, number)
            layers[number] = _summarize_layer(
                number, source.format, source.leaves(range(source.num_experts)), source.sizes
            )
        except CheckpointError as error:
            layers[number] = error
    return Summary(model.family.name, str(model.config.get("model_type")), layers)


def _summarize_layer(number: int, format: str, leaves: Experts, sizes) -> LayerSummary:
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
    return LayerSummary(
        layer=number,
        format=format,
        experts=sizes.num_experts,
        parts=gate_up.shape[1],
        intermediate=sizes.intermediate,
        hidden=sizes.hidden,
        gate_up_scale=_range(gate_up),
        down_scale=_range(down),
        part_ratio=float(ratios.max()),
        gate_up_input_scale=_range_of(leaves.gate_up.input_scale),
        down_input_scale=_range_of(leaves.down.input_scale),
        nbytes=nbytes,
    )


def _range(values: np.ndarray) -> Range:
    return float(values.min()), float(values.max())


def _range_of(leaf) -> Range | None:
    return None if leaf is None else _range(leaf.read())
