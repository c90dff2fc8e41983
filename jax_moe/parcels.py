"""Parcels: tokens as they travel between devices in w4a4, each a row of bytes, so that one gather moves all of it.

    int32[K] expert ids | float32[K] routing weights | uint8[H/2] codes | e4m3[H/16] block scales | zeros

The zeros make the row a multiple of 8 bytes, so that the codes of 16 values are aligned to theirs. On a GPU a kernel
makes parcels, launched by a custom call of its own, and ``fused_moe``'s custom call takes them as its x; on a CPU both
are XLA's code.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jax_moe import layouts, nvfp4
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
    return made, dataclasses.replace(problem, x_form="parcels")


def assemble(x, expert_ids, routing_weights, input_scale, *, problem: Parcels) -> jax.Array:
    """The parcels, as XLA's code: what the primitive's operands become."""
    codes, scales = nvfp4.quantize(x, input_scale)

    def as_bytes(array):
        return jax.lax.bitcast_convert_type(array, jnp.uint8).reshape(problem.num_tokens, -1)

    rows = jnp.concatenate([as_bytes(part) for part in (expert_ids, routing_weights, codes, scales)], axis=-1)
    return jnp.pad(rows, ((0, 0), (0, problem.num_bytes - rows.shape[1])))


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
