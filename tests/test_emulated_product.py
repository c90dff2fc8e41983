"""Grouped products on the emulator, of each target: where all sums are exact, the bits of their definition."""

import dataclasses
import importlib.util
import itertools
import shutil

import emulated_call
import emulator
from helpers import assert_bit_equal
import jax.numpy as jnp
import numpy as np
from product_cases import expected, local_rows, make_case
import pytest

from jax_moe.kernels.targets import TARGETS

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("cutlass") is None, reason="nvidia-cutlass-dsl is not installed"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator is compiled with g++, which is not here"),
]

each_target = pytest.mark.parametrize("target", [name for name, target in TARGETS.items() if target.product])

W4A4, BF16, DYNAMIC = dict(precision="w4a4"), dict(out_dtype=jnp.bfloat16), dict(precision="w4a4_dynamic")
_CASES = {
    "ragged": dict(group_sizes=[3, 0, 5, 2], rows=12),
    "ragged, rounded": dict(group_sizes=[3, 0, 5, 2, 1], rows=13, group_offset=1, local_groups=3, **W4A4, **BF16),
    "one row": dict(group_sizes=[1], rows=1, bias=False, in_features=16, out_features=16),
    "one group": dict(group_sizes=[21], rows=21, bias=False, in_features=320, out_features=400, **BF16),
    "no bias, rounded": dict(group_sizes=[9, 14], rows=30, bias=False, **W4A4),
    "hostile sizes": dict(group_sizes=[-3, 2**31 - 1, 4, -(2**31), 2], rows=9, **W4A4, **BF16),
    "sizes elsewhere": dict(group_sizes=[4, 3], rows=7, group_offset=5, local_groups=3, **W4A4, **BF16),
    "groups without a size": dict(group_sizes=[4, 3], rows=9, group_offset=-2, local_groups=5),
    "tiles": dict(group_sizes=[0, 31, 0, 90], rows=140, local_groups=3, group_offset=1, **BF16),
    "tiles, rounded": dict(group_sizes=[150, 170], rows=321, **W4A4),
    "row scales": dict(group_sizes=[3, 0, 5, 2], rows=12, **DYNAMIC),
    "row scales, hostile sizes": dict(group_sizes=[-3, 2**31 - 1, 4, -(2**31), 2], rows=9, **DYNAMIC, **BF16),
    "row scales, tiles": dict(group_sizes=[0, 31, 0, 90], rows=140, local_groups=3, group_offset=1, **DYNAMIC),
}


@each_target
@pytest.mark.parametrize("number", range(len(_CASES)), ids=list(_CASES))
def test_exact_products_have_the_bits_of_their_definition(number, target):
    case = make_case(number, **list(_CASES.values())[number])
    if case.precision not in TARGETS[target].layouts:
        pytest.skip(f"{target} has no kernels for {case.precision}")
    call = emulated_call.prepare_product(case, target)
    assert call.program.adds is None
    wanted = expected(case)
    for seed, order in zip(range(2), itertools.islice(itertools.cycle(emulator.ORDERS), number, None), strict=False):
        call = emulated_call.prepare_product(case, target)
        assert_bit_equal(call.run(order=order, seed=seed), wanted)


@each_target
def test_rows_of_no_local_group_are_never_read(target):
    """NaN in them reaches nothing, and they come out as zeros."""
    for precision in TARGETS[target].layouts:
        case = make_case(1, [3, 4, 5], 15, group_offset=1, local_groups=1, precision=precision)
        (rows,) = local_rows(case)
        wanted = expected(case)
        x = np.asarray(case.x, np.float32)
        x[: rows.start] = x[rows.stop :] = np.nan
        case = dataclasses.replace(case, x=jnp.asarray(x, jnp.bfloat16))
        out = emulated_call.prepare_product(case, target).run(seed=2)
        assert (out[: rows.start] == 0).all()
        assert (out[rows.stop :] == 0).all()
        assert_bit_equal(out, wanted)


@each_target
def test_without_rows_nothing_is_launched(target):
    assert emulated_call.prepare_product(make_case(0, [0, 0], 0), target).program.launches == ()
