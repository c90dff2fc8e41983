"""The smallest FFI op on a GPU: a CuTe DSL kernel that adds into its output, as a JAX function that may be captured.

Run it:  python examples/minimal_ffi_gpu/segment_sum.py       (needs g++, jax and nvidia-cutlass-dsl, not jax_moe)

Read ``../minimal_ffi`` first, for what every FFI op has; then ``segment_sum.cc``, ``kernel.py`` and this. With a GPU it
runs the op eagerly and inside a command buffer, and compares it with ``jax.ops.segment_sum``. Without one it builds the
handler, compiles the kernel, and lowers the program for a GPU.

What ``jax_moe`` adds to this: while XLA captures, its zeroing runs *beside* the first kernels instead of before them
(``ffi/launch_sequence.h``); kernels are chosen by shape, and cached (``jax_moe/kernels/``).
"""

import ctypes
import functools
import pathlib
import subprocess

import jax
import jax.numpy as jnp
import kernel

here = pathlib.Path(__file__).parent
source, library = here / "segment_sum.cc", here / "libsegment_sum.so"
TARGET = "minimal_ffi_segment_sum_v1"


def build() -> None:
    if library.exists() and library.stat().st_mtime > source.stat().st_mtime:
        return
    flags = ["-std=c++17", "-O2", "-Wall", "-shared", "-fPIC", "-isystem", jax.ffi.include_dir()]
    subprocess.run(["g++", *flags, str(source), "-o", str(library), "-ldl"], check=True)


def register() -> None:
    """One target, three stages. The type of the state must be known before a target that makes one."""
    handlers = ctypes.CDLL(str(library))

    def pointer(getter):
        getter.restype = ctypes.c_void_p
        return jax.ffi.pycapsule(getter())

    state = {"type_id": pointer(handlers.SegmentSumTypeId), "type_info": pointer(handlers.SegmentSumTypeInfo)}
    jax.ffi.register_ffi_type("minimal_ffi_segment_sum_kernel", state, platform="CUDA")  # pyright: ignore
    stages = {
        "instantiate": jax.ffi.pycapsule(handlers.SegmentSumInstantiate),
        "initialize": jax.ffi.pycapsule(handlers.SegmentSumInitialize),
        "execute": jax.ffi.pycapsule(handlers.SegmentSumExecute),
    }
    jax.ffi.register_ffi_target(TARGET, stages, platform="CUDA")


@functools.partial(jax.jit, static_argnums=(2, 3))
def segment_sum(x: jax.Array, ids: jax.Array, num_segments: int, arch: str = "sm_90a") -> jax.Array:
    """float32 ``[S, D]``: the rows of ``x`` ``[T, D]``, added up by ``ids`` int32 ``[T]``; on a GPU of ``arch``."""
    image, name = kernel.machine_code(arch)
    call = jax.ffi.ffi_call(TARGET, jax.ShapeDtypeStruct((num_segments, x.shape[1]), x.dtype))
    return call(x, ids, image=image, name=name)


def check(arch: str) -> None:
    """Runs it on the GPU: eager, then in a command buffer, which a program of one call must be allowed to be."""
    captured = jax.jit(
        lambda x, ids: segment_sum(x, ids, 64, arch), compiler_options={"xla_gpu_graph_min_graph_size": 1}
    )
    for seed in range(8):  # the second call is captured, later ones are replays
        keys = jax.random.split(jax.random.key(seed))
        x, ids = jax.random.normal(keys[0], (1000, 96)), jax.random.randint(keys[1], (1000,), 0, 66)
        expected = jax.ops.segment_sum(x, ids, 64)
        for name, got in (("eager", segment_sum(x, ids, 64, arch)), ("captured", captured(x, ids))):
            difference = float(jnp.max(jnp.abs(got - expected)))
            assert difference < 1e-4, (name, seed, difference)
    print("eager and captured: as jax.ops.segment_sum, 8 times each")


def main() -> None:
    build()
    register()
    gpus = [device for device in jax.devices() if device.platform == "gpu"]
    arch = f"sm_{gpus[0].compute_capability.replace('.', '')}a" if gpus else "sm_90a"
    print(f"kernel for {arch}: {len(kernel.machine_code(arch)[0])} bytes of machine code")
    if gpus:
        check(arch)
    else:
        x, ids = jax.ShapeDtypeStruct((1000, 96), jnp.float32), jax.ShapeDtypeStruct((1000,), jnp.int32)
        program = segment_sum.trace(x, ids, 64, arch).lower(lowering_platforms=("cuda",)).as_text()
        print(f"no GPU here: lowered to {program.count('custom_call @' + TARGET)} custom call")


if __name__ == "__main__":
    main()
