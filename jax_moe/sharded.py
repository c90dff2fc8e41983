"""``sharded_moe``: expert and tensor parallelism, with the local op inside one ``shard_map``."""

import dataclasses

import jax
import jax.core
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from jax_moe import activations, arguments, check, eager, exchange, moe, parcels, placement
from jax_moe.experts import Experts
from jax_moe.placement import Axis
from jax_moe.problem import Combine, Options, OUT_DTYPES, Precision, WeightOn
from jax_moe.routing import Routing


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
    sum_dtype=jnp.float32,
    command_buffer: bool = True,
    batch_invariant: bool = False,
) -> jax.Array:
    """:func:`jax_moe.fused_moe` over a device mesh, on weights that stay where :func:`expert_shardings` puts them.

    Every device runs its own experts (``expert_axis``), its own slice of I (``tensor_axis``), or both, on the tokens
    of its slice of ``data_axis``. The partial outputs are summed over the two model axes, by default in float32 and
    rounded once. A data axis may be one of the model axes too (tokens and experts spread over the same devices): the
    tokens are then gathered over it first, in w4a4 as the codes and block scales that are multiplied, and the sum is
    scattered back. ``docs/scaling.md`` says what each form costs.

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
      activation, precision, combine, weight_on, out_dtype, command_buffer: as for ``fused_moe``. In w4a4_dynamic
        each device of ``tensor_axis`` finds the scales of its own slice of the intermediate.
      sum_dtype: of the partial outputs as they travel between devices; no effect where there is nothing to sum.
        float32, or bfloat16: half the bytes, and each device's part is rounded (``docs/numerics.md``).
      batch_invariant: as for ``fused_moe``, on this mesh: parts of more than two devices are added in the order of
        devices, too, which sends half as many bytes again where all devices get the whole sum.

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
        command_buffer=command_buffer, batch_invariant=batch_invariant,
    )  # fmt: skip
    problem = check.check(x, experts, routing, options, expert_offset=0, num_experts=None)
    sum_dtype = arguments.dtype("sum_dtype", sum_dtype, OUT_DTYPES)
    specs = placement.partition_specs(experts, mesh, expert_axis=expert_axis, tensor_axis=tensor_axis)
    expert_axes = placement.axes_in(mesh, "expert_axis", expert_axis)
    tensor_axes = placement.axes_in(mesh, "tensor_axis", tensor_axis)
    data_axes = placement.axes_in(mesh, "data_axis", data_axis)
    if not (expert_axes or tensor_axes or data_axes):
        raise ValueError(
            f"mesh: got axes {mesh.axis_names}, none of which is the expert_axis ({expert_axis!r}), tensor_axis "
            f"({tensor_axis!r}) or data_axis ({data_axis!r})"
        )
    placement.check_divides(mesh, "data_axis", data_axes, "T", problem.num_tokens)

    reduced = expert_axes + tensor_axes
    gathered = tuple(axis for axis in data_axes if axis in reduced and mesh.shape[axis] > 1)
    summed = tuple(axis for axis in reduced if axis not in data_axes)
    moe.debug_ids(routing, num_experts=problem.local_experts)
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
        received = None
        if gathered and parcels.are_taken(problem):
            x, routing, received = exchange.gather_parcels(
                x, routing, experts.gate_up.input_scale, gathered, layout=problem.layout, command_buffer=command_buffer
            )
        elif gathered:
            x, routing = exchange.gather((x, routing), gathered)
        offset = jax.lax.axis_index(expert_axes) * experts.down.global_scale.shape[0] if expert_axes else 0
        if tensor_axes:
            experts = _bias_on_first(experts, jax.lax.axis_index(tensor_axes) == 0)
        is_part = placement.axes_size(mesh, reduced) > 1
        partial = dataclasses.replace(options, out_dtype=sum_dtype) if is_part else options
        local = check.check(x, experts, routing, partial, expert_offset=offset, num_experts=problem.local_experts)
        y = moe.bind(local, x, experts, routing, offset, received)
        y = exchange.add_up(y, scattered=gathered, summed=summed, in_order=batch_invariant)
        return y.reshape(local_shape).astype(out_dtype)

    run = jax.shard_map(local_moe, mesh=mesh, in_specs=(tokens, specs, tokens), out_specs=tokens)
    placement.check_in_place(experts, specs, mesh)
    if AxisType.Explicit in mesh.axis_types:
        if AxisType.Auto in mesh.axis_types:
            raise ValueError(f"mesh: got axes of types {mesh.axis_types}, needs all automatic or all explicit")
        everything = (x, experts, routing), (tokens, specs, jax.tree.map(lambda _: tokens, routing))
        x, experts, routing = jax.tree.map(lambda a, spec: jax.reshard(a, NamedSharding(mesh, spec)), *everything)
    y = eager.as_one_op("sharded_moe", run, x, experts, routing)
    return y if y.shape == shape else y.reshape(shape)


def _spread_tokens(
    x: jax.Array, mesh: Mesh | AbstractMesh, data_axes: tuple[str, ...]
) -> tuple[tuple[str, ...] | None, ...] | None:
    """Which of ``data_axes`` shard each leading axis of ``x``; None: all leading axes as one."""
    leading = x.shape[:-1]
    sharding = jax.typeof(x).sharding if isinstance(x, jax.core.Tracer) else getattr(x, "sharding", None)
    if isinstance(sharding, NamedSharding) and sharding.mesh.axis_names == mesh.axis_names:
        entries = (*sharding.spec, *[None] * len(leading))[: len(leading)]
        found = [tuple(name for name in placement.axis_names(entry) if name in data_axes) for entry in entries]
        if sorted(sum(found, ())) == sorted(data_axes):
            return tuple(names or None for names in found)
    for place, size in enumerate(leading):
        if size % placement.axes_size(mesh, data_axes) == 0:
            return tuple(data_axes or None if axis == place else None for axis in range(len(leading)))
    return None


def _bias_on_first(experts: Experts, is_first: jax.Array) -> Experts:
    """Keeps the down bias on one device of a tensor-parallel group: the sum over the group adds it once."""
    if experts.down.bias is None:
        return experts
    bias = jnp.where(is_first, experts.down.bias, 0)
    return dataclasses.replace(experts, down=dataclasses.replace(experts.down, bias=bias))
