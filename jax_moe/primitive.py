"""The primitive that lowers to the one custom call, and its rules; that of its derivative is in ``derivative.py``.

It exists for what a bare ``jax.ffi.ffi_call`` cannot do: choose attributes and workspaces by platform when the program
is *lowered*, fold a mapped axis into tokens, have a derivative, and refuse, with a message, to be partitioned by XLA.
"""

import dataclasses
import functools

import jax
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir
import jax.numpy as jnp

from jax_moe import custom_call, eager, ffi
from jax_moe.experts import CANONICAL
from jax_moe.operands import NUM_OF_TOKENS
from jax_moe.problem import cpu_workspaces, Problem

fused_moe_p = Primitive("jax_moe_fused_moe")
"""``out = fused_moe_p.bind(*operands, problem=...)``: those of ``operands.py``, but for those in ``problem.absent``;
behind them the parcels, if its ``x_form`` is those."""


fused_moe_p.def_impl(functools.partial(eager.run_eagerly, fused_moe_p))


@fused_moe_p.def_abstract_eval
def _result_type(x, *_, problem: Problem):
    # The output has the shape of x and, inside shard_map, varies over the same mesh axes.
    return x.update(dtype=problem.out_dtype, weak_type=False)


def _lower_cpu(ctx, *operands, problem: Problem):
    if problem.layout != CANONICAL:
        raise ValueError(
            f"experts.layout: got {problem.layout!r}, but on a CPU fused_moe needs {CANONICAL!r} weights: those that "
            "jax_moe.prepare was given, or jax_moe.unprepare(experts, hidden_size, intermediate_size)"
        )
    problem = problem.without_parcels()
    operands = operands[: problem.num_operands]
    return custom_call.emit(ctx, ffi.TARGET, operands, problem, {}, cpu_workspaces(problem))


def _lower_cuda(ctx, *operands, problem: Problem):
    if problem.x_form == "parcels":  # nobody else reads x then, and XLA does not make it
        operands = (operands[-1], *operands[1:-1])
        ctx = ctx.replace(avals_in=[ctx.avals_in[-1], *ctx.avals_in[1:-1]])
    return custom_call.emit_for_cuda(ctx, ffi.TARGET, ffi.NO_CAPTURE_TARGET, operands, problem)


def fold_into_tokens(primitive: Primitive, operands, axes, *, problem: Problem, **static):
    """Batching rule: the mapped axis becomes part of T. Operands behind the op's, and results, lead with tokens.

    Raises:
      NotImplementedError: an expert or expert_offset is mapped.
    """
    is_mapped = [axis is not None for axis in axes]
    if any(is_mapped[NUM_OF_TOKENS : problem.num_operands]):
        raise NotImplementedError(
            "fused_moe: vmap over experts or expert_offset. x and routing may be mapped, because they become more "
            "tokens of the same experts: give the experts in_axes=None. For several layers, use jax.lax.scan. A "
            "lax.cond whose predicate is mapped maps what its branches close over: call fused_moe before it, and "
            "select with jnp.where."
        )
    size = operands[is_mapped.index(True)].shape[axes[is_mapped.index(True)]]
    num_tokens = size * problem.num_tokens

    def fold(operand, axis):
        mapped = (
            jnp.broadcast_to(operand[None], (size, *operand.shape)) if axis is None else jnp.moveaxis(operand, axis, 0)
        )
        return mapped.reshape(num_tokens, mapped.shape[-1])

    folded = list(operands)
    for i in (*range(NUM_OF_TOKENS), *range(problem.num_operands, len(operands))):
        folded[i] = fold(operands[i], axes[i])
    results = primitive.bind(*folded, problem=dataclasses.replace(problem, num_tokens=num_tokens), **static)
    results = jax.tree.map(lambda r: r.reshape(size, problem.num_tokens, r.shape[-1]), results)
    return results, jax.tree.map(lambda _: 0, results)


mlir.register_lowering(fused_moe_p, _lower_cpu, platform="cpu")
mlir.register_lowering(fused_moe_p, _lower_cuda, platform="cuda")
batching.primitive_batchers[fused_moe_p] = functools.partial(fold_into_tokens, fused_moe_p)
