"""Parcels: tokens as they travel between devices in w4a4, each a row of bytes, so that one gather moves all of it.

    int32[K] expert ids | float32[K] routing weights | uint8[H/2] codes | e4m3[H/16] block scales | zeros

The zeros make the row a multiple of 8 bytes, so that the codes of 16 values are aligned to theirs. On a GPU a kernel
makes parcels, launched by a custom call of its own, and ``fused_moe``'s custom call takes them as its x; on a CPU both
are XLA's code.
"""

import dataclasses
import functools
from typing import Any, ClassVar

import jax
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir
import jax.numpy as jnp

from jax_moe import custom_call, eager, ffi, layouts, nvfp4, primitive
from jax_moe.problem import Problem
from jax_moe.routing import Routing

_ALIGNMENT = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parcels:
    """All that is static about a call that makes parcels.

    Attributes:
      num_tokens, top_k, hidden_size: T, K and H.
      layout: of the experts that will multiply the tokens; it names the GPU.
      command_buffer: as :func:`jax_moe.fused_moe` takes it.
    """

    op: ClassVar[str] = "sharded_moe"
    operand_names: ClassVar[tuple[str, ...]] = ("x", "expert_ids", "routing_weights", "input_scale")
    absent: ClassVar[tuple[str, ...]] = ()
    when_sharded: ClassVar[str] = "It belongs in a jax.shard_map over all the mesh's axes."
    out_dtype: ClassVar[Any] = jnp.dtype(jnp.uint8)

    num_tokens: int
    top_k: int
    hidden_size: int
    layout: str
    command_buffer: bool

    @property
    def num_operands(self) -> int:
        return len(self.operand_names)

    @property
    def num_bytes(self) -> int:
        """Of a parcel."""
        return num_bytes(self.top_k, self.hidden_size)

    def attributes(self) -> dict[str, object]:
        """The custom call's attributes beside its kernels."""
        return {}


def num_bytes(top_k: int, hidden_size: int) -> int:
    """Of the parcel of a token with K routes and H values."""
    used = 8 * top_k + 9 * (hidden_size // nvfp4.BLOCK_SIZE)
    return -(-used // _ALIGNMENT) * _ALIGNMENT


def are_taken(problem: Problem) -> bool:
    """Whether a call can be given its tokens so, rounded. What is weighted on the way in is rounded after that."""
    takes = problem.precision == "w4a4" and problem.weight_on == "output"
    return takes and layouts.get(problem.layout).takes_rounded_x


def of_call(problem: Problem) -> tuple[Parcels, Problem]:
    """The call that makes the parcels of all tokens of ``problem``, and ``problem`` with them instead of x."""
    made = Parcels(
        num_tokens=problem.num_tokens, top_k=problem.top_k, hidden_size=problem.hidden_size, layout=problem.layout,
        command_buffer=problem.command_buffer,
    )  # fmt: skip
    return made, dataclasses.replace(problem, x_is_rounded=True, has_parcels=True)


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


def x_of(parcels: jax.Array, top_k: int, hidden_size: int) -> jax.Array:
    """bfloat16 ``[T, H]``: the tokens as w4a4 multiplies them, code * block scale, exactly."""
    _, codes, scales, _ = _split(parcels, 8 * top_k, hidden_size // 2, hidden_size // nvfp4.BLOCK_SIZE)
    return nvfp4.dequantize(codes, jax.lax.bitcast_convert_type(scales, jnp.float8_e4m3fn), dtype=jnp.bfloat16)


def routing_of(parcels: jax.Array, top_k: int) -> Routing:
    """The routing of the tokens."""
    ids, weights, _ = _split(parcels, 4 * top_k, 4 * top_k)
    shape = (*parcels.shape[:-1], top_k, 4)
    return Routing(
        expert_ids=jax.lax.bitcast_convert_type(ids.reshape(shape), jnp.int32),
        weights=jax.lax.bitcast_convert_type(weights.reshape(shape), jnp.float32),
    )


def _split(parcels: jax.Array, *sizes: int) -> list[jax.Array]:
    """Columns of so many bytes, and the rest."""
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return jnp.split(parcels, ends, axis=-1)


def _assemble(x, expert_ids, routing_weights, input_scale, *, problem: Parcels):
    codes, scales = nvfp4.quantize(x, input_scale)

    def as_bytes(array):
        found = jax.lax.bitcast_convert_type(array, jnp.uint8)
        return found.reshape(problem.num_tokens, -1)

    used = 8 * problem.top_k + 9 * (problem.hidden_size // nvfp4.BLOCK_SIZE)
    padding = jnp.zeros((problem.num_tokens, problem.num_bytes - used), jnp.uint8)
    return jnp.concatenate([*map(as_bytes, (expert_ids, routing_weights, codes, scales)), padding], axis=-1)


def _lower_cpu(ctx, *operands, problem: Parcels):
    assemble = functools.partial(_assemble, problem=problem)
    return mlir.lower_fun(assemble, multiple_results=False)(ctx, *operands)


def _lower_cuda(ctx, *operands, problem: Parcels):
    return custom_call.emit_for_cuda(ctx, ffi.PARCELS_TARGET, ffi.PARCELS_NO_CAPTURE_TARGET, operands, problem)


mlir.register_lowering(parcels_p, _lower_cpu, platform="cpu")
mlir.register_lowering(parcels_p, _lower_cuda, platform="cuda")
batching.primitive_batchers[parcels_p] = functools.partial(primitive.fold_into_tokens, parcels_p)
