"""The kernel of ``segment_sum``, in CuTe DSL, and its machine code. Compiling needs the DSL but no GPU."""

import functools
import tempfile

import cuda.bindings.driver as cuda
from cutlass import Float32, Int32
import cutlass.cute as cute
from cutlass.cute.runtime import make_ptr

THREADS = 256  # as segment_sum.cc


@cute.kernel
def segment_sum_kernel(
    x: cute.Pointer, ids: cute.Pointer, y: cute.Pointer, total: Int32, width: Int32, segments: Int32
):
    """One thread for each element of x [T, width]; ``y`` must be zeros by the time that this starts."""
    tid, _, _ = cute.arch.thread_idx()
    cta, _, _ = cute.arch.block_idx()
    index = cta * THREADS + tid
    if index < total:
        row = index // width
        segment = cute.make_tensor(ids + row, cute.make_layout(1))[0]
        if segment >= 0 and segment < segments:  # as jax.ops.segment_sum, which drops other ids
            value = cute.make_tensor(x + index, cute.make_layout(1))[0]
            cute.arch.atomic_add(y + segment * width + (index - row * width), value, sem="relaxed", scope="gpu")


@cute.jit
def launch(x: cute.Pointer, ids: cute.Pointer, y: cute.Pointer, total: Int32, width: Int32, segments: Int32,
           stream: cuda.CUstream):  # fmt: skip
    """Only for the compiler: the handler launches the kernel itself, with these parameters in this order."""
    grid = (total + THREADS - 1) // THREADS
    kernel = segment_sum_kernel(x, ids, y, total, width, segments)
    kernel.launch(grid=(grid, 1, 1), block=(THREADS, 1, 1), stream=stream)  # pyright: ignore


@functools.cache
def machine_code(arch: str) -> tuple[bytes, str]:
    """The cubin for an architecture such as "sm_90a", and the kernel's name in it."""
    pointers = [make_ptr(dtype, 16, cute.AddressSpace.gmem) for dtype in (Float32, Int32, Float32)]
    with tempfile.TemporaryDirectory() as dump:
        options = f"--gpu-arch {arch} --keep-cubin --dump-dir {dump}"
        compiled = cute.compile(launch, *pointers, Int32(1), Int32(1), Int32(1), cuda.CUstream(0), options=options)
    (name,) = compiled.kernel_info
    return compiled.__cubin__, name
