"""The tile map that a GEMM makes of few routes, on the emulator: the same tiles as the sort's, and units as ordered."""

import importlib.util
import shutil

import emulated_call
import emulator
import few_routes_kernel
import numpy as np
import pytest
import small_kernels
from small_kernels import SortCase

from jax_moe.kernels.device.constants import FEW_ROUTES

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("cutlass") is None, reason="nvidia-cutlass-dsl is not installed"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator is compiled with g++, which is not here"),
]

CASES = [
    SortCase(1, 8, 128, 8),
    SortCase(8, 8, 128, 8),
    SortCase(8, 8, 5, 8, "skewed"),
    SortCase(8, 8, 3, 8, "one"),
    SortCase(13, 4, 6, 8, "hostile", 3),
    SortCase(1, 1, 1, 16),
    SortCase(9, 7, 4, 16, "hostile", 2**31 - 5),
    SortCase(16, 4, 3, 16, "skewed", 7),
    SortCase(17, 3, 512, 16),
    SortCase(5, 3, 16, 16, "none"),
    SortCase(21, 3, 2, 8, "one", -3),
]


def written_by(case: SortCase, ids: np.ndarray, m_tiles: int):
    """Number of tiles, ``[units, 3]`` (expert, m tile, token tile) and routes of padded rows, as a CTA makes them."""
    spec = few_routes_kernel.Spec(case.token_tile)
    kernel, shared_bytes = emulated_call.compiled(spec, "sm_90a")
    memory = emulator.Memory()
    num_tiles = memory.poisoned((1,), np.int32, strict=True)
    units = memory.poisoned((ids.size * m_tiles, 3), np.int32, strict=True)
    row_route = memory.poisoned((ids.size * case.token_tile,), np.int32, strict=True)
    given = [memory.array(ids), memory.array(np.int32([case.offset])), num_tiles, units, row_route]
    sizes = [ids.size, case.num_experts, m_tiles]
    emulator.run([emulator.Launch(kernel, 1, [*given, *sizes], spec.threads, 1, shared_bytes)], memory, seed=ids.size)
    count = int(num_tiles.read()[0])
    assert units.written.all(-1).sum() == count * m_tiles
    assert row_route.written.sum() == count * case.token_tile
    return count, units.read(partial=True)[: count * m_tiles], row_route.read(partial=True)[: count * case.token_tile]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_map_is_the_sorts(case):
    ids, m_tiles = small_kernels.ids(case, np.random.default_rng(case.tokens)), 3
    assert ids.size <= FEW_ROUTES
    starts, experts, rows = small_kernels.expected_sort(case, ids)
    count, units, row_route = written_by(case, ids, m_tiles)
    assert count == len(experts)
    np.testing.assert_array_equal(row_route, rows)
    # By expert, then by weight tile, and the tiles of the expert run fastest.
    expected = [
        (expert, m_tile, tile)
        for expert in range(case.num_experts)
        for m_tile in range(m_tiles)
        for tile in range(starts[expert], starts[expert + 1])
    ]
    np.testing.assert_array_equal(units, np.reshape(expected, (-1, 3)))
