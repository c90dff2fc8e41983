"""Where the weights of a layer lie on a mesh, and functions that run there, so that no weight moves."""

from collections.abc import Callable
import dataclasses
import functools
import math
from typing import Any

import jax
import jax.core
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
import numpy as np

from jax_moe import arguments, eager, layouts
from jax_moe.experts import Experts, Projection

Axis = str | tuple[str, ...] | None
"""One mesh axis, several that act as one, or none."""


def expert_shardings(
    experts: Experts, mesh: Mesh | AbstractMesh, *, expert_axis: Axis = "expert", tensor_axis: Axis = "tensor"
) -> Experts:
    """The ``NamedSharding`` of every leaf of ``experts``, for ``jax.device_put(experts, ...)`` or ``in_shardings``.

    Layers that are stacked, for ``jax.lax.scan`` say, lead with further axes, ``[..., E, ...]``: every device has its
    part of all of them.

    Raises:
      ValueError: the mesh does not divide E or I.
    """
    specs = partition_specs(experts, mesh, expert_axis=expert_axis, tensor_axis=tensor_axis)
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)


def put(array: jax.Array | np.ndarray, sharding: NamedSharding) -> jax.Array:
    """What every process has whole, placed: each takes its part of it.

    With several processes ``jax.device_put`` would gather the arrays of all of them on each device, to compare them.
    """
    host = np.asarray(array)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index], dtype=host.dtype)


def partition_specs(
    experts: Experts, mesh: Mesh | AbstractMesh, *, expert_axis: Axis = "expert", tensor_axis: Axis = "tensor"
) -> Experts:
    """The ``PartitionSpec`` of every leaf of ``experts``: E over ``expert_axis``, I over ``tensor_axis``.

    Raises:
      ValueError: the mesh does not divide E or I, or lacks an axis that is not the default one.
    """
    arguments.instance("mesh", mesh, Mesh | AbstractMesh)
    expert_axes = axes_in(mesh, "expert_axis", expert_axis)
    tensor_axes = axes_in(mesh, "tensor_axis", tensor_axis)
    if shared := set(expert_axes) & set(tensor_axes):
        raise ValueError(f"expert_axis, tensor_axis: both got {sorted(shared)}, need different mesh axes")
    *_, num_experts = arguments.array("experts.down.global_scale", experts.down.global_scale, None, ("...", "E"))
    check_divides(mesh, "expert_axis", expert_axes, "E", num_experts)
    slices = axes_size(mesh, tensor_axes)
    if reason := layouts.get(experts.layout).why_not_sliced(experts, slices):
        raise ValueError(f"tensor_axis: {tensor_axes} has {slices} devices, which does not divide {reason}")
    return specs_of(experts, expert_axes, tensor_axes)


def specs_of(experts: Experts, expert_axes: tuple[str, ...], tensor_axes: tuple[str, ...]) -> Experts:
    """The ``PartitionSpec`` of every leaf, whether or not a mesh divides it."""
    mesh_axes = {layouts.E: expert_axes or None, layouts.I: tensor_axes or None, None: None}
    layers = (None,) * (experts.down.global_scale.ndim - 1)  # axes of stacked layers

    def specs(projection: Projection, partition: Projection) -> Projection:
        is_absent = {name: getattr(projection, name) is None for name in ("input_scale", "bias")}
        return Projection(
            **{
                name: None
                if axes is None or is_absent.get(name)
                else PartitionSpec(*layers, *(mesh_axes[a] for a in axes))
                for name, axes in vars(partition).items()
            }
        )

    partition = layouts.get(experts.layout).partition
    return Experts(
        specs(experts.gate_up, partition.gate_up), specs(experts.down, partition.down), layout=experts.layout
    )


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


def axes_in(mesh: Mesh | AbstractMesh, argument: str, axis: Axis) -> tuple[str, ...]:
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


def check_divides(mesh: Mesh | AbstractMesh, argument: str, axes: tuple[str, ...], name: str, size: int) -> None:
    """Raises unless the ``axes`` that ``argument`` names split ``size``, the value of ``name``, into equal slices."""
    parts = axes_size(mesh, axes)
    if size % parts:
        raise ValueError(
            f"{argument}: {axes} has {parts} devices, which does not divide {name} = {size} into equal slices"
        )


@dataclasses.dataclass(frozen=True)
class Placement:
    """How the experts of a layer are spread over a mesh.

    Attributes:
      mesh: the mesh; None: the experts are in one place.
      expert_axes, tensor_axes: the mesh axes over E and over I.
    """

    mesh: Mesh | AbstractMesh | None = None
    expert_axes: tuple[str, ...] = ()
    tensor_axes: tuple[str, ...] = ()

    @property
    def slices(self) -> int:
        """In how many slices I is."""
        return axes_size(self.mesh, self.tensor_axes) if self.mesh else 1

    def specs(self, experts: Experts) -> Experts:
        """The ``PartitionSpec`` of every leaf that ``experts``, so placed, have."""
        return specs_of(experts, self.expert_axes, self.tensor_axes)


def find(experts: Experts) -> Placement:
    """Where the experts of one layer are. Inside ``jax.jit``, automatic mesh axes are not seen.

    Raises:
      ValueError: they are on a mesh in another way than :func:`jax_moe.expert_shardings` would put them.
    """
    payload = experts.gate_up.payload
    if not isinstance(payload, jax.Array):  # a NumPy array is nowhere yet
        return Placement()
    is_traced = isinstance(payload, jax.core.Tracer)
    sharding = jax.typeof(payload).sharding if is_traced else payload.sharding
    if sharding.is_fully_replicated:
        return Placement()
    if not isinstance(sharding, NamedSharding):
        raise ValueError(f"experts.gate_up.payload: got sharding {sharding}, needs a NamedSharding")
    spec = (*sharding.spec, *[None] * payload.ndim)[: payload.ndim]
    axes = dict(zip(layouts.get(experts.layout).partition.gate_up.payload, spec, strict=True))
    expert_axis, tensor_axis = axes[layouts.E], axes[layouts.I]
    mesh = sharding.mesh
    specs = partition_specs(experts, mesh, expert_axis=expert_axis, tensor_axis=tensor_axis)
    check_in_place(experts, specs, mesh)
    return Placement(mesh, axis_names(expert_axis), axis_names(tensor_axis))


class InPlace:
    """A function of one layer's experts under ``jax.jit``, which each device runs on those that it holds.

    ``function(placement, experts, *arrays, *static)`` gets local experts, and arrays that every device has whole.
    Where the experts are on a mesh it runs inside one ``jax.shard_map``, and ``out_specs(placement, experts, *static)``
    are the specs of what it returns. ``placement`` is where they are, ``num_arrays`` the number of ``arrays``; ``verb``
    is for :func:`refuse_to_gather`.
    """

    def __init__(self, verb: str, function: Callable[..., Any], out_specs: Callable[..., Any], num_arrays: int = 0):
        self._verb, self._function, self._out_specs, self._num_arrays = verb, function, out_specs, num_arrays

    def __call__(self, experts: Experts, *args: Any) -> Any:
        run, arguments = self._bind(experts, args)
        return eager.as_one_op(self._verb, run, *arguments)

    def lower(self, experts: Experts, *args: Any) -> jax.stages.Lowered:
        """As the method of a jitted function: to see what the compiled program moves."""
        run, arguments = self._bind(experts, args)
        return run.lower(*arguments)

    def _bind(self, experts: Experts, args: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...]]:
        placement = find(experts)
        arrays, static = args[: self._num_arrays], args[self._num_arrays :]
        if placement.mesh is None:
            specs = out_specs = None
            experts = refuse_to_gather(self._verb, experts)
        else:
            specs, out_specs = placement.specs(experts), self._out_specs(placement, experts, *static)
            arrays = _on_every_device(placement.mesh, arrays)
        return _jitted(self._function, placement, static, self._num_arrays, specs, out_specs), (experts, *arrays)


@functools.lru_cache(maxsize=256)  # else every layer of a model would be compiled anew
def _jitted(function, placement: Placement, static, num_arrays: int, specs, out_specs):
    def local(experts, *arrays):
        return function(placement, experts, *arrays, *static)

    local.__name__ = function.__name__  # in logs and profiles
    if placement.mesh is None:
        return jax.jit(local)
    in_specs = (specs, *[PartitionSpec()] * num_arrays)
    return jax.jit(jax.shard_map(local, mesh=placement.mesh, in_specs=in_specs, out_specs=out_specs))


def _on_every_device(mesh: Mesh | AbstractMesh, arrays: Any) -> Any:
    sharding = NamedSharding(mesh, PartitionSpec())

    def move(array):
        if not isinstance(array, jax.core.Tracer):
            return jax.device_put(array, sharding)
        return jax.reshard(array, sharding) if AxisType.Explicit in mesh.axis_types else array

    return jax.tree.map(move, arrays)


def refuse_to_gather(verb: str, arrays: Any) -> Any:
    """``arrays``, in a program that XLA must not partition: lowering it for several devices raises.

    Only traced ones need it, over whose automatic mesh axes ``jax.jit`` and ``jax.vmap`` show no placement.
    """
    return jax.tree.map(
        lambda array: in_one_place_p.bind(array, verb=verb) if isinstance(array, jax.core.Tracer) else array, arrays
    )


in_one_place_p = Primitive("jax_moe_in_one_place")
"""The identity of an array, which raises when it is lowered where XLA would partition the program."""

in_one_place_p.def_abstract_eval(lambda array, *, verb: array)
batching.primitive_batchers[in_one_place_p] = lambda args, dims, *, verb: (in_one_place_p.bind(*args, verb=verb), *dims)


def _refuse(verb: str, num_devices: int) -> None:
    if num_devices != 1:
        raise ValueError(
            f"{verb}: the program is spread over {num_devices} devices. Inside jax.jit or jax.vmap it is not seen "
            f"where the weights are, and XLA would silently gather all of them on each device. Call {verb} outside, "
            "for one layer, where it keeps them in place, or inside a jax.shard_map over all the mesh's axes."
        )


@in_one_place_p.def_impl
def _run(array, *, verb: str):  # eagerly, inside jax.vmap
    _refuse(verb, 1 if array.sharding.is_fully_replicated else array.sharding.num_devices)
    return array


def num_partitions(axis_context) -> int:
    """Into how many parts XLA may split what is lowered in this context."""
    mesh = getattr(axis_context, "mesh", None)
    if mesh is None:
        return getattr(axis_context, "num_devices", 1)
    automatic = set(mesh.axis_names) - set(axis_context.manual_axes)
    return math.prod(mesh.shape[axis] for axis in automatic)


def _lower(ctx, array, *, verb: str):
    _refuse(verb, num_partitions(ctx.module_context.axis_context))
    return [array]


mlir.register_lowering(in_one_place_p, _lower)
