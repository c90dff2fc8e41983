"""``prepare``, ``unprepare`` and ``calibrate`` on experts that are spread over a mesh: right, and no weight moves."""

import dataclasses
import re

import helpers
from helpers import make_case
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import numpy as np
import pytest

import jax_moe
from jax_moe import activations, layouts, placement, preparation, quantize

AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
SWIGLU, RELU2 = jax_moe.SwiGLU(), jax_moe.ReLU2()


def place(experts, expert, tensor, axis_type=AUTO):
    mesh = jax.make_mesh((expert, tensor), ("expert", "tensor"), axis_types=(axis_type,) * 2)
    return mesh, jax.device_put(experts, jax_moe.expert_shardings(experts, mesh))


def moved(lowered) -> list[str]:
    """Result types of the collectives of a program that carry more than a number for each expert."""
    pattern = r"= (\S+) (?:all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute)(?:-start)?\("
    types = re.findall(pattern, lowered.compile().as_text())
    return [found for found in types if len(re.search(r"\[([\d,]*)\]", found)[1].split(",")) > 2]


def assert_placed_like(got, expected, mesh):
    """The same bits, each leaf where ``expert_shardings`` puts it."""
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    shardings = jax.tree.leaves(jax_moe.expert_shardings(got, mesh))
    for a, b, sharding in zip(jax.tree.leaves(got), jax.tree.leaves(expected), shardings, strict=True):
        helpers.assert_bit_equal(a, b)
        assert a.sharding.is_equivalent_to(sharding, a.ndim), (a.sharding, sharding)


@pytest.mark.parametrize(
    ("expert", "tensor", "weight_on", "axis_type"),
    [(8, 1, "output", AUTO), (1, 2, "output", EXPLICIT), (2, 2, "input", AUTO), (2, 4, "input", EXPLICIT)],
)
def test_calibrate(expert, tensor, weight_on, axis_type):
    """Every device's experts and slices of I count, and those of no token take the largest scale of all devices."""
    case = make_case(1, tokens=6, hidden=48, intermediate=128, num_experts=8, top_k=2, bias=True)
    case = dataclasses.replace(case, experts=helpers.without_input_scales(case.experts))
    expected = jax_moe.calibrate(case.experts, case.x, case.routing, weight_on=weight_on)
    mesh, placed = place(case.experts, expert, tensor, axis_type)
    got = jax_moe.calibrate(placed, case.x, case.routing, weight_on=weight_on)
    assert_placed_like(dataclasses.replace(got, gate_up=placed.gate_up), dataclasses.replace(
        expected, gate_up=case.experts.gate_up), mesh)  # fmt: skip
    helpers.assert_bit_equal(got.gate_up.input_scale, expected.gate_up.input_scale)
    lowered = quantize._amaxes.lower(placed, case.x, case.routing, jax_moe.SwiGLU(), weight_on)
    assert moved(lowered) == []


def test_calibrate_on_tokens_that_are_spread_too():
    case = make_case(2, tokens=8, hidden=48, intermediate=64, num_experts=4)
    expected = jax_moe.calibrate(case.experts, case.x, case.routing)
    for axis_type in (AUTO, EXPLICIT):
        mesh, placed = place(case.experts, 4, 2, axis_type)
        x, routing = jax.device_put((case.x, case.routing), NamedSharding(mesh, P("expert", None)))
        got = jax_moe.calibrate(placed, x, routing)
        helpers.assert_bit_equal(got.down.input_scale, expected.down.input_scale)
        helpers.assert_bit_equal(got.gate_up.input_scale, expected.gate_up.input_scale)


@pytest.mark.parametrize(
    ("layout", "expert", "tensor", "activation", "axis_type"),
    [
        ("wgmma_v1", 8, 1, SWIGLU, AUTO),
        ("wgmma_v1", 1, 2, RELU2, EXPLICIT),
        ("wgmma_v1", 2, 2, SWIGLU, EXPLICIT),
        ("wgmma_v1", 2, 4, RELU2, AUTO),
        ("wgmma_v1", 2, 4, SWIGLU, AUTO),
        ("tcgen05_bf16_v1", 2, 4, RELU2, AUTO),
        ("tcgen05_fp4_v1", 2, 2, SWIGLU, EXPLICIT),
        ("tcgen05_fp4_v1", 2, 4, RELU2, AUTO),
    ],
)
def test_prepare_and_unprepare(layout, expert, tensor, activation, axis_type):
    """I = 320 in 2 or 4 slices: 160 and 80 are no whole blocks of 64 or 128, so every slice is padded by itself."""
    hidden, intermediate = 80, 320
    case = make_case(3, hidden=hidden, intermediate=intermediate, num_experts=8, activation=activation, bias=True)
    mesh, placed = place(case.experts, expert, tensor, axis_type)
    prepared = jax_moe.prepare(placed, layout)
    again = jax_moe.unprepare(prepared, hidden, intermediate)
    assert_placed_like(again, case.experts, mesh)
    assert moved(preparation._prepare_in_place.lower(placed, layout)) == []
    lowered = preparation._unprepare_in_place.lower(prepared, hidden, intermediate // tensor)
    assert moved(lowered) == []


@pytest.mark.parametrize("intermediate", [96, 736])
def test_another_number_of_slices_is_no_padding(intermediate):
    """In one piece I is padded at its end, in two slices in the middle too: what is cut off there may be weights."""
    case = make_case(12, hidden=32, intermediate=intermediate, num_experts=2)
    mesh, placed = place(case.experts, 1, 2)
    in_one_piece = jax_moe.prepare(case.experts, "sm_90a", progress=False)
    in_two = jax_moe.prepare(placed, "sm_90a")
    for experts in (
        jax.device_put(in_one_piece, jax_moe.expert_shardings(in_one_piece, mesh)),
        jax.device_put(in_two, jax.devices()[0]),
    ):
        with pytest.raises(
            ValueError, match=r"intermediate_size: got \d+, (but weights stand where|needs a multiple of)"
        ):
            jax_moe.unprepare(experts, 32, intermediate)


@pytest.mark.parametrize(
    ("layout", "intermediate", "slices", "activation"),
    [
        ("wgmma_v1", 160, 2, SWIGLU),
        ("wgmma_v1", 192, 4, RELU2),
        ("wgmma_v1", 704, 2, SWIGLU),
        ("wgmma_v1", 704, 2, RELU2),
        ("wgmma_v1", 1856, 2, SWIGLU),
        ("wgmma_v1", 1856, 4, RELU2),
        ("tcgen05_bf16_v1", 704, 2, RELU2),
        ("tcgen05_fp4_v1", 160, 2, SWIGLU),
        ("tcgen05_fp4_v1", 704, 2, SWIGLU),
        ("tcgen05_fp4_v1", 704, 2, RELU2),
    ],
    ids=str,
)
def test_each_slice_is_prepared_as_if_it_were_the_whole(layout, intermediate, slices, activation):
    """What a device holds is what it would hold of experts of its slice only, padded with zeros to whole blocks."""
    case = make_case(4, hidden=32, intermediate=intermediate, num_experts=2, activation=activation, bias=True)
    _, placed = place(case.experts, 1, slices)
    prepared = jax_moe.prepare(placed, layout)
    tile = layouts.get(layout).slice_unit(activations.num_parts(activation))
    size = intermediate // slices
    padded = -(-size // tile) * tile
    gate_up, down = case.experts.gate_up, case.experts.down
    for number in range(slices):
        first, last = number * size, (number + 1) * size

        def fit(array, axis, unit, first=first, last=last):
            part = np.take(np.asarray(array), np.arange(first // unit, last // unit), axis)
            widths = [(0, 0)] * part.ndim
            widths[axis] = (0, padded // unit - size // unit)
            return jnp.asarray(np.pad(part, widths))

        alone = jax_moe.Experts(
            dataclasses.replace(
                gate_up,
                payload=fit(gate_up.payload, 2, 1),
                block_scale=fit(gate_up.block_scale, 2, 1),
                bias=fit(gate_up.bias, 2, 1),
            ),
            dataclasses.replace(down, payload=fit(down.payload, 2, 2), block_scale=fit(down.block_scale, 2, 16)),
        )
        expected = jax_moe.prepare(alone, layout, progress=False)
        for name in ("gate_up", "down"):
            got = getattr(prepared, name).payload.addressable_shards[number].data
            helpers.assert_bit_equal(got, getattr(expected, name).payload)
            assert getattr(prepared, name).block_scale is None
        helpers.assert_bit_equal(prepared.gate_up.bias.addressable_shards[number].data, expected.gate_up.bias)
        # Whole blocks of gate_up and of down are the same part of I: a device's h is what its down weights read.
        assert expected.down.payload.shape[2] * (256 if layout == "tcgen05_fp4_v1" else 64) == padded


def test_unprepare_refuses_another_size():
    case = make_case(5, hidden=48, intermediate=320, num_experts=2)
    _, placed = place(case.experts, 1, 2)
    prepared = jax_moe.prepare(placed, "sm_90a")
    for size in (256, 304, 388, 416, 319):
        with pytest.raises(ValueError, match=r"intermediate_size: got \d+, needs a multiple of 32 from 288 to 384"):
            jax_moe.unprepare(prepared, 48, size)
    with pytest.raises(ValueError, match=r"hidden_size: got 64, needs a multiple of 16 from 16 to 64|hidden_size"):
        jax_moe.unprepare(prepared, 128, 320)
    with pytest.raises(TypeError, match="intermediate_size: got '320', needs an int"):
        jax_moe.unprepare(prepared, 48, "320")


@pytest.mark.parametrize(
    ("layout", "intermediate", "what", "down_blocks"),
    [
        ("wgmma_v1", 704, "I in 11 weight blocks", 12),
        ("tcgen05_fp4_v1", 704, "I in 11 weight blocks", 4),
        # Both numbers of blocks are even, but half of gate_up's is less of I than half of down's.
        ("tcgen05_fp4_v1", 384, r"I = 6 \* 64 in gate_up, 2 \* 256 in down alike", 2),
    ],
)
def test_weight_blocks_that_the_mesh_does_not_divide_say_what_to_do(layout, intermediate, what, down_blocks):
    experts = jax_moe.prepare(make_case(6, hidden=48, intermediate=intermediate).experts, layout, progress=False)
    mesh = jax.make_mesh((2,), ("tensor",), axis_types=(AUTO,))
    with pytest.raises(ValueError, match=rf"tensor_axis.*{what}; place canonical experts, then prepare them"):
        jax_moe.expert_shardings(experts, mesh)
    canonical = jax_moe.unprepare(experts, 48, intermediate)  # the advice works
    placed = jax.device_put(canonical, jax_moe.expert_shardings(canonical, mesh))
    assert jax_moe.prepare(placed, layout).down.payload.shape[2] == down_blocks


VERBS = {
    "prepare": lambda case, prepared: (lambda e: jax_moe.prepare(e, "sm_90a"), case.experts),
    "unprepare": lambda case, prepared: (lambda e: jax_moe.unprepare(e, 48, 32), prepared),
    "calibrate": lambda case, prepared: (lambda e: jax_moe.calibrate(e, case.x, case.routing), case.experts),
}


@pytest.mark.parametrize("verb", VERBS)
def test_under_jit_automatic_placements_are_not_seen_and_nothing_is_gathered(verb):
    case = make_case(7, hidden=48, intermediate=32)
    function, experts = VERBS[verb](case, jax_moe.prepare(case.experts, "sm_90a", progress=False))
    expected = function(experts)
    _, placed = place(experts, 4, 1)
    with pytest.raises(ValueError, match=rf"{verb}: the program is spread over 4 devices"):
        jax.jit(function)(placed)
    on_one = jax.jit(function)(experts)
    jax.tree.map(helpers.assert_bit_equal, on_one, expected)


def test_under_jit_quantize_experts_gathers_nothing_either():
    mesh = jax.make_mesh((4,), ("expert",), axis_types=(AUTO,))
    dense = [np.ones(shape, np.float32) for shape in ((4, 32, 48), (4, 32, 48), (4, 48, 32))]
    placed = jax.device_put(dense, NamedSharding(mesh, P("expert")))
    with pytest.raises(ValueError, match="quantize_experts: the program is spread over 4 devices"):
        jax.jit(jax_moe.quantize_experts)(*placed)
    explicit = jax.make_mesh((4,), ("expert",), axis_types=(EXPLICIT,))
    with jax.set_mesh(explicit), pytest.raises(ValueError, match="gate: got an array spread over 4 devices"):
        jax.jit(jax_moe.quantize_experts)(*jax.device_put(dense, NamedSharding(explicit, P("expert"))))


@pytest.mark.parametrize("verb", VERBS)
def test_under_jit_explicit_placements_are_seen(verb):
    case = make_case(8, hidden=48, intermediate=32)
    function, experts = VERBS[verb](case, jax_moe.prepare(case.experts, "sm_90a", progress=False))
    expected = function(experts)
    mesh, placed = place(experts, 4, 1, EXPLICIT)
    with jax.set_mesh(mesh):
        run = jax.jit(function)
        got = run(placed)
    jax.tree.map(helpers.assert_bit_equal, got, expected)
    assert got.down.payload.sharding.spec[0] == "expert"


def test_vmap_over_stacked_layers_that_are_spread_is_refused():
    """Eagerly too: jax.vmap hides where the weights are."""
    case = make_case(13, hidden=48, intermediate=32)
    mesh = jax.make_mesh((4,), ("expert",), axis_types=(AUTO,))
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), helpers.without_input_scales(case.experts))
    spread = jax.device_put(stacked, NamedSharding(mesh, P(None, "expert")))
    with pytest.raises(ValueError, match="prepare: the program is spread over 4 devices"):
        jax.vmap(lambda e: jax_moe.prepare(e, "sm_90a"))(spread)


@pytest.mark.parametrize("leaf", ["gate", "up", "down"])
def test_no_dense_weight_is_gathered_under_jit(leaf):
    mesh = jax.make_mesh((4,), ("expert",), axis_types=(AUTO,))
    dense = {"gate": np.ones((4, 32, 48), np.float32), "up": np.ones((4, 32, 48), np.float32),
             "down": np.ones((4, 48, 32), np.float32)}  # fmt: skip
    placed = jax.device_put(dense[leaf], NamedSharding(mesh, P("expert")))
    with pytest.raises(ValueError, match="quantize_experts: the program is spread over 4 devices"):
        jax.jit(lambda array: jax_moe.quantize_experts(**dense | {leaf: array}))(placed)


@pytest.mark.parametrize("verb", ["prepare", "unprepare"])
def test_vmap_over_stacked_layers(verb):
    """The guard against gathering is the identity for every transformation."""
    case = make_case(9, hidden=48, intermediate=32)
    function, experts = VERBS[verb](case, jax_moe.prepare(case.experts, "sm_90a", progress=False))
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), experts)
    got = jax.vmap(function)(stacked)
    jax.tree.map(lambda a, b: helpers.assert_bit_equal(a[1], b), got, function(experts))


def stacked_layers(layout, mesh):
    """Three layers on the mesh one by one, and as one stack where ``expert_shardings`` puts it."""
    cases = [make_case(seed, hidden=48, intermediate=128, num_experts=4, tokens=6, bias=True) for seed in (20, 21, 22)]
    layers = [jax_moe.prepare(case.experts, layout, progress=False) for case in cases]  # I: two slices of whole blocks
    placed = [jax.device_put(experts, jax_moe.expert_shardings(experts, mesh)) for experts in layers]
    stack = jax.tree.map(lambda *leaves: np.stack(leaves), *layers)
    return cases, placed, jax.device_put(stack, jax_moe.expert_shardings(stack, mesh))


@pytest.mark.parametrize("layout", ["canonical", "sm_90a"])
def test_stacked_layers_have_the_placement_of_each(layout):
    """However many axes lead: each device holds of the stack what it would hold of every layer."""
    mesh = jax.make_mesh((2, 2), ("expert", "tensor"), axis_types=(AUTO,) * 2)
    _, layers, stack = stacked_layers(layout, mesh)
    for leaf, *parts in zip(jax.tree.leaves(stack), *map(jax.tree.leaves, layers), strict=True):
        for shard in leaf.addressable_shards:
            held = [next(s.data for s in part.addressable_shards if s.device == shard.device) for part in parts]
            helpers.assert_bit_equal(shard.data, jnp.stack([jax.device_put(part, shard.device) for part in held]))
    deeper = jax.tree.map(lambda leaf: np.asarray(leaf)[None], stack)
    for leaf, sharding in zip(
        jax.tree.leaves(stack), jax.tree.leaves(jax_moe.expert_shardings(deeper, mesh)), strict=True
    ):
        assert sharding.is_equivalent_to(NamedSharding(mesh, P(None, *leaf.sharding.spec)), leaf.ndim + 1)
    with pytest.raises(ValueError, match=r"expert_axis: \('all',\) has 8 devices, which does not divide E = 4"):
        jax_moe.expert_shardings(stack, jax.make_mesh((8,), ("all",), axis_types=(AUTO,)), expert_axis="all")


def test_a_scan_over_stacked_layers_moves_no_weight():
    mesh = jax.make_mesh((2, 2), ("expert", "tensor"), axis_types=(AUTO,) * 2)
    cases, layers, stack = stacked_layers("canonical", mesh)
    x, routing = cases[0].x, cases[0].routing

    def layer(x, experts):
        return jax_moe.sharded_moe(x, experts, routing, mesh=mesh), None

    run = jax.jit(lambda x, stack: jax.lax.scan(layer, x, stack)[0])
    expected = x
    for experts in layers:
        expected = jax.jit(layer)(expected, experts)[0]
    helpers.assert_bit_equal(run(x, stack), expected)
    assert moved(run.lower(x, stack)) == []
    assert "all-gather" not in run.lower(x, stack).compile().as_text()


def test_a_scan_over_stacked_prepared_layers_moves_no_weight():
    """Unpacked inside ``shard_map``, each device its part of each layer: what the layers were made of."""
    mesh = jax.make_mesh((2, 2), ("expert", "tensor"), axis_types=(AUTO,) * 2)
    cases, _, stack = stacked_layers("sm_90a", mesh)
    wanted = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(case.experts for case in cases))
    specs = [placement.partition_specs(experts, mesh) for experts in (stack, wanted)]

    def local(stack):
        return jax.lax.scan(lambda _, experts: (None, jax_moe.unprepare(experts, 48, 64)), None, stack)[1]

    run = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(specs[0],), out_specs=specs[1]))
    jax.tree.map(helpers.assert_bit_equal, run(stack), wanted)
    assert moved(run.lower(stack)) == []


def test_one_compilation_serves_every_layer():
    layers = [make_case(seed, hidden=48, intermediate=64, num_experts=4).experts for seed in (10, 11)]
    placed = [place(experts, 2, 2)[1] for experts in layers]
    run, _ = preparation._prepare_in_place._bind(placed[0], ("wgmma_v1",))
    again, _ = preparation._prepare_in_place._bind(placed[1], ("wgmma_v1",))
    assert run is again
