"""``jax_moe.nn.MoE``: the module is its parts, alone and over a mesh, and it comes from a checkpoint in one call."""

from pathlib import Path

import helpers
import jax
import jax.export
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
import numpy as np
import pytest
import statement

import jax_moe
from jax_moe import checkpoints

nnx = pytest.importorskip("flax.nnx", reason="flax is not installed; jax_moe.nn needs it")
from jax_moe.nn import MoE, Quantized  # noqa: E402

DATA = Path(__file__).parent / "checkpoints" / "data"
CASES = sorted(path.name for path in DATA.iterdir())


def tokens(count: int, hidden: int = 64, dtype=jnp.bfloat16) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).normal(size=(count, hidden)), dtype)


def by_hand(directory: Path, layer: int, x: jax.Array, **options) -> np.ndarray:
    """The layer from its parts, in float32."""
    experts, router = checkpoints.load_experts(directory, layer), checkpoints.load_router(directory, layer)
    family = checkpoints.moe_options(directory)
    y = jax_moe.fused_moe(x.astype(jnp.bfloat16), experts, router(x), **family, **options, out_dtype=jnp.float32)
    shared = checkpoints.load_shared_expert(directory, layer)
    return np.asarray(y if shared is None else y + shared(x, family["activation"]))


@pytest.mark.parametrize("case", CASES)
def test_a_module_from_a_checkpoint_is_the_layer(case):
    for layer in checkpoints.list_layers(DATA / case):
        module = MoE.from_checkpoint(DATA / case, layer, combine="ordered")
        x = tokens(6, dtype=jnp.float32)
        y = nnx.jit(lambda module, x: module(x))(module, x.reshape(2, 3, 64))
        assert y.shape == (2, 3, 64)
        assert y.dtype == jnp.float32
        np.testing.assert_allclose(
            y.reshape(6, 64), by_hand(DATA / case, layer, x, combine="ordered"), rtol=1e-4, atol=1e-5
        )
        assert module(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16


@pytest.mark.parametrize("axes", [{"expert": 4}, {"tensor": 2}, {"expert": 2, "tensor": 2}, {"expert": 2, "data": 2}])
def test_over_a_mesh_it_computes_the_same_and_moves_no_weights(axes):
    case = DATA / "modelopt-deepseek_v3"
    mesh = Mesh(np.array(jax.devices()[: int(np.prod(list(axes.values())))]).reshape(tuple(axes.values())), tuple(axes))
    module = MoE.from_checkpoint(case, 1, mesh=mesh)
    assert (
        module.experts.gate_up.payload[...].sharding.spec
        == jax_moe.expert_shardings(checkpoints.load_experts(case, 1), mesh).gate_up.payload.spec
    )
    x = tokens(8, dtype=jnp.float32)
    run = nnx.jit(lambda module, x: module(x))
    np.testing.assert_allclose(run(module, x), by_hand(case, 1, x), rtol=1e-4, atol=1e-5)
    graph, state = nnx.split(module)
    hlo = jax.jit(lambda state, x: nnx.merge(graph, state)(x)).lower(state, x).compile().as_text()
    assert not [line for line in hlo.splitlines() if "all-gather" in line and "u8[" in line]


def test_variables_carry_their_partition_specs():
    module = MoE.from_checkpoint(DATA / "modelopt-deepseek_v3", 1)
    specs = nnx.get_partition_spec(nnx.state(module))
    flat = {jax.tree_util.keystr(path): spec for path, spec in jax.tree_util.tree_leaves_with_path(
        specs, is_leaf=lambda node: isinstance(node, PartitionSpec))}  # fmt: skip
    payload = next(spec for name, spec in flat.items() if "gate_up" in name and "payload" in name)
    assert payload == PartitionSpec(("expert",), None, ("tensor",), None)
    assert isinstance(module.experts.down.payload, Quantized)
    assert len(jax.tree.leaves(nnx.state(module, Quantized))) == 8
    assert len(jax.tree.leaves(nnx.state(module, nnx.Param))) == 4


def test_w4a4_from_the_checkpoints_own_input_scales():
    case = DATA / "llmcompressor-qwen3_moe"
    x = tokens(5)
    module = MoE.from_checkpoint(case, 0, precision="w4a4", combine="ordered")
    np.testing.assert_allclose(
        np.asarray(module(x), np.float32),
        by_hand(case, 0, x, precision="w4a4", combine="ordered"),
        rtol=2**-7,
        atol=1e-5,
    )


def test_a_checkpoint_without_input_scales_runs_with_those_of_each_row():
    case = DATA / "modelopt-qwen3_moe-w4a16"
    x = tokens(5)
    module = MoE.from_checkpoint(case, 0, precision="w4a4_dynamic", combine="ordered")
    assert module.experts.gate_up.input_scale is None
    np.testing.assert_allclose(
        np.asarray(module(x), np.float32),
        by_hand(case, 0, x, precision="w4a4_dynamic", combine="ordered"),
        rtol=2**-7,
        atol=1e-5,
    )


def test_state_round_trip():
    module = MoE.from_checkpoint(DATA / "llmcompressor-gpt_oss", 0)
    graph, state = nnx.split(module)
    again = nnx.merge(graph, jax.tree.map(jnp.copy, state))
    np.testing.assert_array_equal(np.asarray(module(tokens(3)), np.float32), np.asarray(again(tokens(3)), np.float32))


def a_router(experts: int = 4, hidden: int = 64, k: int = 2) -> checkpoints.Router:
    return checkpoints.Router(tokens(experts, hidden, jnp.float32), k=k)


def a_shared_expert(parts: int = 2, hidden: int = 64) -> checkpoints.SharedExpert:
    return checkpoints.SharedExpert(jnp.ones((parts, 16, hidden)), jnp.ones((hidden, 16)))


@pytest.fixture(scope="module")
def experts() -> jax_moe.Experts:
    """E = 4, I = 32, H = 64."""
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = (4, 32, 64), (4, 32, 64), (4, 64, 32)
    return jax_moe.quantize_experts(*(jax.random.normal(key, s) for key, s in zip(keys, shapes, strict=True)))


def test_a_layer_without_a_checkpoint(experts):
    router, x = a_router(), tokens(5)
    want = jax_moe.fused_moe(x, experts, jax_moe.route(router.logits(x), 2), combine="ordered")
    np.testing.assert_array_equal(MoE(experts, router, combine="ordered")(x), want)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"experts": None}, TypeError, "experts: got NoneType, needs Experts"),
        ({"router": None}, TypeError, "router: got NoneType, needs Router"),
        ({"router": lambda x: x}, TypeError, "router: got function, needs Router"),
        ({"router": a_router(hidden=32)}, ValueError, r"router.weight: got shape \(4, 32\), needs \[4, 64\]"),
        ({"router": a_router(experts=5)}, ValueError, r"router.weight: got shape \(5, 64\), needs \[4, 64\]"),
        ({"router": a_router(k=5)}, ValueError, "k: got 5, needs 1 <= k <= E = 4"),
        ({"shared_expert": a_router()}, TypeError, "shared_expert: got Router, needs SharedExpert"),
        ({"shared_expert": a_shared_expert(parts=1)}, ValueError,
         r"SharedExpert.gate_up: got shape \(1, 16, 64\), needs \[2, I, H\]"),
        ({"shared_expert": a_shared_expert(hidden=32)}, ValueError,
         r"shared_expert.gate_up: got shape \(2, 16, 32\), needs \[P, I, 64\]"),
        ({"activation": "silu"}, TypeError, "activation: got str, needs SwiGLU or"),
        ({"activation": jax_moe.ReLU2()}, ValueError, "activation: got ReLU2, which has no gate"),
        ({"precision": "w4a4"}, ValueError, "experts.gate_up.input_scale: got None"),
        ({"combine": "sum"}, ValueError, "combine: got 'sum'"),
        ({"weight_on": "x"}, ValueError, "weight_on: got 'x'"),
        ({"mesh": 4}, TypeError, "mesh: got int, needs Mesh"),
        ({"expert_axis": 4}, TypeError, "expert_axis: got int, needs str"),
        ({"expert_axis": "tensor"}, ValueError, "expert_axis, tensor_axis: both got"),
    ],
)  # fmt: skip
def test_the_constructor_names_what_does_not_fit(experts, arguments, error, message):
    with pytest.raises(error, match=f"^{message}"):
        MoE(**{"experts": experts, "router": a_router()} | arguments)


def test_a_prepared_layer_is_checked_up_to_its_padding(experts):
    prepared = jax_moe.prepare(experts, "sm_90a")
    MoE(prepared, a_router(), a_shared_expert())
    with pytest.raises(ValueError, match=r"^router.weight: got shape \(5, 64\), needs \[4, H\]"):
        MoE(prepared, a_router(experts=5))
    with pytest.raises(ValueError, match=r"^experts.gate_up.payload: got shape"):
        MoE(prepared, a_router(hidden=144))


def test_a_call_names_what_does_not_fit(experts):
    module = MoE(experts, a_router())
    with pytest.raises(ValueError, match=r"^x: got shape \(2, 3, 32\), needs \[2, 3, 64\]"):
        module(jnp.ones((2, 3, 32)))
    with pytest.raises(ValueError, match=r"^x: got shape \(\), needs \[64\]"):
        module(jnp.float32(1))
    with pytest.raises(TypeError, match=r"^x: got dtype int32, needs floats"):
        module(jnp.ones((2, 64), jnp.int32))
    with pytest.raises(TypeError, match=r"^x: got list, needs an array"):
        module([1.0] * 64)
    assert module(jnp.ones(64)).shape == (64,)


@pytest.mark.parametrize("target", [None, "canonical", "sm_90a"])
def test_a_checkpoint_is_prepared_for_the_target(target, monkeypatch):
    case = DATA / "modelopt-deepseek_v3"
    asked = []
    monkeypatch.setattr("jax_moe.nn.moe.prepare", lambda *args, **_: asked.append(args[1]) or jax_moe.prepare(*args))
    module = MoE.from_checkpoint(case, 1, target=target)
    assert asked == [target]
    want = jax_moe.prepare(checkpoints.load_experts(case, 1), target)
    assert module.experts.layout == want.layout
    np.testing.assert_array_equal(module.experts.down.payload[...], want.down.payload)


def test_on_a_mesh_experts_are_prepared_where_they_are():
    mesh = Mesh(np.array(jax.devices()[:2]), ("expert",))
    module = MoE.from_checkpoint(DATA / "modelopt-deepseek_v3", 1, mesh=mesh, target="sm_90a")
    payload = module.experts.gate_up.payload
    assert (
        payload[...].sharding.spec
        == payload.get_metadata("out_sharding")
        == PartitionSpec(("expert",), None, None, None)
    )


@pytest.mark.parametrize("layout", ["canonical", "wgmma_v1"])
def test_a_converted_checkpoint_is_prepared_once(tmp_path, layout):
    checkpoints.convert(DATA / "modelopt-deepseek_v3", tmp_path / "out", layout=layout)
    for target in (None, "sm_90a"):
        wanted = layout if target is None else "wgmma_v1"
        assert MoE.from_checkpoint(tmp_path / "out", 1, target=target).experts.layout == wanted
    if layout != "canonical":
        with pytest.raises(ValueError, match=r"^experts.layout: got 'wgmma_v1', needs 'canonical'"):
            MoE.from_checkpoint(tmp_path / "out", 1, target="canonical")


def test_what_the_family_says_can_be_replaced():
    case = DATA / "modelopt-qwen3_moe"
    x = tokens(5)
    options = {"activation": jax_moe.GeGLU(), "weight_on": "input", "combine": "ordered"}
    module = MoE.from_checkpoint(case, 0, **options)
    want = jax_moe.fused_moe(x, checkpoints.load_experts(case, 0), checkpoints.load_router(case, 0)(x), **options)
    np.testing.assert_array_equal(module(x), want)


def test_the_core_does_not_import_flax():
    helpers.run_python("import sys, jax_moe, jax_moe.checkpoints; assert not [m for m in sys.modules if 'flax' in m]")


def test_the_decoder_layer_example_agrees_with_transformers():
    """What the recording cannot tell: that attention, norms and residuals around the module are transformers' too."""
    example = Path(__file__).parents[1] / "examples" / "qwen3_layer.py"
    printed = helpers.run_python(f"import runpy; runpy.run_path({str(example)!r}, run_name='__main__')", COLUMNS="200")
    error = float(printed.split("relative error")[1].split()[0])
    assert 0 < error < 3 * 2**-8  # inputs, gate, up and intermediate are rounded to bfloat16, over a residual


def a_module(experts: jax_moe.Experts, seed: int = 0, **options) -> MoE:
    """E = 4, I = 32, H = 64, with a shared expert of I' = 32 that tensor parallelism splits."""
    keys = jax.random.split(jax.random.key(seed), 3)
    shapes = (4, 64), (2, 32, 64), (64, 32)
    weight, gate_up, down = (np.asarray(jax.random.normal(k, s)) * 0.1 for k, s in zip(keys, shapes, strict=True))
    router = checkpoints.Router(jnp.asarray(weight), k=2)
    return MoE(experts, router, checkpoints.SharedExpert(jnp.asarray(gate_up), jnp.asarray(down)), **options)


def definition(module: MoE, x) -> np.ndarray:
    """The layer in NumPy's float64; only the intermediate of the experts is rounded, to bfloat16."""
    shape, x = x.shape, np.asarray(x, np.float64).reshape(-1, x.shape[-1])
    logits = x @ np.asarray(module.router.weight[...], np.float64).T
    ids = np.argsort(-logits, axis=-1)[:, :2]
    weights = np.exp(np.take_along_axis(logits, ids, -1))
    routing = jax_moe.Routing(ids, weights / weights.sum(-1, keepdims=True))
    is_variable = lambda node: isinstance(node, nnx.Variable)  # noqa: E731
    experts = jax.tree.map(lambda variable: np.asarray(variable[...]), module.experts, is_leaf=is_variable)
    y, _ = statement.moe(x, experts, routing, activation=jax_moe.SwiGLU(), precision="w4a16")
    gate, up = np.asarray(module.shared_expert.gate_up[...], np.float64)
    h = statement.activate(jax_moe.SwiGLU(), x @ gate.T, x @ up.T)
    return (y + h @ np.asarray(module.shared_expert.down[...], np.float64).T).reshape(shape)


def assert_is_the_layer(y, module: MoE, x) -> None:
    want = definition(module, x)
    assert y.shape == x.shape
    # Where the intermediate lies between two bfloat16 values it may round to the other one, 2^-8 away.
    assert np.linalg.norm(np.asarray(y, np.float64) - want) <= 2**-8 * np.linalg.norm(want)


@pytest.fixture
def module(experts) -> MoE:
    return a_module(experts)


def exact(*shape: int) -> jax.Array:
    """float32 values that bfloat16 has too: the module rounds nothing of them."""
    return tokens(int(np.prod(shape[:-1]))).astype(jnp.float32).reshape(shape)


def test_a_graph_is_a_value(experts, module):
    """Two layers of one architecture have one GraphDef, and programs are found again by it."""
    graph, state = nnx.split(module)
    same, other = nnx.split(a_module(experts, seed=1))[0], nnx.split(a_module(experts, combine="ordered"))[0]
    assert graph == same
    assert hash(graph) == hash(same)
    assert graph != other
    x, traced = exact(5, 64), []

    def layer(graph, state, x):
        traced.append(graph)
        return nnx.merge(graph, state)(x)

    for run in (jax.jit(layer), jax.jit(layer, static_argnums=0)):
        traced.clear()
        assert_is_the_layer(run(graph, state, x), module, x)
        run(same, nnx.split(a_module(experts, seed=1))[1], x)
        assert len(traced) == 1
        run(other, state, x)
        assert len(traced) == 2
    assert jax.eval_shape(lambda module, x: module(x), module, x).shape == x.shape
    assert_is_the_layer(jax.jit(lambda module, x: module(x))(module, x), module, x)
    assert_is_the_layer(nnx.clone(module)(x), module, x)


@pytest.mark.parametrize("how", ["lax.scan", "nnx.scan"])
def test_layers_in_a_scan(experts, how):
    modules = [a_module(experts, seed) for seed in range(3)]
    graph, states = nnx.split(modules[0])[0], [nnx.split(module)[1] for module in modules]
    stacked, x = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states), exact(5, 64)
    if how == "lax.scan":
        outs = jax.lax.scan(lambda x, state: (x, nnx.merge(graph, state)(x)), x, stacked)[1]
    else:
        scan = nnx.scan(lambda x, module: (x, module(x)), in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))
        outs = scan(x, nnx.merge(graph, stacked))[1]
    for y, module in zip(outs, modules, strict=True):
        assert_is_the_layer(y, module, x)


def test_an_exported_program_takes_the_state_as_a_dict_of_arrays(module):
    graph, state = nnx.split(module)
    x = exact(5, 64)

    @jax.jit
    def layer(arrays, x):
        nnx.replace_by_pure_dict(inner := jax.tree.map(lambda leaf: leaf, state), arrays)
        return nnx.merge(graph, inner)(x)

    arrays = nnx.to_pure_dict(state)
    exported = jax.export.export(layer, disabled_checks=jax_moe.export_checks())(arrays, x)
    assert_is_the_layer(jax.export.deserialize(exported.serialize()).call(arrays, x), module, x)


MESHES = [{"expert": 2, "tensor": 2}, {"data": 2, "expert": 2}, {"data": 2, "tensor": 2}, {"data": 2}]


def a_mesh(axes: dict[str, int], kind=AxisType.Auto) -> Mesh:
    count = int(np.prod(list(axes.values())))
    return jax.make_mesh(tuple(axes.values()), tuple(axes), (kind,) * len(axes), devices=jax.devices()[:count])


def placed(module: MoE, mesh: Mesh) -> MoE:
    """By the specs that its variables carry, as far as the mesh has the axes."""
    graph, state = nnx.split(module)
    is_spec = lambda node: isinstance(node, PartitionSpec)  # noqa: E731
    here = lambda axis: tuple(name for name in axis or () if name in mesh.axis_names) or None  # noqa: E731
    sharding = lambda spec: NamedSharding(mesh, PartitionSpec(*map(here, spec)))  # noqa: E731
    shardings = jax.tree.map(sharding, nnx.get_partition_spec(state), is_leaf=is_spec)
    return nnx.merge(graph, jax.device_put(state, shardings))


def call(module, x):
    return module(x)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("axes", MESHES, ids=str)
def test_placed_by_its_specs_it_runs_where_it_is(module, axes, kind):
    """Without ``mesh=``; x whole, or spread over batch or sequence; with and without ``jax.set_mesh``; no tokens."""
    mesh, x = a_mesh(axes, kind), exact(2, 4, 64)
    there, run = placed(module, mesh), jax.jit(call)
    for spread in [()] + [("data",), (None, "data")] * ("data" in axes):
        spread_x = jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spread)))
        assert_is_the_layer(run(there, spread_x), module, x)
    with jax.set_mesh(mesh):
        assert_is_the_layer(run(there, spread_x), module, x)
    no_tokens = jax.device_put(np.zeros((2, 0, 64), np.float32), spread_x.sharding)
    assert run(there, no_tokens).shape == (2, 0, 64)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_placed_it_runs_eagerly_and_stays(module, kind):
    mesh, x = a_mesh({"expert": 2, "tensor": 2}, kind), exact(2, 4, 64)
    there = placed(module, mesh)
    payload = there.experts.down.payload[...].sharding
    with jax.set_mesh(mesh):
        assert_is_the_layer(there(x), module, x)
        assert_is_the_layer(nnx.jit(call)(there, x), module, x)  # which writes the module's state back
    assert there.experts.down.payload[...].sharding.is_equivalent_to(payload, 3)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_tokens_over_the_devices_of_the_shared_expert(experts, kind):
    mesh, x = a_mesh({"tensor": 2}, kind), exact(2, 4, 64)
    module = a_module(experts, data_axis="tensor")
    spread_x = jax.device_put(x, NamedSharding(mesh, PartitionSpec("tensor")))
    assert_is_the_layer(nnx.jit(call)(placed(module, mesh), spread_x), module, x)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_tokens_over_more_than_the_devices_of_the_shared_expert(experts, kind):
    mesh, x = a_mesh({"data": 2, "tensor": 2}, kind), exact(8, 64)
    module = a_module(experts, data_axis=("data", "tensor"))
    spread_x = jax.device_put(x, NamedSharding(mesh, PartitionSpec(("data", "tensor"))))
    assert_is_the_layer(jax.jit(call)(placed(module, mesh), spread_x), module, x)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_tokens_over_another_axis_than_the_data_axis(module, kind):
    mesh, x = a_mesh({"data": 2, "tensor": 2}, kind), exact(8, 64)
    spread_x = jax.device_put(x, NamedSharding(mesh, PartitionSpec("tensor")))
    assert_is_the_layer(jax.jit(call)(placed(module, mesh), spread_x), module, x)


@pytest.mark.parametrize("axes", MESHES, ids=str)
def test_a_module_that_is_nowhere_runs_over_the_mesh_that_is_set(module, axes):
    x = exact(2, 4, 64)
    with jax.set_mesh(a_mesh(axes)):
        assert_is_the_layer(jax.jit(call)(module, x), module, x)
        assert_is_the_layer(jax.jit(lambda x: module(x))(x), module, x)
        assert_is_the_layer(module(x), module, x)


def test_a_mesh_of_other_axes(module):
    """One device needs none of ours; of several an error tells which they could be."""
    x = exact(5, 64)
    with jax.set_mesh(a_mesh({"batch": 1})):
        assert_is_the_layer(jax.jit(call)(module, x), module, x)
    error = pytest.raises(ValueError, match=r"^mesh: got axes \('batch',\), none of which is the expert_axis")
    with jax.set_mesh(a_mesh({"batch": 2})), error:
        jax.jit(call)(module, x)


def test_inside_a_shard_map_it_is_a_part(module):
    mesh, x = a_mesh({"data": 2}), exact(4, 64)
    spec = PartitionSpec("data")
    run = jax.shard_map(lambda x: module(x), mesh=mesh, in_specs=spec, out_specs=spec)
    assert_is_the_layer(jax.jit(run)(x), module, x)


def test_the_mesh_it_was_made_with_stays_its_own(experts):
    mesh, x = a_mesh({"expert": 2}), exact(5, 64)
    module = a_module(jax.device_put(experts, jax_moe.expert_shardings(experts, mesh)), mesh=mesh)
    assert_is_the_layer(nnx.jit(call)(module, x), module, x)
    assert module.mesh is mesh


BLOCK = Path(__file__).parent / "checkpoints" / "blocks" / "deepseek_v4-hash"


@pytest.mark.parametrize("axes", [None, {"data": 2, "expert": 2}], ids=str)
def test_a_layer_that_routes_by_token_ids(axes):
    """What transformers computes, its tokens as a batch and spread over a mesh too."""
    (layer,), expected = checkpoints.list_layers(BLOCK), np.load(BLOCK / "expected.npz")
    mesh = axes and a_mesh(axes, AxisType.Explicit)
    module = MoE.from_checkpoint(BLOCK, layer, mesh=mesh)
    x, ids = (jnp.asarray(expected[name]) for name in ("x", "token_ids"))
    x, ids = x.astype(jnp.bfloat16).astype(jnp.float32).reshape(2, -1, x.shape[-1]), ids.reshape(2, -1)
    if mesh:
        x, ids = jax.device_put((x, ids), NamedSharding(mesh, PartitionSpec("data")))
    y = nnx.jit(lambda module, x, ids: module(x, ids))(module, x, ids)
    want = expected["y"].reshape(x.shape)
    assert np.linalg.norm(np.asarray(y) - want) < 2**-8 * np.linalg.norm(want)
    table = module.router.token_table
    assert not isinstance(table, nnx.Param)
    assert hash(nnx.split(module)[0]) == hash(nnx.split(MoE.from_checkpoint(BLOCK, layer, mesh=mesh))[0])
    with pytest.raises(TypeError, match=r"^token_ids: got NoneType, needs an array"):
        module(x)
    with pytest.raises(ValueError, match=r"^token_ids: got shape"):
        module(x, ids[:, :1])


def test_other_routers_do_not_look_at_token_ids(module):
    x = exact(5, 64)
    np.testing.assert_array_equal(module(x, jnp.arange(5)), module(x))
