"""The FFI library: its targets, their registration, and the primitive that lowers to the one custom call.

The primitive exists for what a bare ``jax.ffi.ffi_call`` cannot do: choose attributes and workspaces by
platform when the program is *lowered*, fold a mapped axis into tokens, have a derivative, and refuse, with a message,
to be partitioned by XLA.
"""

from collections.abc import Callable
import ctypes
import dataclasses
import functools
import math
import pathlib
import sysconfig
from typing import Any

import jax
import jax.core
import jax.export
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
import jax.numpy as jnp
import numpy as np

from jax_moe import settings
from jax_moe.experts import CANONICAL
from jax_moe.operands import fill, NUM_OF_TOKENS
from jax_moe.problem import cpu_workspaces, Problem

__all__ = ["NO_CAPTURE_TARGET", "TARGET", "library_path"]

TARGET = "jax_moe_fused_moe_v1"
"""Target of the custom call. The version is in the name because exported programs outlive this library."""

NO_CAPTURE_TARGET = TARGET + "_no_capture"
"""The same handler without the trait that lets XLA record it into a command buffer (GPU only)."""


def library_path() -> pathlib.Path:
    """Where the compiled handlers are: in the package, or where ``JAX_MOE_FFI_LIBRARY`` says.

    Raises:
      ImportError: no library there.
    """
    if override := settings.ffi_library():
        candidates = [override]
    else:
        # The second is for Python started in a source checkout, whose jax_moe/ hides the installed one.
        folders = (pathlib.Path(__file__).parent, pathlib.Path(sysconfig.get_path("platlib"), "jax_moe"))
        candidates = [folder / "lib" / "libjax_moe_ffi.so" for folder in folders]
    for candidate in candidates:
        if candidate.exists():
            return candidate
    raise ImportError(
        f"jax_moe: the FFI library is missing, looked in {', '.join(map(str, candidates))}. "
        "Install the package (`pip install .` builds it) rather than importing it from the source folder."
    )


@functools.cache
def library() -> ctypes.CDLL:
    """The loaded library; opening it starts no backend and touches no device."""
    return ctypes.CDLL(str(library_path()))


def register() -> None:
    """Registers the targets with XLA, once, when ``jax_moe`` is imported.

    At import and not at first use, because an exported or cached program runs without any of our Python being traced.
    The CPU handler is stateless, so this is safe before the backend exists; JAX keeps the CUDA ones until a CUDA
    backend asks for them.
    """
    jax.ffi.register_ffi_target(TARGET, _capsule("JaxMoeFusedMoeCpu"), platform="cpu")

    # The type of the CUDA handler's state must be known before a target that returns it.
    state_type = {"type_id": _capsule_from("JaxMoeCudaTypeId"), "type_info": _capsule_from("JaxMoeCudaTypeInfo")}
    jax.ffi.register_ffi_type("jax_moe_cuda_call", state_type, platform="CUDA")  # pyright: ignore[reportArgumentType]
    for target, execute in ((TARGET, "JaxMoeFusedMoeCuda"), (NO_CAPTURE_TARGET, "JaxMoeFusedMoeCudaNoCapture")):
        stages = {
            "instantiate": _capsule("JaxMoeFusedMoeCudaInstantiate"),
            "initialize": _capsule("JaxMoeFusedMoeCudaInitialize"),
            "execute": _capsule(execute),
        }
        jax.ffi.register_ffi_target(target, stages, platform="CUDA")


def _capsule(symbol: str):
    """The handler of that name."""
    return jax.ffi.pycapsule(_symbol(symbol))


def _capsule_from(getter: str):
    """The object that a C function of that name returns the address of."""
    function = _symbol(getter)
    function.restype = ctypes.c_void_p
    return jax.ffi.pycapsule(function())


def _symbol(name: str):
    try:
        return getattr(library(), name)
    except AttributeError:
        raise ImportError(f"jax_moe: {library_path()} is older than this package (no {name}): build it again") from None


def export_checks() -> list[jax.export.DisabledSafetyCheck]:
    """What ``jax.export.export(f, disabled_checks=...)`` needs to let our custom calls through.

    ``jax.export`` refuses custom calls whose stability nobody vouches for; we do, by versioning the target. A program
    is exported for one platform, whose layout its experts have (:func:`jax_moe.prepare`).
    """
    return [jax.export.DisabledSafetyCheck.custom_call(target) for target in (TARGET, NO_CAPTURE_TARGET)]


fused_moe_p = Primitive("jax_moe_fused_moe")
"""``out = fused_moe_p.bind(*operands, problem=...)``: those of ``operands.py``, but for those in ``problem.absent``."""


def run_eagerly(primitive: Primitive, *operands, **static):
    """A primitive outside ``jax.jit``: a program of its own, as for those of JAX."""
    with jax.disable_jit(False):  # else the jitted function would come back here
        return as_one_op(primitive.name, _jitted(primitive, **static), *operands)


def as_one_op(name: str, function: Callable[..., Any], *args: Any) -> Any:
    """``function(*args)``, looked at as a whole for what ``jax_debug_nans`` and ``jax_debug_infs`` are to find.

    JAX itself, having found a NaN in what a program returns, runs the program again op by op. For our primitives that
    is the same program again, and an eager ``jax.shard_map`` that is given a NaN comes back to itself: neither ends.

    Raises:
      FloatingPointError: found one.
    """
    config: Any = jax.config
    tests = [("nan", jnp.isnan, config.jax_debug_nans), ("inf", jnp.isinf, config.jax_debug_infs)]
    tests = [(kind, is_kind) for kind, is_kind, wanted in tests if wanted]
    if not tests:
        return function(*args)
    with jax.debug_nans(False), jax.debug_infs(False):
        results = function(*args)
        for result in jax.tree.leaves(results):
            if isinstance(result, jax.core.Tracer) or not jnp.issubdtype(result.dtype, jnp.floating):
                continue
            for kind, is_kind in tests:
                if is_kind(result).any():
                    raise FloatingPointError(f"invalid value ({kind}) encountered in {name}")
    return results


@functools.lru_cache(maxsize=256)  # of eager calls: T is part of the problem, and every batch may have another
def _jitted(primitive: Primitive, **static):
    def run(*operands):
        return primitive.bind(*operands, **static)

    run.__name__ = primitive.name.removeprefix("jax_moe_")  # in logs and profiles
    return jax.jit(run)


fused_moe_p.def_impl(functools.partial(run_eagerly, fused_moe_p))


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
    ctx, operands = _with_absent(ctx, operands, problem)
    return _custom_call(ctx, TARGET, operands, problem.attributes(), cpu_workspaces(problem))


def _lower_cuda(ctx, *operands, problem: Problem):
    from jax_moe.kernels import lowering  # here, because a CPU never needs it

    call = lowering.cuda_call(problem)
    target = TARGET if problem.command_buffer else NO_CAPTURE_TARGET
    ctx, operands = _with_absent(ctx, operands, problem)
    return _custom_call(ctx, target, operands, problem.attributes() | call.attributes, call.workspaces)


def _with_absent(ctx, operands, problem: Problem):
    """The context and the operands with f32[0] for each absent one, so that every operand has a fixed place.

    They are made here and not by the caller, because an operand may become sharded, even one without elements, and
    then jaxlib 0.11.2 crashes: that is what an eager ``shard_map`` does with everything that a primitive takes.
    """
    empty = np.zeros((0,), np.float32)
    avals = fill(ctx.avals_in, problem.absent, jax.core.ShapedArray(empty.shape, empty.dtype))
    return ctx.replace(avals_in=avals), fill(operands, problem.absent, mlir.ir_constant(empty))


def _custom_call(ctx, target, operands, attributes, workspaces):
    """Emits the call; the workspaces become results behind the output, and are dropped here."""
    (out,) = ctx.avals_out
    if out.size == 0:  # jaxlib 0.11.2 crashes where an operand without elements is sharded: no call, then
        return mlir.lower_fun(lambda *_: jnp.zeros(out.shape, out.dtype), multiple_results=False)(ctx, *operands)
    refuse_partitioning(ctx.module_context.axis_context)
    results = [jax.core.ShapedArray(w.shape, w.dtype) for w in workspaces]
    rule = jax.ffi.ffi_lowering(target)
    return rule(ctx.replace(avals_out=[*ctx.avals_out, *results]), *operands, **attributes)[:1]


def refuse_partitioning(axis_context) -> None:
    """Raises unless each device runs this call on arrays of its own.

    XLA cannot split a custom call: it would gather every operand, the weights included, on every device and
    say nothing. Inside ``shard_map`` over all mesh axes the operands are local and all is well.
    """
    count = num_partitions(axis_context)
    if count != 1:
        raise ValueError(
            f"fused_moe: this call is spread over {count} devices outside jax.shard_map. XLA cannot split a "
            "custom call and would silently gather every operand, the weights included, on each of them. Call "
            "jax_moe.sharded_moe(..., mesh=mesh), or put fused_moe in a jax.shard_map over all the mesh's axes."
        )


def num_partitions(axis_context) -> int:
    """Into how many parts XLA may split what is lowered in this context."""
    mesh = getattr(axis_context, "mesh", None)
    if mesh is None:
        return getattr(axis_context, "num_devices", 1)
    automatic = set(mesh.axis_names) - set(axis_context.manual_axes)
    return math.prod(mesh.shape[axis] for axis in automatic)


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


def _jvp(primals, tangents, *, problem: Problem):
    from jax_moe import derivative  # here, because it needs prepare's inverse, which needs this module

    return derivative.jvp(primals, tangents, problem=problem)


mlir.register_lowering(fused_moe_p, _lower_cpu, platform="cpu")
mlir.register_lowering(fused_moe_p, _lower_cuda, platform="cuda")
batching.primitive_batchers[fused_moe_p] = functools.partial(fold_into_tokens, fused_moe_p)
ad.primitive_jvps[fused_moe_p] = _jvp
