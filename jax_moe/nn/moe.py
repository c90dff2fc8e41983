"""``MoE``: router, NVFP4 experts and an optional shared expert as one flax.nnx module."""

from collections.abc import Callable
import dataclasses
import functools
import os
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from jax_moe import activations, arguments, checkpoints, moe, placement, sharded
from jax_moe.checkpoints import HashRouter, load, Router, SharedExpert
from jax_moe.experts import CANONICAL, Experts
from jax_moe.preparation import prepare
from jax_moe.problem import Combine, Options, OUT_DTYPES, Precision, WeightOn


class Quantized(nnx.Variable):
    """A leaf of ``Experts``: not a parameter, because NVFP4 codes have no gradient to follow."""


@dataclasses.dataclass(frozen=True)
class Axes:
    """Over which mesh axes a :class:`MoE` is spread: arguments of :func:`jax_moe.sharded_moe`."""

    expert_axis: placement.Axis
    tensor_axis: placement.Axis
    data_axis: placement.Axis


class MoE(nnx.Module):
    """A mixture-of-experts layer for inference.

    ``module(x)`` routes ``x``, runs the chosen experts in one custom call and adds the shared expert. On a mesh the
    experts stay where they are (:func:`jax_moe.sharded_moe`). Every variable carries its ``PartitionSpec``, so
    ``nnx.get_partition_spec(nnx.state(module))`` gives the specs of the whole module; placed by them, it runs on the
    mesh that it was placed on.

    :meth:`from_checkpoint` makes one in one call. From weights of one's own it is, with ``gate`` and ``up``
    ``[E, I, H]``, ``down`` ``[E, H, I]`` and the router's ``weight`` ``[E, H]``::

        experts = jax_moe.prepare(jax_moe.quantize_experts(gate, up, down))
        router = jax_moe.checkpoints.Router(weight, k=8, method=jax_moe.Softmax())
        module = MoE(experts, router)

    Attributes:
      experts: the :class:`jax_moe.Experts`, each leaf in a :class:`Quantized` variable.
      router: the :class:`jax_moe.Router`, each leaf in an ``nnx.Param``; or a ``HashRouter``, likewise,
        but for its table of integers, in an ``nnx.Variable``.
      shared_expert: the :class:`jax_moe.SharedExpert`, likewise, or None.
      options: how it computes: arguments of :func:`jax_moe.fused_moe`, as one hashable object.
      mesh: the mesh that it was made with, or None.
      axes: the names of the mesh axes that it is spread over.
    """

    def __init__(
        self,
        experts: Experts,
        router: Router | HashRouter,
        shared_expert: SharedExpert | None = None,
        *,
        activation: activations.Activation = activations.SwiGLU(),
        precision: Precision = "w4a16",
        combine: Combine = "atomic",
        weight_on: WeightOn = "output",
        command_buffer: bool = True,
        batch_invariant: bool = False,
        mesh: Mesh | None = None,
        expert_axis: placement.Axis = "expert",
        tensor_axis: placement.Axis = "tensor",
        data_axis: placement.Axis = "data",
        sum_dtype=jnp.float32,
    ):
        """Wraps arrays that are where they should be: see :meth:`from_checkpoint`, or ``jax_moe.expert_shardings``.

        Args:
          experts: all E experts of the layer, ``[E, P, I, H]`` and ``[E, H, I]``; on a GPU they must have gone through
            :func:`jax_moe.prepare`.
          router: a :class:`jax_moe.Router`, or a :class:`jax_moe.HashRouter`, with float32
            weights ``[E, H]``.
          shared_expert: a :class:`jax_moe.SharedExpert` with weights ``[P, I', H]`` and ``[H, I']``, I' its
            own; or None.
          activation, precision, combine, weight_on, command_buffer: as for :func:`jax_moe.fused_moe`.
          batch_invariant: as for :func:`jax_moe.fused_moe`, of the experts: the router's logits and the shared expert
            are XLA's products, whose bits may depend on the batch.
          mesh: run over this mesh. None is the mesh that the experts, or else ``x``, are placed on when the module is
            called, or else the one that ``jax.set_mesh`` has set; without any, one device.
          expert_axis, tensor_axis, data_axis, sum_dtype: as for :func:`jax_moe.sharded_moe`.

        Raises:
          TypeError, ValueError: an argument has the wrong type, dtype, shape or value, or two do not fit each other; or
            the mesh does not divide the experts.
        """
        arguments.instance("experts", experts, Experts)
        arguments.instance("router", router, Router | HashRouter)
        arguments.instance("shared_expert", shared_expert, SharedExpert | None)
        self.options = Options(
            activation=activation, precision=precision, combine=combine, weight_on=weight_on, out_dtype=jnp.float32,
            command_buffer=command_buffer, batch_invariant=batch_invariant,
        )  # fmt: skip
        self.mesh = mesh
        self.axes = Axes(expert_axis, tensor_axis, data_axis)
        self.sum_dtype = arguments.dtype("sum_dtype", sum_dtype, OUT_DTYPES)
        specs = _expert_specs(experts, mesh, expert_axis, tensor_axis)
        _check(experts, router, shared_expert, self.options)
        self.experts = nnx.data(_variables(Quantized, experts, specs))
        self.router = nnx.data(_variables(_parameter, router, jax.tree.map(lambda _: PartitionSpec(), router)))
        shared_specs = None if shared_expert is None else _shared_specs(shared_expert, mesh, tensor_axis)
        self.shared_expert = nnx.data(_variables(nnx.Param, shared_expert, shared_specs))

    @classmethod
    def from_checkpoint(
        cls,
        directory: str | os.PathLike[str],
        layer: int,
        *,
        target: str | None = None,
        mesh: Mesh | None = None,
        expert_axis: placement.Axis = "expert",
        tensor_axis: placement.Axis = "tensor",
        progress: bool = True,
        **options: Any,
    ) -> "MoE":
        """One MoE layer of a checkpoint, with the router's rule and the activation of its family.

        Args:
          directory, layer: as for :func:`jax_moe.load_experts`.
          target: what to prepare the experts for, as for :func:`jax_moe.prepare`: None is JAX's default device.
            Experts that :func:`jax_moe.checkpoints.convert` prepared stay as they are, whatever that device is.
          mesh, expert_axis, tensor_axis: where the weights go; each process reads only its own part of the experts.
          progress: show a progress bar on a terminal.
          options: the constructor's other options; ``activation`` and ``weight_on`` take the place of the family's.

        Raises:
          CheckpointError: as :func:`jax_moe.load_experts`, or the layer is more than a router, experts and a shared
            expert of one x.
          TypeError, ValueError: as :func:`jax_moe.load_experts`, :func:`jax_moe.prepare` and the constructor.
        """
        axes: dict[str, Any] = {"expert_axis": expert_axis, "tensor_axis": tensor_axis}
        load.check_whole_module(directory, layer)
        router = checkpoints.load_router(directory, layer)
        experts = checkpoints.load_experts(directory, layer, mesh=mesh, progress=progress, **axes)
        shared_expert = checkpoints.load_shared_expert(directory, layer)
        if experts.layout == CANONICAL or target is not None:
            experts = prepare(experts, target, options.get("precision", "w4a16"), progress=progress)
        if mesh is not None:
            everywhere = NamedSharding(mesh, PartitionSpec())
            router = jax.tree.map(lambda array: placement.put(array, everywhere), router)
        if mesh is not None and shared_expert is not None:
            specs = _shared_specs(shared_expert, mesh, tensor_axis)
            shared_expert = jax.tree.map(
                lambda array, spec: placement.put(array, NamedSharding(mesh, spec)), shared_expert, specs
            )
        options = checkpoints.moe_options(directory, layer) | options
        return cls(experts, router, shared_expert, mesh=mesh, **axes, **options)

    def __call__(self, x: jax.Array, token_ids: jax.Array | None = None) -> jax.Array:
        """``x`` ``[..., H]`` of any float dtype to the same shape and dtype; the experts see it in bfloat16.

        Args:
          x: the tokens.
          token_ids: their ids, integers ``[...]``. A ``HashRouter`` needs them, a ``Router`` does not look at them.

        Raises:
          TypeError: ``x`` is not an array of floats, or ``token_ids`` not one of integers where they are needed.
          ValueError: the last axis of ``x`` is not H, the ids have not its leading axes, or the mesh's data axis does
            not divide its tokens.
        """
        experts, router, shared_expert = map(_arrays, (self.experts, self.router, self.shared_expert))
        hidden = router.weight.shape[1]
        arguments.floats("x", x, (*getattr(x, "shape", ())[:-1], hidden))
        options, mesh = vars(self.options), self.mesh or _mesh_of(experts, x, self.axes)
        if mesh is None:
            run = functools.partial(moe.fused_moe, **options)
        else:
            run = functools.partial(
                sharded.sharded_moe, mesh=mesh, **vars(self.axes), sum_dtype=self.sum_dtype, **options
            )
        return _layer(run, x, token_ids, experts, router, shared_expert)


def _mesh_of(experts: Experts, x: jax.Array, axes: Axes) -> Mesh | AbstractMesh | None:
    """The mesh that a call must be split over; None on one device, and inside a ``shard_map``."""
    seen = [jax.typeof(a).sharding.mesh for a in (experts.down.payload, x)]  # jax.jit tells it of what it traces too
    context = jax.sharding.get_abstract_mesh()  # over which JAX spreads what is nowhere in particular
    mesh = next((mesh for mesh in (*seen, context) if not mesh.empty), None)
    if mesh is not None and dict(mesh.shape) == dict(context.shape):
        mesh = context  # the same, and its axes have the types that JAX computes with
    if mesh is None or AxisType.Manual in mesh.axis_types:
        return None
    names = {name for axis in vars(axes).values() for name in placement.axis_names(axis)}
    # Of several devices without an axis of ours: sharded_moe says so.
    return mesh if mesh.size > 1 or names & set(mesh.axis_names) else None


def _layer(
    run: functools.partial,
    x: jax.Array,
    token_ids: Any,
    experts: Experts,
    router: Router | HashRouter,
    shared_expert: SharedExpert | None,
) -> jax.Array:
    """``x`` ``[..., H]`` to the same shape and dtype; ``run`` is ``fused_moe`` or ``sharded_moe`` with its options."""
    routing = router(x, token_ids) if isinstance(router, HashRouter) else router(x)
    y = run(x.astype(jnp.bfloat16), experts, routing)
    if shared_expert is not None:
        dense, sharding = shared_expert(x, run.keywords["activation"]), jax.typeof(y).sharding
        if AxisType.Explicit in sharding.mesh.axis_types:  # it is where x was, and y over the data axis
            dense = jax.reshard(dense, sharding)
        y = y + dense
    return y.astype(x.dtype)


def _check(experts: Experts, router: Router | HashRouter, shared_expert: SharedExpert | None, options: Options) -> None:
    """Raises what a call would raise about anything but its ``x``."""
    num_experts, hidden = experts.down.payload.shape[:2]
    if experts.layout != CANONICAL:
        hidden = "H"  # prepared experts know it only up to their padding
    _, hidden = arguments.floats("router.weight", router.weight, (num_experts, hidden))
    if shared_expert is not None:
        arguments.floats("shared_expert.gate_up", shared_expert.gate_up, ("P", "I", hidden))
    # Without shardings: the placement of weights is for the mesh to judge, and that of x is not known yet.
    x, token_ids = jax.ShapeDtypeStruct((0, hidden), jnp.bfloat16), jax.ShapeDtypeStruct((0,), jnp.int32)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), (experts, router, shared_expert))
    jax.eval_shape(functools.partial(_layer, functools.partial(moe.fused_moe, **vars(options))), x, token_ids, *shapes)


def _parameter(leaf: jax.Array, **metadata: Any) -> nnx.Variable:
    """What ``jax.grad`` may ask a derivative for is an ``nnx.Param``; a table of integers is not."""
    kind = nnx.Param if jnp.issubdtype(leaf.dtype, jnp.floating) else nnx.Variable
    return kind(leaf, **metadata)


def _variables(kind: Callable[..., nnx.Variable], tree: Any, specs: Any) -> Any:
    # The arrays are in place already: flax would otherwise want to move them, and need the mesh for it.
    return jax.tree.map(lambda leaf, spec: kind(leaf, out_sharding=spec, eager_sharding=False), tree, specs)


def _arrays(tree: Any) -> Any:
    is_variable = lambda node: isinstance(node, nnx.Variable)  # noqa: E731
    return jax.tree.map(lambda variable: variable[...], tree, is_leaf=is_variable)


def _expert_specs(
    experts: Experts, mesh: Mesh | None, expert_axis: placement.Axis, tensor_axis: placement.Axis
) -> Experts:
    names = tuple(dict.fromkeys(_names("expert_axis", expert_axis) + _names("tensor_axis", tensor_axis)))
    # Without a mesh the specs still name the axes, for one that comes later.
    target: Any = mesh or AbstractMesh((1,) * len(names), names)
    return placement.partition_specs(experts, target, expert_axis=expert_axis, tensor_axis=tensor_axis)


def _shared_specs(shared_expert: SharedExpert, mesh: Mesh | None, tensor_axis: placement.Axis) -> Any:
    """A ``SharedExpert`` of specs: I over the tensor axis."""
    names = (
        tuple(name for name in _names("tensor_axis", tensor_axis) if mesh is None or name in mesh.axis_names) or None
    )
    specs: Any = {
        "gate_up": PartitionSpec(None, names, None),
        "down": PartitionSpec(None, names),
        "gate_up_bias": PartitionSpec(None, names),
        "down_bias": PartitionSpec(),
        "gate": PartitionSpec(),
    }
    present = {name: spec for name, spec in specs.items() if getattr(shared_expert, name) is not None}
    return dataclasses.replace(shared_expert, **present)


def _names(argument: str, axis: placement.Axis) -> tuple[str, ...]:
    arguments.instance(argument, axis, str | tuple | None)
    return placement.axis_names(axis)
