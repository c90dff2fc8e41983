"""``precision="w4a4_dynamic"``: the scale of a row, which rows have one, and what hostile rows become."""

import dataclasses
import functools

import helpers
from helpers import make_case
import jax
import jax.numpy as jnp
import numpy as np
import product_cases
import pytest
import statement

import jax_moe
from jax_moe import nvfp4, reference

DYNAMIC = "w4a4_dynamic"
SPECIAL = np.float32(
    [0, -0.0, 2.0**-149, 2.0**-126, 1e-20, 1.4e-16, 2688 * 2.0**-64, 1e-3, 2688, 65504, 3.3895314e38, 3.4028235e38]
)


# --- The scale ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_the_scale_of_a_row_is_the_definitions(wrap):
    rng = np.random.default_rng(0)
    rows = (rng.standard_t(2, (500, 48)) * 10.0 ** rng.integers(-25, 30, (500, 1))).astype(np.float32)
    rows = np.concatenate([rows, SPECIAL[:, None] * np.ones(48, np.float32), -rows[:3]])
    scales = np.asarray(wrap(nvfp4.row_scale)(jnp.asarray(rows)))
    helpers.assert_bit_equal(scales, statement.row_scales(rows))
    assert (scales >= 2.0**-64).all()
    # Multiplying with the reciprocal is another function.
    assert (scales != np.maximum(np.abs(rows).max(1) * (np.float32(1) / np.float32(2688)), np.float32(2.0**-64))).any()


def test_nan_and_infinity_stay_in_the_scale():
    rows = np.ones((400, 512), np.float32)  # in small arrays XLA's maximum would keep a NaN too
    rows[1, 5], rows[2, 31], rows[3, 0] = np.nan, np.inf, -np.inf
    scales = np.asarray(jax.jit(nvfp4.row_scale)(jnp.asarray(rows)))
    assert np.isnan(scales[1])
    assert (scales[2:4] == np.inf).all()
    assert (scales[[0, *range(4, 400)]] == np.float32(1) / np.float32(2688)).all()


def test_the_largest_value_gets_the_largest_code_and_block_scale():
    x = np.random.default_rng(1).normal(size=(64, 64)).astype(np.float32)
    codes, scales = statement.quantize(x, statement.row_scales(x))
    at = np.abs(x).argmax(1)
    assert (codes[np.arange(64), at] & 7 == 7).all()
    assert (scales[np.arange(64), at // 16].astype(np.float32) == 448).all()


# --- The handler --------------------------------------------------------------------------------------------------


def identity(width: int) -> jax_moe.Projection:
    codes = 2 * np.eye(width, dtype=np.uint8)[None]  # 2 is the code of 1
    one = np.ones((1, width, width // 16), jnp.float8_e4m3fn)
    return jax_moe.Projection(nvfp4.pack(jnp.asarray(codes)), jnp.asarray(one), jnp.ones(1, jnp.float32))


@pytest.mark.parametrize("function", [jax_moe.ragged_dot, reference.ragged_dot])
def test_rows_are_rounded_bit_for_bit(function):
    """Through an identity matrix: what is multiplied, and its scale, are all that the output is made of."""
    rng = np.random.default_rng(2)
    rows = (rng.standard_t(2, (700, 64)) * 10.0 ** rng.integers(-20, 30, (700, 1))).astype(jnp.bfloat16)
    rows = np.concatenate([rows, (SPECIAL[:-1, None] * rng.uniform(-1, 1, 64)).astype(jnp.bfloat16)])
    x = rows.astype(np.float32)
    scales = statement.row_scales(x)
    wanted = statement.dequantize(*statement.quantize(x, scales)) * scales[:, None]
    sizes = jnp.asarray([len(rows)], jnp.int32)
    got = function(jnp.asarray(rows), identity(64), sizes, precision=DYNAMIC, out_dtype=jnp.float32)
    helpers.assert_bit_equal(np.asarray(got) + 0, wanted + 0)  # zeros may differ in sign


def test_input_scales_are_left_aside():
    case = make_case(3, bias=True, precision=DYNAMIC, combine="ordered")
    bare = dataclasses.replace(case, experts=helpers.without_input_scales(case.experts))
    helpers.assert_bit_equal(bare.run(), case.run())
    x, sizes = case.x, jnp.asarray([5], jnp.int32)
    weights = identity(48)
    given = dataclasses.replace(weights, input_scale=jnp.asarray([jnp.nan], jnp.float32))
    run = functools.partial(jax_moe.ragged_dot, precision=DYNAMIC)
    helpers.assert_bit_equal(run(x, given, sizes), run(x, weights, sizes))


def test_w4a4_still_needs_its_scales():
    case = make_case(3, precision="w4a4")
    bare = dataclasses.replace(case, experts=helpers.without_input_scales(case.experts))
    with pytest.raises(ValueError, match=r"input_scale: got None.*w4a4_dynamic"):
        bare.run()


@pytest.mark.parametrize("weight_on", ["output", "input"])
@pytest.mark.parametrize("factor", [2.0**-20, 2.0**-12, 2.0**30])
def test_rows_of_any_size_keep_their_precision(factor, weight_on):
    """A row times a power of two is the same codes: exactly so many times the gate and up that it was.

    Rows of one call differ by the factor, so that a scale of all of them would lose the small ones.
    """
    case = make_case(4, tokens=8, activation=jax_moe.ReLU2(), precision=DYNAMIC, weight_on=weight_on, combine="ordered",
                     out_dtype=jnp.float32)  # fmt: skip
    small = dataclasses.replace(case, x=case.x.at[::2].multiply(factor))
    got, usual = small.run(), case.run()
    helpers.assert_bit_equal(got[1::2], usual[1::2])
    helpers.assert_bit_equal(got[::2], usual[::2] * np.float32(factor) ** 2)


@pytest.mark.parametrize("weight_on", ["output", "input"])
@pytest.mark.parametrize("combine", ["atomic", "ordered"])
@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
def test_a_row_that_is_not_finite_is_nan_and_no_other_row_is(value, combine, weight_on):
    case = make_case(5, tokens=6, bias=True, precision=DYNAMIC, combine=combine, weight_on=weight_on,
                     out_dtype=jnp.float32)  # fmt: skip
    usual = case.run()
    for op in (jax_moe.fused_moe, reference.fused_moe):
        got = dataclasses.replace(case, x=case.x.at[2, 17].set(value)).run(op)
        assert np.isnan(got[2]).all()
        np.testing.assert_allclose(np.delete(got, 2, 0), np.delete(usual, 2, 0), rtol=1e-5)


def test_a_row_of_the_intermediate_that_overflows_is_nan():
    """relu2 of large values: an infinity in one route's row, of one token."""
    case = make_case(6, tokens=4, activation=jax_moe.ReLU2(), precision=DYNAMIC, out_dtype=jnp.float32)
    got = dataclasses.replace(case, x=case.x.at[1].multiply(2.0**70)).run()
    assert np.isnan(got[1]).all()
    assert np.isfinite(np.delete(got, 1, 0)).all()


def test_zeros_stay_zeros():
    case = make_case(7, tokens=4, precision=DYNAMIC, out_dtype=jnp.float32)
    got = dataclasses.replace(case, x=case.x.at[1].set(0).at[2].set(-0.0)).run()
    assert not got[1:3].any()
    assert got[0].any()


def test_it_needs_no_calibration_where_w4a4_would_saturate():
    """4 times what was calibrated on: w4a4 is then far off, rows with scales of their own are as good as ever."""
    case = make_case(8, tokens=64, hidden=128, intermediate=128, out_dtype=jnp.float32)
    case = dataclasses.replace(case, experts=jax_moe.calibrate(case.experts, case.x, case.routing))
    larger = dataclasses.replace(case, x=4 * case.x)
    wanted = larger.run()
    static, dynamic = (
        np.linalg.norm(larger.run(precision=precision) - wanted) / np.linalg.norm(wanted)
        for precision in ("w4a4", DYNAMIC)
    )
    assert dynamic < 0.2 < 0.5 < static


# --- On a mesh ----------------------------------------------------------------------------------------------------


def sharded(case, names, **axes):
    mesh = jax.make_mesh(tuple(axes.values()), tuple(axes))
    return case.run(functools.partial(jax_moe.sharded_moe, mesh=mesh, **names))


@pytest.mark.parametrize(
    ("axes", "names"),
    [
        (dict(expert=4), {}),
        (dict(data=2, expert=2), {}),
        (dict(expert=4), dict(data_axis="expert")),  # tokens are gathered, in bfloat16
    ],
    ids=str,
)
@pytest.mark.parametrize("weight_on", ["output", "input"])
def test_experts_and_tokens_over_axes_are_the_unsharded_call(axes, names, weight_on):
    case = make_case(9, tokens=16, num_experts=8, top_k=3, bias=True, precision=DYNAMIC, weight_on=weight_on,
                     out_dtype=jnp.float32)  # fmt: skip
    case = dataclasses.replace(case, options={k: v for k, v in case.options.items() if k != "expert_offset"})
    helpers.assert_matches(sharded(case, names, **axes), case)


def test_a_slice_of_the_intermediate_has_scales_of_its_own():
    case = make_case(10, tokens=16, intermediate=64, bias=True, precision=DYNAMIC, out_dtype=jnp.float32)
    case = dataclasses.replace(case, options={k: v for k, v in case.options.items() if k != "expert_offset"})
    got = sharded(case, {}, tensor=2)
    options = {k: v for k, v in case.options.items() if k != "out_dtype"}
    values, bounds, sizes = statement.moe_parts(
        case.x, case.experts, case.routing, expert_parts=1, tensor_parts=2, **options
    )
    sums = [a.sum((0, 1)) for a in (values, bounds, sizes)]
    result = helpers.compare(got, sums[0], sums[1] + 2 * statement.U32 * sums[2])
    assert result.passes, str(result)
    with pytest.raises(AssertionError):  # it is not what one device would compute
        helpers.assert_matches(got, case)


# --- Exported products --------------------------------------------------------------------------------------------


def test_a_product_of_many_groups_is_within_its_bound():
    case = product_cases.make_case(11, [3, 0, 40, 7], 60, exact=False, precision=DYNAMIC)
    got = jax_moe.ragged_dot(
        case.x, case.weights, jnp.asarray(case.group_sizes), precision=DYNAMIC, out_dtype=jnp.float32
    )
    result = helpers.compare(got, *product_cases.defined(case))
    assert result.passes, str(result)
