"""Kernel arguments: raw global pointers, and how kernels index them."""

import cutlass
import cutlass.cute as cute
from cutlass.cute.runtime import make_ptr

_ALIGNMENT = 16  # what XLA promises for any buffer


def pointer(dtype) -> cute.Pointer:
    """A stand-in for an argument of ``dtype`` while an entry is compiled."""
    return make_ptr(dtype, _ALIGNMENT, cute.AddressSpace.gmem, assumed_align=_ALIGNMENT)


def array(base: cute.Pointer) -> cute.Tensor:
    """``base`` as a dense vector of unknown length."""
    return cute.make_tensor(base, cute.make_layout(cutlass.Int32(2**31 - 1)))
