"""How a kernel is launched while it is compiled, and how it reads what it is launched with.

A kernel is a class that is made from its spec, with a method ``kernel(self, given)``. ``given`` has the spec's
parameters by name: raw global pointers, then ``Int32`` scalars, flattened in this order into the kernel's parameter
table. The entry serves compilation only: the handler launches the kernel itself, as the spec says.
"""

import collections

import cuda.bindings.driver as cuda
from cutlass import BFloat16, Float32, Int32, Uint8
import cutlass.cute as cute
from cutlass.cute.runtime import make_ptr

_ALIGNMENT = 16  # what XLA promises for any buffer
_POINTEES = {"i32*": Int32, "f32*": Float32, "bf16*": BFloat16, "u8*": Uint8}


class Kernel:
    """What every kernel's class is derived from."""

    def __init__(self, spec):
        self.spec = spec

    def launch_options(self):
        """What ``.launch(...)`` takes beyond what any spec says."""
        return {}

    @cute.jit
    def launch(self, given, grid: Int32, stream: cuda.CUstream):
        spec = self.spec
        self.kernel(given).launch(
            grid=(grid, 1, 1), block=(spec.threads, 1, 1), cluster=(spec.cluster, 1, 1) if spec.cluster > 1 else None,
            stream=stream, use_pdl=spec.overlap, **self.launch_options(),
        )  # fmt: skip


def example_arguments(spec) -> tuple:
    """Stand-ins for the arguments of ``launch``."""
    values = {
        name: pointer(_POINTEES[kind]) if kind in _POINTEES else Int32(0) for name, kind in spec.parameters.items()
    }
    return named(**values), Int32(1), cuda.CUstream(0)


def named(**values):
    """Named values; a tuple, because the DSL would rebind a mutable object's attributes at the end of every branch."""
    return collections.namedtuple("Named", values)(**values)


def pointer(dtype) -> cute.Pointer:
    """A stand-in for a pointer to ``dtype``."""
    return make_ptr(dtype, _ALIGNMENT, cute.AddressSpace.gmem, assumed_align=_ALIGNMENT)


def array(base: cute.Pointer) -> cute.Tensor:
    """``base`` as a dense vector of unknown length."""
    return cute.make_tensor(base, cute.make_layout(Int32(2**31 - 1)))
