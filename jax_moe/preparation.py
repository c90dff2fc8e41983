"""``prepare`` and ``unprepare``: canonical weights into the layout of a GPU's kernels, once, at load, and back."""

import dataclasses
import functools
import math
from typing import overload

import jax
import jax.core
import jax.numpy as jnp

from jax_moe import arguments, layouts, nvfp4, placement
from jax_moe.experts import CANONICAL, Experts, PreparedProjection, Projection
from jax_moe.kernels import targets
from jax_moe.problem import Precision


@overload
def prepare(
    experts: Experts, target: str | None = None, precision: Precision | None = None, *, progress: bool = True
) -> Experts: ...
@overload
def prepare(
    experts: Projection, target: str | None = None, precision: Precision | None = None, *, progress: bool = True
) -> Projection: ...
def prepare(
    experts: Experts | Projection,
    target: str | None = None,
    precision: Precision | None = None,
    *,
    progress: bool = True,
) -> Experts | Projection:
    """Repacks one layer's experts for the kernels of ``target``; done once, when the weights are loaded.

    Works where the weights are, one expert at a time: beside the input and the result, memory holds a few copies of
    one expert. On a mesh, weights that are placed as :func:`jax_moe.expert_shardings` says stay so, and each device
    repacks its own, with its slice of I padded as the layout needs. Inside ``jax.jit`` a placement over automatic axes
    is not seen: there, a program for several devices is refused.

    Args:
      experts: canonical layout, or that of the target already: then they are returned as they are. Or a Projection of
        a single part with any lead axes, in one place, for :func:`jax_moe.ragged_dot` and :func:`jax_moe.linear`.
      target: a GPU target (``python -m jax_moe doctor`` lists them), or the name of a layout: "canonical" is that of
        CPUs. None is what JAX's default device needs, so that a program may call this wherever it runs.
      precision: of the calls to come; None: they may be of any, which the target must have one layout for.
      progress: show a progress bar on a terminal, if it takes longer than a second and is not on a mesh.

    Returns:
      Experts with ``layout`` set to that of the target. E stays the first axis of every leaf and I an axis of its own,
      in whole blocks of weights: shard over these. ``jax_moe/layouts/`` says what each layout is.
      Of a Projection, a :class:`jax_moe.PreparedProjection`; on a CPU the same one.

      Every weight keeps its value exactly; only, where the layout's scales have no NaN, a block scale that is NaN makes
      the *global* scale of its expert and part NaN.

    Raises:
      TypeError: not Experts or a Projection.
      ValueError: unknown target or precision, no kernels for the default device, a target that has a layout for each
        precision and none was named, or the experts are in another layout, of several layers, or placed on a mesh
        in another way; traced for several devices outside ``jax.shard_map``.
    """
    arguments.instance("experts", experts, Experts | Projection)
    layout = targets.layout_for(target, precision)
    if isinstance(experts, Projection):
        return _prepare_projection(experts, layout)
    if layout.name == experts.layout:
        return experts
    if experts.layout != CANONICAL:
        raise ValueError(
            f"experts.layout: got {experts.layout!r}, needs {CANONICAL!r}: jax_moe.unprepare(experts, ...)"
        )
    _check_one_layer(experts, layouts.get(CANONICAL), "jax.vmap(jax_moe.prepare) repacks")
    for name, projection in (("gate_up", experts.gate_up), ("down", experts.down)):
        if projection.block_scale is None:
            raise ValueError(f"experts.{name}.block_scale: got None, canonical experts need it")
    if placement.find(experts).mesh is not None:
        return _prepare_in_place(experts, layout.name)
    return layout.pack(placement.refuse_to_gather("prepare", experts), progress=progress, tensor_axes=())


def _prepare_projection(weights: Projection, layout: layouts.Layout) -> Projection:
    if layout.name == (weights.layout if isinstance(weights, PreparedProjection) else CANONICAL):
        return weights
    if isinstance(weights, PreparedProjection):
        raise ValueError(f"experts.layout: got {weights.layout!r}, needs {CANONICAL!r} weights")
    weights = placement.refuse_to_gather("prepare", weights)
    lead = jnp.shape(weights.global_scale)
    rows, _ = arguments.array("experts.payload", weights.payload, None, (*lead, "N", "C/2"))[-2:]
    arguments.array("experts.block_scale", weights.block_scale, jnp.float8_e4m3fn, (*lead, rows, "C/16"))

    def with_lead(leaf, lead, rank):
        return jnp.reshape(leaf, (*lead, *leaf.shape[leaf.ndim - rank :]))

    count = math.prod(lead)
    flat = Projection(
        with_lead(nvfp4.payload_bytes(weights.payload), (count,), 2),
        with_lead(weights.block_scale, (count,), 2),
        with_lead(weights.global_scale, (count,), 0),
    )
    packed = layout.pack_matrices(flat)
    return PreparedProjection(
        with_lead(packed.payload, lead, 3),
        None,
        with_lead(packed.global_scale, lead, 0),
        weights.input_scale,
        weights.bias,
        layout=layout.name,
        out_features=rows,
    )


def _check_one_layer(experts: Experts, layout: layouts.Layout, advice: str) -> None:
    """Raises unless the experts are those of one layer; ``advice`` says what does the same to stacked ones."""
    for name, projection in (("gate_up", experts.gate_up), ("down", experts.down)):
        arguments.instance(f"experts.{name}", projection, Projection)
    rank, axes = len(getattr(experts.gate_up.payload, "shape", ())), layout.partition.gate_up.payload
    if rank != len(axes):
        shape = ", ".join(axis or "*" for axis in axes)
        raise ValueError(
            f"experts.gate_up.payload: got {rank} axes, needs [{shape}], the experts of one layer; "
            f"{advice} stacked layers"
        )


def _prepare_local(where: placement.Placement, experts: Experts, layout_name: str) -> Experts:
    """What one device holds."""
    layout = layouts.get(layout_name)
    if where.slices > 1:
        experts = _pad_intermediate(experts, layout.slice_unit(experts.gate_up.payload.shape[1]))
    return layout.pack(experts, progress=False, tensor_axes=where.tensor_axes)


_prepare_in_place = placement.InPlace(
    "prepare",
    _prepare_local,
    lambda where, experts, layout_name: where.specs(dataclasses.replace(experts, layout=layout_name)),
)


def _pad_intermediate(experts: Experts, multiple: int) -> Experts:
    """Pads I of canonical experts with weights and biases of zero."""
    gate_up, down = experts.gate_up, experts.down
    padding = -gate_up.payload.shape[2] % multiple

    def pad(array: jax.Array, count: int) -> jax.Array:
        widths = [(0, 0)] * array.ndim
        widths[2] = (0, count)  # I, in every one of these arrays
        return jnp.pad(array, widths)

    return dataclasses.replace(
        experts,
        gate_up=dataclasses.replace(
            gate_up,
            payload=pad(nvfp4.payload_bytes(gate_up.payload), padding),
            block_scale=pad(gate_up.block_scale, padding),
            bias=None if gate_up.bias is None else pad(gate_up.bias, padding),
        ),
        down=dataclasses.replace(
            down,
            payload=pad(nvfp4.payload_bytes(down.payload), padding // 2),
            block_scale=pad(down.block_scale, padding // nvfp4.BLOCK_SIZE),
        ),
    )


@overload
def unprepare(experts: Experts, hidden_size: int, intermediate_size: int) -> Experts: ...
@overload
def unprepare(experts: PreparedProjection, hidden_size: int) -> Projection: ...
def unprepare(
    experts: Experts | PreparedProjection, hidden_size: int, intermediate_size: int | None = None
) -> Experts | Projection:
    """The inverse of :func:`prepare`: canonical experts with the same values, bit for bit where no block scale was
    negative, NaN, or zero over nonzero codes.

    On a mesh they stay where they are, as in :func:`prepare`. I must be in as many slices now as when it was prepared.

    Args:
      experts: prepared, of one layer. Or a PreparedProjection, in one place.
      hidden_size, intermediate_size: H and I without padding; of a projection, C alone.

    Raises:
      TypeError: not Experts or a PreparedProjection, or a size is not an int.
      ValueError: the experts are not prepared, not of these sizes, prepared in another number of slices of I (not seen
        under ``jax.jit``), of several layers, or placed on a mesh in another way than :func:`jax_moe.expert_shardings`
        says; traced for several devices outside ``jax.shard_map``.
    """
    arguments.instance("experts", experts, Experts | PreparedProjection)
    layout = layouts.get(experts.layout)
    if isinstance(experts, PreparedProjection):
        return _unprepare_projection(experts, layout, arguments.integer("hidden_size", hidden_size))
    if layout.name == CANONICAL:
        raise ValueError(f"experts.layout: got {CANONICAL!r}, needs a layout that jax_moe.prepare made")
    hidden_size = arguments.integer("hidden_size", hidden_size)
    intermediate_size = arguments.integer("intermediate_size", intermediate_size)
    _check_one_layer(experts, layout, "jax.vmap(lambda e: jax_moe.unprepare(e, H, I)) unpacks")
    slices = placement.find(experts).slices
    layout.check_unpadded(experts, hidden_size, intermediate_size, slices)
    canonical, cut = _unprepare_in_place(experts, hidden_size, intermediate_size // slices)
    if not isinstance(cut, jax.core.Tracer) and cut.any():
        raise ValueError(
            f"intermediate_size: got {intermediate_size}, but weights stand where the padding of I in {slices} slices "
            "would be: these experts were prepared in another number of slices"
        )
    return canonical


def _unprepare_projection(weights: PreparedProjection, layout: layouts.Layout, in_features: int) -> Projection:
    weights = placement.refuse_to_gather("unprepare", weights)
    lead = weights.global_scale.shape
    payloads = jnp.reshape(weights.payload, (-1, *weights.payload.shape[-3:]))
    # Padding included: what is cut off is looked at.
    unpack = functools.partial(layout.unpack_matrix, out_features=weights.out_features, in_features=None)
    unpacked = jax.lax.map(unpack, payloads)
    codes, scales = (leaf.reshape(*lead, *leaf.shape[1:]) for leaf in unpacked)
    padded = 2 * codes.shape[-1]
    if in_features % nvfp4.BLOCK_SIZE or not 0 < in_features <= padded:
        raise ValueError(f"hidden_size: got {in_features}, needs a multiple of {nvfp4.BLOCK_SIZE} from 16 to {padded}")
    cut = codes[..., in_features // 2 :]
    if not isinstance(cut, jax.core.Tracer) and cut.any():
        raise ValueError(f"hidden_size: got {in_features}, but weights stand where the padding of C would be")
    return Projection(
        codes[..., : in_features // 2],
        scales[..., : in_features // nvfp4.BLOCK_SIZE],
        weights.global_scale,
        weights.input_scale,
        weights.bias,
    )


def _unprepare_local(
    where: placement.Placement, experts: Experts, hidden_size: int, intermediate_size: int
) -> tuple[Experts, jax.Array]:
    return layouts.get(experts.layout).unpack(experts, hidden_size, intermediate_size)


_unprepare_in_place = placement.InPlace(
    "unprepare",
    _unprepare_local,
    lambda where, experts, *_: (
        where.specs(dataclasses.replace(experts, layout=CANONICAL)),
        jax.sharding.PartitionSpec((*where.expert_axes, *where.tensor_axes) or None),
    ),
)
