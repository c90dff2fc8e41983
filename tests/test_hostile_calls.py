"""Custom calls made by hand, with everything wrong that can be: refused with INVALID_ARGUMENT, and never out of bounds.

Most of the work is in ``ffi/tests/hostile_calls.cc``, which runs the real handler under AddressSanitizer and
UndefinedBehaviorSanitizer, without Python and with every buffer an allocation of exactly the size it claims.
"""

import pathlib
import re
import shutil
import subprocess
import sys

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_moe
from jax_moe import ffi, nvfp4, problem
from jax_moe.operands import expert_operands, OPERANDS

_SOURCE = helpers.SOURCE_FOLDER / "ffi"
_SEEDS = (1, 2, 3, 4)
_CALLS_PER_SEED = 3000

_MUTANTS = {
    "ids are not checked against the number of experts": (
        "cpu/handler.cc",
        "= LocalExpert(p, route);",
        "= int64_t{p.expert_ids[route]} - *p.expert_offset;",
    ),
    "one operand's shape is not checked": (  # the last one: what reads the header is compiled again after it, too
        "decode.h",
        "JAX_MOE_TRY(operands.GetData(kRoutingWeights, ffi::F32, {tokens, k}, &p.routing_weights));",
        "p.routing_weights = static_cast<const float*>(operands[kRoutingWeights].untyped_data());",
    ),
}


def _build(source: pathlib.Path, build: pathlib.Path) -> pathlib.Path:
    configure = ["cmake", "-S", source, "-B", build, f"-DPython3_EXECUTABLE={sys.executable}"]
    options = ["-DJAX_MOE_SANITIZE=ON", "-DJAX_MOE_BUILD_TESTS=ON", "-DJAX_MOE_WERROR=ON"]
    for command in ([*configure, *options], ["cmake", "--build", build, "--target", "hostile_calls", "-j2"]):
        ran = subprocess.run(command, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stdout + ran.stderr
    return build / "hostile_calls"


@pytest.fixture(scope="module")
def build_folder(tmp_path_factory):
    helpers.need_shipped_headers()
    if shutil.which("cmake") is None or shutil.which("c++") is None:
        pytest.skip("needs cmake and a C++ compiler")
    return tmp_path_factory.mktemp("hostile")


@pytest.fixture(scope="module")
def fuzzer(build_folder):
    shutil.copytree(_SOURCE, build_folder / "ffi")
    return _build(build_folder / "ffi", build_folder / "build")


def test_sanitized_handler_survives_hostile_calls(fuzzer):
    total = 0
    for seed in _SEEDS:
        ran = subprocess.run([fuzzer, str(seed), str(_CALLS_PER_SEED)], capture_output=True, text=True)
        assert ran.returncode == 0, ran.stdout + ran.stderr
        print(ran.stdout, end="")
        total += int(re.search(r"(\d+) hostile calls", ran.stdout)[1])
    print(f"{total} hostile calls under AddressSanitizer and UndefinedBehaviorSanitizer")
    assert total >= 10_000


@pytest.mark.parametrize("name", _MUTANTS)
def test_fuzz_catches_a_handler_without_the_check(name, fuzzer, build_folder):
    """Rebuilds in place, so that only what the mutant touches is compiled again."""
    file, check, without = _MUTANTS[name]
    path = build_folder / "ffi" / file
    original = path.read_text()
    assert check in original
    try:
        path.write_text(original.replace(check, without))
        mutant = _build(build_folder / "ffi", build_folder / "build")
        ran = subprocess.run([mutant, "1", str(_CALLS_PER_SEED)], capture_output=True, text=True)
    finally:
        path.write_text(original)
    assert ran.returncode != 0, ran.stdout
    assert any(sign in ran.stderr for sign in ("AddressSanitizer", "runtime error", "was not refused")), ran.stderr


# --- The registered target, through jax.ffi.ffi_call ----------------------------------------------------------------


def _arguments(precision="w4a4", **options):
    """Operands, result types and attributes of a valid call."""
    case = helpers.make_case(bias=True, **options)
    weights = list(expert_operands(case.experts).values())
    operands = [case.x, case.routing.expert_ids, case.routing.weights, jnp.int32(0), *weights]
    call = problem.Problem(
        num_tokens=case.x.shape[0], top_k=case.routing.expert_ids.shape[1], local_experts=weights[5].shape[0],
        hidden_size=case.x.shape[1], intermediate_size=weights[0].shape[2], activation=jax_moe.SwiGLU(),
        precision=precision, combine="ordered", weight_on="output", out_dtype=jnp.dtype(jnp.float32),
        layout="canonical", command_buffer=True, absent=(),
    )  # fmt: skip
    results = [jax.ShapeDtypeStruct(case.x.shape, jnp.float32), *problem.cpu_workspaces(call)]
    return operands, results, call.attributes()


def _call(operands, results, attributes):
    return jax.block_until_ready(jax.ffi.ffi_call(ffi.TARGET, results)(*operands, **attributes))


def _assert_refused(name, operands, results, attributes):
    with pytest.raises(Exception, match="(?s)INVALID_ARGUMENT.*" + re.escape(name)):
        _call(operands, results, attributes)


def test_the_valid_call_is_accepted():
    assert np.isfinite(np.asarray(_call(*_arguments())[0])).all()


@pytest.mark.parametrize("index", range(len(OPERANDS)), ids=OPERANDS)
@pytest.mark.parametrize("wrong", ["shape", "rank", "dtype"])
def test_wrong_operand_is_refused_by_name(index, wrong):
    operands, results, attributes = _arguments()
    operand = operands[index]
    if wrong == "dtype":
        operands[index] = jnp.zeros(operand.shape, jnp.int8)
    elif wrong == "rank" or not operand.ndim:
        operands[index] = operand[None]
    else:
        operands[index] = operand[..., :-1]
    # An operand that others take their sizes from may be blamed on one of those.
    name = "" if wrong != "dtype" and index in (0, 1, 4, 11) else OPERANDS[index]
    _assert_refused(name, operands, results, attributes)


def test_wrong_number_of_operands_is_refused():
    operands, results, attributes = _arguments()
    _assert_refused("operands: got 13, needs 14", operands[:-1], results, attributes)
    _assert_refused("operands: got 15, needs 14", [*operands, operands[0]], results, attributes)


@pytest.mark.parametrize("index", range(7))
def test_wrong_result_is_refused(index):
    operands, results, attributes = _arguments()
    shorter = results[index].shape[0] - 1, *results[index].shape[1:]
    results[index] = jax.ShapeDtypeStruct(shorter, results[index].dtype)
    _assert_refused("workspace" if index else "out", operands, results, attributes)


def test_wrong_number_of_results_is_refused():
    operands, results, attributes = _arguments()
    _assert_refused("results: got 6, needs 7", operands, results[:-1], attributes)
    dynamic = attributes | {"precision": "w4a4_dynamic"}
    _assert_refused("results: got 7, needs 9", operands, results, dynamic)


@pytest.mark.parametrize("index", [7, 8])
def test_wrong_scales_of_rows_are_refused(index):
    operands, results, attributes = _arguments(precision="w4a4_dynamic")
    assert np.isfinite(np.asarray(_call(operands, results, attributes)[0])).all()
    results[index] = jax.ShapeDtypeStruct((results[index].shape[0] - 1,), jnp.float32)
    _assert_refused("_scales", operands, results, attributes)


@pytest.mark.parametrize("name", ["precision", "combine", "weight_on", "activation", "alpha", "beta", "limit"])
def test_wrong_attribute_is_refused_by_name(name):
    operands, results, attributes = _arguments()
    # Values that equal no right one: jax's caches take np.float64(1) for np.float32(1).
    for wrong in ("w4a16 ", np.int32(9), np.float64(0.625)):
        _assert_refused(f"attribute {name}", operands, results, attributes | {name: wrong})
    del attributes[name]
    _assert_refused(f"attribute {name}", operands, results, attributes)


def test_x_that_is_rounded_is_multiplied_as_it_is():
    """The bits of the call that rounds it: the only difference is who did."""
    operands, results, attributes = _arguments()
    expected = _call(operands, results, attributes)[0]
    input_scale = operands[OPERANDS.index("gate_up.input_scale")]
    operands[0] = nvfp4.quantize_dequantize(operands[0], input_scale)
    rounded = attributes | {"precision": "w4a4_rounded_x"}
    helpers.assert_bit_equal(_call(operands, results, rounded)[0], expected)
    assert (np.asarray(_call(operands, results, attributes)[0]) != np.asarray(expected)).any()  # rounded twice


def test_x_that_is_weighted_cannot_be_rounded_already():
    operands, results, attributes = _arguments()
    rows = results[4].shape[1]
    results[4] = jax.ShapeDtypeStruct((operands[1].size, rows), jnp.float32)  # as a call with weight_on = input has it
    _call(operands, results, attributes | {"weight_on": "input"})
    hostile = attributes | {"weight_on": "input", "precision": "w4a4_rounded_x"}
    _assert_refused("attribute weight_on: got 'input'", operands, results, hostile)


@pytest.mark.parametrize("precision", ["w4a16_rounded_x", "w4a4_rounded_x ", "w4a4_rounded", "_rounded_x"])
def test_no_other_precision_is_rounded(precision):
    operands, results, attributes = _arguments()
    needs = "needs w4a16 | w4a4 | w4a4_dynamic | w4a4_rounded_x | w4a4_parcels"
    _assert_refused(
        f"attribute precision: got '{precision}', {needs}", operands, results, attributes | {"precision": precision}
    )


def test_parcels_are_for_a_gpu():
    operands, results, attributes = _arguments()
    operands[0] = jnp.zeros((operands[0].shape[0], 64), jnp.uint8)
    refusal = "attribute precision: got 'w4a4_parcels', which only a GPU takes"
    _assert_refused(refusal, operands, results, attributes | {"precision": "w4a4_parcels"})


def test_w4a4_without_scales_says_who_fills_them():
    for index in (7, 12):
        operands, results, attributes = _arguments()
        operands[index] = jnp.zeros((0,), jnp.float32)
        _assert_refused("calibrate()", operands, results, attributes)
