"""``tcgen05``: tensor memory and tensor cores of sm_100, one function for each PTX instruction, and descriptors.

PTX ISA 9.1, sections 9.7.16.4 (descriptors) to 9.7.16.12. A tensor-memory address is ``lane << 16 | column``. One fixed
thread issues the copies of scales, the products and the commits: they are asynchronous, and only those of one thread
are ordered among themselves (section 9.7.16.6.4).
"""

from cutlass import Float32, Int32, Int64, Uint32
from cutlass._mlir import ir
from cutlass._mlir.dialects import llvm
from cutlass.cutlass_dsl import dsl_user_op, T

from jax_moe.kernels.device.ptx import assemble

COLUMNS = 512
"""Of the tensor memory of a multiprocessor; each has 128 lanes of 32 bits."""

_LEAST_COLUMNS = 32


def allocation(columns: int) -> int:
    """The columns to allocate where ``columns`` are needed: a power of two."""
    return max(_LEAST_COLUMNS, 1 << (columns - 1).bit_length())


# -- descriptors ------------------------------------------------------------------------------------------------------

_SWIZZLED = 1 << 16 | 1024 // 16 << 32 | 1 << 46 | 2 << 61
"""Rows of 128 bytes with the 128-byte swizzle, along K: the leading offset is not used, 8 rows are 1024 bytes, version
1, swizzle 2."""

_PLAIN = 1 << 16 | 128 // 16 << 32 | 1 << 46
"""Rows of 16 bytes without swizzle: 8 rows are 128 bytes."""

_FP4 = 1 << 7 | 1 << 10
"""Block-scaled: A and B are e2m1 (1), their scales e4m3 (0), K is 64 (0), scale ids are 0."""

_BF16 = 1 << 4 | 1 << 7 | 1 << 10
"""``kind::f16``: sums in fp32 (1), A and B are bf16 (1)."""

_M = 128 // 16 << 24
"""128 rows of A for each CTA. (The block-scaled form has M / 128 at bit 27, which is the same.)"""


def _shared(constant: int, address: Int32) -> Int64:
    return Int64(constant) | Int64((address >> 4) & 0x3FFF)


def operand_descriptor(address: Int32) -> Int64:
    """Of an operand in shared memory: rows of 128 bytes, swizzled, 1024-byte aligned; later steps are in the row."""
    return _shared(_SWIZZLED, address)


def scale_descriptor(address: Int32) -> Int64:
    """Of a scale atom of 512 bytes in shared memory."""
    return _shared(_PLAIN, address)


def moved(descriptor: Int64, num_bytes: int) -> Int64:
    """Of what lies so many bytes, a multiple of 16, behind; shared memory ends before the address field does."""
    return descriptor + num_bytes // 16


def instruction_descriptor(fp4: bool, group: int, width: Int32) -> Int32:
    """Of ``128 * group`` rows of A times ``width`` of B, a multiple of ``8 * group`` up to 256, known at run time."""
    return Int32((_FP4 if fp4 else _BF16) | group * _M) | (width // 8 << 17)


# -- asynchronous, one thread -----------------------------------------------------------------------------------------
#
# ``group`` is the number of CTAs: 1, or 2 where one thread of a pair works for both. Shared addresses and tensor-memory
# addresses are then the same in both. All instructions of a kernel must have the same.


def _values(kinds, values, loc, ip):
    return [kind(value).ir_value(loc=loc, ip=ip) for kind, value in zip(kinds, values, strict=True)]


@dsl_user_op
def copy_scales(group: int, columns: Int32, descriptor: Int64, *, loc=None, ip=None) -> None:
    """A scale atom to 4 columns: row r's four scales to lane r % 32 (and + 32, 64, 96) of column r // 32."""
    operands = _values((Int32, Int64), (columns, descriptor), loc, ip)
    text = f"tcgen05.cp.cta_group::{group}.32x128b.warpx4 [$0], $1;"
    assemble(None, operands, text, "r,l,~{memory}", False, loc, ip)


@dsl_user_op
def multiply_fp4(
    group: int, sums: Int32, a: Int64, b: Int64, instruction: Int32, a_scales: Int32, b_scales: Int32,
    accumulate: Int32, *, loc=None, ip=None,
) -> None:  # fmt: skip
    """The rows of A times those of B over 64 values of e2m1, with a scale for each 16; 0 overwrites the sums.

    A pair has 128 rows of A and half the rows of B in each CTA, the scales of all rows of B in both.
    """
    kinds = (Int32, Int64, Int64, Int32, Int32, Int32, Int32)
    operands = _values(kinds, (sums, a, b, instruction, a_scales, b_scales, accumulate), loc, ip)
    text = "{ .reg .pred p; setp.ne.b32 p, $6, 0; "
    text += f"tcgen05.mma.cta_group::{group}.kind::mxf4nvf4.block_scale.block16 [$0], $1, $2, $3, [$4], [$5], p; }}"
    assemble(None, operands, text, "r,l,l,r,r,r,r,~{memory}", False, loc, ip)


@dsl_user_op
def multiply_bf16(
    group: int, sums: Int32, a: Int32, b: Int64, instruction: Int32, accumulate: Int32, *, loc=None, ip=None
) -> None:
    """The same over 16 values of bf16, with A in tensor memory: row r in lane r, two values a column."""
    operands = _values((Int32, Int32, Int64, Int32, Int32), (sums, a, b, instruction, accumulate), loc, ip)
    text = f"{{ .reg .pred p; setp.ne.b32 p, $4, 0; tcgen05.mma.cta_group::{group}.kind::f16 [$0], [$1], $2, $3, p; }}"
    assemble(None, operands, text, "r,r,l,r,r,~{memory}", False, loc, ip)


@dsl_user_op
def commit(group: int, barrier: Int32, *, loc=None, ip=None) -> None:
    """An arrival at an mbarrier, in each CTA, when all copies and products that this thread has issued are complete."""
    operands = _values((Int32,), (barrier,), loc, ip)
    text = "tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [$0];"
    if group == 2:
        text = "{ .reg .b16 both; mov.b16 both, 3; tcgen05.commit.cta_group::2.mbarrier::arrive::one"
        text += ".shared::cluster.multicast::cluster.b64 [$0], both; }"
    assemble(None, operands, text, "r,~{memory}", False, loc, ip)


# -- synchronisation --------------------------------------------------------------------------------------------------


@dsl_user_op
def fence_before(*, loc=None, ip=None) -> None:
    """Orders tcgen05 operations before the synchronisation of threads that follows."""
    assemble(None, [], "tcgen05.fence::before_thread_sync;", "~{memory}", False, loc, ip)


@dsl_user_op
def fence_after(*, loc=None, ip=None) -> None:
    """Orders tcgen05 operations after the synchronisation of threads that came before."""
    assemble(None, [], "tcgen05.fence::after_thread_sync;", "~{memory}", False, loc, ip)


@dsl_user_op
def wait_loads(*, loc=None, ip=None) -> None:
    """Until this warp's loads from tensor memory are complete: only then may the columns change."""
    assemble(None, [], "tcgen05.wait::ld.sync.aligned;", "~{memory}", False, loc, ip)


@dsl_user_op
def wait_stores(*, loc=None, ip=None) -> None:
    """Until this warp's stores to tensor memory are complete."""
    assemble(None, [], "tcgen05.wait::st.sync.aligned;", "~{memory}", False, loc, ip)


# -- whole warps, their own 32 lanes ----------------------------------------------------------------------------------


@dsl_user_op
def load_fragments(address: Int32, blocks: int, *, loc=None, ip=None) -> list[Float32]:
    """16 lanes by ``8 * blocks`` columns, 4 values of each 8 columns for a thread; ``blocks`` is 1, 2 or 4.

    Thread ``4*g + q`` gets columns 2q, 2q + 1 of lane g, then those of lane g + 8: a fragment of Hopper's ``wgmma``.
    """
    count = 4 * blocks
    struct = ir.Type.parse(f"!llvm.struct<({', '.join(['f32'] * count)})>")
    registers = ", ".join(f"${i}" for i in range(count))
    text = f"tcgen05.ld.sync.aligned.16x256b.x{blocks}.b32 {{{registers}}}, [${count}];"
    operands = _values((Int32,), (address,), loc, ip)
    value = assemble(struct, operands, text, "=f," * count + "r,~{memory}", False, loc, ip)
    return [Float32(llvm.extractvalue(T.f32(), value, [i], loc=loc, ip=ip)) for i in range(count)]


@dsl_user_op
def store_columns(address: Int32, words: list[Uint32], *, loc=None, ip=None) -> None:
    """A thread's ``words`` to neighbouring columns of its own lane."""
    operands = [Int32(address).ir_value(loc=loc, ip=ip), *(Uint32(w).ir_value(loc=loc, ip=ip) for w in words)]
    registers = ", ".join(f"${i + 1}" for i in range(len(words)))
    text = f"tcgen05.st.sync.aligned.32x32b.x{len(words)}.b32 [$0], {{{registers}}};"
    assemble(None, operands, text, "r" + ",r" * len(words) + ",~{memory}", False, loc, ip)
