"""The physical floor of a call: the time to read the weights that it touches, or to multiply, whichever is longer.

Both at this card's ceilings, as its row has them (``kernels/target.py``). Where a card has no row, or that has none, or
the GPU is a slice of its card, they are measured here and now: a stream that only reads, and JAX's product of large
bf16 matrices.
"""

import ctypes
import functools
from typing import Any, get_args

import jax
import jax.numpy as jnp

from jax_moe import problem, shapes
from jax_moe.cli import timing
from jax_moe.kernels import targets
from jax_moe.kernels.target import Ceilings

_BYTES = 2**31  # far more than any L2 holds
_THREADS, _CTAS_PER_MP = 256, 8
_LOADS, _VECTOR_BYTES = 4, 16
_LAUNCHES = 8
_MATRIX, _PRODUCTS = 8192, 8

NEVER = 0x9E3779B9
"""No xor of the words that are read is this: they are below 2**29."""

READ_ALL = f"""
.version 8.0
.target sm_80
.address_size 64
.visible .entry read_all(.param .u64 source, .param .u64 steps, .param .u64 out)
{{
  .reg .pred %p<2>;
  .reg .b32 %r<24>;
  .reg .b64 %rd<8>;
  ld.param.u64 %rd0, [source];
  ld.param.u64 %rd1, [steps];
  ld.param.u64 %rd2, [out];
  mov.u32 %r0, %ctaid.x;
  mov.u32 %r1, %ntid.x;
  mov.u32 %r2, %tid.x;
  mad.lo.s32 %r3, %r0, %r1, %r2;
  mul.wide.u32 %rd3, %r3, {_VECTOR_BYTES};
  add.s64 %rd0, %rd0, %rd3;
  mov.u32 %r4, %nctaid.x;
  mul.lo.s32 %r5, %r4, %r1;
  mul.wide.u32 %rd4, %r5, {_VECTOR_BYTES};
  mov.b32 %r6, 0;
AGAIN:
""" + "".join(
    f"  ld.global.L1::no_allocate.v4.u32 {{%r{8 + 4 * i}, %r{9 + 4 * i}, %r{10 + 4 * i}, %r{11 + 4 * i}}}, [%rd0];\n"
    "  add.s64 %rd0, %rd0, %rd4;\n"
    for i in range(_LOADS)
) + "".join(f"  xor.b32 %r6, %r6, %r{8 + i};\n" for i in range(4 * _LOADS)) + f"""
  add.s64 %rd1, %rd1, -1;
  setp.ne.s64 %p0, %rd1, 0;
  @%p0 bra AGAIN;
  setp.ne.b32 %p1, %r6, {NEVER:#x};
  @%p1 bra END;
  st.global.b32 [%rd2], %r6;
END:
  ret;
}}
"""  # fmt: skip
"""Each thread reads vectors of 16 bytes, neighbours side by side, ``steps`` times four; the store keeps them needed."""


def layer_seconds(shape: shapes.LayerShape, tokens: int, touched: float, ceilings: Ceilings, precision: Any) -> float:
    """The floor of a call of a layer with so many tokens that touch so many experts."""
    return seconds(touched * shape.weight_bytes_per_expert, shape.flops(tokens), ceilings, precision)


def seconds(weight_bytes: float, flop: float, ceilings: Ceilings, precision: problem.Precision) -> float:
    """The floor of whatever reads so many bytes and multiplies so much."""
    return max(weight_bytes / ceilings.bytes_per_second, flop / ceilings.flop_per_second[precision])


@functools.cache
def at_hand() -> Ceilings | None:
    """Those of JAX's default device, measured if need be; None where that is no GPU that there are kernels for."""
    device = jax.devices()[0]
    if device.platform != "gpu":
        return None
    try:
        target = targets.for_device(device)
    except ValueError:
        return None
    row = targets.row_of(target, device)
    whole = row is not None and getattr(device, "core_count", row.multiprocessors) == row.multiprocessors
    return row.ceilings if row is not None and whole and row.ceilings else measured(device)


def measured(device: Any) -> Ceilings:
    """What this GPU reads and multiplies in a second, now."""
    rate = _multiply()
    return Ceilings(_read(device), dict.fromkeys(get_args(problem.Precision), rate), "measured on this GPU in this run")


def _multiply() -> float:
    """FLOP a second of bf16 products of large matrices."""
    key = jax.random.key(0)
    x, w = (jax.random.normal(k, (_MATRIX, _MATRIX), jnp.bfloat16) for k in jax.random.split(key))
    w = w * _MATRIX**-0.5  # products keep their size: how large numbers are tells on a GPU's power

    @jax.jit
    def chain(x, w):
        for _ in range(_PRODUCTS):
            x = x @ w
        return x

    one = timing.seconds_per_call(functools.partial(timing.run, chain, (x, w)), _PRODUCTS, 5)
    return 2 * _MATRIX**3 / one


def _read(device: Any) -> float:
    """Bytes a second that a kernel reads that does nothing else."""
    ctas = (getattr(device, "core_count", None) or 132) * _CTAS_PER_MP
    step = ctas * _THREADS * _LOADS * _VECTOR_BYTES
    steps = _BYTES // step
    words = jax.block_until_ready(jnp.arange(steps * step // 4, dtype=jnp.uint32))
    out = jax.block_until_ready(jnp.zeros(4, jnp.uint32))
    driver = ctypes.CDLL("libcuda.so.1")

    def call(name: str, *arguments: Any) -> None:
        if code := getattr(driver, name)(*arguments):
            raise RuntimeError(f"jax_moe: {name} returned {code}")

    context, module, function = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_void_p()
    call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device.local_hardware_id)  # the one that JAX uses
    call("cuCtxPushCurrent_v2", context)
    try:
        call("cuModuleLoadData", ctypes.byref(module), READ_ALL.encode())
        call("cuModuleGetFunction", ctypes.byref(function), module, b"read_all")
        values = [
            ctypes.c_uint64(value) for value in (words.unsafe_buffer_pointer(), steps, out.unsafe_buffer_pointer())
        ]
        given = (ctypes.c_void_p * 3)(*(ctypes.addressof(value) for value in values))

        def run(programs: int) -> None:
            for _ in range(programs):
                call("cuLaunchKernel", function, ctas, 1, 1, _THREADS, 1, 1, 0, None, given, None)
            call("cuCtxSynchronize")

        run(2)
        best = min(timing.timed(run, _LAUNCHES) for _ in range(5)) / _LAUNCHES
        call("cuModuleUnload", module)
    finally:
        call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))
        call("cuDevicePrimaryCtxRelease_v2", device.local_hardware_id)
    return steps * step / best
