"""What the primitives of this package share: how a call on local arrays is lowered to one custom call."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.core
from jax.interpreters import mlir
import jax.numpy as jnp
import numpy as np

from jax_moe import ffi, placement
from jax_moe.operands import fill


def vary_alike(*operands: jax.Array) -> tuple[jax.Array, ...]:
    """Inside ``shard_map``, marks every operand as varying over each mesh axis that any of them varies over."""
    varying = [frozenset(jax.typeof(operand).mat.varying) for operand in operands]
    union = frozenset().union(*varying)
    return tuple(
        jax.lax.pcast(operand, tuple(union - axes), to="varying") if union - axes else operand
        for operand, axes in zip(operands, varying, strict=True)
    )


def emit(
    ctx, target: str, operands, problem: Any, attributes: Mapping[str, Any], workspaces: Sequence[jax.ShapeDtypeStruct]
):
    """Emits the call of ``problem`` and returns its output.

    An absent operand becomes f32[0], so that each has a fixed place. Here and not where the op is called, because an
    operand may become sharded, even one without elements, and then jaxlib 0.11.2 crashes: that is what an eager
    ``shard_map`` does with everything that a primitive takes.

    Args:
      ctx: of the lowering rule, as is ``operands``: those that are given.
      target: of the custom call.
      problem: what is static about the call: a Problem, a Product or Parcels.
      attributes: those that only this platform has.
      workspaces: results behind the output.
    """
    (out,) = ctx.avals_out
    if out.size == 0:  # the same crash, of tokens without elements: no call, then
        return mlir.lower_fun(lambda *_: jnp.zeros(out.shape, out.dtype), multiple_results=False)(ctx, *operands)
    ffi.register()
    refuse_partitioning(ctx.module_context.axis_context, problem)
    empty = np.zeros((0,), np.float32)
    absent_type = jax.core.ShapedArray(empty.shape, empty.dtype)
    avals = fill(ctx.avals_in, problem.absent, absent_type, problem.operand_names)
    results = [out, *(jax.core.ShapedArray(w.shape, w.dtype) for w in workspaces)]
    rule = jax.ffi.ffi_lowering(target)
    operands = fill(operands, problem.absent, mlir.ir_constant(empty), problem.operand_names)
    return rule(ctx.replace(avals_in=avals, avals_out=results), *operands, **problem.attributes(), **attributes)[:1]


def emit_for_cuda(ctx, target: str, no_capture_target: str, operands, problem: Any):
    """As :func:`emit`, with what the GPU's target makes of ``problem``."""
    from jax_moe.kernels import lowering  # here, because a CPU never needs it

    call = lowering.cuda_call(problem)
    chosen = target if problem.command_buffer else no_capture_target
    return emit(ctx, chosen, operands, problem, call.attributes, call.workspaces)


def refuse_partitioning(axis_context, problem: Any) -> None:
    """Raises unless each device runs this call on arrays of its own.

    XLA cannot split a custom call: it would gather every operand, the weights included, on every device and
    say nothing. Inside ``shard_map`` over all mesh axes the operands are local and all is well.
    """
    count = placement.num_partitions(axis_context)
    if count != 1:
        raise ValueError(
            f"{problem.op}: this call is spread over {count} devices outside jax.shard_map. XLA cannot split a "
            "custom call and would silently gather every operand, the weights included, on each of them. "
            f"{problem.when_sharded}"
        )
