"""sm_90a's product with one matrix on the emulator, in each form: exact sums have the bits of its definition."""

import dataclasses
import importlib.util
import shutil

import emulated_call
import emulator
from helpers import assert_bit_equal
import jax.numpy as jnp
import numpy as np
from product_cases import expected, make_case
import pytest

from jax_moe.kernels.sm90.program import CONFIGS, FEW_UNITS

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("cutlass") is None, reason="nvidia-cutlass-dsl is not installed"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator is compiled with g++, which is not here"),
]

FORMS = [
    (CONFIGS[0], 1), (CONFIGS[2], 1),  # persistent
    (CONFIGS[0], 4), (CONFIGS[1], 2), (FEW_UNITS, 3),  # k warpgroups and clusters; not as many shares as CTAs
    (CONFIGS[2], 8), (CONFIGS[9], 3),  # m warpgroups and clusters; one has no block of the matrix at its end
]  # fmt: skip

each_form = pytest.mark.parametrize("form", FORMS, ids=lambda form: f"{form[0].name}-{form[1]}")


def _run(case, form, **options) -> np.ndarray:
    call = emulated_call.prepare_product(case, multiprocessors=8, form=form)
    (*before, product) = call.program.launches
    assert [launch.name for launch in before] == (["x_rows"] if case.precision == "w4a4" else [])
    assert (product.spec.config, product.spec.cluster) == form
    return call.run(multiprocessors=8, **options)


@each_form
def test_exact_products_have_the_bits_of_their_definition(form):
    """9 blocks of the contraction, so that parts differ; tiles at all widths, and rows behind the group's are zeros."""
    given = dict(in_features=576, out_features=400)
    for seed, (rows, size) in enumerate(((5, 3), (form[0].token_tile + 1, 2**31 - 1), (2 * form[0].token_tile, 9))):
        case = make_case(seed, [size], rows, **given)
        assert_bit_equal(_run(case, form, order=emulator.ORDERS[seed % 3], seed=seed) + 0, expected(case) + 0)
    case = make_case(3, [40], 40, precision="w4a4", out_dtype=jnp.bfloat16, bias=False, **given)
    assert_bit_equal(_run(case, form, order="starved") + 0, expected(case) + 0)


@pytest.mark.parametrize("form", [FORMS[0], FORMS[2]], ids=["alone", "split"])
@pytest.mark.parametrize(("size", "offset"), [(-3, 0), (-(2**31), 0), (7, 1), (7, -(2**31)), (7, 2**31 - 1)])
def test_hostile_sizes_and_offsets_are_zeros(form, size, offset):
    """NaN in x reaches nothing."""
    case = make_case(1, [size], 9, group_offset=offset, local_groups=1, in_features=576)
    case = dataclasses.replace(case, x=case.x * jnp.nan)
    assert (_run(case, form, seed=2) == 0).all()


@each_form
def test_what_is_behind_the_group_reaches_nothing(form):
    case = make_case(2, [form[0].token_tile + 3], 2 * form[0].token_tile + 5, in_features=576)
    wanted = expected(case)
    case = dataclasses.replace(case, x=case.x.at[form[0].token_tile + 3 :].set(jnp.nan))
    assert_bit_equal(_run(case, form, seed=3) + 0, wanted + 0)


def test_sums_that_round_are_added_in_one_order():
    """However late each CTA of a cluster is."""
    case = make_case(4, [7], 7, exact=False, in_features=576)
    outs = [_run(case, FORMS[2], order=order, seed=seed) for seed, order in enumerate((*emulator.ORDERS, "random"))]
    for out in outs[1:]:
        assert_bit_equal(out, outs[0])
