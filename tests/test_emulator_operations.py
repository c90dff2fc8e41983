"""What single operations of the emulator compute, against NumPy and ml_dtypes."""

import shutil

import emulator
import ml_dtypes
import numpy as np
from ptx.parser import PTXError
import pytest
import small_ptx

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator is compiled with g++")

RNG = np.random.default_rng(0)
WORDS = RNG.integers(0, 2**32, (3, 32), np.uint32)
# Normal and subnormal numbers, halves, zeros, infinities, NaN.
FLOATS = np.array(
    [0.0, -0.0, 1.0, -1.5, 2.5, 3.5, 6.5, 447.0, 449.0, 1e9, -1e9, 3e38, -3e38, 1e-38, -1e-40, 1e-45, np.inf,
     -np.inf, np.nan, 0.25, 0.75, 1.25, 1.75, 5.0, 2**-9, 2**-10, 0.017, 65504.0, 65520.0, 1 / 3, 2**-133, -(2**-134)],
    np.float32,
)  # fmt: skip


def bits(values):
    return np.asarray(values).view(np.uint32)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("add.s32 %r10, %r1, %r2;", lambda a, b, c: a + b),
        ("sub.s32 %r10, %r1, -5;", lambda a, b, c: a + np.uint32(5)),
        ("mul.lo.s32 %r10, %r1, %r2;", lambda a, b, c: a * b),
        ("mad.lo.s32 %r10, %r1, %r2, %r3;", lambda a, b, c: a * b + c),
        ("mul.hi.s32 %r10, %r1, %r2;", lambda a, b, c: (a.view("i4").astype("i8") * b.view("i4") >> 32).astype("u4")),
        ("mul.hi.u32 %r10, %r1, %r2;", lambda a, b, c: (a.astype("u8") * b >> 32).astype("u4")),
        ("div.s32 %r10, %r1, %r2;", lambda a, b, c: np.trunc(a.view("i4") / b.view("i4")).astype("i4").view("u4")),
        ("shr.s32 %r10, %r1, 31;", lambda a, b, c: (a.view("i4") >> 31).view("u4")),
        ("shr.u32 %r10, %r1, 33;", lambda a, b, c: a * np.uint32(0)),
        ("shl.b32 %r10, %r1, 7;", lambda a, b, c: a << np.uint32(7)),
        ("shf.r.wrap.b32 %r10, %r1, %r1, 5;", lambda a, b, c: a >> np.uint32(5) | a << np.uint32(27)),
        ("shf.l.wrap.b32 %r10, %r1, %r2, 37;", lambda a, b, c: b << np.uint32(5) | a >> np.uint32(27)),
        ("lop3.b32 %r10, %r1, %r2, %r3, 0xea;", lambda a, b, c: a & b | c),
        ("lop3.b32 %r10, %r1, %r2, %r3, 0x96;", lambda a, b, c: a ^ b ^ c),
        ("prmt.b32 %r10, %r1, %r2, 0x6170;", lambda a, b, c: np.stack(
            [a.view("u1")[0::4], b.view("u1")[3::4], a.view("u1")[1::4], b.view("u1")[2::4]], 1).view("u4")[:, 0]),
        ("bfe.u32 %r10, %r1, 4, 9;", lambda a, b, c: a >> np.uint32(4) & np.uint32(511)),
        ("bfi.b32 %r10, %r1, %r2, 8, 4;",
         lambda a, b, c: b & np.uint32(0xFFFFF0FF) | (a & np.uint32(15)) << np.uint32(8)),
        ("popc.b32 %r10, %r1;", lambda a, b, c: np.bitwise_count(a).astype("u4")),
        ("mov.b32 {%rs0, %rs1}, %r1; mov.b32 %r10, {%rs1, %rs0};",
         lambda a, b, c: a >> np.uint32(16) | a << np.uint32(16)),
        ("cvt.u16.u32 %rs0, %r1; cvt.s32.s16 %r10, %rs0;", lambda a, b, c: a.astype("i2").astype("i4").view("u4")),
        ("cvt.s64.s32 %rd5, %r1; shr.u64 %rd5, %rd5, 32; cvt.u32.u64 %r10, %rd5;",
         lambda a, b, c: (a.view("i4") >> 31).view("u4")),
        ("add.s64 %rd12, %rd0, %rd10; ld.global.s32 %rd5, [%rd12]; shr.u64 %rd5, %rd5, 32; cvt.u32.u64 %r10, %rd5;",
         lambda a, b, c: (a.view("i4") >> 31).view("u4")),
        ("add.s64 %rd12, %rd0, %rd10; ld.global.u32 %rd5, [%rd12]; shr.u64 %rd5, %rd5, 32; cvt.u32.u64 %r10, %rd5;",
         lambda a, b, c: a * np.uint32(0)),
        ("setp.lt.s32 %p0, %r1, %r2; selp.b32 %r10, %r1, %r2, %p0;",
         lambda a, b, c: np.minimum(a.view("i4"), b.view("i4")).view("u4")),
        ("setp.lt.u32 %p1, %r3, %r1; setp.lt.or.u32 %p0, %r1, %r2, %p1; selp.b32 %r10, 1, 0, %p0;",
         lambda a, b, c: ((a < b) | (c < a)).astype("u4")),
        ("setp.lt.u32 %p1, %r3, %r1; setp.lt.and.u32 %p0, %r1, %r2, !%p1; selp.b32 %r10, 1, 0, %p0;",
         lambda a, b, c: ((a < b) & (c >= a)).astype("u4")),
    ],
)  # fmt: skip
def test_integers(body, expected):
    with np.errstate(over="ignore"):
        wanted = expected(*WORDS)
    np.testing.assert_array_equal(small_ptx.each_lane(body, *WORDS), wanted)


def _round(values, dtype):
    return np.asarray(values, dtype).astype(np.float32)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("mul.f32 %r10, %r1, %r2;", lambda a, b: a * b),
        ("add.f32 %r10, %r1, %r2;", lambda a, b: a + b),
        ("sub.f32 %r10, %r1, %r2;", lambda a, b: a - b),
        ("div.rn.f32 %r10, %r1, %r2;", lambda a, b: a / b),
        ("rcp.rn.f32 %r10, %r1;", lambda a, b: np.float32(1) / a),
        # Of two doubles the sum is not exact, but no double rounding shows with these values.
        ("fma.rn.f32 %r10, %r1, %r2, %r1;", lambda a, b: (a.astype(float) * b + a).astype(np.float32)),
        ("max.NaN.f32 %r10, %r1, %r2;", np.maximum),
        ("min.NaN.f32 %r10, %r1, %r2;", np.minimum),
        ("max.f32 %r10, %r1, %r2;", np.fmax),
        ("copysign.f32 %r10, %r1, %r2;", lambda a, b: np.copysign(b, a)),
        ("abs.f32 %r10, %r1;", lambda a, b: np.abs(a)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("shift", range(0, 32, 5))
def test_floats(body, expected, shift):
    a, b = FLOATS, np.roll(FLOATS, shift)
    with np.errstate(all="ignore"):
        wanted = np.asarray(expected(a, b), np.float32)
    actual = small_ptx.each_lane(body, a, b, result=np.float32)
    zero = (wanted == 0) & (actual == 0) & ("max" in body or "min" in body)  # of +0 and -0 NumPy gives either
    known = ~np.isnan(wanted)
    np.testing.assert_array_equal(np.isnan(actual), ~known)
    np.testing.assert_array_equal(bits(actual)[known & ~zero], bits(wanted)[known & ~zero])


def test_flushing_and_approximations():
    with np.errstate(all="ignore"):
        flushed = np.where(np.abs(FLOATS) < 2.0**-126, np.copysign(np.float32(0), FLOATS), FLOATS).astype(np.float32)
        wanted = (1 / flushed.astype(float)).astype(np.float32)
        wanted = np.where(np.abs(wanted) < 2.0**-126, np.copysign(np.float32(0), wanted), wanted)
    np.testing.assert_array_equal(
        small_ptx.each_lane("rcp.approx.ftz.f32 %r10, %r1;", FLOATS, result=np.float32), wanted
    )
    exponents = np.linspace(-130, 130, 32).astype(np.float32)
    with np.errstate(over="ignore"):
        powers = np.exp2(exponents.astype(float)).astype(np.float32)
    powers[powers < 2.0**-126] = 0
    np.testing.assert_array_equal(
        small_ptx.each_lane("ex2.approx.ftz.f32 %r10, %r1;", exponents, result=np.float32), powers
    )


def test_conversions_round_as_ml_dtypes():
    known = FLOATS[~np.isnan(FLOATS)]
    low, high = np.resize(known, 32), np.resize(known[::-1], 32)
    pairs = [(high, low)]
    for a, b in pairs:
        packed = small_ptx.each_lane("cvt.rn.bf16x2.f32 %r10, %r1, %r2;", a, b)
        halves = [np.asarray(v, ml_dtypes.bfloat16).view("u2").astype("u4") for v in (a, b)]
        np.testing.assert_array_equal(packed, halves[0] << 16 | halves[1])
        packed = small_ptx.each_lane("cvt.rn.satfinite.e4m3x2.f32 %rs0, %r1, %r2; cvt.u32.u16 %r10, %rs0;", a, b)
        codes = [np.asarray(np.clip(v, -448, 448), ml_dtypes.float8_e4m3fn).view("u1").astype("u4") for v in (a, b)]
        np.testing.assert_array_equal(packed, codes[0] << 8 | codes[1])
        packed = small_ptx.each_lane(
            "{ .reg .b8 c; cvt.rn.satfinite.e2m1x2.f32 c, %r1, %r2; mov.b32 %r10, {c, 0, 0, 0}; }", a, b
        )
        codes = [np.asarray(np.clip(v, -6, 6), ml_dtypes.float4_e2m1fn).view("u1").astype("u4") & 15 for v in (a, b)]
        np.testing.assert_array_equal(packed, codes[0] << 4 | codes[1])
        with np.errstate(over="ignore"):
            wanted = a.astype(np.float16).astype(np.float32)
        body = "cvt.rn.f16.f32 %rs0, %r1; cvt.f32.f16 %r10, %rs0;"
        np.testing.assert_array_equal(bits(small_ptx.each_lane(body, a, result=np.float32)), bits(wanted))


def test_nan_is_kept_or_saturated():
    nan = np.float32([np.nan])
    e4m3 = "cvt.rn.satfinite.e4m3x2.f32 %rs0, %r1, %r1; cvt.u32.u16 %r10, %rs0;"
    assert small_ptx.each_lane(e4m3, nan)[0] == 0x7F7F
    e2m1 = "{ .reg .b8 c; cvt.rn.satfinite.e2m1x2.f32 c, %r1, %r1; mov.b32 %r10, {c, 0, 0, 0}; }"
    assert small_ptx.each_lane(e2m1, nan)[0] == 0x77
    assert small_ptx.each_lane("mul.f32 %r10, %r1, %r1;", nan)[0] == 0x7FFFFFFF


def test_codes_of_four_and_eight_bits_as_halves():
    codes = np.arange(32, dtype=np.uint32) * 8 + 3
    body = "cvt.u16.u32 %rs0, %r1; cvt.rn.f16x2.e4m3x2 %r10, %rs0;"
    halves = small_ptx.each_lane(body, codes).astype(np.uint16).view(np.float16)
    wanted = codes.astype(np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float16)
    np.testing.assert_array_equal(halves, wanted)


def test_products_of_bf16_keep_subnormals():
    a = np.array([0x00010001, 0x3F803F80, 0x7F7F0080], np.uint32)
    b = np.array([0x3F003F80, 0xBF804000, 0x3F003E80], np.uint32)
    pairs = [np.resize(v, 32).view(np.uint16).view(ml_dtypes.bfloat16).astype(float) for v in (a, b)]
    wanted = (pairs[0] * pairs[1]).astype(ml_dtypes.bfloat16).view(np.uint32)
    np.testing.assert_array_equal(small_ptx.each_lane("mul.rn.bf16x2 %r10, %r1, %r2;", a, b), wanted)


def test_lanes_of_a_warp():
    lanes = np.arange(32, dtype=np.uint32)
    each = small_ptx.each_lane
    np.testing.assert_array_equal(each("shfl.sync.bfly.b32 %r10, %r1, 5, 31, -1;", lanes), lanes ^ 5)
    np.testing.assert_array_equal(each("shfl.sync.idx.b32 %r10, %r1, 3, 31, -1;", lanes), lanes * 0 + 3)
    np.testing.assert_array_equal(each("shfl.sync.idx.b32 %r10, %r1, 3, 6175, -1;", lanes), lanes & 24 | 3)
    up = each("shfl.sync.up.b32 %r10|%p0, %r1, 2, 0, -1; @!%p0 mov.b32 %r10, 99;", lanes)
    np.testing.assert_array_equal(up, np.where(lanes < 2, 99, lanes - 2))
    np.testing.assert_array_equal(
        each("and.b32 %r2, %r1, 1; match.any.sync.b32 %r10, %r2, -1;", lanes),
        np.where(lanes % 2, 0xAAAAAAAA, 0x55555555),
    )
    elected = each("elect.sync %r10|%p0, -1; selp.b32 %r10, 1, 0, %p0;", lanes)
    assert elected.sum() == 1


def test_lanes_that_part_meet_again():
    """Loops of different lengths, and a branch that lies behind where it returns to."""
    lanes = np.arange(32, dtype=np.uint32)
    body = """
      mov.b32 %r2, 0; mov.b32 %r3, 0;
    LOOP:
      setp.ge.u32 %p0, %r2, %r1; @%p0 bra AFTER;
      add.s32 %r3, %r3, %r2; add.s32 %r2, %r2, 1;
      bra LOOP;
    AFTER:
      and.b32 %r4, %r1, 1; setp.ne.b32 %p1, %r4, 0; @%p1 bra FAR;
    BACK:
      shfl.sync.bfly.b32 %r10, %r3, 1, 31, -1;
      bra END;
    FAR:
      add.s32 %r3, %r3, 1000;
      bra BACK;
    END:
    """
    sums = lanes * (lanes - 1) // 2 + 1000 * (lanes % 2)
    np.testing.assert_array_equal(small_ptx.each_lane(body, lanes), sums[lanes ^ 1])


def test_unknown_operations_are_refused_with_their_line():
    with pytest.raises(emulator.EmulatorError, match=r"line 11: the emulator does not know add\.s32\.wrong"):
        emulator.Kernel(small_ptx.text("add.s32.wrong %r1, %r1, 1;"))
    with pytest.raises(PTXError, match="line 11: '%nothing'"):
        emulator.Kernel(small_ptx.text("mov.b32 %r1, %nothing;"))
    with pytest.raises(emulator.EmulatorError, match="wrong width"):
        small_ptx.run("add.s64 %rd1, %r1, %rd2;", np.zeros(1))


def test_counts_by_operation_and_warp():
    memory = emulator.Memory()
    out = memory.poisoned((64,), np.uint32)
    body = "setp.ge.u32 %p0, %r0, 32; @%p0 bra END; mul.wide.u32 %rd1, %r0, 4; add.s64 %rd1, %rd1, %rd0; "
    body += "st.global.b32 [%rd1], %r0; END:"
    kernel = emulator.Kernel(small_ptx.text(body, threads=64))
    (counts,) = emulator.run([emulator.Launch(kernel, 1, [out])], memory)
    assert counts.by_operation()["st.global.b32"] == 1
    assert "st.global.b32" not in counts.by_operation(1)
    assert counts.by_operation(1)["setp.ge.u32"] == 1
    assert int(counts) == 8 + 5  # warp 1 branches over three
