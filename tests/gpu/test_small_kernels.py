"""The sort of routes and the pass over x on a GPU, against NumPy and ``jax_moe.nvfp4``, bit for bit."""

import calls
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_kernels
from small_kernels import SortCase

from jax_moe import nvfp4
from jax_moe.kernels import cache, specs, tiling
from jax_moe.kernels.device.constants import WORK_COUNTERS

TARGET = calls.target().name


SORT_CASES = [
    SortCase(1, 8, 128, 8),
    SortCase(1, 1, 1, 8),
    SortCase(3, 5, 7, 16),
    SortCase(17, 16, 512, 8),
    SortCase(32, 8, 128, 8),
    SortCase(32, 8, 128, 8, "hostile"),
    SortCase(128, 8, 128, 16, "one"),
    SortCase(255, 8, 33, 24, "uniform", 5),
    SortCase(256, 8, 16, 64, "none"),
    SortCase(257, 8, 128, 32, "uniform", 64),
    SortCase(512, 8, 128, 64, "hostile", 3),
    SortCase(2048, 4, 128, 128, "skewed"),
    SortCase(8192, 8, 128, 128),
    SortCase(8192, 8, 128, 128, "one"),
    SortCase(8192, 16, 512, 128, "hostile", 100),
    SortCase(8191, 2, 8, 128, "skewed", weighted=False),
    SortCase(255, 8, 33, 24, "skewed", 5, granule=8),
    SortCase(8192, 8, 128, 192, "hostile", 3, granule=16),
]
ROWS_SPECS = [specs.XRowsSpec(True, False), specs.XRowsSpec(True, True), specs.XRowsSpec(False, True)]


def _kernel_step(spec, arguments: str, grid: int) -> dict:
    kernel = cache.compiled(spec, TARGET)
    return calls.step(
        kernel.image, kernel.symbol, arguments, grid=grid, threads=kernel.threads, cluster=spec.cluster,
        shared=kernel.shared_bytes,
    )  # fmt: skip


def _takes_out(build_folder) -> dict:
    """A launch that is given the output, as some launch of a call has to be, and leaves it as it is."""
    return calls.step(calls.launch_kernels(build_folder), "nothing", "result:0")


@pytest.mark.parametrize("case", SORT_CASES, ids=str)
def test_sort(build_folder, poison, case):
    rng = np.random.default_rng(case.tokens)
    routes = case.tokens * case.top_k
    max_tiles = tiling.max_tiles(routes, case.num_experts, case.token_tile)
    arguments = f"operand:1 operand:2 operand:3 result:1 result:2 result:3 result:4 result:5 i32:{routes}"
    steps = {"sort": _kernel_step(case.spec, arguments, case.spec.cluster), "out": _takes_out(build_folder)}
    workspaces = [
        jax.ShapeDtypeStruct((case.num_experts + 1 + WORK_COUNTERS,), jnp.int32),
        jax.ShapeDtypeStruct((max_tiles,), jnp.int32),
        jax.ShapeDtypeStruct((max_tiles * case.token_tile,), jnp.int32),
        jax.ShapeDtypeStruct((max_tiles * case.token_tile,), jnp.float32),
        jax.ShapeDtypeStruct((case.spec.cluster, case.num_experts), jnp.int32),
    ]
    x = jnp.zeros((case.tokens, 16), jnp.bfloat16)

    def call_of(ids, weights):
        return calls.call(
            x, steps, expert_ids=ids, routing_weights=weights, num_experts=case.num_experts,
            expert_offset=case.offset, workspaces=workspaces,
        )  # fmt: skip

    sort = calls.jit(call_of, {})
    for _ in range(2):
        ids, weights = small_kernels.ids(case, rng), rng.normal(size=(case.tokens, case.top_k)).astype(np.float32)
        starts, experts, rows = small_kernels.expected_sort(case, ids)
        poison(0.25)
        _, got_starts, got_experts, got_rows, got_weights, _ = map(np.asarray, sort(ids, weights))
        np.testing.assert_array_equal(got_starts, np.append(starts, [0] * WORK_COUNTERS))
        np.testing.assert_array_equal(got_experts[: len(experts)], experts)
        np.testing.assert_array_equal(got_rows[: len(rows)], rows)
        filled = rows >= 0
        expected = weights.reshape(-1)[rows[filled]] if case.weighted else np.ones(filled.sum(), np.float32)
        np.testing.assert_array_equal(got_weights[: len(rows)][filled], expected)


@pytest.mark.parametrize("spec", ROWS_SPECS, ids=str)
@pytest.mark.parametrize(("tokens", "hidden"), [(1, 16), (5, 2880), (300, 4096)])
def test_rows(build_folder, poison, spec, tokens, hidden):
    slots = 3 if spec.per_route else 1
    num_rows = tokens * slots
    rng = np.random.default_rng(hidden)
    x, scale = small_kernels.hard_values(rng, (tokens, hidden)), jnp.float32(1 / 448)
    weights = jnp.asarray(rng.normal(size=(tokens, slots)), jnp.float32)
    arguments = f"operand:0 operand:2 operand:7 result:1 i32:{num_rows} i32:{slots} i32:{hidden // 16}"
    steps = {
        "x_rows": _kernel_step(spec, arguments, spec.grid(num_rows, hidden)),
        "out": _takes_out(build_folder),
    }
    workspaces = [jax.ShapeDtypeStruct((num_rows, hidden), jnp.bfloat16)]

    def call_of(x, weights):
        ids = jnp.zeros(weights.shape, jnp.int32)
        return calls.call(
            x, steps, expert_ids=ids, routing_weights=weights, input_scale=scale, workspaces=workspaces
        )[1]  # fmt: skip

    poison(0.25)
    got = np.asarray(calls.jit(call_of, {})(x, weights))  # where nothing can run, it skips here
    expected = small_kernels.expected_rows(x, weights if spec.per_route else None)
    if spec.quantise:
        with jax.default_device(jax.devices("cpu")[0]):
            values = expected
            expected = np.array(jax.jit(nvfp4.quantize_dequantize)(jnp.asarray(values), np.float32(scale)))
        # XLA's CPU backend loses a NaN in the maximum of a large array: a block with a NaN is all NaN.
        expected.reshape(-1, 16)[np.isnan(values).reshape(-1, 16).any(1)] = np.nan
    # A zero's sign and a NaN's bits are nobody's business: products with them are the same.
    np.testing.assert_array_equal(got.astype(np.float32), np.asarray(expected).astype(np.float32))
