"""The experts of a layer that ``convert`` wrote: the leaves of ``Experts`` in the layout of the conversion."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from jax_moe import activations, layouts, nvfp4
from jax_moe.checkpoints.files import CheckpointError, Files, read_floats, read_rows, TensorInfo
from jax_moe.checkpoints.leaves import Leaf
from jax_moe.checkpoints.model import Model, refuse_online_transforms, Sizes, sizes
from jax_moe.checkpoints.stored import check_block_scale
from jax_moe.experts import CANONICAL, Experts, Projection
from jax_moe.preparation import prepare

VERSION = "1"
"""Of a layer's file."""


@dataclasses.dataclass(frozen=True)
class ConvertedLayer:
    """The experts of a layer that ``convert`` wrote."""

    files: Files
    module: str
    expected: Experts
    sizes: Sizes

    @property
    def num_experts(self) -> int:
        return self.sizes.num_experts

    @property
    def format(self) -> str:
        return f"jax_moe, {self.layout}"

    @property
    def layout(self) -> str:
        return self.expected.layout

    def leaves(self, experts: range) -> Experts:
        """As :meth:`jax_moe.checkpoints.published.PublishedLayer.leaves`."""

        def leaf(path, shape: jax.ShapeDtypeStruct) -> Leaf:
            info = self.files.info(f"{self.module}.experts.{jax.tree_util.keystr(path)[1:]}")

            def row(index: int, inner: tuple[slice, ...]) -> np.ndarray:
                if not info.shape:
                    return read_floats(info)
                values = _read_expert(info, experts[index], inner)
                _check_values(values, info)
                return values

            lead = (len(experts),) if info.shape else ()
            return Leaf((*lead, *info.shape[1:]), np.dtype(shape.dtype), row, info.name)

        return jax.tree_util.tree_map_with_path(leaf, self.expected)


def _read_expert(info: TensorInfo, expert: int, inner: tuple[slice, ...]) -> np.ndarray:
    """``array[(expert, *inner)]``; of the expert's first axis, no more is read than that."""
    if not inner:
        return read_rows(info, expert, expert + 1)[0]
    size = info.shape[1]
    start, stop, _ = inner[0].indices(size)
    flat = dataclasses.replace(info, shape=(info.shape[0] * size, *info.shape[2:]))
    return read_rows(flat, expert * size + start, expert * size + stop)[(slice(None), *inner[1:])]


def named_leaves(experts: Experts) -> list[tuple[str, Any]]:
    """The leaves with their names in a file, without the prefix."""
    return [(jax.tree_util.keystr(path)[1:], leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(experts)]


def _check_values(values: np.ndarray, info: TensorInfo) -> None:
    if info.dtype == "F8_E4M3":
        check_block_scale(values, str(info))
    elif info.dtype == "F32" and not np.isfinite(values).all():
        raise CheckpointError(f"{info}: found a number that is not finite, expected finite scales and biases")


def holds(model: Model, number: int) -> bool:
    """Whether the experts of a layer are converted ones."""
    return f"{model.module(number)}.experts.gate_up.payload" in model.files.names()


def open_converted(model: Model, number: int) -> ConvertedLayer:
    """See :func:`jax_moe.checkpoints.layer.open_experts`."""
    prefix = f"{model.module(number)}.experts."
    metadata = model.files.metadata(f"{prefix}gate_up.payload")
    layout = layouts.current_name(metadata.get("layout"))
    if metadata.get("version") != VERSION or layout not in layouts.LAYOUTS:
        raise CheckpointError(
            f"{model.files.info(prefix + 'gate_up.payload')}: found version {metadata.get('version')!r} and layout "
            f"{metadata.get('layout')!r}, expected version {VERSION} and a known layout"
        )
    expected = _expected(model, number, layout)
    unexplained = model.files.under(prefix)
    for name, leaf in named_leaves(expected):
        unexplained.discard(prefix + name)
        info = model.files.info(prefix + name)
        if info.shape != leaf.shape or info.numpy_dtype != leaf.dtype:
            raise CheckpointError(f"{info}: found {info.summary}, expected {leaf.dtype} {list(leaf.shape)}")
    # Prepared experts once had block scales of no elements.
    left = sorted(name for name in unexplained if model.files.info(name).nbytes)
    if left:
        raise CheckpointError(f"{model.files.info(left[0])}: found a tensor that converted experts do not have")
    refuse_online_transforms(model, number)  # the configuration came along
    return ConvertedLayer(model.files, model.module(number), expected, sizes(model, number))


def _expected(model: Model, number: int, layout: str) -> Experts:
    """Shapes and dtypes of the leaves, from the config."""
    prefix, size = f"{model.module(number)}.experts.", sizes(model, number)
    parts = activations.num_parts(model.family.activation(model.settings(number)))

    def projection(
        name: str, rows: int, contraction: int, lead: tuple[int, ...], input_shape: tuple[int, ...]
    ) -> Projection:
        def shape(dtype, *axes: int, kind: str | None = None):
            present = kind is None or f"{prefix}{name}.{kind}" in model.files.names()
            return jax.ShapeDtypeStruct(axes, dtype) if present else None

        return Projection(
            payload=shape(np.uint8, *lead, rows, contraction // 2),
            block_scale=shape(jax.numpy.float8_e4m3fn, *lead, rows, contraction // nvfp4.BLOCK_SIZE),
            global_scale=shape(np.float32, *lead),
            input_scale=shape(np.float32, *input_shape, kind="input_scale"),
            bias=shape(np.float32, *lead, rows, kind="bias"),
        )

    experts = size.num_experts
    canonical = Experts(
        gate_up=projection("gate_up", size.intermediate, size.hidden, (experts, parts), ()),
        down=projection("down", size.hidden, size.intermediate, (experts,), (experts,)),
    )
    if layout == CANONICAL:
        return canonical
    return jax.eval_shape(functools.partial(prepare, target=layout, progress=False), canonical)
