"""``MoE``: router, NVFP4 experts and an optional shared expert as one flax.nnx module."""

import os
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from jax_moe import activations, checkpoints, moe, parallel, plan
from jax_moe.checkpoints import CheckpointError, Router, SharedExpert
from jax_moe.experts import CANONICAL, Experts


class Quantized(nnx.Variable):
    """A leaf of ``Experts``: not a parameter, because NVFP4 codes have no gradient to follow."""


class MoE(nnx.Module):
    """A mixture-of-experts layer for inference.

    ``module(x)`` routes ``x``, runs the chosen experts in one custom call and adds the shared expert. On a mesh the
    experts stay where they are (:func:`jax_moe.sharded_moe`). Every variable carries its ``PartitionSpec``, so
    ``nnx.get_partition_spec(nnx.state(module))`` gives the specs of the whole module.

    Attributes:
      experts: the :class:`jax_moe.Experts`, each leaf in a :class:`Quantized` variable.
      router: the :class:`jax_moe.checkpoints.Router`, each leaf in an ``nnx.Param``.
      shared_expert: the :class:`jax_moe.checkpoints.SharedExpert`, likewise, or None.
    """

    def __init__(
        self,
        experts: Experts,
        router: Router,
        shared_expert: SharedExpert | None = None,
        *,
        activation: activations.Activation = activations.SwiGLU(),
        precision: plan.Precision = "w4a16",
        combine: plan.Combine = "atomic",
        weight_on: plan.WeightOn = "output",
        mesh: Mesh | None = None,
        expert_axis: parallel.Axis = "expert",
        tensor_axis: parallel.Axis = "tensor",
        data_axis: parallel.Axis = "data",
    ):
        """Wraps arrays that are where they should be: see :meth:`from_checkpoint`, or ``jax_moe.expert_shardings``.

        Args:
          experts, router, shared_expert: the weights.
          activation, precision, combine, weight_on: as for :func:`jax_moe.fused_moe`.
          mesh: run over this mesh; None for one device.
          expert_axis, tensor_axis, data_axis: as for :func:`jax_moe.sharded_moe`.

        Raises:
          ValueError: the mesh does not divide the experts.
        """
        self.options: dict[str, Any] = {
            "activation": activation,
            "precision": precision,
            "combine": combine,
            "weight_on": weight_on,
        }
        self.mesh = mesh
        self.axes: dict[str, Any] = {"expert_axis": expert_axis, "tensor_axis": tensor_axis, "data_axis": data_axis}
        specs = _expert_specs(experts, mesh, expert_axis, tensor_axis)
        self.experts = nnx.data(_variables(Quantized, experts, specs))
        self.router = nnx.data(_variables(nnx.Param, router, jax.tree.map(lambda _: PartitionSpec(), router)))
        shared_specs = None if shared_expert is None else _shared_specs(mesh, tensor_axis)
        self.shared_expert = nnx.data(_variables(nnx.Param, shared_expert, shared_specs))

    @classmethod
    def from_checkpoint(
        cls,
        directory: str | os.PathLike[str],
        layer: int,
        *,
        mesh: Mesh | None = None,
        expert_axis: parallel.Axis = "expert",
        tensor_axis: parallel.Axis = "tensor",
        progress: bool = True,
        **options: Any,
    ) -> "MoE":
        """One MoE layer of a checkpoint, with the router's rule and the activation of its family.

        Args:
          directory, layer: as for :func:`jax_moe.load_experts`.
          mesh, expert_axis, tensor_axis: where the weights go; each process reads only its own part of the experts.
          progress: show a progress bar on a terminal.
          options: ``precision``, ``combine`` and ``data_axis`` of the constructor.

        Raises:
          CheckpointError: as :func:`jax_moe.load_experts`, or the experts work on another size than the layer.
        """
        axes: dict[str, Any] = {"expert_axis": expert_axis, "tensor_axis": tensor_axis}
        router = checkpoints.load_router(directory, layer)
        experts = checkpoints.load_experts(directory, layer, mesh=mesh, progress=progress, **axes)
        shared_expert = checkpoints.load_shared_expert(directory, layer)
        if experts.layout == CANONICAL and experts.down.payload.shape[1] != router.weight.shape[1]:
            raise CheckpointError(
                f"{directory}: layer {layer}: found experts of H = {experts.down.payload.shape[1]} behind a "
                f"projection from {router.weight.shape[1]}; MoE has no such projection, load_experts loads them alone"
            )
        if mesh is not None:
            router = jax.device_put(router, NamedSharding(mesh, PartitionSpec()))
        if mesh is not None and shared_expert is not None:
            specs = _shared_specs(mesh, tensor_axis)
            shared_expert = jax.tree.map(
                lambda a, spec: jax.device_put(a, NamedSharding(mesh, spec)), shared_expert, specs
            )
        family = checkpoints.moe_options(directory)
        return cls(experts, router, shared_expert, mesh=mesh, **axes, **family, **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        """``x`` ``[..., H]`` of any float dtype to the same shape and dtype; the experts see it in bfloat16."""
        tokens = x.reshape(-1, x.shape[-1])
        routing = _arrays(self.router)(tokens)
        run = moe.fused_moe if self.mesh is None else parallel.sharded_moe
        placement = {} if self.mesh is None else {"mesh": self.mesh, **self.axes}
        y = run(
            tokens.astype(jnp.bfloat16),
            _arrays(self.experts),
            routing,
            out_dtype=jnp.float32,
            **self.options,
            **placement,
        )
        if self.shared_expert is not None:
            y = y + _arrays(self.shared_expert)(tokens, self.options["activation"])
        return y.astype(x.dtype).reshape(x.shape)


def _variables(kind: type[nnx.Variable], tree: Any, specs: Any) -> Any:
    # The arrays are in place already: flax would otherwise want to move them, and need the mesh for it.
    return jax.tree.map(lambda leaf, spec: kind(leaf, out_sharding=spec, eager_sharding=False), tree, specs)


def _arrays(tree: Any) -> Any:
    is_variable = lambda node: isinstance(node, nnx.Variable)  # noqa: E731
    return jax.tree.map(lambda variable: variable[...], tree, is_leaf=is_variable)


def _expert_specs(
    experts: Experts, mesh: Mesh | None, expert_axis: parallel.Axis, tensor_axis: parallel.Axis
) -> Experts:
    names = _names(expert_axis) + _names(tensor_axis)
    # Without a mesh the specs still name the axes, for one that comes later.
    target: Any = mesh or AbstractMesh((1,) * len(names), names)
    return parallel.partition_specs(experts, target, expert_axis=expert_axis, tensor_axis=tensor_axis)


def _shared_specs(mesh: Mesh | None, tensor_axis: parallel.Axis) -> Any:
    """A ``SharedExpert`` of specs: I over the tensor axis."""
    names = tuple(name for name in _names(tensor_axis) if mesh is None or name in mesh.axis_names) or None
    specs: Any = PartitionSpec(None, names, None), PartitionSpec(None, names)
    return SharedExpert(*specs)


def _names(axis: parallel.Axis) -> tuple[str, ...]:
    return () if axis is None else (axis,) if isinstance(axis, str) else tuple(axis)
