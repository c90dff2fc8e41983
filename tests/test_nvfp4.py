"""NVFP4 numerics, bit for bit, against ``ml_dtypes`` and the definition in NumPy."""

import helpers
from hypothesis import given, strategies as st
from hypothesis.extra import numpy as hnp
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import statement

from jax_moe import nvfp4

CODES = np.arange(16, dtype=np.uint8)
quantize = jax.jit(nvfp4.quantize)  # eager, every operation of every shape would be a program of its own
dequantize = jax.jit(nvfp4.dequantize, static_argnames="dtype")
INFINITY, NAN = np.float32(np.inf), np.float32(np.nan)

# Where XLA's CPU backend gives IEEE results: it flushes subnormals, and outside of these scales a code that is not 0
# can come from a subnormal value, product or reciprocal. nvfp4.quantize documents them.
SMALLEST_SCALE, LARGEST_SCALE = 2.0**-115, 2.0**117


def _bits(values):
    return np.asarray(values, np.float32).view(np.uint32)


def _neighbours(values):
    values = np.asarray(values, np.float32)
    return np.concatenate([np.nextafter(values, -INFINITY), values, np.nextafter(values, INFINITY)])


def _interesting():
    """Every e2m1 value, every tie between two, their float32 neighbours, and everything special; both signs."""
    ties = (statement.E2M1[1:] + statement.E2M1[:-1]) / 2
    special = [0, 2.0**-149, 2.0**-127, 2.0**-126, 6.5, 7, 8, 1e30, np.finfo(np.float32).max, INFINITY, NAN]
    positive = np.concatenate([_neighbours(statement.E2M1[1:]), _neighbours(ties), np.float32(special)])
    return np.concatenate([positive, -positive])  # of NaN too: the sign bit


def _e2m1(values):
    with np.errstate(invalid="ignore"):  # NumPy reports NaNs that a cast meets
        return values.astype(np.float32).astype(ml_dtypes.float4_e2m1fn).view(np.uint8)


# --- e2m1 and e4m3 ------------------------------------------------------------------------------------------------


def test_decodes_every_e2m1_code():
    expected = CODES.view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
        decoded = nvfp4.e2m1_to_float(jnp.asarray(CODES), dtype)
        assert decoded.dtype == dtype
        np.testing.assert_array_equal(_bits(decoded), _bits(expected))  # -0 is not 0


def test_encodes_every_e2m1_value_to_its_code():
    np.testing.assert_array_equal(nvfp4.e2m1_from_float(nvfp4.e2m1_to_float(jnp.asarray(CODES))), CODES)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_rounds_to_e2m1_as_ml_dtypes_does(dtype, transform):
    with np.errstate(over="ignore", invalid="ignore"):
        values = _interesting().astype(dtype)
    expected = _e2m1(values)
    np.testing.assert_array_equal(transform(nvfp4.e2m1_from_float)(jnp.asarray(values)), expected)


@given(hnp.arrays(np.uint32, (64,)))
def test_rounds_any_bits_to_e2m1_as_ml_dtypes_does(bits):
    values = bits.view(np.float32)
    expected = _e2m1(values)
    np.testing.assert_array_equal(nvfp4.e2m1_from_float(jnp.asarray(values)), expected)


def test_rounds_every_bfloat16_to_e2m1_as_ml_dtypes_does():
    values = np.arange(2**16, dtype=np.uint16).view(ml_dtypes.bfloat16)
    expected = _e2m1(values)
    np.testing.assert_array_equal(nvfp4.e2m1_from_float(jnp.asarray(values)), expected)


def test_dequantises_every_pair_of_codes_exactly():
    """All 16 e2m1 codes under all 256 e4m3 codes, NaN and -0 included: the product is exact in bfloat16."""
    scales = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn)[:, None]
    payload = np.broadcast_to(CODES[0::2] | CODES[1::2] << 4, (256, 8))
    values = CODES.view(ml_dtypes.float4_e2m1fn).astype(np.float64) * scales.astype(np.float64)
    for dtype in (jnp.float32, jnp.bfloat16):
        result = dequantize(jnp.asarray(payload), jnp.asarray(scales), dtype=dtype)
        assert result.dtype == dtype
        np.testing.assert_array_equal(np.asarray(result, np.float64), values)
        finite = ~np.isnan(values)
        np.testing.assert_array_equal(np.signbit(np.asarray(result, np.float64))[finite], np.signbit(values)[finite])


def test_dequantises_with_a_global_scale_for_each_row():
    rng = np.random.default_rng(0)
    payload = rng.integers(0, 256, (2, 3, 16), np.uint8)
    scales = rng.integers(0x20, 0x60, (2, 3, 2), np.uint8).view(ml_dtypes.float8_e4m3fn)
    for shape in [(), (2, 3), (2, 1)]:
        global_scale = rng.uniform(0.1, 10, shape).astype(np.float32)
        expected = statement.dequantize(statement.unpack(payload), scales)
        expected = expected * np.broadcast_to(global_scale, (2, 3))[..., None]
        actual = dequantize(jnp.asarray(payload), jnp.asarray(scales), jnp.asarray(global_scale))
        np.testing.assert_array_equal(_bits(actual), _bits(expected))


# --- Packing ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(2,), (3, 32), (2, 1, 16), (0, 4)])
def test_packs_the_even_index_low(shape):
    codes = np.random.default_rng(0).integers(0, 16, shape, np.uint8)
    payload = nvfp4.pack(jnp.asarray(codes))
    assert payload.dtype == jnp.uint8
    np.testing.assert_array_equal(np.asarray(payload) & 15, codes[..., 0::2])
    np.testing.assert_array_equal(np.asarray(payload) >> 4, codes[..., 1::2])
    np.testing.assert_array_equal(nvfp4.unpack(payload), codes)


def test_packs_as_a_float4_view_reads():
    payload = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(nvfp4.pack(nvfp4.unpack(jnp.asarray(payload[None]))), payload[None])
    # jax reads the bytes of a float4 array as we do.
    viewed = jnp.asarray(payload[None]).view(jnp.float4_e2m1fn)
    np.testing.assert_array_equal(np.asarray(viewed).view(np.uint8), statement.unpack(payload[None]))


def test_refuses_to_pack_an_odd_number():
    with pytest.raises(ValueError, match=r"codes: .*even.*\(2, 3\)"):
        nvfp4.pack(jnp.zeros((2, 3), jnp.uint8))


# --- Quantising ---------------------------------------------------------------------------------------------------


def _assert_quantises(values, scale, quantize=quantize):
    codes, scales = statement.quantize(values, scale)
    payload, block_scale = quantize(jnp.asarray(values), jnp.float32(scale))
    assert (payload.dtype, block_scale.dtype) == (jnp.uint8, jnp.float8_e4m3fn)
    helpers.assert_bit_equal(block_scale, scales)
    np.testing.assert_array_equal(statement.unpack(payload), codes)


_SCALES = st.floats(SMALLEST_SCALE, LARGEST_SCALE, width=32)
_BLOCK = st.lists(st.floats(-1, 1, width=32), min_size=16, max_size=16)


@given(
    hnp.arrays(np.float32, (3, 32), elements=st.floats(width=32, allow_subnormal=False)),
    st.one_of(_SCALES, st.integers(-115, 117).map(lambda e: 2.0**e)),
)
def test_quantises_anything_as_defined(values, scale):
    _assert_quantises(values, scale)


@given(_BLOCK, _BLOCK, _SCALES, st.floats(2.0**-12, 2.0**12, width=32))
def test_quantises_values_near_their_scale_as_defined(first, second, scale, size):
    """Blocks whose scale is neither 0 nor saturated, where every step of the definition matters."""
    with np.errstate(all="ignore"):
        values = np.float32([[*first, *second]] * 3) * np.float32(size) * np.float32(scale)
    values = np.where(np.abs(values) < 2.0**-126, np.float32(0), values)
    _assert_quantises(values, scale)


@pytest.mark.parametrize("scale", [SMALLEST_SCALE, 2.0**-60, 1e-4, 0.3, 1.0, 3e20, LARGEST_SCALE])
def test_quantises_every_boundary_of_the_block_scale(scale):
    """A largest value at every e4m3 value, every tie of two, and their neighbours; up to and beyond 448."""
    e4m3 = np.arange(0x7F, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    amax = np.concatenate([e4m3, (e4m3[1:] + e4m3[:-1]) / 2, np.float32([448, 456, 464, 465, 480, 1000])])
    with np.errstate(all="ignore"):
        amax = _neighbours(np.float32(6) * np.float32(scale) * amax)
    amax = amax[np.isfinite(amax) & (amax >= 2.0**-126)]
    shape = np.float32([1, -1, 0.75, -0.5, 0.1, 0, -0.0, 1 / 3, 0.25, 0.26, 0.6, -0.9, 0.41, -0.42, 0.04, 0.05])
    values = amax[:, None] * shape
    _assert_quantises(np.where(np.abs(values) < 2.0**-126, np.float32(0) * values, values), scale)


def test_quantises_every_tie_of_a_code_as_defined():
    """Values that scaling puts next to a tie, where a quotient in place of the product with 1 / (sf s) shows."""
    rng = np.random.default_rng(4)
    ties = (statement.E2M1[1:] + statement.E2M1[:-1]) / 2
    for scale in rng.uniform(0.5, 1, 40).astype(np.float32):
        sf = rng.integers(8, 0x7F, 64, np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)[:, None]
        block = np.float32(sf * scale) * np.concatenate([np.float32([6, 0.2]), ties, -ties])
        block[:, 2:] = np.nextafter(block[:, 2:], rng.choice([-INFINITY, INFINITY], (64, 14)))
        _assert_quantises(block, scale)


@pytest.mark.parametrize("quantize", [nvfp4.quantize, quantize], ids=["eager", "jit"])
def test_quantises_special_values(quantize):
    ones, zeros = np.ones(15, np.float32), np.zeros(15, np.float32)
    first = [0.0, -0.0, INFINITY, -INFINITY, NAN, -NAN, 1.0, np.finfo(np.float32).max]
    values = np.stack([np.r_[np.float32(v), rest] for v in first for rest in (ones, zeros, -ones, -zeros, ones * NAN)])
    _assert_quantises(values, 0.25, quantize)


def test_a_scale_that_the_compiler_knows_changes_nothing():
    """XLA turns a division by a constant into a product with its reciprocal, unless told not to."""
    values = np.random.default_rng(0).normal(size=(512, 16)).astype(np.float32)
    for scale in (np.float32(1 / 3), np.float32(0.0123), np.float32(7e-4)):
        codes, scales = statement.quantize(values, scale)
        payload, block_scale = jax.jit(lambda v, s=scale: nvfp4.quantize(v, s))(values)
        helpers.assert_bit_equal(block_scale, scales)
        np.testing.assert_array_equal(statement.unpack(payload), codes)
    amax = np.abs(values).max(1)
    helpers.assert_bit_equal(jax.jit(nvfp4.global_scale_for)(amax), amax / np.float32(6 * 448))


def test_quantises_rows_under_scales_of_their_own():
    rng = np.random.default_rng(1)
    values = rng.normal(size=(3, 2, 32)).astype(np.float32)
    for shape in [(3, 2), (3, 1), (2,)]:
        scales = rng.uniform(1e-3, 1, shape).astype(np.float32)
        payload, block_scale = quantize(jnp.asarray(values), jnp.asarray(scales))
        for index in np.ndindex(3, 2):
            codes, row_scales = statement.quantize(values[index], np.broadcast_to(scales, (3, 2))[index])
            np.testing.assert_array_equal(statement.unpack(payload[index]), codes)
            helpers.assert_bit_equal(block_scale[index], row_scales)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_quantises_narrow_floats_by_their_values(dtype):
    values = jnp.asarray(np.random.default_rng(2).normal(size=(8, 64)), dtype)
    codes, scales = statement.quantize(np.asarray(values, np.float32), 1e-3)
    payload, block_scale = quantize(values, jnp.float32(1e-3))
    np.testing.assert_array_equal(statement.unpack(payload), codes)
    helpers.assert_bit_equal(block_scale, scales)
    expected = statement.dequantize(codes, scales).astype(ml_dtypes.bfloat16)
    helpers.assert_bit_equal(jax.jit(nvfp4.quantize_dequantize)(values, jnp.float32(1e-3)), expected)


@given(
    hnp.arrays(np.uint8, (4, 32), elements=st.integers(0, 15)),
    hnp.arrays(np.uint8, (4, 2), elements=st.integers(1, 0x7E)),
)
def test_a_tensor_that_is_nvfp4_survives(codes, scales):
    """Quantising dequantised values gives back the codes and scales, where a block reaches 6 and so fixes its scale."""
    codes[:, 0::16] = 7
    block_scale = scales.view(ml_dtypes.float8_e4m3fn)
    values = dequantize(nvfp4.pack(jnp.asarray(codes)), jnp.asarray(block_scale))
    payload, found = quantize(values, jnp.float32(1))
    helpers.assert_bit_equal(found, block_scale)
    np.testing.assert_array_equal(statement.unpack(payload), codes)


@pytest.mark.parametrize("shape", [(0, 16), (0, 0), (2, 0)])
def test_quantises_nothing(shape):
    payload, block_scale = quantize(jnp.zeros(shape), jnp.float32(1))
    assert payload.shape == (shape[0], shape[1] // 2)
    assert block_scale.shape == (shape[0], shape[1] // 16)
    assert dequantize(payload, block_scale).shape == shape


def test_refuses_a_partial_block():
    with pytest.raises(ValueError, match=r"values: .*16.*\(2, 24\)"):
        quantize(jnp.zeros((2, 24)), jnp.float32(1))


@pytest.mark.parametrize("scale", [2.0**-120, 2.0**-116, 2.0**118, 2.0**125])
def test_scales_out_of_range_lose_values_but_invent_none(scale):
    """Subnormals beyond the documented range are flushed: a value may become 0 or saturate; it is never a NaN."""
    values = np.random.default_rng(3).normal(size=(4, 16)).astype(np.float32) * np.float32(scale)
    values = np.where(np.isfinite(values), values, np.float32(0))
    result = np.asarray(dequantize(*quantize(jnp.asarray(values), jnp.float32(scale))), np.float64)
    assert (np.abs(result * scale) <= 1.25 * np.abs(values).max().astype(np.float64)).all()


def test_global_scale_for():
    amax = np.float32([0, 1, 2688, 1e-30, 3e38])
    expected = np.where(amax > 0, amax / np.float32(2688), np.float32(1))
    helpers.assert_bit_equal(nvfp4.global_scale_for(jnp.asarray(amax)), expected.astype(np.float32))
    # Under it the largest value is 6 * 448, the largest that NVFP4 has.
    for row in np.float32([amax[1:]] * 16).T:
        payload, block_scale = quantize(jnp.asarray(row), nvfp4.global_scale_for(row.max()))
        assert dequantize(payload, block_scale).max() == 6 * 448


@pytest.mark.parametrize("rows", [1, 64, 900])
@pytest.mark.parametrize("jit", [False, True])
def test_a_nan_is_not_lost_in_a_large_array(rows, jit):
    """XLA's float maximum on a CPU drops NaN once it is vectorised."""
    values = np.ones((rows, 64), np.float32)
    values[rows // 2, 21] = np.nan
    quantize = jax.jit(nvfp4.quantize) if jit else nvfp4.quantize
    _, block_scale = quantize(values, jnp.float32(1))
    nan = np.isnan(np.asarray(block_scale).astype(np.float32))
    assert nan[rows // 2, 1]
    assert nan.sum() == 1
    assert np.isnan(nvfp4.global_scale_for(nvfp4.amax(jnp.asarray(values))))
