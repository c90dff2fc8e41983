"""``sharded_moe`` on eight virtual devices: the unsharded bits, and no weight that moves."""

import dataclasses
import functools
import itertools
import math
import re

import helpers
from helpers import make_case, make_exact_case
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import numpy as np
import pytest

import jax_moe
from jax_moe import ffi, moe, primitive

AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit


def make_mesh(axis_type=AUTO, **axes):
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(axis_type,) * len(axes))


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh, and which of its axes shard what."""

    axes: dict[str, int]
    names: dict[str, str | tuple[str, ...] | None] = dataclasses.field(default_factory=dict)

    def __str__(self):
        return " ".join(
            [f"{name}{size}" for name, size in self.axes.items()] + [f"{k}={v}" for k, v in self.names.items()]
        )

    @property
    def data_axes(self) -> tuple[str, ...]:
        name = self.names.get("data_axis", "data")
        return name if isinstance(name, tuple) else (name,) if name in self.axes else ()

    @property
    def tokens(self):
        """How x and the routing are sharded."""
        return P(self.data_axes or None, None)

    def size(self, *names) -> int:
        return math.prod(self.axes[name] for name in names)

    @property
    def model_names(self):
        return {key: value for key, value in self.names.items() if key != "data_axis"}

    def place(self, case, axis_type=AUTO):
        """The mesh, and the case with every array sharded over it."""
        mesh = make_mesh(axis_type, **self.axes)
        tokens = NamedSharding(mesh, self.tokens)
        return mesh, dataclasses.replace(
            case,
            x=jax.device_put(case.x, tokens),
            routing=jax.device_put(case.routing, tokens),
            experts=jax.device_put(case.experts, jax_moe.expert_shardings(case.experts, mesh, **self.model_names)),
        )

    def function(self, mesh, case, **options):
        """``sharded_moe`` as a function of arrays alone, under jit."""
        options = self.names | case.options | options
        return jax.jit(lambda x, experts, routing: jax_moe.sharded_moe(x, experts, routing, mesh=mesh, **options))


@pytest.mark.parametrize("axis_type", [AUTO, EXPLICIT])
@pytest.mark.parametrize("debug", ["0", "1"])
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_the_mesh_may_be_the_one_that_is_set(monkeypatch, wrap, debug, axis_type):
    monkeypatch.setenv("JAX_MOE_DEBUG", debug)
    case = make_exact_case(num_experts=8)
    mesh = make_mesh(axis_type, expert=4)
    experts = jax.device_put(case.experts, jax_moe.expert_shardings(case.experts, mesh))
    with jax.set_mesh(mesh):
        got = wrap(functools.partial(jax_moe.sharded_moe, **case.options))(case.x, experts, case.routing)
    helpers.assert_bit_equal(got, case.run())


@pytest.mark.parametrize("axes", [{"expert": 4}, {"data": 2, "tensor": 2}], ids=str)
def test_the_local_op_knows_how_many_experts_there_are_in_all(axes):
    """A GPU's kernels are chosen for T*K/E tokens an expert, and E is not what a device holds."""
    case, mesh = make_case(num_experts=8), make_mesh(**axes)
    traced = jax.make_jaxpr(functools.partial(jax_moe.sharded_moe, mesh=mesh))(case.x[:4], case.experts, jax.tree.map(
        lambda leaf: leaf[:4], case.routing))  # fmt: skip
    (run,) = [e.params["jaxpr"] for e in traced.eqns if e.primitive.name == "shard_map"]
    (problem,) = [e.params["problem"] for e in run.eqns if e.primitive is primitive.fused_moe_p]
    assert (problem.local_experts, problem.num_experts) == (8 // axes.get("expert", 1), 8)


@pytest.mark.parametrize("axis_type", [AUTO, EXPLICIT])
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("axes", [{"expert": 4}, {"data": 2, "tensor": 2}], ids=str)
def test_debug_mode_looks_at_all_ids_once(monkeypatch, axes, wrap, axis_type):
    """Not on every device again, and not only at those of its tokens."""
    seen = []
    monkeypatch.setenv("JAX_MOE_DEBUG", "1")
    monkeypatch.setattr(moe, "_raise_on_bad_id", lambda ids, num_experts: seen.append((np.array(ids), num_experts)))
    mesh, case = Layout(axes).place(make_case(num_experts=8, tokens=4), axis_type)
    with jax.set_mesh(mesh):
        jax.block_until_ready(wrap(jax_moe.sharded_moe)(case.x, case.experts, case.routing))
    jax.effects_barrier()
    ((ids, num_experts),) = seen
    assert np.array_equal(ids, case.routing.expert_ids)
    assert num_experts == 8


def test_debug_mode_names_the_token_of_all_and_the_number_of_all_experts():
    program = """
import jax, jax_moe, helpers
case = helpers.make_case(0, tokens=8, num_experts=8)
mesh = jax.make_mesh((2, 2), ("data", "expert"))
routing = jax_moe.Routing(case.routing.expert_ids.at[6, 1].set(8), case.routing.weights)
try:
    jax.block_until_ready(jax_moe.sharded_moe(case.x, case.experts, routing, mesh=mesh))
    jax.effects_barrier()
except Exception as error:
    assert "routing.expert_ids: got 8 for token 6, slot 1 (1 such ids), needs 0 <= id < E = 8" in str(error), error
    print("reported")
"""
    assert helpers.run_python(program, JAX_MOE_DEBUG="1", JAX_NUM_CPU_DEVICES="4") == "reported\n"


def test_without_any_mesh_it_says_so():
    case = make_case()
    with pytest.raises(ValueError, match=r"mesh: got None, and jax\.set_mesh has set none"):
        jax_moe.sharded_moe(case.x, case.experts, case.routing)


SEPARATE = [
    Layout({"expert": 8}),
    Layout({"tensor": 8}),
    Layout({"data": 8}),
    Layout({"expert": 2, "tensor": 4}),
    Layout({"tensor": 2, "expert": 4}),
    Layout({"data": 2, "expert": 2, "tensor": 2}),
    Layout({"data": 1, "expert": 8}),
    Layout({"data": 8, "expert": 1}),
    Layout({"data": 4, "tensor": 2}),
    Layout({"other": 2, "expert": 4}),  # an axis that nothing is sharded over
    Layout({"x": 2, "y": 4}, {"expert_axis": "y", "tensor_axis": "x", "data_axis": None}),
    Layout({"a": 2, "b": 2, "c": 2}, {"expert_axis": ("a", "b"), "tensor_axis": "c"}),
    Layout({"a": 2, "b": 2, "c": 2}, {"expert_axis": ("c", "a"), "tensor_axis": "b"}),  # not in the mesh's order
    Layout({"a": 2, "b": 2, "c": 2}, {"expert_axis": None, "tensor_axis": ("b", "c"), "data_axis": "a"}),
]
GATHERED = [
    Layout({"expert": 8}, {"data_axis": "expert"}),
    Layout({"tensor": 8}, {"data_axis": "tensor"}),
    Layout({"expert": 4, "tensor": 2}, {"data_axis": "expert"}),
    Layout({"expert": 4, "tensor": 2}, {"data_axis": ("expert", "tensor")}),
    Layout({"data": 2, "expert": 4}, {"data_axis": ("data", "expert")}),
    Layout({"data": 2, "expert": 4}, {"data_axis": ("expert", "data")}),
]


@pytest.mark.parametrize("layout", SEPARATE + GATHERED, ids=str)
def test_the_unsharded_bits(layout):
    """On exact cases, bias and all; which rows are whose cannot be mixed up, since no two rows are alike."""
    for precision, combine in (("w4a16", "atomic"), ("w4a4", "ordered")):
        case = make_exact_case(precision=precision, combine=combine)
        mesh, placed = layout.place(case)
        run = layout.function(mesh, placed)
        y = run(placed.x, placed.experts, placed.routing)
        assert y.sharding.is_equivalent_to(NamedSharding(mesh, layout.tokens), 2)
        helpers.assert_bit_equal(y, case.run())


@pytest.mark.parametrize("layout", [SEPARATE[5], GATHERED[3]], ids=str)
@pytest.mark.parametrize(
    ("precision", "weight_on", "gated"),
    list(itertools.product(("w4a16", "w4a4"), ("output", "input"), (True, False))),
)
def test_every_option(layout, precision, weight_on, gated):
    out_dtype = jnp.float32 if weight_on == "output" else jnp.bfloat16
    case = make_exact_case(1, precision=precision, weight_on=weight_on, gated=gated, out_dtype=out_dtype)
    mesh, placed = layout.place(case)
    run = layout.function(mesh, placed)
    helpers.assert_bit_equal(run(placed.x, placed.experts, placed.routing), case.run())


@pytest.mark.parametrize("layout", [SEPARATE[0], SEPARATE[3], SEPARATE[5], GATHERED[0], GATHERED[3]], ids=str)
def test_explicit_axes(layout):
    case = make_exact_case(2)
    mesh, placed = layout.place(case, EXPLICIT)
    with jax.set_mesh(mesh):
        y = layout.function(mesh, placed)(placed.x, placed.experts, placed.routing)
    helpers.assert_bit_equal(y, case.run())


@pytest.mark.parametrize("layout", [SEPARATE[5], GATHERED[0]], ids=str)
@pytest.mark.parametrize("activation", helpers.ACTIVATIONS[1:5], ids=str)
def test_random_cases_match_the_definition(layout, activation):
    case = make_case(
        3, tokens=16, hidden=48, intermediate=64, num_experts=8, top_k=3, activation=activation, bias=True,
        precision="w4a4", routing="hostile", out_dtype=jnp.float32,
    )  # fmt: skip
    case = dataclasses.replace(case, options={k: v for k, v in case.options.items() if k != "expert_offset"})
    mesh, placed = layout.place(case)
    y = layout.function(mesh, placed)(placed.x, placed.experts, placed.routing)
    helpers.assert_matches(y, case)


def test_arrays_of_one_device_and_eager_calls():
    """Arrays that are nowhere in particular, as in a first try at it."""
    case = make_exact_case(4)
    mesh = make_mesh(data=2, expert=2, tensor=2)
    y = jax_moe.sharded_moe(case.x, case.experts, case.routing, mesh=mesh, **case.options)
    helpers.assert_bit_equal(y, case.run())


def test_inside_scan_over_layers():
    cases = [make_exact_case(seed) for seed in range(2)]
    mesh = make_mesh(expert=4, tensor=2)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *((c.experts, c.routing) for c in cases))

    def layer(total, weights):
        return total + jax_moe.sharded_moe(cases[0].x, *weights, mesh=mesh, **cases[0].options), None

    total, _ = jax.jit(lambda: jax.lax.scan(layer, jnp.zeros_like(cases[0].x), stacked))()
    x = cases[0].x
    expected = sum(jax_moe.fused_moe(x, c.experts, c.routing, **c.options) for c in cases)
    helpers.assert_bit_equal(total, expected)


# --- What moves ---------------------------------------------------------------------------------------------------

_COLLECTIVE = re.compile(
    r"= (.*?) (all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute|collective-broadcast)(?:-start)?\("
)


def collectives(run, case) -> list[tuple[str, str]]:
    """(kind, result type) of every collective of the compiled program."""
    hlo = run.lower(case.x, case.experts, case.routing).compile().as_text()
    assert f'custom_call_target="{ffi.TARGET}"' in hlo
    return [(kind, result) for result, kind in _COLLECTIVE.findall(hlo)]


@pytest.mark.parametrize("axis_type", [AUTO, EXPLICIT], ids=["auto", "explicit"])
@pytest.mark.parametrize("layout", SEPARATE, ids=str)
def test_only_partial_sums_move(layout, axis_type):
    mesh, case = layout.place(make_exact_case(), axis_type)
    moved = collectives(layout.function(mesh, case), case)
    tokens = 16 // layout.size(*layout.data_axes)
    assert all(kind == "all-reduce" and result.startswith(f"f32[{tokens},64]") for kind, result in moved), moved
    # One sum over all the model axes at once, where there are any.
    unused = set(layout.data_axes) | {"other"} & set(layout.axes)
    assert len(moved) <= 1
    assert moved or layout.size(*unused) == 8


@pytest.mark.parametrize("layout", GATHERED, ids=str)
def test_only_tokens_and_sums_move(layout):
    """Gathered: x (bf16), ids (s32) and weights (f32) over at most all 16 tokens; no uint8, no float8, nothing of I."""
    mesh, case = layout.place(make_exact_case())
    moved = collectives(layout.function(mesh, case), case)
    assert any(kind == "all-gather" for kind, _ in moved)
    for kind, result in moved:
        types = re.findall(r"(\w+)\[([\d,]*)\]", result)
        assert {name for name, _ in types} <= {"bf16", "u16", "s32", "f32"}, (kind, result)
        for _, shape in types:
            assert math.prod(map(int, shape.split(","))) <= 16 * 64, (kind, result)


def test_the_collectives_are_seen():
    """The pattern finds what it looks for: weights that are gathered on purpose."""
    case = make_exact_case()
    mesh = make_mesh(expert=8)
    experts = jax.device_put(case.experts, jax_moe.expert_shardings(case.experts, mesh))

    def gather(x, experts, routing):
        payload = jax.lax.with_sharding_constraint(experts.gate_up.payload, NamedSharding(mesh, P()))
        gate_up = dataclasses.replace(experts.gate_up, payload=payload)
        options = case.options | {"mesh": mesh, "expert_axis": None, "data_axis": "expert"}
        return jax_moe.sharded_moe(x, dataclasses.replace(experts, gate_up=gate_up), routing, **options)

    moved = collectives(jax.jit(gather), dataclasses.replace(case, experts=experts))
    assert any(kind == "all-gather" and "u8[" in result for kind, result in moved), moved


# --- Shardings ----------------------------------------------------------------------------------------------------


def test_expert_shardings_put_every_leaf_where_it_is_used():
    case = make_exact_case()
    mesh = make_mesh(tensor=2, expert=4)
    placed = jax.device_put(case.experts, jax_moe.expert_shardings(case.experts, mesh))
    local = jax.tree.map(lambda leaf: leaf.addressable_shards[0].data.shape, placed)
    assert local.gate_up == jax_moe.Projection((2, 2, 64, 32), (2, 2, 64, 4), (2, 2), (), (2, 2, 64))
    assert local.down == jax_moe.Projection((2, 64, 32), (2, 64, 4), (2,), (2,), (2, 64))


def test_expert_shardings_drop_absent_leaves():
    experts = helpers.without_input_scales(make_case(0).experts)
    shardings = jax_moe.expert_shardings(experts, make_mesh(expert=2))
    assert jax.tree.structure(shardings) == jax.tree.structure(experts)


# --- Errors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("axes", "options", "message"),
    [
        ({"expert": 8}, {"num_experts": 4}, r"expert_axis: \('expert',\) has 8 devices.*E = 4"),
        ({"expert": 8}, {"num_experts": 12, "top_k": 2}, r"expert_axis: .*E = 12"),
        ({"tensor": 8}, {"intermediate": 64}, r"tensor_axis: .*8 devices.*I = 64 into slices that are multiples of 16"),
        ({"tensor": 2}, {"intermediate": 48}, r"tensor_axis: .*I = 48 into slices that are multiples of 16"),
        ({"data": 8}, {"tokens": 12}, r"data_axis: .*8 devices.*T = 12"),
        ({"data": 2}, {"tokens": 1}, r"data_axis: .*T = 1"),
        ({"model": 8}, {}, r"mesh: got axes \('model',\), none of which is the expert_axis"),
    ],
    ids=str,
)
def test_a_mesh_that_does_not_fit(axes, options, message):
    case = make_exact_case(**options)
    arguments = {"mesh": make_mesh(**axes)} | case.options
    with pytest.raises(ValueError, match=message):
        jax_moe.sharded_moe(case.x, case.experts, case.routing, **arguments)
    with pytest.raises(ValueError, match=message):
        jax.jit(lambda *arrays: jax_moe.sharded_moe(*arrays, **arguments)).lower(case.x, case.experts, case.routing)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"expert_axis": "experts"}, r"expert_axis: got 'experts', but the mesh has the axes \('expert', 'tensor'\)"),
        ({"tensor_axis": ("tensor", "t")}, r"tensor_axis: got \('tensor', 't'\), but the mesh has the axes"),
        ({"data_axis": "batch"}, "data_axis: got 'batch', but the mesh has the axes"),
        ({"tensor_axis": "expert"}, r"expert_axis, tensor_axis: both got \['expert'\]"),
    ],
    ids=str,
)
def test_axes_that_do_not_fit(names, message):
    case = make_exact_case()
    with pytest.raises(ValueError, match=message):
        jax_moe.sharded_moe(case.x, case.experts, case.routing, mesh=make_mesh(expert=4, tensor=2), **names)


@pytest.mark.parametrize("axis", [3, ["expert"], ("expert", 4)], ids=str)
def test_axes_that_are_no_axes(axis):
    case = make_exact_case()
    with pytest.raises((TypeError, ValueError), match="expert_axis: got"):
        jax_moe.sharded_moe(case.x, case.experts, case.routing, mesh=make_mesh(expert=4), expert_axis=axis)


@pytest.mark.parametrize("mesh", ["mesh", (2, 4)], ids=str)
def test_no_mesh(mesh):
    case = make_exact_case()
    with pytest.raises(TypeError, match="mesh: got"):
        jax_moe.sharded_moe(case.x, case.experts, case.routing, mesh=mesh)


def test_no_tokens():
    case = make_exact_case(tokens=0)
    y = jax_moe.sharded_moe(case.x, case.experts, case.routing, mesh=make_mesh(expert=4, tensor=2), **case.options)
    assert y.shape == (0, 64)


# --- Without sharded_moe ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis_type", [AUTO, EXPLICIT], ids=["auto", "explicit"])
@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("what", ["experts", "x", "everything"])
def test_plain_fused_moe_on_sharded_arrays_raises(what, transform, axis_type):
    """Rather than to gather the weights on every device."""
    case = make_exact_case()
    _, placed = Layout({"data": 2, "expert": 4}).place(case, axis_type)
    if what == "experts":
        placed = dataclasses.replace(placed, x=case.x, routing=case.routing)
    elif what == "x":
        placed = dataclasses.replace(placed, experts=case.experts)
    run = transform(lambda x, experts, routing: jax_moe.fused_moe(x, experts, routing, **case.options))
    with pytest.raises(ValueError, match=r"fused_moe: .*8 devices.*sharded_moe|[Ii]ncompatible devices"):
        run(placed.x, placed.experts, placed.routing)


def test_plain_fused_moe_on_a_mesh_of_one_device():
    case = make_exact_case()
    _, placed = Layout({"expert": 1}).place(case)
    run = jax.jit(lambda x, experts, routing: jax_moe.fused_moe(x, experts, routing, **case.options))
    helpers.assert_bit_equal(run(placed.x, placed.experts, placed.routing), case.run())


@pytest.mark.parametrize("axis_type", [AUTO, EXPLICIT], ids=["auto", "explicit"])
def test_inside_a_shard_map_of_ones_own(axis_type):
    """With vma checking on: expert parallelism written by hand."""
    case = make_exact_case(5, out_dtype=jnp.float32)
    mesh, placed = Layout({"data": 2, "expert": 4}).place(case, axis_type)
    specs = jax.tree.map(lambda s: s.spec, jax_moe.expert_shardings(case.experts, mesh))

    def local(x, experts, routing):
        offset = jax.lax.axis_index("expert") * 2
        y = jax_moe.fused_moe(x, experts, routing, expert_offset=offset, **case.options)
        assert jax.typeof(y).mat.varying == {"data", "expert"}
        return jax.lax.psum(y, "expert")

    tokens = P("data", None)
    run = jax.shard_map(local, mesh=mesh, in_specs=(tokens, specs, tokens), out_specs=tokens, check_vma=True)
    helpers.assert_bit_equal(jax.jit(run)(placed.x, placed.experts, placed.routing), case.run())


def test_inside_a_shard_map_over_some_axes_raises():
    """The others stay XLA's to partition, and it would gather over them."""
    case = make_exact_case()
    mesh = make_mesh(data=2, expert=4)

    def local(x, experts, routing):
        return jax_moe.fused_moe(x, experts, routing, **case.options)

    run = jax.shard_map(local, mesh=mesh, in_specs=P(), out_specs=P(), axis_names={"data"}, check_vma=False)
    with pytest.raises(ValueError, match=r"fused_moe: .*4 devices.*sharded_moe"):
        jax.jit(run)(case.x, case.experts, case.routing)


def test_eager_weights_that_are_placed_otherwise_are_refused():
    """Under jit over automatic axes a placement cannot be seen; outside it can, and nothing may move silently."""
    mesh = make_mesh(expert=2, tensor=2)
    case = make_case(num_experts=4, intermediate=32)
    placed = jax.device_put(case.experts, jax_moe.expert_shardings(case.experts, mesh))
    jax_moe.sharded_moe(case.x, placed, case.routing, mesh=mesh)
    elsewhere = jax.device_put(placed.down.payload, NamedSharding(mesh, P(None, "expert", None)))
    moved = dataclasses.replace(placed, down=dataclasses.replace(placed.down, payload=elsewhere))
    with pytest.raises(ValueError, match=r"experts\.down\.payload: got sharding"):
        jax_moe.sharded_moe(case.x, moved, case.routing, mesh=mesh)


def test_an_axis_of_one_device_moves_nothing():
    """Weights that are spread over experts only, on a mesh that has a tensor axis of size 1."""
    case = make_exact_case(9)
    mesh = make_mesh(EXPLICIT, expert=4, tensor=1)
    shardings = jax_moe.expert_shardings(case.experts, mesh, tensor_axis=None)
    experts = jax.device_put(case.experts, shardings)
    with jax.set_mesh(mesh):
        y = jax.jit(functools.partial(jax_moe.sharded_moe, **case.options))(case.x, experts, case.routing)
    helpers.assert_bit_equal(y, case.run())


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_the_types_of_axes_are_no_placement(wrap):
    """Weights that were placed on automatic axes, used where the same mesh is set with explicit ones."""
    case = make_exact_case(10)
    placed = jax.device_put(case.experts, jax_moe.expert_shardings(case.experts, make_mesh(expert=4)))
    with jax.set_mesh(make_mesh(EXPLICIT, expert=4)):
        y = wrap(functools.partial(jax_moe.sharded_moe, **case.options))(case.x, placed, case.routing)
    helpers.assert_bit_equal(y, case.run())


def test_axes_of_both_types_are_refused():
    case = make_exact_case(11)
    mesh = jax.make_mesh((2, 4), ("data", "expert"), axis_types=(AUTO, EXPLICIT))
    with pytest.raises(ValueError, match=r"mesh: got axes of types .*, needs all automatic or all explicit"):
        jax_moe.sharded_moe(case.x, case.experts, case.routing, mesh=mesh)


def test_an_axis_that_is_named_twice_is_refused():
    case = make_exact_case(12)
    with pytest.raises(ValueError, match=r"data_axis: got .*, needs each mesh axis once"):
        jax_moe.sharded_moe(
            case.x, case.experts, case.routing, mesh=make_mesh(data=2, expert=4), data_axis=("data", "data")
        )
