"""sm_90a's product with one matrix: which form is chosen, and that each form is one that the kernel can have."""

import dataclasses
import itertools

import cuda_call
import jax.numpy as jnp
import pytest

from jax_moe.kernels import targets
from jax_moe.kernels.sm90 import program
from jax_moe.kernels.sm90.device.weight_block import BLOCK_ROWS
from jax_moe.kernels.sm90.target import SM90

H200 = SM90.cards[0]
SHAPES = ((4096, 4096), (4096, 14336), (2048, 4096), (2048, 512), (4096, 8192), (16, 16), (64, 151936))
"""C and N: attention and head of published models, and the least."""


def _product(rows, in_features, out_features, **changes):
    sizes = dict(num_rows=rows, in_features=in_features, out_features=out_features)
    return cuda_call.product(num_groups=1, local_groups=1, **sizes, **changes)


@pytest.mark.parametrize("card", SM90.cards, ids=lambda card: card.name)
@pytest.mark.parametrize("rows", [1, 8, 9, 32, 128, 512, 2048, 8192])
def test_ctas_that_share_a_unit_all_run_at_once(card, rows):
    """Each has a part of the contraction, and a cluster has one unit; else CTAs are no more than units or places."""
    for in_features, out_features in SHAPES:
        call = _product(rows, in_features, out_features)
        with targets.planned_for(card):
            (launch,) = cuda_call.program(call).launches
        spec, row_blocks, k_blocks = launch.spec, -(-out_features // 128), -(-in_features // 64)
        units = -(-row_blocks // spec.config.m_warpgroups) * -(-rows // spec.config.token_tile)
        places = card.multiprocessors * spec.config.ctas_per_sm
        assert spec.split in program.SPLITS
        assert spec.split <= k_blocks
        assert launch.grid == (spec.split * units if spec.split > 1 else min(units, places))
        assert launch.grid <= places


def test_sums_of_any_form_fit_where_the_stages_were():
    """A thread has 8 of each 8 tokens, for each m warpgroup; a CTA gets a share from each CTA of the cluster."""
    for config, split in itertools.product((*program.CONFIGS, program.FEW_UNITS), program.SPLITS[1:]):
        shares = -(-config.token_tile // 8 // split)
        sums = split * shares * config.m_warpgroups * 8 * BLOCK_ROWS * 4
        assert sums <= config.stages * config.stage_bytes


def _card(**changes):
    few_units = dataclasses.replace(H200.costs.few_units, **changes)
    return dataclasses.replace(H200, costs=dataclasses.replace(H200.costs, few_units=few_units))


def test_few_units_are_shared_and_many_are_not():
    assert program.linear_form(H200, 1, 32, 64)[1] > 1
    assert program.linear_form(H200, 8192, 32, 64)[1] == 1
    assert program.linear_form(_card(meeting=1e6), 1, 32, 64)[1] == 1


def test_each_cta_has_a_block_of_the_contraction():
    """Without one it would wait for ever, however cheap it is to share."""
    assert [program.linear_form(_card(meeting=-1e6), 1, 1, k_blocks)[1] for k_blocks in (1, 2, 3, 9)] == [1, 2, 3, 4]


def test_no_kernel_goes_in_front_but_the_pass_over_x():
    names = [launch.name for launch in cuda_call.program(_product(40, 4096, 4096)).launches]
    assert names == ["product"]
    rounded = cuda_call.program(_product(40, 4096, 4096, precision="w4a4"))
    assert [launch.name for launch in rounded.launches] == ["x_rows", "product"]
    assert list(rounded.workspaces) == ["x_rows"]
    assert cuda_call.program(_product(0, 4096, 4096)).launches == ()


def test_one_of_several_groups_has_a_tile_map():
    """Where its rows are is data then."""
    for groups in (dict(num_groups=3, local_groups=1), dict(num_groups=1, local_groups=3)):
        call = cuda_call.product(num_rows=40, **groups)
        assert [launch.name for launch in cuda_call.program(call).launches] == ["groups", "product"]


def test_more_values_than_the_kernel_counts_are_an_error():
    with pytest.raises(ValueError, match=r"T = 1000000 rows of C = 32768, for N = 16, .* int32"):
        cuda_call.program(_product(10**6, 32768, 16, out_dtype=jnp.dtype(jnp.bfloat16)))
