"""Calls without a sort, on the emulator: the tile map that a CTA makes is the sort's, and whole calls are right."""

import dataclasses
import importlib.util
import shutil

import emulated_call
import emulator
import few_routes_kernel
from helpers import assert_bit_equal, make_exact_case, make_ids
import jax.numpy as jnp
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
    SortCase(8, 7, 4, 16, "hostile", 2**31 - 2),
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


@pytest.mark.parametrize(
    ("sizes", "routing", "options"),
    [
        (dict(tokens=13, top_k=4, num_experts=6), "hostile", dict(precision="w4a16", combine="atomic")),
        (dict(tokens=13, top_k=4, num_experts=6), "any", dict(precision="w4a16", combine="ordered", weight_on="input")),
        (dict(tokens=16, top_k=4, num_experts=8), "one", dict(precision="w4a4", combine="atomic")),
        (dict(tokens=3, top_k=8, num_experts=9), "hostile", dict(precision="w4a4", combine="ordered")),
        (dict(tokens=2, top_k=2, num_experts=3), "elsewhere", dict(precision="w4a16", combine="atomic")),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_exact_calls_have_the_bits_of_the_cpu(sizes, routing, options):
    """Experts without rows and with several tiles, CTAs with several units and with none, all on another shard."""
    case = make_exact_case(5, hidden=272, intermediate=192, out_dtype=jnp.float32, **sizes, **options)
    rng, offset, experts = np.random.default_rng(6), 3, sizes["num_experts"]
    if routing == "elsewhere":
        ids = jnp.full(case.routing.expert_ids.shape, offset + experts, jnp.int32)
    elif routing == "one":
        ids = jnp.full(case.routing.expert_ids.shape, offset + 1, jnp.int32)
    else:
        ids = make_ids(rng, routing, *case.routing.expert_ids.shape, offset + experts + 1)
    case = dataclasses.replace(case, routing=dataclasses.replace(case.routing, expert_ids=ids))
    case = case.with_options(expert_offset=offset)
    call = emulated_call.prepare(case, "sm_90a", multiprocessors=2)
    assert "sort" not in [launch.name for launch in call.program.launches]
    assert_bit_equal(call.run(order="random", seed=2), case.run())
