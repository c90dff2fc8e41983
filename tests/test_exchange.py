"""What travels between devices in ``sharded_moe``, and what it does to the numbers: w4a4's codes, sums in bfloat16."""

import dataclasses
import functools
import math
import re

import helpers
from helpers import make_case, make_exact_case
import jax
import jax.export
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec as P
import numpy as np
import pytest
import statement
import test_derivative
from test_sharded_moe import GATHERED, Layout, make_mesh, SEPARATE

import jax_moe
from jax_moe import exchange, nvfp4, parcels
from jax_moe.experts import CANONICAL

REPLICATED = Layout({"expert": 8})
SPREAD = Layout({"expert": 8}, {"data_axis": "expert"})
TENSOR = Layout({"tensor": 4})
TENSOR_SPREAD = Layout({"tensor": 4}, {"data_axis": "tensor"})
BOTH = Layout({"expert": 4, "tensor": 2}, {"data_axis": ("expert", "tensor")})
BOTH_TURNED = Layout({"expert": 4, "tensor": 2}, {"data_axis": ("tensor", "expert")})
HALF = Layout({"expert": 4, "tensor": 2}, {"data_axis": "expert"})
INVARIANT = {"combine": "ordered", "batch_invariant": True}


def random_case(seed=0, **options):
    options = (
        dict(tokens=16, hidden=64, intermediate=64, num_experts=8, top_k=3, bias=True, out_dtype=jnp.float32) | options
    )
    case = make_case(seed, **options)
    return dataclasses.replace(case, options={k: v for k, v in case.options.items() if k != "expert_offset"})


def with_input_scale(case, scale):
    gate_up = dataclasses.replace(case.experts.gate_up, input_scale=jnp.asarray(scale, jnp.float32))
    return dataclasses.replace(case, experts=dataclasses.replace(case.experts, gate_up=gate_up))


def hard_x(case, scale: float):
    """Ordinary tokens, ties, and blocks of zeros, of subnormals and under subnormal scales, of infinities."""
    rng = np.random.default_rng(9)
    blocks = np.asarray(case.x, np.float64).reshape(16, -1, 16) * scale * 300
    blocks[1] = rng.integers(-255, 256, blocks[1].shape) * scale  # on boundaries of e2m1 and of e4m3
    blocks[2] *= 2.0**-16  # block scales from 2^-9 to 2^-6
    blocks[3] = 0
    blocks[4, 0] = 2.0**-130  # subnormal in bfloat16
    blocks[4, 1] = 3e38
    blocks[4, 2, 3], blocks[4, 3, 5] = np.inf, -np.inf
    blocks[5, 1] = -0.0
    blocks[6] = np.resize([0.25, -0.75, 1.25, -1.75, 2.5, -3.5, 5, 6], 16) * scale
    return jnp.asarray(blocks.reshape(case.x.shape), jnp.bfloat16)


def run_on(layout, case, axis_type=AxisType.Auto, **options):
    mesh, placed = layout.place(case, axis_type)
    with jax.set_mesh(mesh):
        return np.asarray(layout.function(mesh, placed, **options)(placed.x, placed.experts, placed.routing))


def same(actual, expected):
    """The bits, but for the sign of a zero and what a NaN says."""
    np.testing.assert_array_equal(actual, expected, strict=True)


# --- w4a4: codes and block scales instead of x --------------------------------------------------------------------


@pytest.mark.parametrize("layout", [SPREAD, TENSOR_SPREAD, BOTH, BOTH_TURNED], ids=str)
def test_gathered_rows_are_the_definitions(layout):
    """Bit for bit, in the order of the tokens, on every device."""
    axes, tokens = layout.data_axes, P(layout.data_axes, None)

    @jax.jit
    @functools.partial(jax.shard_map, mesh=make_mesh(**layout.axes), in_specs=(tokens, tokens, P()), out_specs=P(axes))
    def gathered(x, routing, scale):
        found = exchange.gather_parcels(x, routing, scale, axes, layout=CANONICAL, command_buffer=True)
        return jax.tree.map(lambda leaf: leaf[None], found)

    rng = np.random.default_rng(8)
    ids, weights = rng.integers(-(2**31), 2**31, (16, 3)), rng.normal(size=(16, 3))
    routing = jax_moe.Routing(jnp.asarray(ids, jnp.int32), jnp.asarray(weights, jnp.float32))
    for scale in np.float32([2.0**-115, 1 / 448, 1, 3, 2.0**100]):
        x = hard_x(random_case(), scale).at[7, 20].set(jnp.nan)
        values = np.asarray(x, np.float32)
        with np.errstate(all="ignore"):  # NumPy reports the NaN
            flushed = np.where(np.abs(values) < 2.0**-126, np.float32(0), values)  # as XLA's CPU backend does
            expected = statement.dequantize(*statement.quantize(flushed, scale))
        got, got_routing, rows = gathered(x, routing, scale)
        assert (got.shape, got.dtype) == ((layout.size(*axes), *x.shape), jnp.bfloat16)
        for of_a_device in np.asarray(got, np.float32):
            same(of_a_device, expected)
        for of_all, whole in zip(jax.tree.leaves(got_routing), jax.tree.leaves(routing), strict=True):
            same(np.asarray(of_all), np.broadcast_to(whole, of_all.shape))
        assert (np.asarray(rows) == np.asarray(rows)[:1]).all()


@pytest.mark.parametrize("layout", [*GATHERED, BOTH_TURNED], ids=str)
def test_the_bits_of_the_bfloat16_gather(monkeypatch, layout):
    for seed, scale in enumerate((None, 1.0, 3.0)):
        combine = "atomic" if seed else "ordered"
        case = random_case(seed, precision="w4a4", combine=combine, routing="any", intermediate=128)
        if scale is not None:
            case = with_input_scale(dataclasses.replace(case, x=hard_x(case, scale).at[7, 20].set(jnp.nan)), scale)
        got = run_on(layout, case)
        with monkeypatch.context() as changed:
            changed.setattr(parcels, "are_taken", lambda _: False)
            expected = run_on(layout, case)
        same(got, expected)
        assert np.isnan(got).any(1).tolist() == [scale is not None and token == 7 for token in range(16)]
        assert len(np.unique(got)) > 500


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("layout", [SPREAD, GATHERED[4]], ids=str)
def test_the_bits_of_one_device(layout, axis_type):
    """With one expert a token there is one part that is not zero, so that no sum has an order."""
    for seed, scale in enumerate((None, 1 / 448, 3.0)):
        case = random_case(seed, precision="w4a4", top_k=1)
        if scale is not None:
            case = with_input_scale(dataclasses.replace(case, x=hard_x(case, scale)), scale)
        same(run_on(layout, case, axis_type), case.run())


def test_only_where_the_local_op_takes_it():
    """What is weighted on the way in, and what is not rounded at all, travels as it is."""
    for options in ({"precision": "w4a16"}, {"precision": "w4a4", "weight_on": "input"}):
        case = make_exact_case(1, **options)
        helpers.assert_bit_equal(run_on(SPREAD, case), case.run())
        assert ("all_gather", BF16) in moved(SPREAD, case)


def test_prepared_experts_of_a_layout_that_quantises_itself():
    """tcgen05_fp4_v1: its kernels multiply codes, and take x in bfloat16."""
    case = random_case(precision="w4a4", num_experts=4, hidden=128, intermediate=128)
    mesh = make_mesh(expert=2)
    for target, takes in (("sm_90a", True), ("sm_100f", False)):
        experts = jax.eval_shape(functools.partial(jax_moe.prepare, target=target, precision="w4a4"), case.experts)
        run = functools.partial(jax_moe.sharded_moe, mesh=mesh, data_axis="expert", precision="w4a4")
        traced = str(jax.make_jaxpr(run)(case.x, experts, case.routing))
        assert ("x_form='parcels'" in traced) is takes
        gathers = re.findall(r":(\w+)\[[\d,]*\](?:\{.*?\})? = all_gather\[", traced)
        assert gathers == (["u8"] if takes else ["bf16", "i32", "f32"])


def test_no_quotient_of_the_rounding_is_float32():
    """XLA's GPU backend divides float32 within a unit or two in the last place, which changes codes."""
    x = jax.ShapeDtypeStruct((4, 64), jnp.bfloat16)
    text = jax.jit(nvfp4.quantize).lower(x, jax.ShapeDtypeStruct((), jnp.float32)).as_text()
    divisions = [line for line in text.splitlines() if "stablehlo.divide" in line]
    assert len(divisions) == 2
    assert all(line.rstrip().endswith("xf64>") for line in divisions), divisions
    assert text.count("stablehlo.reduce_precision") == 2  # without it LLVM would narrow them


# --- What travels -------------------------------------------------------------------------------------------------

_COLLECTIVE = re.compile(r'"stablehlo\.(all_gather|all_reduce|all_to_all|reduce_scatter|collective_\w+)"')
_RESULT = re.compile(r"\) -> tensor<([\dx]+)x(\w+)>")
_BYTES = {"ui8": 1, "bf16": 2, "i32": 4, "f32": 4}


def moved(layout, case, **options) -> list[tuple[str, int]]:
    """(kind, bytes of the result on a device) of every collective, sorted.

    By the program as it is lowered, because XLA's CPU backend widens bfloat16 on the way; compiling adds none to it.
    """
    mesh, placed = layout.place(case)
    lowered = layout.function(mesh, placed, **options).lower(placed.x, placed.experts, placed.routing)
    lines, found = iter(lowered.as_text().splitlines()), []
    for line in lines:
        if kind := _COLLECTIVE.search(line):
            while not (result := _RESULT.search(line)):  # behind what it adds with
                line = next(lines)
            found.append((kind[1], _BYTES[result[2]] * math.prod(map(int, result[1].split("x")))))
    compiled = re.findall(
        r" (all-gather|all-reduce|all-to-all|reduce-scatter|collective-\w+)(?:-start)?\(", lowered.compile().as_text()
    )
    assert sorted(kind.replace("-", "_") for kind in compiled) == sorted(kind for kind, _ in found)
    return sorted(found)


T, H, K = 16, 64, 4  # of make_exact_case
BF16, F32 = T * H * 2, T * H * 4
ROUTING = [("all_gather", T * K * 4), ("all_gather", T * K * 4)]  # ids and weights
PARCELS = ("all_gather", T * (H * 9 // 16 + K * 8 + 4))  # a row is a multiple of 8 bytes


@pytest.mark.parametrize(
    ("layout", "precision", "sum_dtype", "expected"),
    [
        (REPLICATED, "w4a4", jnp.float32, [("all_reduce", F32)]),
        (TENSOR, "w4a4", jnp.float32, [("all_reduce", F32)]),
        (SPREAD, "w4a16", jnp.float32, [("all_gather", BF16), *ROUTING, ("reduce_scatter", F32 // 8)]),
        (SPREAD, "w4a4", jnp.float32, [PARCELS, ("reduce_scatter", F32 // 8)]),
        (SPREAD, "w4a16", jnp.bfloat16, [("all_gather", BF16), *ROUTING, ("all_to_all", BF16)]),
        (SPREAD, "w4a4", jnp.bfloat16, [PARCELS, ("all_to_all", BF16)]),
        (TENSOR_SPREAD, "w4a4", jnp.float32, [PARCELS, ("reduce_scatter", F32 // 4)]),
        (TENSOR_SPREAD, "w4a4", jnp.bfloat16, [PARCELS, ("all_to_all", BF16)]),
        (BOTH, "w4a4", jnp.float32, [PARCELS, ("reduce_scatter", F32 // 8)]),
        (BOTH, "w4a4", jnp.bfloat16, [PARCELS, ("all_to_all", BF16)]),
        (HALF, "w4a4", jnp.float32, [PARCELS, ("reduce_scatter", F32 // 4), ("all_reduce", F32 // 4)]),
        (HALF, "w4a4", jnp.bfloat16, [PARCELS, ("all_to_all", BF16), ("all_reduce", BF16 // 4)]),
        (REPLICATED, "w4a4", jnp.bfloat16, [("all_reduce", BF16)]),
        (TENSOR, "w4a16", jnp.bfloat16, [("all_reduce", BF16)]),
        (Layout({"data": 8}), "w4a4", jnp.bfloat16, []),
        (Layout({"data": 8, "expert": 1}, {"data_axis": ("data", "expert")}), "w4a4", jnp.bfloat16, []),
    ],
    ids=str,
)  # fmt: skip
def test_everything_that_travels(layout, precision, sum_dtype, expected):
    assert moved(layout, make_exact_case(precision=precision), sum_dtype=sum_dtype) == sorted(expected)


# --- Sums that travel in bfloat16 ---------------------------------------------------------------------------------

SUMMED = [layout for layout in [*SEPARATE, *GATHERED, BOTH_TURNED] if "other" not in layout.axes]


@pytest.mark.parametrize("layout", SUMMED, ids=str)
def test_sums_in_bfloat16_are_within_the_bound(layout):
    for seed, (precision, out_dtype) in enumerate((("w4a16", jnp.float32), ("w4a4", jnp.bfloat16))):
        case = random_case(seed, precision=precision, intermediate=128, out_dtype=out_dtype, combine="ordered")
        got = run_on(layout, case, sum_dtype=jnp.bfloat16)
        helpers.assert_matches_sum(got, case, layout.axes, layout.names)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("layout", [SPREAD, Layout({"tensor": 1, "expert": 8}, {"data_axis": "expert"})], ids=str)
@pytest.mark.parametrize("out_dtype", [jnp.float32, jnp.bfloat16])
def test_scattered_parts_are_rounded_once_and_added_in_float32(out_dtype, layout, axis_type):
    """Bit for bit: what the parts are is exact, and so are float32 sums of them when they are rounded."""
    case = make_exact_case(3, hidden=128, out_dtype=jnp.float32)
    parts = []
    for first in range(8):
        experts = jax.tree.map(lambda leaf, e=first: leaf[e : e + 1] if leaf.ndim else leaf, case.experts)
        parts.append(dataclasses.replace(case, experts=experts).run(expert_offset=first))
    rounded = [statement.bfloat16(part) for part in parts]
    assert sum((r != p).sum() for r, p in zip(rounded, parts, strict=True)) > 1000  # it is no empty claim
    expected = np.sum(rounded, 0).astype(out_dtype)
    assert (expected != np.sum(parts, 0).astype(out_dtype)).any()
    got = run_on(layout, case.with_options(out_dtype=out_dtype), axis_type, sum_dtype=jnp.bfloat16)
    helpers.assert_bit_equal(got + out_dtype(0), expected + out_dtype(0))


def test_scattered_sums_do_not_depend_on_which_device_is_where():
    """Nor on the run: the mesh alone says in which order parts are added."""
    case = random_case(4)
    results = []
    for order in (range(8), range(8), [3, 7, 0, 2, 6, 1, 5, 4]):
        mesh = jax.sharding.Mesh(np.array(jax.devices())[list(order)], ("expert",))
        run = functools.partial(
            jax_moe.sharded_moe, mesh=mesh, data_axis="expert", sum_dtype=jnp.bfloat16, **case.options
        )
        results.append(np.asarray(jax.jit(lambda *arrays, run=run: run(*arrays))(case.x, case.experts, case.routing)))
    helpers.assert_bit_equal(results[1], results[0])
    helpers.assert_bit_equal(results[2], results[0])


_WRONG = {
    "nothing": lambda parts: parts,
    "a part left out": lambda parts: parts.at[3].set(0),
    "a part counted twice": lambda parts: parts.at[3].multiply(2),
    "a part in other rows": lambda parts: parts.at[3].set(jnp.roll(parts[3], 1, axis=0)),
    "parts of fewer bits": lambda parts: jax.lax.reduce_precision(parts, 8, 5),
}


@pytest.mark.parametrize(
    ("layout", "wrong"),
    # What is summed on all devices may lose some bits: each of seven additions is rounded.
    [(layout, wrong) for layout in (SPREAD, REPLICATED) for wrong in _WRONG if layout is SPREAD or "bits" not in wrong],
    ids=str,
)
def test_a_sum_that_is_wrong_is_found(monkeypatch, layout, wrong):
    """The bound has room for what is rounded, and for no more."""

    def add_up(partial, *, scattered, summed, **_):
        parts = _WRONG[wrong](jax.lax.all_gather(partial, scattered + summed)).astype(jnp.float32)
        total = jnp.sum(parts, 0)
        if not scattered:
            return jax.lax.pmax(total, summed)
        size = total.shape[0] // parts.shape[0]
        return jax.lax.dynamic_slice_in_dim(total, jax.lax.axis_index(scattered) * size, size)

    monkeypatch.setattr(exchange, "add_up", add_up)
    case = random_case(5, combine="ordered")
    got = run_on(layout, case, sum_dtype=jnp.bfloat16)
    if wrong == "nothing":
        helpers.assert_matches_sum(got, case, layout.axes, layout.names)
        return
    with pytest.raises(AssertionError, match="relative Frobenius error"):
        helpers.assert_matches_sum(got, case, layout.axes, layout.names)


@pytest.mark.parametrize("layout", [Layout({"data": 8}), Layout({"data": 4, "expert": 1, "tensor": 1}), Layout(
    {"data": 2, "expert": 1}, {"data_axis": ("data", "expert")})], ids=str)  # fmt: skip
def test_where_nothing_is_summed_it_has_no_effect(layout):
    case = random_case(6)
    same(run_on(layout, case, sum_dtype=jnp.bfloat16), case.run())


def test_the_default_is_float32():
    case = random_case(7)
    same(run_on(SPREAD, case), run_on(SPREAD, case, sum_dtype=jnp.float32))
    assert (run_on(SPREAD, case) != run_on(SPREAD, case, sum_dtype="bfloat16")).mean() > 0.5


@pytest.mark.parametrize("sum_dtype", [jnp.float16, np.float64, jnp.int32, "half a float", None, 3], ids=str)
def test_other_dtypes_are_refused_by_name(sum_dtype):
    case = make_exact_case()
    for mesh in (make_mesh(expert=8), make_mesh(data=8)):
        with pytest.raises((TypeError, ValueError), match="sum_dtype: got"):
            jax_moe.sharded_moe(case.x, case.experts, case.routing, mesh=mesh, sum_dtype=sum_dtype)
    pytest.importorskip("flax.nnx", reason="flax is not installed; jax_moe.nn needs it")
    from jax_moe.nn import MoE

    router = jax_moe.checkpoints.Router(jnp.ones((8, 64), jnp.float32), k=2)
    with pytest.raises((TypeError, ValueError), match="sum_dtype: got"):
        MoE(case.experts, router, sum_dtype=sum_dtype)


def test_a_module_passes_it_on():
    nnx = pytest.importorskip("flax.nnx", reason="flax is not installed; jax_moe.nn needs it")
    from jax_moe.nn import MoE

    case = random_case(8, precision="w4a4", hidden=64)
    mesh = make_mesh(expert=8)
    router = jax_moe.checkpoints.Router(jnp.asarray(np.random.default_rng(0).normal(size=(8, 64)), jnp.float32), k=3)
    experts = jax.device_put(case.experts, jax_moe.expert_shardings(case.experts, mesh))
    options = dict(mesh=mesh, data_axis="expert", precision="w4a4")
    x = case.x.astype(jnp.float32)
    run = nnx.jit(lambda module, x: module(x))
    default, module = MoE(experts, router, **options), MoE(experts, router, sum_dtype=jnp.bfloat16, **options)
    got = np.asarray(run(module, x))
    helpers.assert_matches_sum(got, dataclasses.replace(case, routing=router(x)), SPREAD.axes, SPREAD.names)
    assert (got != np.asarray(run(default, x))).mean() > 0.5
    assert hash(nnx.graphdef(module)) != hash(nnx.graphdef(default))


# --- Transformations ----------------------------------------------------------------------------------------------


def _op(layout, **more):
    """``sharded_moe`` with the keywords of ``fused_moe``, for tests of one device."""
    mesh = make_mesh(**layout.axes)

    def op(x, experts, routing, *, expert_offset=0, **options):
        assert expert_offset == 0
        return jax_moe.sharded_moe(x, experts, routing, mesh=mesh, **layout.names, **options, **more)

    return op


def _derivatives(case, op, dy):
    """Gradients, a tangent, and a product of the second derivative with a vector, with respect to x and the weights."""
    loss = test_derivative.loss_of(case, dy, op)
    primals = case.x, case.routing.weights
    rng = np.random.default_rng(1)
    tangents = tuple(jnp.asarray(rng.normal(size=a.shape), a.dtype) for a in primals)
    square = jax.grad(lambda *a: jnp.square(loss(*a)), (0, 1))
    return jax.jit(
        lambda *a: (jax.grad(loss, (0, 1))(*a), jax.jvp(loss, a, tangents)[1], jax.jvp(square, a, tangents)[1])
    )(*primals)


@pytest.mark.parametrize("layout", [SPREAD, BOTH], ids=str)
def test_derivatives_are_those_of_the_bfloat16_gather(monkeypatch, layout):
    """x that was rounded and divided by its scale has the tangent of x: the input scale is no part of a derivative."""
    case = with_input_scale(random_case(9, precision="w4a4"), 1 / 64)
    dy = test_derivative.cotangent(case)
    got = _derivatives(case, _op(layout), dy)
    monkeypatch.setattr(parcels, "are_taken", lambda _: False)
    expected = _derivatives(case, _op(layout), dy)
    jax.tree.map(helpers.assert_bit_equal, got, expected)


@pytest.mark.parametrize("options", [{}, INVARIANT], ids=["", "batch invariant"])
@pytest.mark.parametrize("sum_dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("layout", [SPREAD, BOTH, REPLICATED], ids=str)
def test_gradients_are_the_definitions(layout, sum_dtype, options):
    """Each device rounds its part of dx to bfloat16."""
    case = with_input_scale(random_case(10, precision="w4a4"), 1 / 64)
    case = case.with_options(expert_offset=0, **options)
    dy = test_derivative.cotangent(case)  # values that bfloat16 holds
    loss = test_derivative.loss_of(case, dy, _op(layout, sum_dtype=sum_dtype))
    got = jax.jit(jax.grad(loss, (0, 1)))(case.x, case.routing.weights)
    for actual, want, tolerance in zip(got, test_derivative.gradients(case, dy), (2.0**-7, 1e-5), strict=True):
        error = np.abs(np.asarray(actual, np.float64) - want).max() / np.abs(want).max()
        assert error < tolerance


def test_experts_stay_frozen():
    """Their input scale too, which x is divided by before it travels."""
    case = random_case(11, precision="w4a4")

    def loss(scale):
        scaled = with_input_scale(case, scale)
        return _op(SPREAD)(case.x, scaled.experts, case.routing, **case.options).sum()

    with pytest.raises(NotImplementedError, match="with respect to its experts"):
        jax.jit(jax.grad(loss))(case.experts.gate_up.input_scale)


@pytest.mark.parametrize("options", [{}, INVARIANT], ids=["", "batch invariant"])
@pytest.mark.parametrize("sum_dtype", [jnp.float32, jnp.bfloat16])
def test_vmap_over_tokens(sum_dtype, options):
    case = random_case(12, precision="w4a4", tokens=48).with_options(**options)
    run = functools.partial(_op(SPREAD, sum_dtype=sum_dtype), **case.options)
    x, routing = jax.tree.map(lambda a: a.reshape(3, 16, -1), (case.x, case.routing))
    got = jax.jit(jax.vmap(run, in_axes=(0, None, 0)))(x, case.experts, routing)
    one = jax.jit(lambda x, routing: run(x, case.experts, routing))
    for i in range(3):
        same(np.asarray(got[i]), np.asarray(one(x[i], jax.tree.map(lambda a, i=i: a[i], routing))))
    of_x = jax.jit(jax.vmap(run, in_axes=(0, None, None)))(x, case.experts, jax.tree.map(lambda a: a[0], routing))
    same(np.asarray(of_x[0]), np.asarray(got[0]))


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_exported_and_loaded_again(axis_type):
    case = random_case(13, precision="w4a4")
    mesh, placed = BOTH.place(case, axis_type)
    run = BOTH.function(mesh, placed, sum_dtype=jnp.bfloat16)
    with jax.set_mesh(mesh):
        expected = np.asarray(run(placed.x, placed.experts, placed.routing))
        checks = jax_moe.export_checks()
        exported = jax.export.export(run, disabled_checks=checks)(placed.x, placed.experts, placed.routing)
    assert exported.mlir_module().count('precision = "w4a4_rounded_x"') == 1
    again = jax.export.deserialize(exported.serialize())
    same(np.asarray(jax.jit(again.call)(placed.x, placed.experts, placed.routing)), expected)


@pytest.mark.parametrize("around", ["checkpoint", "scan", "eager"])
def test_under(around):
    """The division of the rounding is in float64, whatever jax_enable_x64 says: nothing that traces again minds."""
    case = random_case(14, precision="w4a4")
    run = functools.partial(_op(SPREAD), **case.options)
    one = lambda x: run(x, case.experts, case.routing)  # noqa: E731
    expected = np.asarray(jax.jit(one)(case.x))
    if around == "scan":
        ys = jax.jit(lambda x: jax.lax.scan(lambda _, x: (None, one(x)), None, jnp.stack([x, x]))[1])(case.x)
        same(np.asarray(ys[1]), expected)
    elif around == "checkpoint":
        same(np.asarray(jax.jit(jax.checkpoint(one))(case.x)), expected)
        grads = [jax.jit(jax.grad(lambda x, f=f: f(x).sum()))(case.x) for f in (one, jax.checkpoint(one))]
        helpers.assert_bit_equal(grads[1], grads[0])
    else:
        same(np.asarray(one(case.x)), expected)


@pytest.mark.parametrize("precision", ["w4a16", "w4a4"])
def test_no_tokens(precision):
    case = random_case(15, precision=precision, tokens=0)
    y = _op(SPREAD, sum_dtype=jnp.bfloat16)(case.x, case.experts, case.routing, **case.options)
    assert (y.shape, y.dtype) == ((0, 64), jnp.float32)
