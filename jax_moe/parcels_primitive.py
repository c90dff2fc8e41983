"""The primitive that makes parcels (``parcels.py``), which lowers to a custom call of its own, and its rules."""

import functools

import jax
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from jax_moe import custom_call, eager, ffi, primitive
from jax_moe.parcels import assemble, Parcels
from jax_moe.routing import Routing

parcels_p = Primitive("jax_moe_parcels")
"""``parcels = parcels_p.bind(x, expert_ids, routing_weights, input_scale, problem=...)``."""

parcels_p.def_impl(functools.partial(eager.run_eagerly, parcels_p))


@parcels_p.def_abstract_eval
def _result_type(x, *_, problem: Parcels):
    return x.update(shape=(problem.num_tokens, problem.num_bytes), dtype=problem.out_dtype, weak_type=False)


def make(x: jax.Array, routing: Routing, input_scale: jax.Array, *, layout: str, command_buffer: bool) -> jax.Array:
    """The parcels of tokens, uint8 ``[T, num_bytes]``.

    Args:
      x: bfloat16 ``[T, H]``.
      routing: of these tokens.
      input_scale: float32 scalar, the global scale of x.
      layout, command_buffer: as :class:`Parcels` has them.
    """
    problem = Parcels(
        num_tokens=x.shape[0], top_k=routing.expert_ids.shape[1], hidden_size=x.shape[1], layout=layout,
        command_buffer=command_buffer,
    )  # fmt: skip
    # Bytes have no tangents: exchange.py says what those of their contents are.
    given = jax.lax.stop_gradient((x, routing.expert_ids, routing.weights, input_scale))
    return parcels_p.bind(*custom_call.vary_alike(*given), problem=problem)


def _lower_cpu(ctx, *operands, problem: Parcels):
    make = functools.partial(assemble, problem=problem)
    return mlir.lower_fun(make, multiple_results=False)(ctx, *operands)


def _lower_cuda(ctx, *operands, problem: Parcels):
    return custom_call.emit_for_cuda(ctx, ffi.PARCELS_TARGET, ffi.PARCELS_NO_CAPTURE_TARGET, operands, problem)


mlir.register_lowering(parcels_p, _lower_cpu, platform="cpu")
mlir.register_lowering(parcels_p, _lower_cuda, platform="cuda")
batching.primitive_batchers[parcels_p] = functools.partial(primitive.fold_into_tokens, parcels_p)
