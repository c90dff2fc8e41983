"""The FFI library: where it is, its targets and their registration, and what its CUDA handler has counted."""

import ctypes
import functools
import pathlib
import sysconfig
from typing import NamedTuple

import jax
import jax.export

from jax_moe import settings

__all__ = [
    "NO_CAPTURE_TARGET",
    "PARCELS_NO_CAPTURE_TARGET",
    "PARCELS_TARGET",
    "PRODUCT_NO_CAPTURE_TARGET",
    "PRODUCT_TARGET",
    "TARGET",
    "Counters",
    "counters",
    "library_path",
]

TARGET = "jax_moe_fused_moe_v2"
"""Target of ``fused_moe``'s custom call. The version is in the name because exported programs outlive this library."""

PRODUCT_TARGET = "jax_moe_ragged_dot_v1"
"""Target of ``ragged_dot``'s custom call."""

PARCELS_TARGET = "jax_moe_parcels_v1"
"""Target of the custom call that makes parcels (``parcels.py``; GPU only)."""

_V1_TARGET = "jax_moe_fused_moe_v1"
"""On a CPU the same call; on a GPU refused: the kernels' attributes were others."""

NO_CAPTURE_TARGET = TARGET + "_no_capture"
"""The same handler without the trait that lets XLA record it into a command buffer (GPU only)."""

PRODUCT_NO_CAPTURE_TARGET = PRODUCT_TARGET + "_no_capture"
"""The same of ``ragged_dot``."""

PARCELS_NO_CAPTURE_TARGET = PARCELS_TARGET + "_no_capture"
"""The same of parcels."""


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


def is_built() -> bool:
    """Whether there is a library. Without one, ``jax_moe`` can be imported and the op raises when it is lowered."""
    try:
        library_path()
    except ImportError:
        return False
    return True


@functools.cache
def library() -> ctypes.CDLL:
    """The loaded library; opening it starts no backend and touches no device."""
    return ctypes.CDLL(str(library_path()))


@functools.cache
def register() -> None:
    """Registers the targets with XLA, once: when ``jax_moe`` is imported, or else when the op is first lowered.

    At import and not at first use, because an exported or cached program runs without any of our Python being traced.
    The CPU handler is stateless, so this is safe before the backend exists; JAX keeps the CUDA ones until a CUDA
    backend asks for them.

    Raises:
      ImportError: there is no library, or it is older than this package.
    """
    for target in (TARGET, _V1_TARGET):
        jax.ffi.register_ffi_target(target, _capsule("JaxMoeFusedMoeCpu"), platform="cpu")
    jax.ffi.register_ffi_target(PRODUCT_TARGET, _capsule("JaxMoeRaggedDotCpu"), platform="cpu")

    # The type of the CUDA handler's state must be known before a target that returns it.
    state_type = {"type_id": _capsule_from("JaxMoeCudaTypeId"), "type_info": _capsule_from("JaxMoeCudaTypeInfo")}
    jax.ffi.register_ffi_type("jax_moe_cuda_call", state_type, platform="CUDA")  # pyright: ignore[reportArgumentType]
    instantiate = {
        TARGET: "JaxMoeFusedMoeCudaInstantiate",
        _V1_TARGET: "JaxMoeFusedMoeCudaV1Instantiate",
        PRODUCT_TARGET: "JaxMoeRaggedDotCudaInstantiate",
        PARCELS_TARGET: "JaxMoeParcelsCudaInstantiate",
    }
    for suffix, execute in (("", "JaxMoeCuda"), ("_no_capture", "JaxMoeCudaNoCapture")):
        for target, symbol in instantiate.items():
            stages = {
                "instantiate": _capsule(symbol),
                "initialize": _capsule("JaxMoeCudaInitialize"),
                "execute": _capsule(execute),
            }
            jax.ffi.register_ffi_target(target + suffix, stages, platform="CUDA")


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
    targets = (TARGET, PRODUCT_TARGET, PARCELS_TARGET)
    no_capture = (NO_CAPTURE_TARGET, PRODUCT_NO_CAPTURE_TARGET, PARCELS_NO_CAPTURE_TARGET)
    return [jax.export.DisabledSafetyCheck.custom_call(target) for target in (*targets, *no_capture)]


class Counters(NamedTuple):
    """Calls that the CUDA handler has enqueued since the library was loaded, on all devices.

    A replay of a command buffer is no call: nobody calls the handler then. Programs of fewer than five operations that
    may be captured stay eager (``xla_gpu_graph_min_graph_size``), and so do all while a profiler is active.

    Attributes:
      eager: on a stream, in order.
      captured: recorded by XLA into a command buffer.
      forked: of those captured, the ones whose zeroing became a branch of its own, beside GEMM1.
    """

    eager: int
    captured: int
    forked: int


def counters() -> Counters:
    """What the handler has done so far; tells whether calls are captured and the zeroing is overlapped."""
    values = (ctypes.c_int64 * len(Counters._fields))()
    library().JaxMoeCudaCounters(values)
    return Counters(*values)
