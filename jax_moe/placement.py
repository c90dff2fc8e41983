"""Functions of one layer's experts that run where the experts are, so that no weight moves."""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

import jax
import jax.core
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from jax_moe import ffi, parallel
from jax_moe.experts import Experts


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
        return parallel.axes_size(self.mesh, self.tensor_axes) if self.mesh else 1

    def specs(self, experts: Experts) -> Experts:
        """The ``PartitionSpec`` of every leaf that ``experts``, so placed, have."""
        return parallel.specs_of(experts, self.expert_axes, self.tensor_axes)


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
    expert_axis, tensor_axis = parallel.model_axes(experts, sharding.spec)
    mesh = sharding.mesh
    specs = parallel.partition_specs(experts, mesh, expert_axis=expert_axis, tensor_axis=tensor_axis)
    parallel.check_in_place(experts, specs, mesh)
    return Placement(mesh, parallel.axis_names(expert_axis), parallel.axis_names(tensor_axis))


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
        return ffi.as_one_op(self._verb, run, *arguments)

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


def _lower(ctx, array, *, verb: str):
    _refuse(verb, ffi.num_partitions(ctx.module_context.axis_context))
    return [array]


mlir.register_lowering(in_one_place_p, _lower)
