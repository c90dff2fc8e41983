"""The prepared layout, checked by doing to it what the kernel's instructions do, thread by thread."""

import dataclasses
import itertools
import re
import types

import helpers
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
import ml_dtypes
import numpy as np
import pytest

import jax_moe
from jax_moe import layouts, nvfp4, shapes
from jax_moe.cli import timing
from jax_moe.experts import Experts, Projection
from jax_moe.kernels import targets
from jax_moe.kernels.device import bf16_weights
from jax_moe.preparation import prepare, unprepare

GATED = (2, 96, 80)
UNGATED = (1, 144, 64)
BLOCKS = {"wgmma_v1": (64, 4608), "tcgen05_bf16_v1": (64, 4608), "tcgen05_fp4_v1": (256, 18432)}
"""Of each layout of blocks: values of the contraction in one, and its bytes."""
HAVE_NAN = {"tcgen05_fp4_v1"}
"""Layouts whose block scales may be NaN."""
each_layout = pytest.mark.parametrize("layout", BLOCKS)


def random_experts(rng, num_experts, parts, intermediate, hidden, bias=False):
    """With block scales of every size."""
    shape = shapes.LayerShape(num_experts, 1, hidden, intermediate)
    experts = timing.random_experts(shape, rng, parts=parts, bias=bias, block_scales=(1, 127))
    return helpers.without_input_scales(experts)


def rotate_right(words, bits):
    return (words >> bits | words << (32 - bits) % 32).astype(np.uint32) if bits else words


def multiply_bf16x2(a, b):
    """``mul.rn.bf16x2`` on u32 arrays."""
    a, b = (v.astype("<u4")[..., None].view("<u2").view(ml_dtypes.bfloat16).astype(np.float64) for v in (a, b))
    product = (a * b).astype(np.float32)
    rounded = product.astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(rounded.astype(np.float32), product)  # nothing may be rounded away
    return rounded


def dequantise(block):
    """The A fragments of one 4608-byte block as the kernel makes them: ``[thread, half, step, register, 2]``."""
    codes = block[:4096].view("<u4").reshape(2, 128, 4)  # half, thread, step
    threads = np.arange(128)
    scale_words = block[4096:].view("<u4").reshape(4, 8, 4)[threads // 32, threads % 32 // 4]  # thread, (half, upper)
    pairs = [words & 0x0FF00FF0 | 0x70007000 for words in (scale_words, rotate_right(scale_words, 8))]
    fragments = np.zeros((128, 2, 4, 4, 2), np.float64)
    for step in range(4):
        half_words = pairs[step // 2] >> 16 * (step % 2) & 0xFFFF
        scales = (half_words | half_words << 16).astype(np.uint32)
        for half in range(2):
            word = codes[half, :, step]
            spread = ((word.astype(np.uint64) & 0x001B001B) * 4228 & 0xFFFFFFFF).astype(np.uint32)
            for register, value in enumerate((word, rotate_right(word, 3), rotate_right(word, 6), spread)):
                value = value & np.uint32(0x81C081C0)
                fragments[:, half, step, register] = multiply_bf16x2(value, scales[:, 2 * half + register % 2])
    return fragments


def matrix_from_fragments(fragments):
    """``[128, 64]`` by the A fragment table of the PTX ISA for wgmma.m64k16, two 64-row halves and four k16-steps."""
    matrix = np.full((128, 64), np.nan)
    for thread in range(128):
        for register in range(4):
            row = 16 * (thread // 32) + thread % 32 // 4 + 8 * (register % 2)
            column = thread % 4 * 2 + 8 * (register // 2)
            for half in range(2):
                for step in range(4):
                    values = fragments[thread, half, step, register]
                    matrix[64 * half + row, 16 * step + column : 16 * step + column + 2] = values
    return matrix


def epilogue_row(row, gated):
    """``(projection, value)`` that GEMM1's (gated) or GEMM2's epilogue takes row ``row`` of the product for."""
    half, warp, group, upper = row // 64, row % 64 // 16, row % 8, row % 16 // 8
    return (upper, 16 * warp + 2 * group + half) if gated else (0, 32 * warp + 4 * group + 2 * half + upper)


@pytest.mark.parametrize(("projections", "intermediate", "hidden"), [GATED, UNGATED])
def test_instructions_reproduce_weights(projections, intermediate, hidden):
    experts = random_experts(np.random.default_rng(0), 2, projections, intermediate, hidden)
    prepared = prepare(experts, "sm_90a", progress=False)

    def check(payload, projection, gated):
        expected = np.asarray(nvfp4.dequantize(projection.payload, projection.block_scale), np.float64)
        expected = expected.reshape(2, -1, *expected.shape[-2:])  # expert, projection, row, column
        rows = expected.shape[2]
        per_block = 64 if gated else 128
        for expert in range(2):
            for row_block in range(payload.shape[1]):
                for k_block in range(payload.shape[2]):
                    got = matrix_from_fragments(dequantise(np.asarray(payload[expert, row_block, k_block]))) * 2.0**7
                    for row in range(128):
                        p, value = epilogue_row(row, gated)
                        value += row_block * per_block
                        want = np.zeros(64)
                        if value < rows:
                            part = expected[expert, p, value, 64 * k_block : 64 * k_block + 64]
                            want[: part.size] = part
                        np.testing.assert_array_equal(got[row], want)

    check(prepared.gate_up.payload, experts.gate_up, projections == 2)
    check(prepared.down.payload, experts.down, False)


def test_every_code_and_scale():
    """All 16 codes by all 127 non-negative e4m3 scales, at every place of a word."""
    codes = np.zeros((128, 128, 64), np.uint8)
    codes[:] = np.arange(16, dtype=np.uint8).repeat(8).reshape(128, 1, 1)
    codes = (codes + np.arange(64, dtype=np.uint8)) % 16
    bits = (np.arange(128)[None, :, None] + np.arange(128)[:, None, None] + 32 * np.arange(4)) % 127
    projection = Projection(
        nvfp4.pack(jnp.asarray(codes.reshape(128, 128, 64))),
        jnp.asarray(bits.astype(np.uint8).view(ml_dtypes.float8_e4m3fn)),
        jnp.ones(128),
    )
    gate_up = Projection(projection.payload[:, None], projection.block_scale[:, None], jnp.ones((128, 1)))
    experts = Experts(gate_up=gate_up, down=projection)
    prepared = prepare(experts, "sm_90a", progress=False)
    seen = set()
    for expert in range(0, 128, 8):
        got = matrix_from_fragments(dequantise(np.asarray(prepared.down.payload[expert, 0, 0]))) * 2.0**7
        order = [epilogue_row(row, False)[1] for row in range(128)]
        want = np.asarray(nvfp4.dequantize(projection.payload[expert], projection.block_scale[expert]), np.float64)
        np.testing.assert_array_equal(got, want[order])
        seen |= set(zip(codes[expert].ravel(), bits[expert].repeat(16, axis=1).ravel(), strict=True))
    assert len(seen) == 16 * 127


def test_every_layout_is_tested():
    assert {*BLOCKS, "canonical"} == {*layouts.LAYOUTS}


@pytest.mark.parametrize(
    ("layout", "sizes"),
    [
        *itertools.product(BLOCKS, (GATED, UNGATED, (2, 16, 16), (2, 192, 176))),
        ("tcgen05_fp4_v1", (1, 272, 528)),
        ("tcgen05_fp4_v1", (2, 336, 256)),  # its blocks are longer
    ],
    ids=str,
)
def test_round_trip(layout, sizes):
    projections, intermediate, hidden = sizes
    experts = random_experts(np.random.default_rng(1), 3, projections, intermediate, hidden, bias=True)
    prepared = prepare(experts, layout, progress=False)
    assert prepared.layout == layout
    block_k, size = BLOCKS[layout]
    assert prepared.gate_up.payload.shape == (3, -(-projections * intermediate // 128), -(-hidden // block_k), size)
    assert prepared.down.payload.shape == (3, -(-hidden // 128), -(-intermediate // block_k), size)
    assert prepared.gate_up.bias.shape[2] * projections == 128 * prepared.gate_up.payload.shape[1]
    again = unprepare(prepared, hidden, intermediate)
    for name in ("gate_up", "down"):
        for field in ("payload", "block_scale", "global_scale", "bias"):
            want, got = getattr(getattr(experts, name), field), getattr(getattr(again, name), field)
            np.testing.assert_array_equal(np.asarray(got).view(np.uint8), np.asarray(want).view(np.uint8))


@each_layout
def test_zero_negative_and_nan_block_scales(layout):
    rng = np.random.default_rng(2)
    experts = random_experts(rng, 2, 2, 64, 64)
    scales = np.asarray(experts.gate_up.block_scale).view(np.uint8).copy()
    scales[0, 0, 0, 0], scales[0, 0, 1, 1], scales[0, 1, 2, 2], scales[1, 1, 3, 3] = 0, 0x80 | 0x38, 0x80, 0x7F
    experts = dataclasses.replace(
        experts,
        gate_up=dataclasses.replace(experts.gate_up, block_scale=jnp.asarray(scales.view(ml_dtypes.float8_e4m3fn))),
    )
    prepared = prepare(experts, layout, progress=False)
    is_nan = layout not in HAVE_NAN
    np.testing.assert_array_equal(np.isnan(prepared.gate_up.global_scale), [[False, False], [False, is_nan]])
    assert not np.isnan(prepared.down.global_scale).any()
    again = unprepare(prepared, 64, 64)
    of_interest = slice(None) if layout in HAVE_NAN else 0
    want = np.asarray(nvfp4.dequantize(experts.gate_up.payload, experts.gate_up.block_scale))[of_interest]
    got = np.asarray(nvfp4.dequantize(again.gate_up.payload, again.gate_up.block_scale))[of_interest]
    np.testing.assert_array_equal(got, want)


def test_float4_payloads_are_prepared_as_bytes_are():
    experts = random_experts(np.random.default_rng(4), 2, 2, 48, 80)
    projections = {
        name: dataclasses.replace(projection, payload=projection.payload.view(jnp.float4_e2m1fn))
        for name, projection in (("gate_up", experts.gate_up), ("down", experts.down))
    }
    got = prepare(dataclasses.replace(experts, **projections), "sm_90a", progress=False)
    want = prepare(experts, "sm_90a", progress=False)
    np.testing.assert_array_equal(got.gate_up.payload, want.gate_up.payload)
    np.testing.assert_array_equal(got.down.payload, want.down.payload)


def test_errors():
    with pytest.raises(TypeError, match="experts: got int, needs Experts"):
        prepare(3, "sm_90a")  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match=r"experts\.gate_up: got NoneType, needs Projection"):
        prepare(Experts(None, None), "sm_90a")  # pyright: ignore[reportArgumentType]
    experts = random_experts(np.random.default_rng(3), 1, 2, 16, 16)
    with pytest.raises(ValueError, match="target: got 'sm_80'"):
        prepare(experts, "sm_80")
    prepared = prepare(experts, "sm_90a", progress=False)
    with pytest.raises(ValueError, match=r"experts.layout: got 'wgmma_v1', needs 'canonical'"):
        prepare(prepared, "canonical")
    with pytest.raises(ValueError, match=r"experts.layout: got 'wgmma_v1', needs 'canonical'"):
        prepare(prepared)  # the default device is a CPU
    with pytest.raises(
        ValueError, match=r"experts\.layout: got 'canonical', needs a layout that jax_moe\.prepare made"
    ):
        unprepare(experts, 16, 16)
    with pytest.raises(TypeError, match="experts: got NoneType"):
        unprepare(None, 16, 16)  # pyright: ignore[reportArgumentType]
    for name, sizes in (("hidden_size", (640, 16)), ("hidden_size", (-16, 16)), ("hidden_size", (24, 16)),
                        ("intermediate_size", (16, 0)), ("intermediate_size", (16, 80))):  # fmt: skip
        with pytest.raises(ValueError, match=f"{name}: got .*, needs a multiple of 16 from 16 to 64"):
            unprepare(prepared, *sizes)


@pytest.mark.parametrize(
    ("layout", "projections"), [*itertools.product(BLOCKS, (GATED, UNGATED)), ("tcgen05_fp4_v1", (2, 288, 80))], ids=str
)
def test_a_call_checks_every_leaf_of_prepared_experts(layout, projections):
    parts, intermediate, hidden = projections
    activation = jax_moe.SwiGLU() if parts == 2 else jax_moe.ReLU2()
    case = helpers.make_case(intermediate=intermediate, hidden=hidden, activation=activation, bias=True)
    experts = prepare(case.experts, layout, progress=False)

    def trace(**changes):
        changed = experts
        for name, leaves in changes.items():
            changed = dataclasses.replace(changed, **{name: dataclasses.replace(getattr(changed, name), **leaves)})
        run = jax.jit(lambda x, *rest: jax_moe.fused_moe(x, *rest, activation=activation))
        return run.trace(case.x, changed, case.routing)

    assert trace()
    padded = layouts.get(layout).padded_intermediate_size(intermediate, parts)
    assert (
        padded
        == {64: -(-intermediate // 64) * 64, 256: -(-intermediate // (128 // parts)) * (128 // parts)}[
            BLOCKS[layout][0]
        ]
    )
    assert layouts.get(layout).check(experts, hidden, (4, parts)) == padded
    gate_up, down = experts.gate_up, experts.down
    for changes, message in (
        ({"gate_up": {"payload": gate_up.payload.astype(jnp.int8)}}, "gate_up.payload: got"),
        ({"gate_up": {"payload": gate_up.payload[:, :, :-1]}}, "gate_up.payload: got"),
        ({"gate_up": {"payload": gate_up.payload[:, :0]}}, "does not fit gate_up's 0"),
        (
            {"gate_up": {"block_scale": case.experts.gate_up.block_scale}},
            "gate_up.block_scale: got an array, needs None",
        ),
        ({"gate_up": {"input_scale": down.input_scale}}, "gate_up.input_scale: got"),
        ({"gate_up": {"bias": case.experts.gate_up.bias[..., :-1]}}, "gate_up.bias: got"),
        ({"down": {"payload": down.payload[:3]}}, "down.payload: got"),
        ({"down": {"payload": down.payload[:, :, :0]}}, "down.payload: got 0 blocks of I, which does not fit"),
        ({"down": {"payload": jnp.tile(down.payload, (1, 1, 2, 1))}}, "blocks of I, which does not fit"),
        ({"gate_up": {"payload": jnp.tile(gate_up.payload, (1, 5, 1, 1))}}, "which does not fit"),
        ({"down": {"block_scale": case.experts.down.block_scale}}, "down.block_scale: got an array, needs None"),
        ({"down": {"global_scale": down.global_scale[:3]}}, "down.global_scale: got"),
        ({"down": {"input_scale": down.input_scale[:3]}}, "down.input_scale: got"),
        ({"down": {"bias": down.bias[:, :-1]}}, "down.bias: got"),
    ):
        with pytest.raises((TypeError, ValueError), match=re.escape(message)):
            trace(**changes)


@each_layout
def test_stacked_layers_are_refused_and_vmap_prepares_them(layout):
    layers = [random_experts(np.random.default_rng(seed), 2, *GATED[:1], 96, 80) for seed in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    with pytest.raises(ValueError, match=r"experts\.gate_up\.payload: got 5 axes, needs \[E, \*, I, \*\], .*jax\.vmap"):
        prepare(stacked, layout)
    together = jax.vmap(lambda experts: prepare(experts, layout))(stacked)
    for layer, experts in enumerate(layers):
        one = jax.tree.map(lambda leaf, layer=layer: leaf[layer], together)
        assert_same(one, prepare(experts, layout, progress=False))


def test_spread_never_carries():
    """Pair 3 of a word: each source bit lands on its place, alone, whatever the others are."""
    for bits in range(256):
        word = sum(
            (bits >> i & 1) << (b, b + 16)[half]
            for i, (b, half) in enumerate((b, h) for h in (0, 1) for b in (0, 1, 3, 4))
        )
        got = (word & bf16_weights.SPREAD_MASK) * bf16_weights.SPREAD_FACTOR & bf16_weights.PAIR_MASK
        want = 0
        for half in range(2):
            for bit, target in enumerate((6, 7, 8, 15)):
                want |= (word >> bf16_weights.code_bit(3, half, bit) & 1) << (target + 16 * half)
        assert got == want


def test_the_default_target_is_what_this_device_needs():
    experts = random_experts(np.random.default_rng(0), 1, *UNGATED)
    assert prepare(experts) is experts  # the tests' default device is a CPU
    assert prepare(experts, "canonical") is experts
    prepared = prepare(experts, "sm_90a", progress=False)
    assert prepare(prepared, "sm_90a") is prepared


@pytest.mark.parametrize("default", [None, "gpu", "cpu"])
def test_the_default_device_may_be_chosen(monkeypatch, default):
    """``jax.config.jax_default_device`` is a device or a platform's name; the devices are those of this process."""
    cpu = types.SimpleNamespace(platform="cpu")
    gpu = types.SimpleNamespace(platform="gpu", compute_capability="9.0")
    found = types.SimpleNamespace(
        local_devices=lambda backend=None: [cpu if backend == "cpu" else gpu],
        config=types.SimpleNamespace(jax_default_device=default),
    )
    monkeypatch.setattr(targets, "jax", found)
    assert targets.layout_for(None, None).name == ("canonical" if default == "cpu" else "wgmma_v1")
    found.config.jax_default_device = cpu
    assert targets.layout_for(None, None).name == "canonical"
    gpu.compute_capability = "8.0"
    found.config.jax_default_device = gpu
    with pytest.raises(ValueError, match=r"compute capability 8\.0, kernels exist for 9\.0, 10"):
        targets.layout_for(None, None)


@pytest.mark.parametrize("nan", [0x7F, 0xFF])
@pytest.mark.parametrize("layout", sorted(BLOCKS.keys() - HAVE_NAN))
def test_nan_of_either_sign_in_either_projection(layout, nan):
    experts = random_experts(np.random.default_rng(2), 2, 2, 64, 64)
    for name, place, want in (("gate_up", (1, 1, 3, 3), [[0, 0], [0, 1]]), ("down", (1, 3, 3), [0, 1])):
        projection = getattr(experts, name)
        scales = np.asarray(projection.block_scale).view(np.uint8).copy()
        scales[place] = nan
        changed = dataclasses.replace(projection, block_scale=jnp.asarray(scales.view(ml_dtypes.float8_e4m3fn)))
        prepared = prepare(dataclasses.replace(experts, **{name: changed}), layout, progress=False)
        np.testing.assert_array_equal(np.isnan(getattr(prepared, name).global_scale), want)


@each_layout
def test_what_is_not_repacked_is_kept(layout):
    experts = random_experts(np.random.default_rng(2), 2, *UNGATED, bias=True)
    gate_up = dataclasses.replace(experts.gate_up, input_scale=jnp.float32(3))
    down = dataclasses.replace(experts.down, input_scale=jnp.asarray([5.0, 6.0]))
    prepared = prepare(dataclasses.replace(experts, gate_up=gate_up, down=down), layout, progress=False)
    assert prepared.gate_up.input_scale == 3
    np.testing.assert_array_equal(prepared.down.input_scale, [5, 6])
    np.testing.assert_array_equal(prepared.down.bias, down.bias)
    np.testing.assert_array_equal(prepared.gate_up.bias[:, :, :144], gate_up.bias)
    assert not prepared.gate_up.bias[:, :, 144:].any()


def test_the_reference_says_what_it_needs():
    case = helpers.make_case()
    prepared = dataclasses.replace(case, experts=prepare(case.experts, "sm_90a", progress=False))
    with pytest.raises(ValueError, match=r"experts\.layout: got 'wgmma_v1', the reference needs 'canonical'"):
        prepared.run(jax_moe.reference.fused_moe)
    with pytest.raises(ValueError, match=r"experts\.layout: got 'wgmma_v1', but on a CPU fused_moe needs 'canonical'"):
        prepared.run()


def assert_same(got, expected):
    assert got.layout == expected.layout
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        helpers.assert_bit_equal(a, b)


@pytest.mark.parametrize("shape", [GATED, UNGATED])
@each_layout
def test_traced_experts_become_the_same(layout, shape):
    experts = random_experts(np.random.default_rng(5), 3, *shape, bias=True)
    expected = prepare(experts, layout, progress=False)
    assert_same(jax.jit(lambda e: prepare(e, layout))(experts), expected)


def test_a_traced_program_does_not_grow_with_the_experts():
    def lines(num_experts):
        experts = random_experts(np.random.default_rng(0), num_experts, *GATED)
        return jax.jit(lambda e: prepare(e, "sm_90a")).lower(experts).as_text().count("\n")

    assert lines(16) == lines(2)


def on_mesh(experts, expert, tensor, axis_type=AxisType.Auto):
    mesh = jax.make_mesh((expert, tensor), ("expert", "tensor"), axis_types=(axis_type,) * 2)
    return mesh, jax.device_put(experts, jax_moe.expert_shardings(experts, mesh))


@pytest.mark.parametrize(("expert", "tensor"), [(4, 1), (1, 2), (2, 2), (2, 4)])
@pytest.mark.parametrize(("projections", "axis_type"), [(1, AxisType.Auto), (2, AxisType.Auto), (2, AxisType.Explicit)])
def test_experts_on_a_mesh_stay_where_they_are(expert, tensor, projections, axis_type):
    rng = np.random.default_rng(6)
    experts = random_experts(rng, 4, projections, 512, 80, bias=True)
    scales = np.array(experts.down.block_scale)
    scales[2, 3, 30] = np.nan  # in the last slice of I: every slice's device must hear of it
    experts = dataclasses.replace(experts, down=dataclasses.replace(experts.down, block_scale=jnp.asarray(scales)))
    expected = prepare(experts, "sm_90a", progress=False)
    assert np.isnan(expected.down.global_scale).tolist() == [False, False, True, False]
    mesh, placed = on_mesh(experts, expert, tensor, axis_type)
    prepared = prepare(placed, "sm_90a")
    assert_same(prepared, expected)
    for leaf, sharding in zip(
        jax.tree.leaves(prepared), jax.tree.leaves(jax_moe.expert_shardings(expected, mesh)), strict=True
    ):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)


def test_experts_that_do_not_fit_the_mesh_are_refused():
    experts = random_experts(np.random.default_rng(7), 2, 2, 160, 64)
    mesh, _ = on_mesh(experts, 1, 2)
    elsewhere = NamedSharding(mesh, PartitionSpec(None, None, None, "tensor"))
    payload = jax.device_put(experts.gate_up.payload, elsewhere)
    moved = dataclasses.replace(experts, gate_up=dataclasses.replace(experts.gate_up, payload=payload))
    with pytest.raises(ValueError, match=r"experts.gate_up.payload: got sharding"):
        prepare(moved, "sm_90a")
