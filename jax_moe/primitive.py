"""The primitive that lowers to the one custom call, and its rules; that of its derivative is in ``derivative.py``.

It exists for what a bare ``jax.ffi.ffi_call`` cannot do: choose attributes and workspaces by platform when the program
is *lowered*, fold a mapped axis into tokens, have a derivative, and refuse, with a message, to be partitioned by XLA.
"""

import dataclasses
import functools

import jax
import jax.core
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir
import jax.numpy as jnp
import numpy as np

from jax_moe import eager, ffi, placement
from jax_moe.experts import CANONICAL
from jax_moe.operands import fill, NUM_OF_TOKENS
from jax_moe.problem import cpu_workspaces, Problem

fused_moe_p = Primitive("jax_moe_fused_moe")
"""``out = fused_moe_p.bind(*operands, problem=...)``: those of ``operands.py``, but for those in ``problem.absent``."""


def vary_alike(*operands: jax.Array) -> tuple[jax.Array, ...]:
    """Inside ``shard_map``, marks every operand as varying over each mesh axis that any of them varies over."""
    varying = [frozenset(jax.typeof(operand).mat.varying) for operand in operands]
    union = frozenset().union(*varying)
    return tuple(
        jax.lax.pcast(operand, tuple(union - axes), to="varying") if union - axes else operand
        for operand, axes in zip(operands, varying, strict=True)
    )


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
    return _custom_call(ctx, ffi.TARGET, operands, problem, {}, cpu_workspaces(problem))


def _lower_cuda(ctx, *operands, problem: Problem):
    from jax_moe.kernels import lowering  # here, because a CPU never needs it

    call = lowering.cuda_call(problem)
    target = ffi.TARGET if problem.command_buffer else ffi.NO_CAPTURE_TARGET
    return _custom_call(ctx, target, operands, problem, call.attributes, call.workspaces)


def _custom_call(ctx, target: str, operands, problem: Problem, attributes, workspaces):
    """Emits the call: ``attributes`` are those that only this platform has, ``workspaces`` results behind the output.

    An absent operand becomes f32[0], so that each has a fixed place. Here and not where the op is called, because an
    operand may become sharded, even one without elements, and then jaxlib 0.11.2 crashes: that is what an eager
    ``shard_map`` does with everything that a primitive takes.
    """
    (out,) = ctx.avals_out
    if out.size == 0:  # the same crash, of tokens without elements: no call, then
        return mlir.lower_fun(lambda *_: jnp.zeros(out.shape, out.dtype), multiple_results=False)(ctx, *operands)
    ffi.register()
    refuse_partitioning(ctx.module_context.axis_context)
    empty = np.zeros((0,), np.float32)
    avals = fill(ctx.avals_in, problem.absent, jax.core.ShapedArray(empty.shape, empty.dtype))
    results = [out, *(jax.core.ShapedArray(w.shape, w.dtype) for w in workspaces)]
    rule = jax.ffi.ffi_lowering(target)
    operands = fill(operands, problem.absent, mlir.ir_constant(empty))
    return rule(ctx.replace(avals_in=avals, avals_out=results), *operands, **problem.attributes(), **attributes)[:1]


def refuse_partitioning(axis_context) -> None:
    """Raises unless each device runs this call on arrays of its own.

    XLA cannot split a custom call: it would gather every operand, the weights included, on every device and
    say nothing. Inside ``shard_map`` over all mesh axes the operands are local and all is well.
    """
    count = placement.num_partitions(axis_context)
    if count != 1:
        raise ValueError(
            f"fused_moe: this call is spread over {count} devices outside jax.shard_map. XLA cannot split a "
            "custom call and would silently gather every operand, the weights included, on each of them. Call "
            "jax_moe.sharded_moe(..., mesh=mesh), or put fused_moe in a jax.shard_map over all the mesh's axes."
        )


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
