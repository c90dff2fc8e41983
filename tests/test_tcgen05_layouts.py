"""Our places of operands, scales and sums against CuTe DSL's own layout functions, for every width of a product."""

import importlib.util

import numpy as np
import pytest

from jax_moe.kernels.sm100.device import weight_block
from jax_moe.kernels.sm100.device.weight_block import ATOM_BYTES, CODE_BYTES, SCALE_BYTES, STEP_K

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("cutlass") is None, reason="nvidia-cutlass-dsl is not installed"
)

PRODUCTS = [(group, width) for group in (1, 2) for width in range(8 * group, 257, 8 * group)]
each_product = pytest.mark.parametrize(("group", "width"), PRODUCTS)
"""CTAs of a group and rows of B, of which each CTA of a pair has half."""


@pytest.fixture(scope="module")
def products():
    import dsl_layouts

    return {
        group: dsl_layouts.of_products([width for g, width in PRODUCTS if g == group], group) for group in (1, 2)
    }  # fmt: skip


def places(shape, stride) -> np.ndarray:
    """What a layout gives for each of its coordinates, in order: the first mode runs fastest."""
    if isinstance(shape, int):
        return np.arange(shape) * stride
    offsets = np.zeros(1, int)
    for size, step in zip(shape, stride, strict=True):
        offsets = (places(size, step)[:, None] + offsets).ravel()
    return offsets


def matrix(shape, stride, rows: int) -> np.ndarray:
    """A layout ``((row, value in a step), 1, step, ...)`` as ``[rows, values]``."""
    return places(shape, stride).reshape(-1, rows).T  # rows run fastest, then the values of a step, then steps


def swizzled(name: str, offsets: np.ndarray) -> np.ndarray:
    """Byte offsets with bits 7 to 9 exclusive-or'ed into bits 4 to 6."""
    assert name == "S<3,4,3>"
    return offsets ^ (offsets >> 7 & 7) << 4


@each_product
def test_operands_in_shared_memory(products, group, width):
    tokens, value = width // group, np.arange(256)
    for name, rows in (("a", 128), ("b", tokens)):
        swizzle, shape, stride = products[group][width][name]
        offsets = matrix(shape, stride, rows)  # in halves of bytes
        of_all = np.arange(rows)[:, None]
        np.testing.assert_array_equal(swizzled(swizzle, offsets // 2), weight_block.code_byte(of_all, value))
        np.testing.assert_array_equal(offsets % 2, np.broadcast_to(value % 2, offsets.shape))
    swizzle, shape, stride = products[group][width]["bf16_b"]
    byte = 2 * np.arange(64)
    wanted = weight_block.swizzled(np.arange(tokens)[:, None], byte // 16) + byte % 16
    np.testing.assert_array_equal(swizzled(swizzle, 2 * matrix(shape, stride, tokens)), wanted)


@each_product
def test_a_pair_shares_out_weights_and_tokens(products, group, width):
    """Each CTA has half of the tokens, and 128 rows of weights with all their sums."""
    wanted = [((128 * cta, 0), (width // group * cta, 0), (128 * cta, 0)) for cta in range(group)]
    assert products[group][width]["firsts"] == 2 * wanted


@each_product
def test_scales_in_shared_memory(products, group, width):
    """As many whole atoms as the width needs; a second one's steps behind those of the first."""
    value = np.arange(256)
    for name, atoms in (("a_scales", 1), ("b_scales", -(-width // 128))):
        row = np.arange(128 * atoms)[:, None]
        wanted = row // 128 * SCALE_BYTES + weight_block.scale_byte(row % 128, value) - CODE_BYTES
        np.testing.assert_array_equal(matrix(*products[group][width][name], len(row)), wanted)


@each_product
def test_scales_in_tensor_memory(products, group, width):
    """A step of the product takes 4 columns of each atom, side by side; four copies of the 32 lanes."""
    for name, atoms in (("a_scale_columns", 1), ("b_scale_columns", -(-width // 128))):
        got = places(*products[group][width][name]).reshape(
            4, 4, 16, 4, 4 * atoms, 32
        )  # step, scale, same, copy, row // 32
        step, scale, _, copy, column, lane = np.indices(got.shape)
        wanted_column = 4 * (step * atoms + column // 4) + column % 4
        # Addresses are of bytes: lane << 16 | column, times 4.
        np.testing.assert_array_equal(got, ((lane + 32 * copy << 16) + wanted_column) * 4 + scale)


@each_product
def test_sums_and_bf16_weights_in_tensor_memory(products, group, width):
    for name in ("sums", "bf16_sums"):
        lane, column = np.arange(128)[:, None], np.arange(width)
        np.testing.assert_array_equal(matrix(*products[group][width][name], 128), (lane << 16) + column)
    value = np.arange(64)  # two to a column, in bytes
    np.testing.assert_array_equal(
        2 * matrix(*products[group][width]["bf16_a_columns"], 128), ((lane << 16) + value // 2) * 4 + value % 2 * 2
    )


@pytest.mark.parametrize("blocks", [1, 2, 4])
def test_a_thread_loads_what_the_epilogues_take_it_for(blocks):
    """One load for each half: fragment 4*j + 2*upper + c is column 8*j + 2*quad + c."""
    import dsl_layouts

    for thread, got in enumerate(dsl_layouts.of_load(blocks)):
        warp, group, quad = thread // 32, thread % 32 // 4, thread % 4
        wanted = [
            (weight_block.lane(half, warp, group, upper), 8 * j + 2 * quad + c)
            for half in range(2) for j in range(blocks) for upper in range(2) for c in range(2)
        ]  # fmt: skip
        assert got == wanted


def test_a_thread_stores_a_row_of_weights_to_its_lane():
    import dsl_layouts

    wanted = [[(thread, column) for column in range(32)] for thread in range(128)]
    assert dsl_layouts.of_store(32) == wanted
    assert ATOM_BYTES == 128 * STEP_K // 16
