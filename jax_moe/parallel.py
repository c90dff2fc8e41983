"""``sharded_moe``: expert and tensor parallelism, with the local op inside one ``shard_map``."""

import dataclasses
import math
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from jax_moe import activations, arguments, check, ffi, layouts, moe, settings
from jax_moe.experts import Experts, Projection
from jax_moe.problem import Combine, Options, Precision, WeightOn
from jax_moe.routing import Routing

Axis = str | tuple[str, ...] | None
"""One mesh axis, several that act as one, or none."""


def sharded_moe(
    x: jax.Array,
    experts: Experts,
    routing: Routing,
    *,
    mesh: Mesh | AbstractMesh | None = None,
    expert_axis: Axis = "expert",
    tensor_axis: Axis = "tensor",
    data_axis: Axis = "data",
    activation: activations.Activation = activations.SwiGLU(),
    precision: Precision = "w4a16",
    combine: Combine = "atomic",
    weight_on: WeightOn = "output",
    out_dtype=jnp.bfloat16,
    command_buffer: bool = True,
) -> jax.Array:
    """:func:`jax_moe.fused_moe` over a device mesh, on weights that stay where :func:`expert_shardings` puts them.

    Every device runs its own experts (``expert_axis``), its own slice of I (``tensor_axis``), or both, on the tokens
    of its slice of ``data_axis``. The partial outputs are summed in float32 over the two model axes and rounded
    once. A data axis may be one of the model axes too (tokens and experts spread over the same devices): the tokens
    are then gathered over it first and the sum is scattered back.

    Args:
      x, experts, routing: global arrays as for ``fused_moe``; ids are global. :func:`expert_shardings` gives the
        shardings under which ``experts`` is used in place; give them to ``jax.jit``'s ``in_shardings`` or place the
        weights so, because inside ``jax.jit``, over automatic mesh axes, other placements are not seen and XLA would
        move the weights.
      mesh: the device mesh; None is the one that ``jax.set_mesh`` has set. A default axis name that it lacks is not
        used; at least one axis must be.
      expert_axis: shards E; its size must divide E.
      tensor_axis: shards I; I divided by its size must be a multiple of 16.
      data_axis: shards the tokens; its size must divide T. Of several leading axes of x it shards those that it shards
        already, as far as that can be seen, else the first that its size divides, else all of them as one.
      activation, precision, combine, weight_on, out_dtype, command_buffer: as for ``fused_moe``.

    Returns:
      ``[..., H]`` of ``out_dtype``, sharded over ``data_axis``.

    Raises:
      TypeError, ValueError: as ``fused_moe``, or the mesh does not fit.
    """
    if mesh is None:
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty:
            raise ValueError("mesh: got None, and jax.set_mesh has set none")
    options = Options(
        activation=activation, precision=precision, combine=combine, weight_on=weight_on, out_dtype=out_dtype,
        command_buffer=command_buffer,
    )  # fmt: skip
    problem = check.check(x, experts, routing, options, expert_offset=0, num_experts=None)
    specs = partition_specs(experts, mesh, expert_axis=expert_axis, tensor_axis=tensor_axis)
    expert_axes = _axes_in(mesh, "expert_axis", expert_axis)
    tensor_axes = _axes_in(mesh, "tensor_axis", tensor_axis)
    data_axes = _axes_in(mesh, "data_axis", data_axis)
    if not (expert_axes or tensor_axes or data_axes):
        raise ValueError(
            f"mesh: got axes {mesh.axis_names}, none of which is the expert_axis ({expert_axis!r}), tensor_axis "
            f"({tensor_axis!r}) or data_axis ({data_axis!r})"
        )
    _check_divides(mesh, "data_axis", data_axes, "T", problem.num_tokens)

    num_experts = problem.local_experts
    reduced = expert_axes + tensor_axes
    gathered = tuple(axis for axis in data_axes if axis in reduced)
    summed = tuple(axis for axis in reduced if axis not in gathered)
    shape = x.shape
    leading = _spread_tokens(x, mesh, data_axes)
    if leading is None:
        x, routing = check.flatten(x, routing)
        leading = (data_axes,)
    tokens = PartitionSpec(*leading, None)

    def local_moe(x, experts: Experts, routing: Routing):
        local_shape = x.shape
        if problem.num_tokens == 0:  # XLA gathers nothing of no elements
            return x.astype(out_dtype)
        x, routing = check.flatten(x, routing)
        if gathered:
            x, routing = jax.tree.map(lambda a: jax.lax.all_gather(a, gathered, tiled=True), (x, routing))
        offset = jax.lax.axis_index(expert_axes) * experts.down.global_scale.shape[0] if expert_axes else 0
        if tensor_axes:
            experts = _bias_on_first(experts, jax.lax.axis_index(tensor_axes) == 0)
        partial = dataclasses.replace(options, out_dtype=jnp.float32) if reduced else options
        y = moe.fused_moe(x, experts, routing, **vars(partial), expert_offset=offset, num_experts=num_experts)
        if summed:
            y = jax.lax.psum(y, summed)
        if gathered:
            y = jax.lax.psum_scatter(y, gathered, tiled=True)
        return y.reshape(local_shape).astype(out_dtype)

    run = jax.shard_map(local_moe, mesh=mesh, in_specs=(tokens, specs, tokens), out_specs=tokens)
    check_in_place(experts, specs, mesh)
    if AxisType.Explicit in mesh.axis_types:
        if AxisType.Auto in mesh.axis_types:
            raise ValueError(f"mesh: got axes of types {mesh.axis_types}, needs all automatic or all explicit")
        everything = (x, experts, routing), (tokens, specs, jax.tree.map(lambda _: tokens, routing))
        x, experts, routing = jax.tree.map(lambda a, spec: jax.reshard(a, NamedSharding(mesh, spec)), *everything)
    if settings.debugging():  # a callback cannot run in a shard_map that runs eagerly
        run = jax.jit(run)
    y = ffi.as_one_op("sharded_moe", run, x, experts, routing)
    return y if y.shape == shape else y.reshape(shape)


def expert_shardings(
    experts: Experts, mesh: Mesh | AbstractMesh, *, expert_axis: Axis = "expert", tensor_axis: Axis = "tensor"
) -> Experts:
    """The ``NamedSharding`` of every leaf of ``experts``, for ``jax.device_put(experts, ...)`` or ``in_shardings``.

    Raises:
      ValueError: the mesh does not divide E or I.
    """
    specs = partition_specs(experts, mesh, expert_axis=expert_axis, tensor_axis=tensor_axis)
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)


def partition_specs(
    experts: Experts, mesh: Mesh | AbstractMesh, *, expert_axis: Axis = "expert", tensor_axis: Axis = "tensor"
) -> Experts:
    """The ``PartitionSpec`` of every leaf of ``experts``: E over ``expert_axis``, I over ``tensor_axis``.

    Raises:
      ValueError: the mesh does not divide E or I, or lacks an axis that is not the default one.
    """
    arguments.instance("mesh", mesh, Mesh | AbstractMesh)
    if experts.down.global_scale.ndim != 1:  # layers stacked for lax.scan, say
        shape = experts.down.global_scale.shape
        raise ValueError(f"experts.down.global_scale: got shape {shape}, needs [E]: the experts of one layer")
    expert_axes = _axes_in(mesh, "expert_axis", expert_axis)
    tensor_axes = _axes_in(mesh, "tensor_axis", tensor_axis)
    if shared := set(expert_axes) & set(tensor_axes):
        raise ValueError(f"expert_axis, tensor_axis: both got {sorted(shared)}, need different mesh axes")
    _check_divides(mesh, "expert_axis", expert_axes, "E", experts.down.global_scale.shape[0])
    slices = axes_size(mesh, tensor_axes)
    if reason := layouts.get(experts.layout).why_not_sliced(experts, slices):
        raise ValueError(f"tensor_axis: {tensor_axes} has {slices} devices, which does not divide {reason}")
    return specs_of(experts, expert_axes, tensor_axes)


def specs_of(experts: Experts, expert_axes: tuple[str, ...], tensor_axes: tuple[str, ...]) -> Experts:
    """The ``PartitionSpec`` of every leaf, whether or not a mesh divides it."""
    mesh_axes = {layouts.E: expert_axes or None, layouts.I: tensor_axes or None, None: None}

    def specs(projection: Projection, partition: Projection) -> Projection:
        is_absent = {name: getattr(projection, name) is None for name in ("input_scale", "bias")}
        return Projection(
            **{
                name: None if axes is None or is_absent.get(name) else PartitionSpec(*(mesh_axes[a] for a in axes))
                for name, axes in vars(partition).items()
            }
        )

    partition = layouts.get(experts.layout).partition
    return Experts(
        specs(experts.gate_up, partition.gate_up), specs(experts.down, partition.down), layout=experts.layout
    )


def model_axes(experts: Experts, spec: PartitionSpec) -> tuple[Axis, Axis]:
    """The mesh axes over E and over I, from the spec of ``experts.gate_up.payload``."""
    axes = (*spec, None, None, None, None)
    partition = layouts.get(experts.layout).partition.gate_up.payload
    return axes[partition.index(layouts.E)], axes[partition.index(layouts.I)]


def check_in_place(experts: Experts, specs: Experts, mesh: Mesh | AbstractMesh) -> None:
    """Raises where weights would have to move, as far as their placement is known; slicing a replicated array is free.

    It is not known of what ``jax.jit`` traces over automatic mesh axes.
    """
    leaves = jax.tree_util.tree_leaves_with_path(experts)
    for (path, leaf), spec in zip(leaves, jax.tree.leaves(specs), strict=True):
        if not isinstance(leaf, jax.Array):  # a NumPy array is nowhere yet
            continue
        got: Any = jax.typeof(leaf).sharding if isinstance(leaf, jax.core.Tracer) else leaf.sharding
        # An abstract mesh says nothing of devices, and the types of axes say nothing of placement.
        is_named = isinstance(got, NamedSharding) and dict(got.mesh.shape) == dict(mesh.shape)
        on = got.mesh if is_named and AbstractMesh in (type(mesh), type(got.mesh)) else mesh
        fits = got.is_fully_replicated or got.is_equivalent_to(NamedSharding(on, spec), leaf.ndim)
        if not fits:
            name = "experts" + jax.tree_util.keystr(path)
            raise ValueError(f"{name}: got sharding {got}, needs {spec}; jax_moe.expert_shardings(...) gives it")


def _spread_tokens(
    x: jax.Array, mesh: Mesh | AbstractMesh, data_axes: tuple[str, ...]
) -> tuple[tuple[str, ...] | None, ...] | None:
    """Which of ``data_axes`` shard each leading axis of ``x``; None: all leading axes as one."""
    leading = x.shape[:-1]
    sharding = jax.typeof(x).sharding if isinstance(x, jax.core.Tracer) else getattr(x, "sharding", None)
    if isinstance(sharding, NamedSharding) and sharding.mesh.axis_names == mesh.axis_names:
        entries = (*sharding.spec, *[None] * len(leading))[: len(leading)]
        found = [tuple(name for name in axis_names(entry) if name in data_axes) for entry in entries]
        if sorted(sum(found, ())) == sorted(data_axes):
            return tuple(names or None for names in found)
    for place, size in enumerate(leading):
        if size % axes_size(mesh, data_axes) == 0:
            return tuple(data_axes or None if axis == place else None for axis in range(len(leading)))
    return None


def _bias_on_first(experts: Experts, is_first: jax.Array) -> Experts:
    """Keeps the down bias on one device of a tensor-parallel group: the sum over the group adds it once."""
    if experts.down.bias is None:
        return experts
    bias = jnp.where(is_first, experts.down.bias, 0)
    return dataclasses.replace(experts, down=dataclasses.replace(experts.down, bias=bias))


def _axes_in(mesh: Mesh | AbstractMesh, argument: str, axis: Axis) -> tuple[str, ...]:
    """The mesh axes that ``argument`` names; none where it has its default and the mesh has no such axis."""
    if not isinstance(axis, str | tuple | None):
        raise TypeError(f"{argument}: got {axis!r}, needs a mesh axis, a tuple of them, or None")
    axes = axis_names(axis)
    if argument == f"{axis}_axis" and axis not in mesh.axis_names:
        return ()
    if len(set(axes)) < len(axes):
        raise ValueError(f"{argument}: got {axis!r}, needs each mesh axis once")
    for name in axes:
        if name not in mesh.axis_names:
            raise ValueError(f"{argument}: got {axis!r}, but the mesh has the axes {mesh.axis_names}")
    return axes


def axis_names(axis: Axis) -> tuple[str, ...]:
    """The mesh axes that ``axis`` is made of."""
    return () if axis is None else (axis,) if isinstance(axis, str) else tuple(axis)


def axes_size(mesh: Mesh | AbstractMesh, axes: tuple[str, ...]) -> int:
    """Over how many devices these axes spread an array."""
    return math.prod(mesh.shape[axis] for axis in axes)


def _check_divides(
    mesh: Mesh | AbstractMesh, argument: str, axes: tuple[str, ...], name: str, size: int, multiple: int = 1
) -> None:
    parts = axes_size(mesh, axes)
    if size % (parts * multiple):
        slices = f"slices that are multiples of {multiple}" if multiple > 1 else "equal slices"
        raise ValueError(f"{argument}: {axes} has {parts} devices, which does not divide {name} = {size} into {slices}")
