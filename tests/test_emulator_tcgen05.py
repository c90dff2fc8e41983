"""tcgen05 on the emulator: products of every width against NumPy, what is refused, and mutants of a small kernel."""

import re
import shutil

import emulator
from emulator import EmulatorError, Kernel, Launch, Memory, mutants, ORDERS
import ml_dtypes
import numpy as np
import pytest
import small_ptx
from small_ptx import wait

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator is compiled with g++")

ROWS = 128
E2M1 = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float64)
A_BYTES = ROWS * 128
OPERAND, SCALES = 1 << 16 | 64 << 32 | 1 << 46 | 2 << 61, 1 << 16 | 8 << 32 | 1 << 46  # constants of descriptors


# --- A kernel of one block: 128 rows by 256 values of e2m1, or by 64 of bf16 ----------------------------------------


def swizzled(rows: np.ndarray) -> np.ndarray:
    """The bytes of rows of 128 bytes, u8[n, 128], as operands lie in shared memory."""
    chunks = rows.reshape(len(rows), 8, 16)
    placed = np.empty_like(chunks)
    for r in range(len(rows)):
        placed[r, np.arange(8) ^ r % 8] = chunks[r]
    return placed.reshape(-1)


def atoms(scales: np.ndarray) -> np.ndarray:
    """u8[n, 16], n up to 256, as atoms: those of the first 128 rows, four steps of K, then those of the others."""
    padded = np.full((-(-len(scales) // 128) * 128, 16), 0xAA, np.uint8)  # rows that are not there are never read
    padded[: len(scales)] = scales
    return padded.reshape(-1, 4, 32, 4, 4).transpose(0, 3, 2, 1, 4).reshape(-1)


def _descriptor(register: str, constant: int, address: str, offset: int) -> str:
    return (
        f"add.s32 %r30, {address}, {offset}; shr.u32 %r30, %r30, 4; cvt.u64.u32 {register}, %r30; "
        f"or.b64 {register}, {register}, {constant};\n"
    )


def kernel_text(n: int, fp4: bool, *, a_in_tensor_memory: bool = False) -> str:
    """%rd0: A as in shared memory, %rd1: B, %rd2: f32[n, 128]. Warp 0 allocates, and one thread of it does the rest."""
    halves = -(-n // 128)
    b_bytes = n * 128 + (2048 * halves if fp4 else 0)
    a_bytes = A_BYTES + (2048 if fp4 else 0)
    scale_columns = 16 + 16 * halves if fp4 else 32
    columns = max(32, 1 << (n + scale_columns - 1).bit_length())
    instruction = (1 << 7 | 1 << 10 | (0 if fp4 else 1 << 4) | 8 << 24) | n // 8 << 17
    body = f"""
      mov.b32 %r20, dynamic; add.s32 %r21, %r20, {a_bytes}; add.s32 %r22, %r20, 61440;
      setp.ne.b32 %p0, %r0, 0; setp.ge.u32 %p1, %r0, 32; shr.u32 %r1, %r0, 5; and.b32 %r2, %r0, 31;
      @%p0 bra READY;
      mbarrier.init.shared.b64 [%r22], 1;
      mbarrier.init.shared.b64 [%r22 + 8], 1;
      fence.mbarrier_init.release.cluster;
    READY:
      @%p1 bra ALLOCATED;
      tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r22 + 16], {columns};
      tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned;
    ALLOCATED:
      tcgen05.fence::before_thread_sync;
      bar.sync 0;
      tcgen05.fence::after_thread_sync;
      ld.shared.b32 %r3, [%r22 + 16];
      @%p0 bra LOADED;
      mbarrier.arrive.expect_tx.shared.b64 _, [%r22], {a_bytes + b_bytes};
      cp.async.bulk.shared::cta.global.mbarrier::complete_tx::bytes [%r20], [%rd0], {a_bytes}, [%r22];
      cp.async.bulk.shared::cta.global.mbarrier::complete_tx::bytes [%r21], [%rd1], {b_bytes}, [%r22];
    LOADED:
    """
    if a_in_tensor_memory:  # thread t puts row t there, from its swizzled place
        body += wait("%r22") + "\nshl.b32 %r4, %r0, 7; add.s32 %r4, %r4, %r20; and.b32 %r5, %r0, 7;\n"
        for chunk in range(8):
            words = ", ".join(f"%r{40 + 4 * chunk + i}" for i in range(4))
            body += f"xor.b32 %r6, %r5, {chunk}; shl.b32 %r6, %r6, 4; add.s32 %r6, %r6, %r4;"
            body += f"ld.shared.v4.b32 {{{words}}}, [%r6];\n"
        words = ", ".join(f"%r{40 + i}" for i in range(32))
        body += f"shl.b32 %r7, %r1, 21; add.s32 %r7, %r7, %r3; add.s32 %r7, %r7, {n};\n"
        body += f"tcgen05.st.sync.aligned.32x32b.x32.b32 [%r7], {{{words}}};\n"
        body += "tcgen05.wait::st.sync.aligned;\ntcgen05.fence::before_thread_sync;\nbar.sync 0;\n"
    body += "@%p0 bra ISSUED;\n"
    body += ("" if a_in_tensor_memory else wait("%r22")) + "\ntcgen05.fence::after_thread_sync;\n"
    if fp4:
        for step in range(4):
            body += _descriptor("%rd5", SCALES, "%r20", A_BYTES + 512 * step)
            body += f"add.s32 %r8, %r3, {n + 4 * step};\ntcgen05.cp.cta_group::1.32x128b.warpx4 [%r8], %rd5;\n"
            for half in range(halves):
                body += _descriptor("%rd5", SCALES, "%r21", n * 128 + 2048 * half + 512 * step)
                body += f"add.s32 %r8, %r3, {n + 16 + 4 * (halves * step + half)};\n"
                body += "tcgen05.cp.cta_group::1.32x128b.warpx4 [%r8], %rd5;\n"
    body += f"mov.b32 %r9, {instruction};\n"
    for step in range(4):
        body += _descriptor("%rd5", OPERAND, "%r20", 32 * step) + _descriptor("%rd6", OPERAND, "%r21", 32 * step)
        body += f"setp.ne.b32 %p2, {step}, 0;\n"
        if fp4:
            body += f"add.s32 %r10, %r3, {n + 4 * step}; add.s32 %r11, %r3, {n + 16 + 4 * halves * step};\n"
            body += "tcgen05.mma.cta_group::1.kind::mxf4nvf4.block_scale.block16 "
            body += "[%r3], %rd5, %rd6, %r9, [%r10], [%r11], %p2;\n"
        else:
            a = "%rd5"
            if a_in_tensor_memory:
                body += f"add.s32 %r10, %r3, {n + 8 * step};\n"
                a = "[%r10]"
            body += f"tcgen05.mma.cta_group::1.kind::f16 [%r3], {a}, %rd6, %r9, %p2;\n"
    body += (
        """
      tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%r22 + 8];
    ISSUED:
    """
        + wait("%r22 + 8")
        + """
      tcgen05.fence::after_thread_sync;
      shl.b32 %r12, %r1, 21; add.s32 %r12, %r12, %r3;
      shr.u32 %r13, %r2, 2; and.b32 %r14, %r2, 3; shl.b32 %r15, %r1, 5; add.s32 %r13, %r13, %r15;
    """
    )
    for column in range(0, n, 8):  # a fragment: columns 2q, 2q + 1 of lanes g and g + 8
        for half in range(2):
            body += f"add.s32 %r16, %r12, {(16 * half << 16) + column};\n"
            body += "tcgen05.ld.sync.aligned.16x256b.x1.b32 {%r40, %r41, %r42, %r43}, [%r16];\n"
            for i in range(4):
                body += "shl.b32 %r17, %r14, 8; add.s32 %r17, %r17, %r13; mul.wide.u32 %rd7, %r17, 4; "
                body += "add.s64 %rd7, %rd7, %rd2;\n"
                offset = ((column + i % 2) * ROWS + 16 * half + i // 2 * 8) * 4
                body += f"st.global.b32 [%rd7 + {offset}], %r{40 + i};\n"
    body += f"""
      tcgen05.wait::ld.sync.aligned;
      tcgen05.fence::before_thread_sync;
      bar.sync 0;
      @%p1 bra END;
      tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r3, {columns};
    END:
    """
    return small_ptx.text("\n".join(line.strip() for line in body.splitlines()), 3, 128)


def inputs(n: int, fp4: bool, seed: int = 0):
    """Bytes of A and B, and f64[n, 128] of what they make."""
    rng = np.random.default_rng(seed)
    operands, values = [], []
    for rows in (ROWS, n):
        if fp4:
            codes = rng.integers(0, 256, (rows, 128), np.uint8)
            scales = rng.choice(np.array([0x30, 0x38, 0x3C, 0x41], np.uint8), (rows, 16))
            operands.append(np.concatenate([swizzled(codes), atoms(scales)]))
            numbers = E2M1[np.stack([codes & 15, codes >> 4], -1).reshape(rows, 256)]
            values.append(numbers * np.repeat(scales.view(ml_dtypes.float8_e4m3fn).astype(float), 16, 1))
        else:
            numbers = rng.integers(-8, 9, (rows, 64)).astype(ml_dtypes.bfloat16)
            operands.append(swizzled(numbers.view(np.uint8)))
            values.append(numbers.astype(float))
    return *operands, values[1] @ values[0].T


def product(text: str, n: int, fp4: bool, **options) -> np.ndarray:
    a, b, _ = inputs(n, fp4)
    memory = Memory()
    out = memory.poisoned((n, ROWS), np.float32, "out", strict=True)
    given = [memory.array(a, "a"), memory.array(b, "b"), out]
    launch = Launch(Kernel(text, "product"), 1, given, shared_bytes=65536)
    emulator.run([launch], memory, most_instructions=200_000, **options)
    return out.read()


# --- Results ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", range(8, 257, 8))
def test_products_of_every_width(n):
    for i, (fp4, in_tensor_memory) in enumerate([(True, False), (False, False), (False, True)]):
        text = kernel_text(n, fp4, a_in_tensor_memory=in_tensor_memory)
        actual = product(text, n, fp4, seed=n, order=ORDERS[(n // 8 + i) % 3], check=n in (8, 136))
        np.testing.assert_array_equal(actual, inputs(n, fp4)[2])


def test_products_round_once_a_step():
    """2**24 and sixteen ones: a step's sum is exact, and then 2**24 + 16; one by one they would be lost."""
    n = 8
    numbers = np.zeros((ROWS, 64), ml_dtypes.bfloat16)
    numbers[:, 0], numbers[:, 16:32] = 2**12, 1
    tokens = np.zeros((n, 64), ml_dtypes.bfloat16)
    tokens[:, 0], tokens[:, 16:32] = 2**12, 1
    memory = Memory()
    out = memory.poisoned((n, ROWS), np.float32, "out")
    given = [memory.array(swizzled(v.view(np.uint8))) for v in (numbers, tokens)]
    emulator.run([Launch(Kernel(kernel_text(n, False)), 1, [*given, out], shared_bytes=65536)], memory)
    np.testing.assert_array_equal(out.read(), 2**24 + 16)


def test_a_poisoned_row_poisons_its_sums_only():
    n = 16
    a, b, expected = inputs(n, True)
    memory = Memory()
    arrays = [memory.array(a, "a"), memory.array(b, "b"), memory.poisoned((n, ROWS), np.float32, "out")]
    arrays[0]._marks[5 * 128 + 3] = 1  # of row 5 of A
    arrays[1]._marks[n * 128 + 2 * 16 + 1] = 1  # a scale of row 2 of B
    emulator.run([Launch(Kernel(kernel_text(n, True)), 1, arrays, shared_bytes=65536)], memory)
    written = np.ones((n, ROWS), bool)
    written[2], written[:, 5] = False, False
    np.testing.assert_array_equal(arrays[2].written, written)
    np.testing.assert_array_equal(arrays[2].read(partial=True)[written], expected[written])


def test_rows_to_tensor_memory_and_back():
    body = """
      mov.b32 %r20, dynamic;
      setp.ge.u32 %p1, %r0, 32; @%p1 bra A;
      tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r20], 32;
    A:
      tcgen05.fence::before_thread_sync; bar.sync 0; tcgen05.fence::after_thread_sync;
      ld.shared.b32 %r3, [%r20]; shr.u32 %r1, %r0, 5; shl.b32 %r4, %r1, 21; add.s32 %r4, %r4, %r3;
      add.s32 %r5, %r0, 1000; tcgen05.st.sync.aligned.32x32b.x2.b32 [%r4 + 3], {%r0, %r5};
      {wait}
      tcgen05.ld.sync.aligned.32x32b.x1.b32 {%r6}, [%r4 + 4];
      mul.wide.u32 %rd5, %r0, 4; add.s64 %rd5, %rd5, %rd0; st.global.b32 [%rd5], %r6;
      tcgen05.wait::ld.sync.aligned; tcgen05.fence::before_thread_sync; bar.sync 0;
      @%p1 bra B; tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r3, 32; B:
    """
    with_wait = body.replace("{wait}", "tcgen05.wait::st.sync.aligned;")
    for order in ORDERS:
        (out,) = small_ptx.run(with_wait, (128, np.uint32), threads=128, order=order)
        np.testing.assert_array_equal(out.read(), np.arange(128) + 1000)
        with pytest.raises(EmulatorError, match=r"not ordered|ends, and its shared"):
            small_ptx.run(body.replace("{wait}", ""), (128, np.uint32), threads=128, order=order)
    for text, message in (
        (with_wait.replace("[%r4 + 4]", "[%r4 + 32]"), "not allocated to this CTA"),
        (with_wait.replace("[%r4 + 4]", "[%r4 + 5]"), "was never written"),
        (with_wait.replace("[%r4 + 3]", "[%r3 + 3]"), "warp . cannot access lanes from"),
        (with_wait.replace("tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r3, 32;", ""), "never freed"),
        (with_wait.replace("%r3, 32;", "%r3, 64;"), "freed by who does not have it"),
        (with_wait.replace("[%r20], 32;", "[%r20], 48;"), "a power of two from 32 to 512"),
    ):
        with pytest.raises(EmulatorError, match=message):
            small_ptx.run(text, (128, np.uint32), threads=128)[0].read()


# --- What is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "replacement", "message"),
    [
        (r"mov.b32 %r9, (\d+)", lambda m: f"mov.b32 %r9, {int(m[1]) | 1 << 23}", "bits 23 to 23"),
        (r"mov.b32 %r9, (\d+)", lambda m: f"mov.b32 %r9, {int(m[1]) | 1 << 29}", "bits 29 to 31"),
        (r"mov.b32 %r9, (\d+)", lambda m: f"mov.b32 %r9, {int(m[1]) | 1 << 12}", "bits 10 to 12"),
        (r"mov.b32 %r9, (\d+)", lambda m: f"mov.b32 %r9, {int(m[1]) & ~(63 << 17)}", "N is 0|not 0"),
        (str(OPERAND), lambda m: str(OPERAND & ~(7 << 46)), "without its constant"),
        (str(OPERAND), lambda m: str(OPERAND & ~(7 << 61) | 4 << 61), "128-byte swizzle only"),
        (str(OPERAND), lambda m: str(OPERAND | 1 << 49), "do not start at a multiple of 1024"),
        (str(OPERAND), lambda m: str(OPERAND | 1 << 53), "reserved bits"),
        (str(SCALES), lambda m: str(SCALES | 2 << 61), "without a swizzle only"),
        (r"add.s32 %r21, %r20, (\d+)", lambda m: f"add.s32 %r21, %r20, {int(m[1]) + 512}", "multiple of 1024"),
        (r"add.s32 %r10, %r3, (\d+)", lambda m: "add.s32 %r10, %r3, 510", "not allocated"),
        (r"@%p0 bra ISSUED", lambda m: "@%p1 bra ISSUED", "issued by 32 lanes"),
    ],
)
def test_wrong_descriptors_are_refused(pattern, replacement, message):
    text, count = re.subn(pattern, replacement, kernel_text(16, True))
    assert count > 0
    with pytest.raises(EmulatorError, match=message):
        product(text, 16, True)


# --- Mutants ------------------------------------------------------------------------------------------------------

# What nothing can notice here: no other CTA wants columns, and the barrier behind it orders the initialisation too.
# Nor can the fences around that barrier be missed: the allocation is no asynchronous operation, and but for stores to
# tensor memory each warp has another fence before its first access.
_HARMLESS = {"tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned", "fence.mbarrier_init.release.cluster"}


@pytest.mark.parametrize("kind", ["fp4", "bf16", "bf16, A in tensor memory"])
def test_mutants_of_a_product_are_noticed(kind):
    """By the result, a poisoned decision, a deadlock or the checker, in each of the orders."""
    n, fp4 = 8, kind == "fp4"
    text = kernel_text(n, fp4, a_in_tensor_memory=kind.endswith("memory"))
    expected = inputs(n, fp4)[2]
    fences = [i for i, line in enumerate(text.splitlines(), 1) if "tcgen05.fence" in line]
    spare = fences[:1] if kind.endswith("memory") else fences[:2]
    survivors, tried = [], 0
    for mutant in mutants.mutants(text):
        tried += 1
        kernel = mutant.text
        for order in ORDERS:
            try:
                actual = product(kernel, n, fp4, order=order, seed=1)
            except EmulatorError:
                continue
            if np.array_equal(actual, expected) and mutant.line not in spare:
                survivors.append((order, mutant.what, mutant.operation, mutant.line))
    assert tried >= 30
    unexplained = [each for each in survivors if each[2] not in _HARMLESS]
    assert not unexplained
