"""The PTX instructions that the kernels need and CuTe DSL has no name for, one function each."""

from cutlass import Float32, Int32, Int64, Uint32
from cutlass._mlir import ir
from cutlass._mlir.dialects import llvm
import cutlass.cute as cute
from cutlass.cutlass_dsl import dsl_user_op, T


def assemble(result, operands, text, constraints, pure, loc, ip):
    """Inline PTX; ``pure`` if it may be moved or left out where its result is not used."""
    return llvm.inline_asm(
        result, operands, text, constraints, has_side_effects=not pure, is_align_stack=False,
        asm_dialect=llvm.AsmDialect.AD_ATT, loc=loc, ip=ip,
    )  # fmt: skip


def _words(values, loc, ip):
    return [Uint32(v).ir_value(loc=loc, ip=ip) for v in values]


@dsl_user_op
def rotate_right(word: Uint32, bits: int, *, loc=None, ip=None) -> Uint32:
    """``word`` rotated by a constant."""
    (w,) = _words([word], loc, ip)
    return Uint32(assemble(T.i32(), [w], f"shf.r.wrap.b32 $0, $1, $1, {bits};", "=r,r", True, loc, ip))


@dsl_user_op
def mask_and_set(word: Uint32, mask: int, bits: int, *, loc=None, ip=None) -> Uint32:
    """``word & mask | bits``; one LOP3 has room for one immediate, so ``bits`` is kept in a register."""
    operands = _words([word, Uint32(bits)], loc, ip)
    text = f"lop3.b32 $0, $1, {mask:#x}, $2, 0xea;"
    return Uint32(assemble(T.i32(), operands, text, "=r,r,r", True, loc, ip))


@dsl_user_op
def multiply_bf16x2(a: Uint32, b: Uint32, *, loc=None, ip=None) -> Uint32:
    """Products of two pairs of bf16, subnormals included, rounded to nearest even."""
    return Uint32(assemble(T.i32(), _words([a, b], loc, ip), "mul.rn.bf16x2 $0, $1, $2;", "=r,r,r", True, loc, ip))


@dsl_user_op
def broadcast_half(word: Uint32, upper: bool, *, loc=None, ip=None) -> Uint32:
    """Both halves of the result are the low (or upper) half of ``word``."""
    pick = "{h, h}" if upper else "{l, l}"
    text = f"{{ .reg .b16 l, h; mov.b32 {{l, h}}, $1; mov.b32 $0, {pick}; }}"
    return Uint32(assemble(T.i32(), _words([word], loc, ip), text, "=r,r", True, loc, ip))


@dsl_user_op
def pack_bf16x2(low: Float32, high: Float32, *, loc=None, ip=None) -> Uint32:
    """Two fp32 values rounded to nearest even."""
    operands = [Float32(v).ir_value(loc=loc, ip=ip) for v in (high, low)]
    return Uint32(assemble(T.i32(), operands, "cvt.rn.bf16x2.f32 $0, $1, $2;", "=r,f,f", True, loc, ip))


@dsl_user_op
def pack_e2m1x2(low: Float32, high: Float32, *, loc=None, ip=None) -> Uint32:
    """Two values as e2m1 codes in the low byte, to nearest even, saturating at 6; sm_100 and later."""
    operands = [Float32(v).ir_value(loc=loc, ip=ip) for v in (high, low)]
    text = "{ .reg .b8 codes; cvt.rn.satfinite.e2m1x2.f32 codes, $1, $2; cvt.u32.u8 $0, codes; }"
    return Uint32(assemble(T.i32(), operands, text, "=r,f,f", True, loc, ip))


@dsl_user_op
def e4m3(value: Float32, *, loc=None, ip=None) -> Uint32:
    """The e4m3 of a value that is one, in the low byte."""
    text = "{ .reg .b16 pair; cvt.rn.satfinite.e4m3x2.f32 pair, 0f00000000, $1; cvt.u32.u16 $0, pair; }"
    return Uint32(assemble(T.i32(), [Float32(value).ir_value(loc=loc, ip=ip)], text, "=r,f", True, loc, ip))


@dsl_user_op
def from_e4m3(byte: Uint32, *, loc=None, ip=None) -> Float32:
    """The value of the e4m3 in the low byte of a word."""
    text = "{ .reg .b16 p, l, u; .reg .b32 h; cvt.u16.u32 p, $1; cvt.rn.f16x2.e4m3x2 h, p; mov.b32 {l, u}, h; "
    text += "cvt.f32.f16 $0, l; }"
    return Float32(assemble(T.f32(), _words([byte], loc, ip), text, "=f,r", True, loc, ip))


@dsl_user_op
def bits(value: Float32, *, loc=None, ip=None) -> Uint32:
    """Those of a value."""
    operands = [Float32(value).ir_value(loc=loc, ip=ip)]
    return Uint32(assemble(T.i32(), operands, "mov.b32 $0, $1;", "=r,f", True, loc, ip))


@dsl_user_op
def from_bits(word: Uint32, *, loc=None, ip=None) -> Float32:
    """The value with these bits."""
    return Float32(assemble(T.f32(), _words([word], loc, ip), "mov.b32 $0, $1;", "=f,r", True, loc, ip))


@dsl_user_op
def load_global(address: Int64, size: int, *, loc=None, ip=None) -> Uint32:
    """1 or 4 bytes of global memory that nobody writes meanwhile, aligned to their size."""
    operands = [Int64(address).ir_value(loc=loc, ip=ip)]
    return Uint32(assemble(T.i32(), operands, f"ld.global.nc.u{8 * size} $0, [$1];", "=r,l", False, loc, ip))


@dsl_user_op
def load_shared(address: Int32, *, loc=None, ip=None) -> Uint32:
    """A word of shared memory; ``address`` in the shared window."""
    operands = [Int32(address).ir_value(loc=loc, ip=ip)]
    return Uint32(assemble(T.i32(), operands, "ld.shared.u32 $0, [$1];", "=r,r", False, loc, ip))


@dsl_user_op
def load_shared_v4(address: Int32, *, loc=None, ip=None) -> tuple[Uint32, Uint32, Uint32, Uint32]:
    """16 bytes of shared memory; ``address`` in the shared window."""
    struct = ir.Type.parse("!llvm.struct<(i32, i32, i32, i32)>")
    value = assemble(
        struct, [Int32(address).ir_value(loc=loc, ip=ip)], "ld.shared.v4.u32 {$0, $1, $2, $3}, [$4];", "=r,=r,=r,=r,r",
        False, loc, ip,
    )  # fmt: skip
    return tuple(Uint32(llvm.extractvalue(T.i32(), value, [i], loc=loc, ip=ip)) for i in range(4))


@dsl_user_op
def load_matrices(address: Int32, *, loc=None, ip=None) -> tuple[Uint32, Uint32, Uint32, Uint32]:
    """Four 8 x 8 matrices of 16-bit values from shared memory: lane ``8*i + r`` has the address of row r of matrix i.

    Word i of lane ``4*r + q`` is values 2*q and 2*q + 1 of row r of matrix i.
    """
    struct = ir.Type.parse("!llvm.struct<(i32, i32, i32, i32)>")
    text = "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {$0, $1, $2, $3}, [$4];"
    value = assemble(struct, [Int32(address).ir_value(loc=loc, ip=ip)], text, "=r,=r,=r,=r,r", False, loc, ip)
    return tuple(Uint32(llvm.extractvalue(T.i32(), value, [i], loc=loc, ip=ip)) for i in range(4))


@dsl_user_op
def multiply_add_bf16(sums, a, b, *, loc=None, ip=None) -> tuple[Float32, Float32, Float32, Float32]:
    """A warp's ``mma.m16n8k16``: fp32 sums plus bf16 products; four, four and two registers of a lane."""
    struct = ir.Type.parse("!llvm.struct<(f32, f32, f32, f32)>")
    operands = [*_words([*a, *b], loc, ip), *(Float32(value).ir_value(loc=loc, ip=ip) for value in sums)]
    text = "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, "
    text += "{$10, $11, $12, $13};"
    value = assemble(struct, operands, text, "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f", True, loc, ip)
    return tuple(Float32(llvm.extractvalue(T.f32(), value, [i], loc=loc, ip=ip)) for i in range(4))


@dsl_user_op
def load_early(array: cute.Tensor, index, *, loc=None, ip=None):
    """``array[index]``, a word of global memory, for who has not waited for the end of the grid that wrote it.

    Past L1, which may hold what was there before that grid. Only where an edge that is no ``griddepcontrol.wait``
    says that the grid is done (``kernels/README.md``, Order).
    """
    dtype = array.element_type
    address = Int64(array.iterator.toint()) + Int64(index) * 4
    kind, register, result = ("s32", "r", T.i32()) if dtype is Int32 else ("f32", "f", T.f32())
    text = f"ld.relaxed.gpu.global.{kind} $0, [$1];"
    operands = [address.ir_value(loc=loc, ip=ip)]
    return dtype(assemble(result, operands, text, f"={register},l,~{{memory}}", False, loc, ip))


@dsl_user_op
def load_global_f32x4(address: Int64, wanted: Int32, *, loc=None, ip=None) -> tuple[Float32, Float32, Float32, Float32]:
    """Four fp32 values that are read once, 16-byte aligned; zeros, and no access, if ``wanted`` is 0."""
    struct = ir.Type.parse("!llvm.struct<(f32, f32, f32, f32)>")
    operands = [Int64(address).ir_value(loc=loc, ip=ip), Int32(wanted).ir_value(loc=loc, ip=ip)]
    text = "{ .reg .pred p; setp.ne.s32 p, $5, 0; "
    text += "".join(f"mov.f32 ${i}, 0f00000000; " for i in range(4))
    text += "@p ld.global.L1::no_allocate.v4.f32 {$0, $1, $2, $3}, [$4]; }"
    value = assemble(struct, operands, text, "=&f,=&f,=&f,=&f,l,r", False, loc, ip)
    return tuple(Float32(llvm.extractvalue(T.f32(), value, [i], loc=loc, ip=ip)) for i in range(4))


@dsl_user_op
def gather_rows(
    shared: Int32, base: Int64, offsets, column: Int32, columns: Int32, row_bytes: int, *, loc=None, ip=None
) -> None:
    """``cp.async`` of 16 bytes for each of ``offsets``: from ``base + 16 * offset`` to ``shared + i * row_bytes``.

    Zeros are written, and nothing is read, where an offset is negative and where ``column >= columns``.
    """
    operands = [
        Int32(shared).ir_value(loc=loc, ip=ip), Int64(base).ir_value(loc=loc, ip=ip),
        Int32(column).ir_value(loc=loc, ip=ip), Int32(columns).ir_value(loc=loc, ip=ip),
        *(Int32(offset).ir_value(loc=loc, ip=ip) for offset in offsets),
    ]  # fmt: skip
    text = "{ .reg .pred outside, skip; .reg .u64 source; setp.ge.s32 outside, $2, $3; "
    for i in range(len(offsets)):
        text += f"setp.lt.or.s32 skip, ${4 + i}, 0, outside; mad.wide.s32 source, ${4 + i}, 16, $1; "
        text += f"cp.async.cg.shared.global.L2::128B [$0 + {i * row_bytes}], [source], 16, skip; "
    assemble(None, operands, text + "}", "r,l,r,r" + ",r" * len(offsets) + ",~{memory}", False, loc, ip)


@dsl_user_op
def gather_words(shared: Int32, base: Int64, offsets, row_bytes: int, *, loc=None, ip=None) -> None:
    """``cp.async`` of 4 bytes for each of ``offsets``: from ``base + 4 * offset`` to ``shared + i * row_bytes``.

    Zeros are written, and nothing is read, where an offset is negative.
    """
    operands = [
        Int32(shared).ir_value(loc=loc, ip=ip), Int64(base).ir_value(loc=loc, ip=ip),
        *(Int32(offset).ir_value(loc=loc, ip=ip) for offset in offsets),
    ]  # fmt: skip
    text = "{ .reg .pred skip; .reg .u64 source; "
    for i in range(len(offsets)):
        text += f"setp.lt.s32 skip, ${2 + i}, 0; mad.wide.s32 source, ${2 + i}, 4, $1; "
        text += f"cp.async.ca.shared.global [$0 + {i * row_bytes}], [source], 4, skip; "
    assemble(None, operands, text + "}", "r,l" + ",r" * len(offsets) + ",~{memory}", False, loc, ip)


@dsl_user_op
def bulk_copy(shared: Int32, source: Int64, num_bytes: Int32, barrier: Int32, *, loc=None, ip=None) -> None:
    """Bulk copy of contiguous global memory, counted by an mbarrier; all 16-byte aligned."""
    operands = [
        Int32(shared).ir_value(loc=loc, ip=ip), Int64(source).ir_value(loc=loc, ip=ip),
        Int32(num_bytes).ir_value(loc=loc, ip=ip), Int32(barrier).ir_value(loc=loc, ip=ip),
    ]  # fmt: skip
    text = "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [$0], [$1], $2, [$3];"
    assemble(None, operands, text, "r,l,r,r,~{memory}", False, loc, ip)


@dsl_user_op
def in_cta(address: Int32, rank: int, *, loc=None, ip=None) -> Int32:
    """The place that ``address`` of this CTA's shared memory has in CTA ``rank`` of the cluster."""
    operands = [Int32(address).ir_value(loc=loc, ip=ip)]
    return Int32(assemble(T.i32(), operands, f"mapa.shared::cluster.u32 $0, $1, {rank};", "=r,r", True, loc, ip))


@dsl_user_op
def store_cluster(address: Int32, word: Int32, *, loc=None, ip=None) -> None:
    """Stores a word to the shared memory of a CTA of the cluster (:func:`in_cta`)."""
    operands = [Int32(value).ir_value(loc=loc, ip=ip) for value in (address, word)]
    assemble(None, operands, "st.shared::cluster.b32 [$0], $1;", "r,r,~{memory}", False, loc, ip)


@dsl_user_op
def arrive_cluster(barrier: Int32, *, loc=None, ip=None) -> None:
    """Arrives at an mbarrier of a CTA of the cluster (:func:`in_cta`)."""
    operands = [Int32(barrier).ir_value(loc=loc, ip=ip)]
    text = "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [$0];"
    assemble(None, operands, text, "r,~{memory}", False, loc, ip)


@dsl_user_op
def try_wait_cluster(barrier: Int32, parity: Int32, *, loc=None, ip=None) -> Int32:
    """Waits a while for a phase of an mbarrier that other CTAs arrive at; 0 if it is not complete."""
    operands = [Int32(value).ir_value(loc=loc, ip=ip) for value in (barrier, parity)]
    text = (
        "{ .reg .pred p; mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [$1], $2; selp.b32 $0, 1, 0, p; }"
    )
    return Int32(assemble(T.i32(), operands, text, "=r,r,r,~{memory}", False, loc, ip))


@dsl_user_op
def store_global(address: Int64, words, *, loc=None, ip=None) -> None:
    """Stores 1, 2 or 4 words, aligned to their size."""
    operands = [Int64(address).ir_value(loc=loc, ip=ip), *_words(words, loc, ip)]
    names = ", ".join(f"${i + 1}" for i in range(len(words)))
    vector = f".v{len(words)}" if len(words) > 1 else ""
    names = f"{{{names}}}" if len(words) > 1 else names
    text = f"st.global{vector}.b32 [$0], {names};"
    assemble(None, operands, text, "l" + ",r" * len(words) + ",~{memory}", False, loc, ip)


@dsl_user_op
def store_global_bytes(address: Int64, word: Uint32, size: int, *, loc=None, ip=None) -> None:
    """Stores the low 1 or 2 bytes of a word, aligned to their size."""
    operands = [Int64(address).ir_value(loc=loc, ip=ip), *_words([word], loc, ip)]
    assemble(None, operands, f"st.global.b{8 * size} [$0], $1;", "l,r,~{memory}", False, loc, ip)


@dsl_user_op
def store_global_f32x4(address: Int64, values, *, loc=None, ip=None) -> None:
    """Stores four fp32 values that this kernel never reads again, 16-byte aligned."""
    operands = [Int64(address).ir_value(loc=loc, ip=ip), *(Float32(v).ir_value(loc=loc, ip=ip) for v in values)]
    text = "st.global.cs.v4.f32 [$0], {$1, $2, $3, $4};"
    assemble(None, operands, text, "l,f,f,f,f,~{memory}", False, loc, ip)


@dsl_user_op
def add_global_bf16x4(address: Int64, low: Uint32, high: Uint32, *, loc=None, ip=None) -> None:
    """Adds four bf16 values atomically (each of the four on its own), 8-byte aligned."""
    operands = [Int64(address).ir_value(loc=loc, ip=ip), *_words([low, high], loc, ip)]
    text = "red.relaxed.gpu.global.add.noftz.v2.bf16x2 [$0], {$1, $2};"
    assemble(None, operands, text, "l,r,r,~{memory}", False, loc, ip)


@dsl_user_op
def add_global_f32x4(address: Int64, values, *, loc=None, ip=None) -> None:
    """Adds four fp32 values atomically (each of the four on its own), 16-byte aligned."""
    operands = [Int64(address).ir_value(loc=loc, ip=ip), *(Float32(v).ir_value(loc=loc, ip=ip) for v in values)]
    text = "red.relaxed.gpu.global.add.v4.f32 [$0], {$1, $2, $3, $4};"
    assemble(None, operands, text, "l,f,f,f,f,~{memory}", False, loc, ip)


@dsl_user_op
def fetch_add_global(address: Int64, value: Int32, *, loc=None, ip=None) -> Int32:
    """Adds to an int32 atomically; what was there before."""
    operands = [Int64(address).ir_value(loc=loc, ip=ip), Int32(value).ir_value(loc=loc, ip=ip)]
    text = "atom.relaxed.gpu.global.add.s32 $0, [$1], $2;"
    return Int32(assemble(T.i32(), operands, text, "=r,l,r,~{memory}", False, loc, ip))


def _unary(text, name):
    @dsl_user_op
    def operation(a: Float32, *, loc=None, ip=None) -> Float32:
        operand = Float32(a).ir_value(loc=loc, ip=ip)
        return Float32(assemble(T.f32(), [operand], text, "=f,f", True, loc, ip))

    operation.__name__ = name
    return operation


exp2 = _unary("ex2.approx.ftz.f32 $0, $1;", "exp2")
reciprocal_approximate = _unary("rcp.approx.ftz.f32 $0, $1;", "reciprocal_approximate")
reciprocal = _unary("rcp.rn.f32 $0, $1;", "reciprocal")
# The power of two of a positive normal number; infinity for NaN.
power_of_two_below = _unary("and.b32 $0, $1, 0x7f800000;", "power_of_two_below")
absolute = _unary("abs.f32 $0, $1;", "absolute")
round_e4m3 = _unary(
    "{ .reg .b16 p; .reg .b32 h; .reg .b16 l, u; cvt.rn.satfinite.e4m3x2.f32 p, 0f00000000, $1; "
    "cvt.rn.f16x2.e4m3x2 h, p; mov.b32 {l, u}, h; cvt.f32.f16 $0, l; }",
    "round_e4m3",
)  # saturates at 448, keeps NaN


def _binary(text, name):
    @dsl_user_op
    def operation(a: Float32, b: Float32, *, loc=None, ip=None) -> Float32:
        operands = [Float32(v).ir_value(loc=loc, ip=ip) for v in (a, b)]
        return Float32(assemble(T.f32(), operands, text, "=f,f,f", True, loc, ip))

    operation.__name__ = name
    return operation


divide = _binary("div.rn.f32 $0, $1, $2;", "divide")
maximum = _binary("max.NaN.f32 $0, $1, $2;", "maximum")
minimum = _binary("min.NaN.f32 $0, $1, $2;", "minimum")
copy_sign = _binary("copysign.f32 $0, $2, $1;", "copy_sign")  # magnitude of a, sign of b
