"""The sort, the groups of a product and the pass over x on the emulator, against NumPy and ``jax_moe.nvfp4``, exactly.

tests/gpu/test_small_kernels.py runs on a GPU what exists for one at hand.
"""

import importlib.util
import shutil

import emulated_call
import emulator
import numpy as np
import pytest
import small_kernels
from small_kernels import SortCase

from jax_moe.kernels import specs, tiling
from jax_moe.kernels.device.constants import WORK_COUNTERS

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("cutlass") is None, reason="nvidia-cutlass-dsl is not installed"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator is compiled with g++, which is not here"),
]


def launch(spec, grid, target, arrays):
    kernel, shared_bytes = emulated_call.compiled(spec, target)
    return emulator.Launch(kernel, grid, arrays, spec.threads, spec.cluster, shared_bytes, spec.overlap)


@pytest.mark.parametrize(
    "case",
    [
        SortCase(3, 5, 7, 16),
        SortCase(40, 4, 8, 24, "hostile", 3),
        SortCase(1, 3, 7, 16, granule=8),
        SortCase(130, 4, 4, 192, granule=16),  # 520 routes
        SortCase(130, 4, 1, 192, "one", granule=16),  # 3 * 176 rows
        SortCase(64, 3, 1, 64, "one", granule=16),  # tiles without padding
        SortCase(33, 1, 1, 32, "one", granule=16),  # half of them are one more than a granule
        SortCase(90, 8, 20, 32, "hostile", 3, granule=8),
        SortCase(250, 8, 5, 64, "skewed", weighted=False, granule=16),
        SortCase(50, 3, 16, 64, "none", granule=8),
        SortCase(8, 7, 4, 16, "hostile", 2**31 - 2),  # a difference that would be local in 32 bits
        SortCase(300, 8, 9, 48, "skewed", 2, granule=16),  # a cluster
    ],
    ids=str,
)
def test_sort(case):
    rng = np.random.default_rng(case.tokens)
    routes = case.tokens * case.top_k
    max_tiles = tiling.max_tiles(routes, case.num_experts, case.token_tile)
    ids, weights = small_kernels.ids(case, rng), rng.normal(size=(case.tokens, case.top_k)).astype(np.float32)
    starts, experts, rows = small_kernels.expected_sort(case, ids)
    memory = emulator.Memory()
    tile_map = [
        memory.poisoned((case.num_experts + 1 + WORK_COUNTERS,), np.int32),
        memory.poisoned((max_tiles,), np.int32),
        memory.poisoned((max_tiles * case.token_tile,), np.int32),
        memory.poisoned((max_tiles * case.token_tile,), np.float32),
    ]
    given = [memory.array(ids), memory.array(weights), memory.array(np.int32([case.offset]))]
    counts = memory.poisoned((case.spec.cluster, case.num_experts), np.int32)
    sort = launch(case.spec, case.spec.cluster, "sm_90a", [*given, *tile_map, counts, routes])
    emulator.run([sort], memory, written=True, seed=1, multiprocessors=case.spec.cluster)
    np.testing.assert_array_equal(tile_map[0].read(), np.append(starts, [0] * WORK_COUNTERS))
    for got, expected in zip(tile_map[1:3], (experts, rows), strict=True):
        np.testing.assert_array_equal(got.read(partial=True)[: len(expected)], expected)
        assert got.written[: len(expected)].all()
        assert not got.written[len(expected) :].any()
    expected = np.where(rows >= 0, weights.reshape(-1)[rows] if case.weighted else np.float32(1), np.float32(0))
    np.testing.assert_array_equal(tile_map[3].read(partial=True)[: len(rows)], expected)
    assert tile_map[3].written[: len(rows)].all()


def test_balanced_tiles_by_hand():
    """520 rows in tiles of at most 192 are 3 of 176 rows, the last with 168 of them."""
    case = SortCase(520, 1, 1, 192, granule=16)
    _, _, rows = small_kernels.expected_sort(case, np.zeros((520, 1), np.int32))
    assert [int((tile >= 0).sum()) for tile in rows.reshape(3, 192)] == [176, 176, 168]
    with pytest.raises(ValueError, match="granule: got 16, which does not divide a tile of 24"):
        specs.sort_spec(1, 1, 24, True, 16)


@pytest.mark.parametrize("per_route", [False, True])
@pytest.mark.parametrize(("tokens", "hidden"), [(1, 16), (6, 272), (40, 512)])
def test_x_as_codes(per_route, tokens, hidden):
    slots, padded = 3 if per_route else 1, -(-hidden // 256) * 256
    rng = np.random.default_rng(hidden)
    x, scale = small_kernels.hard_values(rng, (tokens, hidden)), np.float32(1 / 448)
    weights = rng.normal(size=(tokens, slots)).astype(np.float32)
    values = small_kernels.expected_rows(x, weights if per_route else None)
    rows = len(values)
    spec = specs.XRowsSpec(quantise=True, per_route=per_route, codes=True)
    memory = emulator.Memory()
    codes = memory.poisoned((rows, padded // 2), np.uint8, strict=True)
    scales = memory.poisoned((rows, padded // 16), np.uint8, strict=True)
    given = [memory.array(np.asarray(x)), memory.array(weights), memory.array(np.float32([scale])), codes, scales]
    sizes = [rows, slots, hidden // 16, padded // 16]
    emulator.run([launch(spec, spec.grid(rows, padded), "sm_100f", [*given, *sizes])], memory)

    expected_codes, expected_scales = small_kernels.expected_nvfp4(values, scale)
    got_codes = np.stack([codes.read() & 15, codes.read() >> 4], -1).reshape(rows, -1)
    got_scales = scales.read()
    assert not got_codes[:, hidden:].any()
    assert not got_scales[:, hidden // 16 :].any()
    nan = np.isnan(values.astype(np.float32)).reshape(rows, -1, 16).any(-1)
    expected_bits = np.where(nan, 0x7F, expected_scales.view(np.uint8))
    np.testing.assert_array_equal(got_scales[:, : hidden // 16], expected_bits)
    # Beside a NaN scale a code may be anything.
    some = ~nan.repeat(16, axis=1)
    np.testing.assert_array_equal(got_codes[:, :hidden][some], expected_codes[some])


_HOSTILE = np.int32([-1, -(2**31), 2**31 - 1, 2**30, 5, 0, 3])


@pytest.mark.parametrize(
    ("sizes", "offset", "local_groups", "rows", "grid"),
    [
        ([3, 0, 5, 2], 0, 4, 12, 1),
        ([3, 0, 5, 2], 0, 4, 9, 2),  # more than there are rows
        ([3, -4, 5, 2, 9], 1, 3, 30, 3),
        ([7], 0, 1, 7, 1),
        ([4, 3], -2, 4, 9, 1),
        ([4, 3], 1, 5, 9, 2),
        ([4, 3], 9, 2, 9, 1),
        ([4, 3], -9, 2, 9, 1),
        ([4, 3], 2**31 - 1, 2, 9, 1),
        ([4, 3], -(2**31), 3, 9, 1),
        ("hostile", 1, 6, 25, 2),
        ("many", 270, 140, 500, 3),  # more groups than threads, and than the small kernel has room for
        ("many", 0, 600, 300, 2),
    ],
    ids=str,
)
def test_groups(sizes, offset, local_groups, rows, grid):
    rng = np.random.default_rng(rows)
    named = {"hostile": _HOSTILE, "many": np.minimum(rng.geometric(0.5, 600) - 1, 9)}
    sizes = np.int32(named[sizes] if isinstance(sizes, str) else sizes)
    token_tile, row_vectors = 8, 3
    max_tiles = tiling.max_tiles(rows, local_groups, token_tile)
    spec = specs.groups_spec(local_groups, "float32", has_row_group=True)
    first_tiles, tile_group, padded, ends, of_row = small_kernels.expected_groups(
        sizes, offset, local_groups, rows, token_tile
    )
    memory = emulator.Memory()
    expert_tiles = memory.poisoned((local_groups + 1 + WORK_COUNTERS,), np.int32)
    tile_expert, row_route = (
        memory.poisoned((max_tiles,), np.int32),
        memory.poisoned((max_tiles * token_tile,), np.int32),
    )
    group_ends, row_group = memory.poisoned((local_groups,), np.int32), memory.poisoned((rows,), np.int32)
    out = memory.poisoned((rows, 4 * row_vectors), np.float32)
    arrays = [memory.array(sizes), memory.array(np.int32([offset])), expert_tiles, tile_expert, row_route, group_ends,
              row_group, out, rows, len(sizes), local_groups, token_tile, row_vectors]  # fmt: skip
    emulator.run([launch(spec, grid, "sm_90a", arrays)], memory, seed=1, multiprocessors=grid)
    np.testing.assert_array_equal(expert_tiles.read(), np.append(first_tiles, [0] * WORK_COUNTERS))
    np.testing.assert_array_equal(tile_expert.read(partial=True)[: len(tile_group)], tile_group)
    np.testing.assert_array_equal(row_route.read(partial=True)[: len(padded)], padded)
    assert tile_expert.written[: len(tile_group)].all()
    assert row_route.written[: len(padded)].all()
    np.testing.assert_array_equal(group_ends.read(), ends)
    np.testing.assert_array_equal(row_group.read(), of_row)
    zeros = of_row < 0
    np.testing.assert_array_equal(out.written, np.broadcast_to(zeros[:, None], out.written.shape))
    assert (out.read(partial=True)[zeros] == 0).all()
