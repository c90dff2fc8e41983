"""``sharded_moe`` on a mesh of real GPUs: the bits of one GPU where sums are exact, else its definition.

A program that is sharded over GPUs is compiled and captured like no other, so nothing here follows from the tests of
one GPU or of virtual devices. Every call runs on poisoned memory; the first one is eager, the next captured.
"""

import dataclasses
import functools

import calls
import helpers
import jax
import jax.export
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import numpy as np
import parcel_cases
import pytest
import statement

import jax_moe
from jax_moe import ffi, nvfp4, parcels, parcels_primitive

_CAPTURE = {"xla_gpu_graph_min_graph_size": 1}

# Number of GPUs, mesh axes, and the names of axes that are not the default.
_MESHES = {
    "2: experts": (2, {"expert": 2}, {}),
    "2: tensor": (2, {"tensor": 2}, {}),
    "2: tokens": (2, {"data": 2}, {}),
    "2: experts, tokens over them": (2, {"expert": 2}, {"data_axis": "expert"}),
    "2: tensor, tokens over it": (2, {"tensor": 2}, {"data_axis": "tensor"}),
    "4: experts": (4, {"expert": 4}, {}),
    "4: tensor": (4, {"tensor": 4}, {}),
    "4: both": (4, {"expert": 2, "tensor": 2}, {}),
    "4: tokens and experts": (4, {"data": 2, "expert": 2}, {}),
    "4: both, tokens over them": (4, {"expert": 2, "tensor": 2}, {"data_axis": ("expert", "tensor")}),
}
_SPREAD = [name for name, (_, _, names) in _MESHES.items() if names]
_TWO = ["2: experts", "2: tensor", "2: experts, tokens over them"]
_MODES = [("w4a16", "atomic"), ("w4a16", "ordered"), ("w4a4", "atomic"), ("w4a4", "ordered")]


def _mesh(name: str, axis_type=AxisType.Auto):
    """The mesh of that name, and the options of ``sharded_moe`` that it needs."""
    count, axes, names = _MESHES[name]
    devices = calls.devices(count)
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(axis_type,) * len(axes), devices=devices), names


def _place(case: helpers.Case, mesh, names) -> helpers.Case:
    """Experts placed in canonical form and prepared there, tokens and routing spread over the data axis."""
    placed = jax.device_put(case.experts, jax_moe.expert_shardings(case.experts, mesh))
    experts = calls.prepare(placed, case.options.get("precision", "w4a16"))
    data = names.get("data_axis", "data" if "data" in mesh.axis_names else None)
    x, routing = jax.device_put((case.x, case.routing), NamedSharding(mesh, P(data, None)))
    return dataclasses.replace(case, x=x, routing=routing, experts=experts)


def _on_one_gpu(case: helpers.Case) -> np.ndarray:
    """To be asked for before the sharded call: where nothing can run, that one skips the test."""
    experts = calls.prepared(case).experts
    run = jax.jit(functools.partial(jax_moe.fused_moe, **case.options))
    if calls.why_not_run():
        calls.lower(run, case.x, experts, case.routing)
        return np.zeros(())
    return np.asarray(run(case.x, experts, case.routing))


def _call(run, placed: helpers.Case, poison, times: int = 3) -> np.ndarray:
    for _ in range(times):
        poison(0.25)
        y = run(placed.x, placed.experts, placed.routing)
    return np.asarray(y)


def _same_bits(got, expected) -> None:
    helpers.assert_bit_equal(got + np.float32(0), expected + np.float32(0))  # zeros may differ in sign


@pytest.mark.parametrize(("precision", "combine"), _MODES)
@pytest.mark.parametrize("name", _MESHES)
def test_exact_sums_have_the_bits_of_one_gpu(poison, name, precision, combine):
    """And each device's call is captured, with its zeroing on a branch where it adds."""
    mesh, names = _mesh(name)
    case = helpers.make_exact_case(1, tokens=64, precision=precision, combine=combine, out_dtype=jnp.float32)
    placed = _place(case, mesh, names)
    run = calls.jit(functools.partial(jax_moe.sharded_moe, mesh=mesh, **names, **case.options), _CAPTURE)
    expected = _on_one_gpu(case)
    before = ffi.counters()
    got = _call(run, placed, poison)
    after = ffi.counters()
    _same_bits(got, expected)
    captured = after.captured - before.captured
    if precision == "w4a4" and name in _SPREAD:  # and as many calls that make parcels, which add nothing
        captured, rest = divmod(captured, 2)
        assert rest == 0
    assert captured >= mesh.size
    assert after.forked - before.forked == (captured if combine == "atomic" else 0)


@pytest.mark.parametrize("name", _MESHES)
@pytest.mark.parametrize(("precision", "combine"), [_MODES[0], _MODES[3]])
def test_random_cases_match_the_definition(poison, name, precision, combine):
    """The bound is that of one device: sums in float32 in any order, rounded once, which holds for sums of sums too."""
    mesh, names = _mesh(name)
    case = helpers.make_case(2, tokens=48, hidden=256, intermediate=256, num_experts=16, top_k=4, bias=True,
                             precision=precision, combine=combine)  # fmt: skip
    options = {k: v for k, v in case.options.items() if k != "expert_offset"}
    run = calls.jit(functools.partial(jax_moe.sharded_moe, mesh=mesh, **names, **options), _CAPTURE)
    helpers.assert_matches(_call(run, _place(case, mesh, names), poison), case)


@pytest.mark.parametrize("activation", [jax_moe.SwiGLU(), jax_moe.ReLU2()], ids=str)
@pytest.mark.parametrize("intermediate", [704, 1856])
@pytest.mark.parametrize("name", ["2: tensor", "4: tensor", "4: both"])
def test_slices_that_are_no_whole_tiles(poison, name, intermediate, activation):
    """Gemma-4-26B and Nemotron-3-Nano under tensor parallelism: each slice is padded where it is."""
    mesh, names = _mesh(name)
    case = helpers.make_case(3, tokens=33, hidden=128, intermediate=intermediate, activation=activation, bias=True)
    run = calls.jit(functools.partial(jax_moe.sharded_moe, mesh=mesh, activation=activation), _CAPTURE)
    helpers.assert_matches(_call(run, _place(case, mesh, names), poison), case)


@pytest.mark.parametrize("way", ["set_mesh", "explicit", "in_shardings", "eager"])
@pytest.mark.parametrize("name", _TWO)
def test_ways_to_call_it(poison, name, way):
    mesh, names = _mesh(name, AxisType.Explicit if way == "explicit" else AxisType.Auto)
    case = helpers.make_exact_case(4, tokens=32, out_dtype=jnp.float32)
    placed = _place(case, mesh, names)
    options, expected = names | case.options, _on_one_gpu(case)
    if way == "in_shardings":
        shardings = jax.tree.map(lambda leaf: leaf.sharding, (placed.x, placed.experts, placed.routing))
        function = functools.partial(jax_moe.sharded_moe, mesh=mesh, **options)
        run = calls.jit(function, _CAPTURE, in_shardings=shardings)
        got = _call(run, placed, poison)
    elif way == "eager":
        got = _call(calls.eager(functools.partial(jax_moe.sharded_moe, mesh=mesh, **options)), placed, poison)
    else:
        with jax.set_mesh(mesh):
            got = _call(calls.jit(functools.partial(jax_moe.sharded_moe, **options), _CAPTURE), placed, poison)
    _same_bits(got, expected)


@pytest.mark.parametrize("name", ["2: experts", "4: both"])
def test_stacked_layers_in_a_scan(poison, name):
    mesh, names = _mesh(name)
    cases = [helpers.make_exact_case(seed, tokens=32, out_dtype=jnp.float32) for seed in (5, 6, 7)]
    placed = [_place(case, mesh, names) for case in cases]
    x = placed[0].x
    stack = lambda *leaves: jnp.stack(leaves)  # noqa: E731
    experts, routing = (jax.tree.map(stack, *[getattr(p, part) for p in placed]) for part in ("experts", "routing"))

    def layers_of(x, experts, routing):
        def layer(total, weights):
            return total + jax_moe.sharded_moe(x, *weights, mesh=mesh, **cases[0].options), None

        return jax.lax.scan(layer, jnp.zeros(x.shape, jnp.float32), (experts, routing))[0]

    stacked = dataclasses.replace(placed[0], x=x, experts=experts, routing=routing)
    expected = sum(_on_one_gpu(dataclasses.replace(case, x=cases[0].x)) for case in cases)
    _same_bits(_call(calls.jit(layers_of, _CAPTURE), stacked, poison), expected)


@pytest.mark.parametrize("name", _TWO)
def test_exported_and_loaded_again(poison, name):
    mesh, names = _mesh(name)
    case = helpers.make_exact_case(8, tokens=32, out_dtype=jnp.float32)
    placed = _place(case, mesh, names)
    run = calls.jit(functools.partial(jax_moe.sharded_moe, mesh=mesh, **names, **case.options), {})
    expected = _on_one_gpu(case)
    _call(run, placed, poison, times=1)
    exported = jax.export.export(run, disabled_checks=jax_moe.export_checks())(placed.x, placed.experts, placed.routing)
    again = jax.export.deserialize(exported.serialize())
    _same_bits(_call(jax.jit(again.call, compiler_options=_CAPTURE), placed, poison), expected)


@pytest.mark.parametrize("name", _TWO)
def test_no_tokens(poison, name):
    mesh, names = _mesh(name)
    placed = _place(helpers.make_case(9, tokens=0, num_experts=8, intermediate=64), mesh, names)
    run = calls.jit(functools.partial(jax_moe.sharded_moe, mesh=mesh, **names), _CAPTURE)
    assert _call(run, placed, poison).shape == (0, 48)


@pytest.mark.parametrize("name", ["2: experts", "2: tensor", "4: both"])
def test_other_verbs_on_the_mesh(name):
    """``prepare``, ``unprepare`` and ``calibrate`` where the experts are: what they give in one place."""
    calls.require_gpu()
    mesh, _ = _mesh(name)
    case = helpers.make_case(10, tokens=24, hidden=96, intermediate=160, num_experts=8)
    experts = helpers.without_input_scales(case.experts)
    placed = jax.device_put(experts, jax_moe.expert_shardings(experts, mesh))
    again = jax_moe.unprepare(calls.prepare(placed), 96, 160)
    jax.tree.map(helpers.assert_bit_equal, again, experts)
    got = jax_moe.calibrate(placed, case.x, case.routing)
    expected = jax_moe.calibrate(experts, case.x, case.routing)
    for projection in ("gate_up", "down"):
        scales = [np.asarray(getattr(e, projection).input_scale) for e in (got, expected)]
        np.testing.assert_allclose(*scales, rtol=1e-4)  # the order of sums depends on the shapes


# --- What travels in fewer bytes ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("precision", "combine"), _MODES)
@pytest.mark.parametrize("name", _MESHES)
def test_sums_that_travel_in_bfloat16(poison, name, precision, combine):
    """Within the bound of docs/numerics.md. Nothing but parts and sums of them is rounded: the output is float32."""
    mesh, names = _mesh(name)
    case = helpers.make_case(11, tokens=48, hidden=256, intermediate=256, num_experts=16, top_k=4, bias=True,
                             precision=precision, combine=combine, out_dtype=jnp.float32)  # fmt: skip
    options = {k: v for k, v in case.options.items() if k != "expert_offset"} | {"sum_dtype": jnp.bfloat16}
    run = calls.jit(functools.partial(jax_moe.sharded_moe, mesh=mesh, **names, **options), _CAPTURE)
    got = _call(run, _place(case, mesh, names), poison)
    helpers.assert_matches_sum(got, case, _MESHES[name][1], names, on_gpu=True)


@pytest.mark.parametrize("name", _SPREAD)
def test_scattered_sums_in_bfloat16_are_the_same_from_run_to_run(poison, name):
    mesh, names = _mesh(name)
    case = helpers.make_case(12, tokens=64, hidden=256, intermediate=256, num_experts=16, top_k=4, combine="ordered")
    options = {k: v for k, v in case.options.items() if k != "expert_offset"} | {"sum_dtype": jnp.bfloat16}
    run = calls.jit(functools.partial(jax_moe.sharded_moe, mesh=mesh, **names, **options), _CAPTURE)
    placed = _place(case, mesh, names)
    first = _call(run, placed, poison, times=1)
    for _ in range(10):
        helpers.assert_bit_equal(_call(run, placed, poison, times=1), first)


def _tied(seed: int, shape, input_scale: float) -> jax.Array:
    """bfloat16 values of which many, over the scale, are on a rounding boundary: the last bit of a quotient decides."""
    rng = np.random.default_rng(seed)
    steps = np.exp2(rng.integers(-3, 3, (shape[0], shape[1] // 16))).repeat(16, 1)
    return jnp.asarray(rng.integers(-255, 256, shape) * steps * input_scale, jnp.bfloat16)


_INPUT_SCALES = [1.0, 3.0, 5 / 128, 1 / 448]


@pytest.mark.parametrize("input_scale", _INPUT_SCALES)
def test_rounding_outside_a_kernel_has_the_bits_of_ieee_division(input_scale):
    """XLA's GPU backend divides within two units in the last place: the definition rounds each quotient to nearest."""
    x = _tied(13, (256, 2048), input_scale)
    got = calls.jit(nvfp4.quantize, {})(x, jnp.float32(input_scale))
    codes, scales = statement.quantize(np.asarray(x, np.float32), np.float32(input_scale))
    np.testing.assert_array_equal(np.asarray(got[1]).view(np.uint8), scales.view(np.uint8))
    np.testing.assert_array_equal(statement.unpack(got[0]), codes)


@pytest.mark.parametrize("sizes", [*parcel_cases.SIZES, (1000, 8, 4096)], ids=str)
def test_parcels(poison, sizes):
    """Made by a kernel, in a custom call of its own."""
    x, ids, weights = parcel_cases.arrays(*sizes)
    make = functools.partial(parcels_primitive.make, layout=calls.target().layouts["w4a4"], command_buffer=True)
    run = calls.jit(make, _CAPTURE)
    routing = jax_moe.Routing(jnp.asarray(ids), jnp.asarray(weights))
    for _ in range(2):
        poison(0.25)
        got = run(jnp.asarray(x), routing, jnp.float32(parcel_cases.SCALE))
    parcel_cases.same(np.asarray(got), x, ids, weights)


@pytest.mark.parametrize("input_scale", _INPUT_SCALES)
@pytest.mark.parametrize("name", _SPREAD)
def test_x_that_is_rounded_before_the_gather_has_the_same_bits(poison, monkeypatch, name, input_scale):
    """As where bfloat16 is gathered and the kernel rounds it; with ties, zeros, and a token of NaN."""
    mesh, names = _mesh(name)
    case = helpers.make_case(14, tokens=64, hidden=512, intermediate=256, num_experts=16, top_k=4, bias=True,
                             precision="w4a4", combine="ordered", out_dtype=jnp.float32)  # fmt: skip
    gate_up = dataclasses.replace(case.experts.gate_up, input_scale=jnp.float32(input_scale))
    x = _tied(15, case.x.shape, input_scale).at[::2].set(case.x[::2]).at[3].set(0).at[5, 7].set(jnp.nan)
    case = dataclasses.replace(case, x=x, experts=dataclasses.replace(case.experts, gate_up=gate_up))
    placed = _place(case, mesh, names)
    options = {k: v for k, v in case.options.items() if k != "expert_offset"}

    def call():
        run = functools.partial(jax_moe.sharded_moe, mesh=mesh, **names, **options)
        return _call(calls.jit(lambda *arrays: run(*arrays), _CAPTURE), placed, poison)

    if calls.why_not_run() is None:
        with monkeypatch.context() as changed:
            changed.setattr(parcels, "are_taken", lambda _: False)
            expected = call()
    got = call()  # where nothing can run, it skips here
    is_nan = np.isnan(expected).any(1)
    assert is_nan.tolist() == [token == 5 for token in range(64)]
    _same_bits(got[~is_nan], expected[~is_nan])
    assert np.isnan(got[is_nan]).any()


def test_a_module_whose_sums_travel_in_bfloat16(poison):
    nnx = pytest.importorskip("flax.nnx", reason="flax is not installed; jax_moe.nn needs it")
    from jax_moe.nn import MoE

    name = "2: experts, tokens over them"
    mesh, names = _mesh(name)
    case = helpers.make_case(16, tokens=32, hidden=128, intermediate=128, num_experts=8, top_k=2, precision="w4a4",
                             combine="ordered", out_dtype=jnp.float32)  # fmt: skip
    weight = jax.device_put(jax.random.normal(jax.random.key(0), (8, 128)), NamedSharding(mesh, P()))
    router = jax_moe.checkpoints.Router(weight, k=2)
    placed = _place(case, mesh, names)
    module = MoE(
        placed.experts, router, mesh=mesh, precision="w4a4", combine="ordered", sum_dtype=jnp.bfloat16, **names
    )
    graph, state = nnx.split(module)
    run = calls.jit(lambda state, x: nnx.merge(graph, state)(x), _CAPTURE)
    x = placed.x.astype(jnp.float32)
    for _ in range(3):
        poison(0.25)
        got = run(state, x)
    case = dataclasses.replace(case, routing=router(x))
    helpers.assert_matches_sum(got, case, _MESHES[name][1], names, on_gpu=True)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize(
    "method",
    [jax_moe.Softmax(), jax_moe.Softmax(renormalize=False), jax_moe.Sigmoid(), jax_moe.DeepSeekV3(), jax_moe.Llama4()],
    ids=str,
)
def test_routing_of_spread_tokens(method, wrap):
    """The ids of one GPU: XLA's ``top_k`` gave zeros here (``routing._top_k``)."""
    calls.require_gpu()
    mesh, _ = _mesh("2: experts")
    logits = jax.random.normal(jax.random.key(3), (64, 128))
    spread = jax.device_put(logits, NamedSharding(mesh, P("expert", None)))
    route = wrap(lambda logits: jax_moe.route(logits, 8, method))
    got, expected = route(spread), route(jax.device_put(logits, jax.devices()[0]))
    np.testing.assert_array_equal(got.expert_ids, expected.expert_ids)
    np.testing.assert_allclose(got.weights, expected.weights, rtol=1e-6)
