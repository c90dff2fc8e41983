"""Every kernel that a program picks for the shapes of published models, compiled for sm_90a and read back."""

import collections
import dataclasses
import functools
import importlib
import importlib.util
import itertools
import json
import math
import os
import struct

import cuda_call
import jax.numpy as jnp
import pytest
import record_cubins

from jax_moe import activations, parcels, shapes
from jax_moe.kernels import cache, compiler, cubin, lowering, tiling
from jax_moe.kernels.device.constants import FEW_ROUTES
from jax_moe.kernels.sm90 import program, specs as sm90_specs
from jax_moe.kernels.sm90.target import SM90

HAS_DSL = importlib.util.find_spec("cutlass") is not None
needs_dsl = pytest.mark.skipif(not HAS_DSL, reason="nvidia-cutlass-dsl is not installed")

# The low 12 bits of an sm_90 instruction, as nvdisasm -hex shows them.
HGMMA, WARPGROUP, LOCAL_LOAD, LOCAL_STORE = 0xDF0, 0x9C5, 0x983, 0x387
GEMMS = (sm90_specs.Gemm1Spec, sm90_specs.Gemm2Spec, sm90_specs.ProductSpec, sm90_specs.LinearSpec)
MAP_BYTES = (8 * FEW_ROUTES + 1) * 4
"""Of what a CTA makes of few routes (device/few_routes.py)."""
CONFIGS = tuple(dict.fromkeys((*program.CONFIGS, program.FEW_UNITS, *program.BATCH_INVARIANT)))
COSTS = SM90.cards[0].costs
MODES = tuple(itertools.product(("w4a16", "w4a4"), ("atomic", "ordered")))
DYNAMIC = "w4a4_dynamic"
SWIGLU = activations.SwiGLU()
GPT_OSS = activations.SwiGLU(alpha=1.702, beta=1.0, limit=7.0)
RECORD = json.loads(record_cubins.FILE.read_text())


def problem(model, tokens, precision="w4a16", combine="atomic", activation=SWIGLU, out_dtype=jnp.bfloat16, **changes):
    layer = shapes.MODELS[model]
    return cuda_call.problem(
        num_tokens=tokens, local_experts=layer.num_experts, top_k=layer.top_k, hidden_size=layer.hidden_size,
        intermediate_size=layer.intermediate_size, activation=activation, precision=precision, combine=combine,
        out_dtype=jnp.dtype(out_dtype), **changes,
    )  # fmt: skip


@functools.cache
def product_specs():
    """Each config's product, grouped and of one matrix, in turn with and without options, and what is before it.

    The main loop is GEMM1's; what options and clusters change is the end of a unit: each is there with some configs.
    """
    specs = set()
    options = ({}, dict(precision="w4a4", bias=True, out_dtype=jnp.dtype(jnp.float32)))
    for changes in options:
        for groups in (16, 600):
            launches = lowering.launches(cuda_call.product(local_groups=groups, **changes))
            specs |= {launch.spec for launch in launches if not launch.spec.tensor_core_ptx}
    for index, config in enumerate(CONFIGS):
        call, split = cuda_call.product(**options[index % 2]), program.SPLITS[index // 2 % 2 * (1 + index % 3)]
        specs |= {program.product_spec(call, config), program.linear_spec(call, config, split)}
    specs.add(program.product_spec(cuda_call.product(), program.SPLIT_UNITS))
    return sorted(specs, key=lambda spec: spec.name)


def parcel_specs():
    """What makes parcels, and the pass over x that reads them: they depend on no shape."""
    call = problem("qwen3-30b-a3b", 64, "w4a4")
    before = {launch.spec for launch in lowering.launches(call)}
    launches = [launch for one in parcels.of_call(call) for launch in lowering.launches(one)]
    return [launch.spec for launch in launches if launch.spec not in before]


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
        calls.append(problem(model, tokens, precision, "ordered", batch_invariant=True))
    calls += [problem("qwen3-30b-a3b", 64, DYNAMIC, weight_on=weight_on) for weight_on in ("output", "input")]
    specs = {launch.spec for call in calls for launch in lowering.launches(call)}
    gemms = itertools.product(
        (*CONFIGS, program.SPLIT_UNITS), (*calls[: len(MODES)], problem("qwen3-30b-a3b", 64, DYNAMIC))
    )
    for config, call in gemms:
        specs |= set(program.gemms(call, config))
    for rows in (5, 300):  # as in tests/gpu/test_product.py
        product = cuda_call.product(precision=DYNAMIC, num_rows=rows, num_groups=8, local_groups=8, out_features=1536)
        specs |= {launch.spec for launch in lowering.launches(product)}
    specs |= set(product_specs()) | set(parcel_specs())
    return sorted(specs, key=lambda spec: spec.name)


def opcodes(kernel):
    """How often each opcode occurs in the kernel."""
    words = struct.iter_unpack("<Q8x", cubin.instructions(kernel.image, kernel.symbol))
    return collections.Counter(word & 0xFFF for (word,) in words)


def specs_to_compile():
    """All planned specs that are not made of what their recorded machine code was made of, and some of the others.

    A kernel's code is the function of its spec, the device sources and the compiler that the kernel cache takes it for:
    where these are as recorded, so is the code. That this is so, and compiler.py asks for what it asked for then, the
    others show: a GEMM of each config, each kind of GEMM in both precisions, and a kernel of each other kind.
    `JAX_MOE_COMPILE_ALL=1` compiles all.
    """
    specs = planned_specs()
    if os.environ.get("JAX_MOE_COMPILE_ALL") or cache._compiler_version() != RECORD["compiler"]:
        return specs
    samples = collections.defaultdict(list)
    for spec in specs:
        samples[spec.config if isinstance(spec, GEMMS) else type(spec)].append(spec)
        if isinstance(spec, GEMMS):
            samples[type(spec), spec.precision].append(spec)
    chosen = [group[index % len(group)] for index, group in enumerate(samples.values())]
    return [spec for spec in specs if spec in chosen or not is_as_recorded(spec)]


def is_as_recorded(spec):
    return RECORD["kernels"].get(spec.name, {}).get("made_of") == record_cubins.made_of(spec)


each_to_compile = pytest.mark.parametrize(
    "spec", specs_to_compile() if HAS_DSL else [], ids=lambda spec: spec.name.removeprefix("jax_moe_")
)


@needs_dsl
@each_to_compile
def test_machine_code(spec):
    kernel = cache.compiled(spec, "sm_90a")
    counts = opcodes(kernel)
    assert sum(counts.values()) > 50
    assert kernel.threads == spec.threads
    assert kernel.stack_bytes <= compiler.MOST_STACK_BYTES
    if not isinstance(spec, GEMMS):
        assert counts[HGMMA] == kernel.tensor_core_instructions == 0
        return
    config = spec.config
    # The DSL adds up what the kernel allocates; the config's sum leaves room for alignment.
    tile_map = MAP_BYTES if spec.maps_routes else 0
    unused = 0 if spec.precision == DYNAMIC else 4 * config.m_warpgroups * config.token_tile  # scales of rows
    assert config.shared_bytes - 4096 <= kernel.shared_bytes - tile_map + unused <= config.shared_bytes
    a_cta = sm90_specs.SHARED_MEMORY // config.ctas_per_sm - (1024 if config.ctas_per_sm > 1 else 0)
    assert kernel.shared_bytes <= a_cta
    assert counts[HGMMA] > 0
    assert counts[HGMMA] == kernel.tensor_core_instructions
    # Serialised wgmma (ptxas C7512) is a fence and a wait for each; ours have these once for two, four or eight.
    assert counts[WARPGROUP] < 1.25 * counts[HGMMA]
    assert counts[LOCAL_LOAD] + counts[LOCAL_STORE] <= 16
    assert kernel.registers * config.threads * config.ctas_per_sm <= 65536
    module, _, name = spec.implementation.partition(":")
    producer, consumer = getattr(importlib.import_module(module), name)(spec)._registers()
    consumers = config.m_warpgroups * config.k_warpgroups
    # More than was there at launch would never be granted, and the kernel would hang.
    assert 128 * (producer + consumers * consumer) <= kernel.registers * config.threads


@needs_dsl
@each_to_compile
def test_machine_code_has_run_on_a_gpu(spec):
    """Nothing here can run it: its instructions are those that ``pytest -m gpu`` passed with on a GPU."""
    if RECORD["compiler"] != record_cubins.compiler_version():
        pytest.skip(f"the DSL is {record_cubins.compiler_version()}, the record is of {RECORD['compiler']}")
    recorded, made = RECORD["kernels"].get(spec.name), record_cubins.entry(spec)
    assert recorded is not None, "run it on a GPU, then record_cubins.py"
    # Other sources may make the same code; record_cubins.py without a commit then saves compiling all the next time.
    assert recorded | {"made_of": made["made_of"]} == made, "run it on a GPU, then record_cubins.py"


def test_every_planned_kernel_is_recorded_or_compiled():
    """What is not compiled here is made of what was compiled for the record; nothing falls between the two."""
    if not HAS_DSL:
        pytest.skip("nvidia-cutlass-dsl is not installed")
    compiled = specs_to_compile()
    assert all(spec in compiled or is_as_recorded(spec) for spec in planned_specs())
    kinds = {spec.config if isinstance(spec, GEMMS) else type(spec) for spec in planned_specs()}
    assert kinds == {spec.config if isinstance(spec, GEMMS) else type(spec) for spec in compiled}
    assert {(type(spec), spec.precision) for spec in compiled if isinstance(spec, GEMMS)} == {
        (kind, precision)
        for kind in GEMMS
        for precision in ("w4a16", "w4a4", *([DYNAMIC] if kind is not sm90_specs.LinearSpec else []))
    }


def test_tiles_grow_with_the_routes():
    for layer in shapes.MODELS.values():
        tiles = [program.best_config(SM90.cards[0], tokens, layer.top_k, layer.num_experts) for tokens in shapes.TOKENS]
        # With more rows an expert than the widest tile has, what its last tile pads decides.
        one_tile = [
            t.token_tile
            for t, n in zip(tiles, shapes.TOKENS, strict=True)
            if n * layer.top_k / layer.num_experts <= 144
        ]
        assert one_tile == sorted(one_tile)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)
def test_a_config_fits(config):
    # GEMM1 announces a stage half of all stages later: of two, each would wait for the other (notes-h200.md).
    assert config.stages >= 3
    assert config.stage_blocks % config.k_warpgroups == 0
    resident = config.shared_bytes + (1024 if config.ctas_per_sm > 1 else 0)
    assert resident * config.ctas_per_sm <= sm90_specs.SHARED_MEMORY + 1024 * (config.ctas_per_sm > 1)


def test_tiles_of_a_product_are_taken_to_be_full():
    """160 rows in tiles of up to 144 are 80 and 80 if balanced, else 144 and 16; 80 and 16 are multiplied as 112."""
    (config,) = [config for config in program.CONFIGS if config.widths == (112, 128, 144)]
    nanoseconds = COSTS.nanoseconds[config.m_warpgroups]
    assert program._cost(COSTS, 160, config) == 2 * nanoseconds[112]
    assert program._cost(COSTS, 160, config, balanced=False) == nanoseconds[144] + nanoseconds[112]


def test_experts_elsewhere_have_their_share_of_the_routes():
    """Under expert parallelism most routes are not local: the tile is that of the whole layer."""
    whole = problem("qwen3-235b-a22b", 512)
    local = dataclasses.replace(whole, local_experts=16, num_experts=128)
    calls = (whole, local, dataclasses.replace(local, num_experts=None))
    configs = [cuda_call.program(call).launches[1].spec.config for call in calls]
    assert configs[0] == configs[1] != configs[2]


def test_the_cost_of_an_expert_is_that_of_all_its_balanced_tiles():
    tile = next(tile for tile in program.CONFIGS if tile.token_tile == 144)
    nanoseconds = COSTS.nanoseconds[tile.m_warpgroups]
    widths = {
        1: [112], 112: [112], 113: [128], 129: [144], 145: [112, 112], 225: [128, 112], 288: [144, 144],
        289: [112, 112, 112],
    }  # fmt: skip
    assert tile.widths == (112, 128, 144)
    for rows, used in widths.items():
        assert program._cost(COSTS, rows, tile) == sum(nanoseconds[width] for width in used)


@pytest.mark.parametrize(("tokens", "granule"), [(128, 0), (512, 8), (2048, 8)])
def test_tiles_are_balanced_where_there_are_widths_to_choose_from(tokens, granule):
    sort = cuda_call.program(problem("qwen3-235b-a22b", tokens)).launches[0]
    assert (sort.name, sort.spec.granule) == ("sort", granule)


_CHOSEN = {  # for T = 1, 8, ... 8192: token tile, and the narrower widths of its config
    "qwen3-30b-a3b": "8 8 8 16 48/32 152/128/136 152/128/136",
    "qwen3-235b-a22b": "8 8 8 16 48/32 152/128/136 152/128/136",
    "deepseek-r1-ep8": "8 8 16 48/32 152/128/136 152/128/136 152/128/136",
    "mixtral-8x7b": "8 8 16 48/32 152/128/136 152/128/136 152/128/136",
    "gpt-oss-120b": "8 8 8 16 32/16/24 80/64 152/128/136",
}
"""What was chosen when the kernels were measured (benchmarks/notes-h200.md)."""


@pytest.mark.parametrize("model", shapes.MODELS)
def test_the_configs_that_are_chosen_are_those_that_were_measured(model):
    """A change of the costs or of the distribution of rows shows here, and is then a matter of measuring again."""
    calls = [problem(model, tokens) for tokens in shapes.TOKENS]
    configs = [cuda_call.program(call).launches[1].spec.config for call in calls]
    assert " ".join("/".join(map(str, config.widths[-1:] + config.widths[:-1])) for config in configs) == _CHOSEN[model]


def test_the_cheapest_is_that_of_the_likely_rows():
    """Worked by hand: of 4 tokens with 1 of 2 experts, an expert that some choose has 1 to 4 rows, 4:6:4:1."""
    counts = dict(tiling._likely_rows(4, 0.5))
    assert counts == pytest.approx({1: 4 / 15, 2: 6 / 15, 3: 4 / 15, 4: 1 / 15})
    costs = {"narrow": [1, 1, 9, 9], "wide": [3, 3, 3, 3]}  # 10/15 + 5*9/15 = 3.67 and 3
    assert tiling.cheapest(costs, lambda rows, name: costs[name][rows - 1], 4, 1, 2) == "wide"
    costs["narrow"][2] = 5  # 10/15 + 4*5/15 + 9/15 = 2.6
    assert tiling.cheapest(costs, lambda rows, name: costs[name][rows - 1], 4, 1, 2) == "narrow"
    assert tiling._likely_rows(7, 1.0) == [(7, 1.0)]


def test_names_tell_specs_apart():
    specs = planned_specs()
    assert len({spec.name for spec in specs}) == len(specs)
    infinite, clamped = (
        program.gemms(problem("mixtral-8x7b", 8, activation=activation), program.CONFIGS[0])[0]
        for activation in (SWIGLU, GPT_OSS)
    )
    assert math.isinf(infinite.limit)
    assert infinite.name != clamped.name


@pytest.mark.parametrize("num_routes", [0, 1, 7, 8, 9, 100, 1000])
@pytest.mark.parametrize("num_experts", [1, 3, 128])
def test_max_tiles_is_the_worst_routing(num_routes, num_experts):
    token_tile = 8
    # Worst: as many experts as there are routes for, or experts, have a last tile with a single row.
    busy = min(num_routes, num_experts)
    worst = busy + (num_routes - busy) // token_tile if busy else 0
    assert tiling.max_tiles(num_routes, num_experts, token_tile) == worst


def test_a_config_is_chosen_once_for_the_layers_of_a_model(monkeypatch):
    asked, cheapest = [], tiling.cheapest
    monkeypatch.setattr(tiling, "cheapest", lambda *args: asked.append(args) or cheapest(*args))
    program.best_config.cache_clear()
    for _ in range(3):
        cuda_call.program(problem("mixtral-8x7b", 8))
    assert len(asked) == 1
