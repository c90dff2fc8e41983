"""The experts of a published checkpoint: checked headers, and weights that are read on demand."""

from collections.abc import Callable
import dataclasses
from typing import Any
import warnings

import ml_dtypes
import numpy as np

from jax_moe import nvfp4
from jax_moe.checkpoints import dense, quantization, stored
from jax_moe.checkpoints.dense import Dense
from jax_moe.checkpoints.leaves import Leaf
from jax_moe.checkpoints.model import Model, refuse_online_transforms, Sizes, sizes
from jax_moe.checkpoints.stored import Stored
from jax_moe.experts import CANONICAL, Experts, Projection

_FLOAT32 = np.dtype(np.float32)
_E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
_UINT8 = np.dtype(np.uint8)


@dataclasses.dataclass(frozen=True)
class PublishedLayer:
    """The experts of one layer: checked headers, and nothing read yet."""

    layer: int
    sizes: Sizes
    gate_up: Stored | Dense
    down: Stored | Dense
    uses_input_scales: bool

    @property
    def num_experts(self) -> int:
        return self.sizes.num_experts

    @property
    def format(self) -> str:
        return self.gate_up.format_name

    @property
    def layout(self) -> str:
        return CANONICAL

    def leaves(self, experts: range) -> Experts:
        """The arrays of ``experts``, as an ``Experts`` of :class:`~jax_moe.checkpoints.leaves.Leaf`."""
        gate_up, down = self.gate_up, self.down
        gate_up_input, down_input = self._input_scales()
        return Experts(
            gate_up=_projection(
                gate_up, experts, f"layer {self.layer} gate_up", stacked=True, input_scale=gate_up_input
            ),
            down=_projection(down, experts, f"layer {self.layer} down", stacked=False, input_scale=down_input),
        )

    def _input_scales(self) -> tuple[np.ndarray | None, np.ndarray | None]:
        """Of gate_up: the maximum over all experts, not the local ones; of down: ``[E]``. None where absent."""
        if not (self.uses_input_scales and self.gate_up.has_input_scale and self.down.has_input_scale):
            return None, None
        gate_up, down = (
            [stored.input_scale(expert, part) for expert in range(self.num_experts) for part in range(stored.num_parts)]
            for stored in (self.gate_up, self.down)
        )
        missing = gate_up.count(None) + down.count(None)
        known_gate_up = [scale for scale in gate_up if scale is not None]
        known_down = [scale for scale in down if scale is not None]
        if missing:
            # An expert that saw no calibration token. It is rarely chosen, and a scale that is too large costs
            # little precision, while one that is too small saturates.
            warnings.warn(
                f"{self.gate_up.files.directory}: layer {self.layer}: {missing} input scales are missing, zero or not "
                "finite; the largest of the layer stands in for them (w4a4 only)",
                stacklevel=3,
            )
        if not known_gate_up or not known_down:
            return None, None
        filled = [max(known_down) if scale is None else scale for scale in down]
        return np.asarray(max(known_gate_up)), np.asarray(filled, np.float32)


def open_published(model: Model, layer: int, *, quantize: bool = False) -> PublishedLayer:
    """See :func:`jax_moe.checkpoints.layer.open_experts`.

    Raises:
      CheckpointError: see :func:`jax_moe.load_experts`.
    """
    module, shape = model.module(layer), sizes(model, layer)
    where = (model.files, module, model.family, shape.num_experts, shape.hidden, shape.intermediate)
    try:
        gate_up, down = stored.find(*where)
    except stored.OtherFormatError:
        if not quantize:
            raise
        gate_up, down = dense.find(*where)
    refuse_online_transforms(model, layer)
    # W4A8: the weights are NVFP4 but the input scales are those of FP8 activations.
    uses_input_scales = not any("FP8" in name for name in quantization.algorithms(model.files, f"{module}.experts"))
    return PublishedLayer(layer, shape, gate_up, down, uses_input_scales)


def _projection(
    stored: Stored | Dense, experts: range, name: str, *, stacked: bool, input_scale: np.ndarray | None
) -> Projection:
    """Leaves of a projection; ``stacked``: with an axis for the parts (gate_up)."""
    rows, contraction = stored.num_rows, stored.contraction
    lead = (len(experts), stored.num_parts) if stacked else (len(experts),)

    def leaf(kind: str, read: Callable[..., Any], shape: tuple[int, ...], dtype: np.dtype) -> Leaf:
        def part_of(expert: int, part: int, inner: tuple[slice, ...]) -> np.ndarray:
            if len(shape) == 2:  # a matrix: of other rows nothing is read
                return read(expert, part, inner[0])[:, inner[1]]
            return np.asarray(read(expert, part))[inner]

        def row(index: int, inner: tuple[slice, ...]) -> np.ndarray:
            if not stacked:
                return part_of(experts[index], 0, inner)
            parts = range(stored.num_parts)[inner[0]]
            return np.stack([part_of(experts[index], part, inner[1:]) for part in parts])

        return Leaf((*lead, *shape), dtype, row, f"{name}.{kind}")

    input_leaf = None
    if input_scale is not None and input_scale.ndim == 0:
        input_leaf = Leaf((), _FLOAT32, lambda index, inner: input_scale, f"{name}.input_scale")
    elif input_scale is not None:
        input_leaf = Leaf(lead, _FLOAT32, lambda index, inner: input_scale[experts[index]], f"{name}.input_scale")
    return Projection(
        payload=leaf("payload", stored.payload, (rows, contraction // 2), _UINT8),
        block_scale=leaf("block_scale", stored.block_scale, (rows, contraction // nvfp4.BLOCK_SIZE), _E4M3),
        global_scale=leaf("global_scale", stored.global_scale, (), _FLOAT32),
        input_scale=input_leaf,
        bias=leaf("bias", stored.bias, (rows,), _FLOAT32) if stored.has_bias else None,
    )
