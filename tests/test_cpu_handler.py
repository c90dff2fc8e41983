"""What is specific to the CPU handler: its scalar numerics, its instruction sets, threads, and leftovers in buffers.

Whether it computes the right function is ``test_fused_moe.py``'s to say, against the definition.
"""

import ctypes
import dataclasses
import os
import shutil
import subprocess

import helpers
from hypothesis import given, strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import statement

import jax_moe
from jax_moe import ffi, nvfp4, reference

# --- Scalar numerics: ffi/nvfp4.h and ffi/cpu/activation.h, compiled on their own -----------------------------------

_PROBE = """
#include "cpu/activation.h"
#include "nvfp4.h"
using namespace jax_moe;
#define ARRAY_FUNCTION(name, From, To, Function) \\
  void name(const From* from, To* to, int n) { for (int i = 0; i < n; ++i) to[i] = Function(from[i]); }
extern "C" {
ARRAY_FUNCTION(e2m1_from_float, float, uint8_t, E2M1FromFloat)
ARRAY_FUNCTION(e2m1_to_float, uint8_t, float, E2M1ToFloat)
ARRAY_FUNCTION(e4m3_from_float, float, uint8_t, E4M3FromFloat)
ARRAY_FUNCTION(e4m3_to_float, uint8_t, float, E4M3ToFloat)
ARRAY_FUNCTION(bf16_from_float, float, uint16_t, BF16FromFloat)
ARRAY_FUNCTION(bf16_to_float, uint16_t, float, BF16ToFloat)
ARRAY_FUNCTION(exp_of, float, float, Exp)
ARRAY_FUNCTION(tanh_of, float, float, Tanh)
void quantize(const float* from, float scale, uint8_t* codes, uint8_t* scales, int blocks) {
  for (int i = 0; i < blocks; ++i) scales[i] = QuantizeBlock(from + 16 * i, scale, codes + 16 * i);
}
}
"""


@pytest.fixture(scope="module")
def probe(tmp_path_factory):
    if shutil.which("c++") is None:
        pytest.skip("needs a C++ compiler")
    folder = tmp_path_factory.mktemp("probe")
    (folder / "probe.cc").write_text(_PROBE)
    command = [
        "c++",
        "-std=c++20",
        "-O2",
        "-ffp-contract=off",
        "-shared",
        "-fPIC",
        "-I",
        helpers.SOURCE_FOLDER / "ffi",
    ]
    subprocess.run([*command, folder / "probe.cc", "-o", folder / "probe.so"], check=True)
    return ctypes.CDLL(str(folder / "probe.so"))


def _convert(function, values, dtype):
    values = np.ascontiguousarray(values)
    result = np.empty(values.shape, dtype)
    function(values.ctypes.data_as(ctypes.c_void_p), result.ctypes.data_as(ctypes.c_void_p), values.size)
    return result


def _cast(values, dtype):
    with np.errstate(invalid="ignore", over="ignore"):
        return values.astype(dtype)


def _interesting_floats():
    """Every bf16 value, every midpoint between e4m3 neighbours and the floats next to those, and random bits."""
    rng = np.random.default_rng(0)
    bf16 = _cast(np.arange(2**16, dtype=np.uint16).view(ml_dtypes.bfloat16), np.float32)
    e4m3 = np.arange(0x7F, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    middles = np.concatenate([(e4m3[1:] + e4m3[:-1]) / 2, np.float32([464, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5])])
    middles = np.concatenate([middles, np.nextafter(middles, np.float32(0)), np.nextafter(middles, np.float32(1e9))])
    random = rng.integers(0, 2**32, 100_000, np.uint32).view(np.float32)
    return np.concatenate([bf16, middles, -middles, random])


def _same_or_nan(actual, expected):
    actual, expected = _cast(actual, np.float32), _cast(expected, np.float32)
    np.testing.assert_array_equal(actual, expected)
    np.testing.assert_array_equal(np.signbit(actual), np.signbit(expected))


def test_e2m1_is_ml_dtypes(probe):
    values = _interesting_floats()
    expected = _cast(values, ml_dtypes.float4_e2m1fn).view(np.uint8)
    np.testing.assert_array_equal(_convert(probe.e2m1_from_float, values, np.uint8), expected)
    codes = np.arange(16, dtype=np.uint8)
    _same_or_nan(_convert(probe.e2m1_to_float, codes, np.float32), codes.view(ml_dtypes.float4_e2m1fn))


def test_e4m3_is_ml_dtypes(probe):
    values = _interesting_floats()
    expected = _cast(values, ml_dtypes.float8_e4m3fn).view(np.uint8)
    np.testing.assert_array_equal(_convert(probe.e4m3_from_float, values, np.uint8), expected)
    codes = np.arange(256, dtype=np.uint8)
    _same_or_nan(_convert(probe.e4m3_to_float, codes, np.float32), codes.view(ml_dtypes.float8_e4m3fn))


def test_bf16_is_ml_dtypes(probe):
    values = _interesting_floats()
    actual = _convert(probe.bf16_from_float, values, np.uint16).view(ml_dtypes.bfloat16)
    _same_or_nan(actual, _cast(values, ml_dtypes.bfloat16))
    codes = np.arange(2**16, dtype=np.uint16)
    _same_or_nan(_convert(probe.bf16_to_float, codes, np.float32), codes.view(ml_dtypes.bfloat16))


_SPECIAL = st.sampled_from([0.0, -0.0, np.inf, -np.inf, np.nan, 1e-45, 1e-38, 3e38, 448.0, 2688.0])
_VALUES = st.lists(_SPECIAL | st.floats(width=32), min_size=16, max_size=16)


def _quantize(probe, values, scale):
    codes = np.empty(values.size, np.uint8)
    scales = np.empty(values.size // 16, np.uint8)
    arrays = [a.ctypes.data_as(ctypes.c_void_p) for a in (values, codes, scales)]
    probe.quantize(arrays[0], ctypes.c_float(scale), *arrays[1:], scales.size)
    return codes, scales


_SCALES = st.sampled_from([1.0, 1 / 2688, 1e-30, 1e30, 1e-45, 0.0, np.inf, np.nan, -1.0]) | st.floats(width=32)


@given(values=_VALUES, scale=_SCALES)
def test_quantizing_a_block_is_the_definition(probe, values, scale):
    values = np.asarray(values, np.float32)
    codes, scales = _quantize(probe, values, scale)
    expected_codes, expected_scales = statement.quantize(values, np.float32(scale))
    decoded = scales.view(ml_dtypes.float8_e4m3fn)
    np.testing.assert_array_equal(decoded.astype(np.float32), expected_scales.astype(np.float32))
    np.testing.assert_array_equal(codes, expected_codes)


def test_quantizing_is_nvfp4_quantize(probe):
    rng = np.random.default_rng(1)
    values = (rng.normal(size=(4096, 16)) * 10.0 ** rng.integers(-6, 6, (4096, 1))).astype(np.float32)
    codes, scales = _quantize(probe, values, 0.01)
    payload, expected_scales = nvfp4.quantize(jnp.asarray(values), jnp.float32(0.01))
    np.testing.assert_array_equal(scales, np.asarray(expected_scales).view(np.uint8)[:, 0])
    np.testing.assert_array_equal(codes.reshape(values.shape), statement.unpack(payload))


@pytest.mark.parametrize(("name", "function"), [("exp_of", np.exp), ("tanh_of", np.tanh)])
def test_exp_and_tanh_are_good_to_3_ulp(probe, name, function):
    values = np.concatenate(
        [np.linspace(-110, 95, 400_001), np.geomspace(1e-30, 1, 100_001), -np.geomspace(1e-30, 1, 100_001)]
    )
    values = values.astype(np.float32)
    actual = _convert(getattr(probe, name), values, np.float32).astype(np.float64)
    exact = function(values.astype(np.float64))
    in_range = (np.abs(exact) < np.finfo(np.float32).max) & (np.abs(exact) > np.finfo(np.float32).tiny)
    ulp = np.spacing(np.abs(exact[in_range]).astype(np.float32)).astype(np.float64)
    assert (np.abs(actual - exact)[in_range] / ulp).max() < 3
    special = np.float32([np.inf, -np.inf, np.nan, 200, -200, 0])
    with np.errstate(over="ignore"):
        _same_or_nan(np.abs(_convert(getattr(probe, name), special, np.float32)), np.abs(function(special)))


# --- The handler ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("weight_on", ["output", "input"])
@pytest.mark.parametrize("precision", ["w4a16", "w4a4", "w4a4_dynamic"])
def test_exact_inputs_give_the_oracles_bits(precision, weight_on, gated):
    case = helpers.make_exact_case(3, gated=gated, precision=precision, weight_on=weight_on)
    expected = case.run(reference.fused_moe, out_dtype=jnp.float32)
    for combine in ("atomic", "ordered"):
        for out_dtype in (jnp.float32, jnp.bfloat16):
            helpers.assert_bit_equal(case.run(combine=combine, out_dtype=out_dtype), expected.astype(out_dtype))


_IN_A_PROCESS = """
import sys
import helpers, numpy as np
cases = [
    helpers.make_case(seed, tokens=tokens, hidden=1040, intermediate=48, top_k=3, bias=True, activation=activation,
                      precision=precision, combine=combine, routing="any", num_experts=2)
    for seed, (tokens, precision, combine) in enumerate(
        [(1, "w4a16", "atomic"), (7, "w4a4", "ordered"), (50, "w4a16", "ordered"), (3, "w4a4", "atomic"),
         (9, "w4a4_dynamic", "ordered")])
    for activation in helpers.ACTIVATIONS
]
np.save(sys.argv[1], np.concatenate([c.run(out_dtype=np.float32).ravel() for c in cases]))
"""


def test_instruction_sets_agree_to_the_bit(tmp_path):
    """A product of such operands is exact in fp32 and all sum in one order, so fused or not makes no difference."""
    results = {}
    for name in ("baseline", "avx2", "avx512"):
        path = tmp_path / f"{name}.npy"
        helpers.run_python(_IN_A_PROCESS, path, JAX_MOE_CPU_KERNELS=name)
        results[name] = np.load(path)
    assert np.isfinite(results["baseline"]).all()
    helpers.assert_bit_equal(results["avx2"], results["baseline"])
    helpers.assert_bit_equal(results["avx512"], results["baseline"])


def test_number_of_threads_changes_nothing(tmp_path):
    """XLA's pool has a thread per CPU that the process may use."""
    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) < 2:
        pytest.skip("needs two CPUs")
    pinned = f"import os\nos.sched_setaffinity(0, [{cpus[0]}])\n"
    helpers.run_python(_IN_A_PROCESS, tmp_path / "all.npy")
    helpers.run_python(pinned + _IN_A_PROCESS, tmp_path / "one.npy")
    helpers.assert_bit_equal(np.load(tmp_path / "one.npy"), np.load(tmp_path / "all.npy"))


@pytest.mark.parametrize("combine", ["atomic", "ordered"])
@pytest.mark.parametrize("precision", ["w4a16", "w4a4", "w4a4_dynamic"])
def test_a_token_does_not_depend_on_its_batch(precision, combine):
    """The sums of a token have one order, however many tokens share its experts."""
    case = helpers.make_case(4, tokens=67, hidden=64, precision=precision, combine=combine, out_dtype=jnp.float32)
    together = case.run()
    for token in (0, 1, 33, 66):
        routing = jax.tree.map(lambda a, t=token: a[t : t + 1], case.routing)
        alone = jax_moe.fused_moe(case.x[token : token + 1], case.experts, routing, **case.options)
        helpers.assert_bit_equal(alone[0], together[token])


def test_repeated_and_concurrent_calls_give_the_same_bits():
    """Calls in flight at once share XLA's pool, and buffers that earlier ones have left behind."""
    case = helpers.make_case(5, tokens=40, hidden=256, intermediate=128, num_experts=8, top_k=4, routing="hostile")
    run = jax.jit(lambda x: jax_moe.fused_moe(x, case.experts, case.routing, **case.options))
    expected = np.asarray(run(case.x))
    poison = jax.jit(lambda x: jnp.full((64, 1024), jnp.nan) * x[0, 0])
    for _ in range(20):
        junk = [poison(case.x) for _ in range(4)]
        jax.block_until_ready(junk)
        del junk
        for actual in [run(case.x) for _ in range(4)]:
            helpers.assert_bit_equal(actual, expected)


def test_subnormals_are_kept():
    """XLA flushes them to zero on some of its threads; the handler must not, whichever thread it is on."""
    scale = np.full(8, 2.0**-135, np.float32)  # subnormal, and not a value that jax may compute with
    case = helpers.make_exact_case(6, gated=False)
    down = dataclasses.replace(case.experts.down, bias=None)
    plain = dataclasses.replace(down, global_scale=jnp.ones(8))
    tiny = dataclasses.replace(down, global_scale=jnp.asarray(scale))
    results = [
        dataclasses.replace(case, experts=dataclasses.replace(case.experts, down=d)).run(out_dtype=jnp.float32)
        for d in (plain, tiny)
    ]
    expected = results[0].astype(np.float64) * 2.0**-135
    assert np.count_nonzero(np.abs(expected[expected != 0]) < np.finfo(np.float32).tiny) > 100
    np.testing.assert_array_equal(results[1], expected.astype(np.float32))


def test_library_exports_its_handlers_alone():
    if shutil.which("nm") is None:
        pytest.skip("needs nm")
    command = ["nm", "-D", "--defined-only", ffi.library_path()]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    names = [line.split()[-1] for line in listing.splitlines()]
    assert "JaxMoeFusedMoeCpu" in names
    assert all(name.startswith("JaxMoe") for name in names), names
