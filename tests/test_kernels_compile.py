"""Every kernel that the plan picks for the shapes of published models, compiled for sm_90a and read back."""

import collections
import dataclasses
import importlib.util
import itertools
import json
import math
import pathlib
import struct
import sys

import cuda_call
import jax.numpy as jnp
import pytest

from jax_moe import activations, shapes
from jax_moe.kernels import compile, lowering
from jax_moe.kernels.common import plan as common_plan
from jax_moe.kernels.sm90 import plan as sm90_plan

sys.path.insert(0, str(pathlib.Path(__file__).parent / "gpu"))
import record_cubins

HAS_DSL = importlib.util.find_spec("cutlass") is not None
needs_dsl = pytest.mark.skipif(not HAS_DSL, reason="nvidia-cutlass-dsl is not installed")

# The low 12 bits of an sm_90 instruction, as nvdisasm -hex shows them.
HGMMA, WARPGROUP, LOCAL_LOAD, LOCAL_STORE = 0xDF0, 0x9C5, 0x983, 0x387
GEMMS = (common_plan.Gemm1Spec, common_plan.Gemm2Spec)
MODES = tuple(itertools.product(("w4a16", "w4a4"), ("atomic", "ordered")))
SWIGLU = activations.SwiGLU()
GPT_OSS = activations.SwiGLU(alpha=1.702, beta=1.0, limit=7.0)


def problem(model, tokens, precision="w4a16", combine="atomic", activation=SWIGLU, out_dtype=jnp.bfloat16, **changes):
    layer = shapes.MODELS[model]
    return cuda_call.problem(
        num_tokens=tokens, local_experts=layer.num_experts, top_k=layer.top_k, hidden_size=layer.hidden_size,
        intermediate_size=layer.intermediate_size, activation=activation, precision=precision, combine=combine,
        out_dtype=jnp.dtype(out_dtype), **changes,
    )  # fmt: skip


def planned_specs():
    """All that the shapes launch in every precision and combine, each tile in these, other options for some shapes."""
    calls = [
        problem(model, tokens, precision, combine)
        for model in shapes.MODELS
        for tokens in shapes.TOKENS
        for precision, combine in MODES
    ]
    for activation in (GPT_OSS, activations.GeGLU(), activations.ReLU2(), activations.SiTU()):
        for tokens, precision in ((32, "w4a16"), (512, "w4a4"), (8192, "w4a4")):
            calls.append(
                problem("gpt-oss-120b", tokens, precision, "atomic", activation, jnp.float32, biases=(True, True))
            )
    for model, tokens, precision in itertools.product(shapes.MODELS, shapes.TOKENS, ("w4a16", "w4a4")):
        calls.append(problem(model, tokens, precision, weight_on="input"))
    specs = {launch.spec for call in calls for launch in lowering.launches(call)}
    for tile, call in itertools.product(sm90_plan.TILES, calls[: len(MODES)]):
        plan = common_plan.with_tile(call, tile)
        specs |= {plan.gemm1, plan.gemm2}
    return sorted(specs, key=lambda spec: spec.name)


def opcodes(cubin):
    """How often each opcode occurs in the kernel of ``cubin``."""
    (sections_at,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names_index = struct.unpack_from("<HHH", cubin, 0x3A)
    sections = [struct.unpack_from("<IIQQQQ", cubin, sections_at + i * size) for i in range(count)]
    names = sections[names_index][4]
    counts = collections.Counter()
    for name, _, _, _, offset, length in sections:
        if cubin[names + name : names + name + 6] == b".text.":
            counts.update(word & 0xFFF for (word,) in struct.iter_unpack("<Q8x", cubin[offset : offset + length]))
    return counts


@needs_dsl
@pytest.mark.parametrize("spec", planned_specs(), ids=lambda spec: spec.name.removeprefix("jax_moe_"))
def test_machine_code(spec):
    kernel = compile.compiled(spec, "sm_90a")
    counts = opcodes(kernel.image)
    assert sum(counts.values()) > 50
    assert kernel.threads == spec.threads
    assert kernel.stack_bytes <= compile.MOST_STACK_BYTES
    if not isinstance(spec, GEMMS):
        assert counts[HGMMA] == kernel.tensor_core_instructions == 0
        return
    tile = spec.tile
    # The DSL adds up what the kernel allocates; the plan's sum leaves room for alignment.
    assert tile.shared_bytes - 4096 <= kernel.shared_bytes <= tile.shared_bytes
    assert counts[HGMMA] > 0
    assert counts[HGMMA] == kernel.tensor_core_instructions
    # Serialised wgmma (ptxas C7512) is one fence and one wait for each; ours wait once for four or eight.
    assert counts[WARPGROUP] < counts[HGMMA]
    assert counts[LOCAL_LOAD] + counts[LOCAL_STORE] <= 16
    assert kernel.registers * tile.threads * tile.ctas_per_sm <= 65536
    gemm = pytest.importorskip("jax_moe.kernels.sm90.gemm")
    implementation = (gemm.Gemm1 if isinstance(spec, common_plan.Gemm1Spec) else gemm.Gemm2)(spec)
    producer, consumer = implementation._registers()
    consumers = tile.m_warpgroups * tile.k_warpgroups
    # More than was there at launch would never be granted, and the kernel would hang.
    assert 128 * (producer + consumers * consumer) <= kernel.registers * tile.threads


@needs_dsl
@pytest.mark.parametrize("spec", planned_specs(), ids=lambda spec: spec.name.removeprefix("jax_moe_"))
def test_machine_code_has_run_on_a_gpu(spec):
    """Nothing here can run it: what is shipped is byte for byte what ``pytest -m gpu`` passed with on a GPU."""
    record = json.loads(record_cubins.FILE.read_text())
    if record["compiler"] != record_cubins.compiler():
        pytest.skip(f"the DSL is {record_cubins.compiler()}, the kernels that ran on a GPU are of {record['compiler']}")
    assert record["sha256"].get(spec.name) == record_cubins.digest(spec), "run it on a GPU, then record_cubins.py"


def test_tiles_fit_and_grow_with_the_routes():
    for layer in shapes.MODELS.values():
        tiles = [sm90_plan.best_tile(tokens, layer.top_k, layer.num_experts) for tokens in shapes.TOKENS]
        # With more rows an expert than the widest tile has, what its last tile pads decides.
        one_tile = [
            t.token_tile
            for t, n in zip(tiles, shapes.TOKENS, strict=True)
            if n * layer.top_k / layer.num_experts <= 144
        ]
        assert one_tile == sorted(one_tile)
        for tile in tiles:
            assert tile.stages >= 2
            assert tile.stage_blocks % tile.k_warpgroups == 0
            resident = tile.shared_bytes + (1024 if tile.ctas_per_sm > 1 else 0)
            assert resident * tile.ctas_per_sm <= sm90_plan.SHARED_MEMORY + 1024 * (tile.ctas_per_sm > 1)


def test_experts_elsewhere_have_their_share_of_the_routes():
    """Under expert parallelism most routes are not local: the tile is that of the whole layer."""
    whole = problem("qwen3-235b-a22b", 512)
    local = dataclasses.replace(whole, local_experts=16, num_experts=128)
    tiles = [sm90_plan.plan(call).gemm1.tile for call in (whole, local)]
    assert tiles[0] == tiles[1]
    assert sm90_plan.plan(dataclasses.replace(local, num_experts=None)).gemm1.tile != tiles[0]


def test_the_cost_of_an_expert_is_that_of_all_its_tiles():
    tile = next(tile for tile in sm90_plan.TILES if tile.widths == (128, 144))
    whole, part = (sm90_plan._NANOSECONDS[tile.m_warpgroups][width] for width in (144, 128))
    assert [sm90_plan._cost(rows, tile) for rows in (1, 128, 129, 144, 145, 288, 289)] == [
        part, part, whole, whole, whole + part, 2 * whole, 2 * whole + part,
    ]  # fmt: skip


@pytest.mark.parametrize("rows", range(1, 289))
def test_one_expert_gets_the_cheapest_tile_for_just_its_rows(rows):
    best = sm90_plan.best_tile(rows, 1, 1)
    assert sm90_plan._cost(rows, best) == min(sm90_plan._cost(rows, tile) for tile in sm90_plan.TILES)


def test_names_tell_specs_apart():
    specs = planned_specs()
    assert len({spec.name for spec in specs}) == len(specs)
    infinite = sm90_plan.plan(problem("mixtral-8x7b", 8)).gemm1
    assert math.isinf(infinite.limit)
    clamped = sm90_plan.plan(problem("mixtral-8x7b", 8, activation=GPT_OSS)).gemm1
    assert infinite.name != clamped.name


@pytest.mark.parametrize("num_routes", [0, 1, 7, 8, 9, 100, 1000])
@pytest.mark.parametrize("num_experts", [1, 3, 128])
def test_max_tiles_is_the_worst_routing(num_routes, num_experts):
    token_tile = 8
    # Worst: as many experts as there are routes for, or experts, have a last tile with a single row.
    busy = min(num_routes, num_experts)
    worst = busy + (num_routes - busy) // token_tile if busy else 0
    assert common_plan.max_tiles(num_routes, num_experts, token_tile) >= worst
