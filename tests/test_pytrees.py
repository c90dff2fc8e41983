"""``Experts`` and ``Routing`` as pytrees: jit, scan, sharding, checkpoints."""

import dataclasses
import importlib
import math
import pickle
import pkgutil

import helpers
from helpers import make_case
import jax
import jax.export
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np
import pytest

import jax_moe


def assert_trees_bit_equal(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        helpers.assert_bit_equal(a, b)


@pytest.fixture(scope="module")
def case():
    return make_case(0, num_experts=8, bias=True)


def test_leaves_are_named_arrays_that_lead_with_the_experts(case):
    paths = jax.tree_util.tree_leaves_with_path(case.experts)
    names = [jax.tree_util.keystr(path) for path, _ in paths]
    leaves = ("payload", "block_scale", "global_scale", "input_scale", "bias")
    assert names == [f".{projection}.{leaf}" for projection in ("gate_up", "down") for leaf in leaves]
    for name, (_, leaf) in zip(names, paths, strict=True):
        assert isinstance(leaf, jax.Array)
        assert leaf.shape[:1] == (() if name == ".gate_up.input_scale" else (8,))


def test_absent_leaves_are_not_leaves(case):
    bare = helpers.without_input_scales(make_case(0).experts)
    assert len(jax.tree.leaves(bare)) == 6
    assert jax.tree.structure(bare) != jax.tree.structure(case.experts)


def test_frozen(case):
    with pytest.raises(dataclasses.FrozenInstanceError):
        case.experts.layout = "other"
    with pytest.raises(dataclasses.FrozenInstanceError):
        case.routing.weights = None


def test_jit_takes_and_gives_them(case):
    experts, routing = jax.jit(lambda *trees: trees)(case.experts, case.routing)
    assert_trees_bit_equal((experts, routing), (case.experts, case.routing))
    assert isinstance(experts, jax_moe.Experts)
    assert isinstance(routing, jax_moe.Routing)


def test_the_layout_is_static(case):
    """Another layout is another program, and travels with the tree."""
    other = dataclasses.replace(case.experts, layout="other")
    run = jax.jit(lambda experts: experts)
    assert run(case.experts).layout == "canonical"
    assert run(other).layout == "other"
    assert run._cache_size() == 2


def test_copies_and_pickles(case):
    host = jax.tree.map(np.asarray, case.experts)
    assert_trees_bit_equal(pickle.loads(pickle.dumps(host)), host)


def test_scan_over_stacked_layers(case):
    layers = [make_case(seed, num_experts=8, bias=True) for seed in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *((c.experts, c.routing) for c in layers))

    def layer(x, weights):
        return x + jax_moe.fused_moe(x, *weights), None

    x = expected = case.x
    for c in layers:
        expected = expected + jax_moe.fused_moe(expected, c.experts, c.routing)
    helpers.assert_bit_equal(jax.jit(lambda x: jax.lax.scan(layer, x, stacked)[0])(x), expected)


def test_device_put_with_named_sharding(case):
    mesh = jax.make_mesh((8,), ("expert",))
    shardings = jax_moe.expert_shardings(case.experts, mesh)
    placed = jax.device_put(case.experts, shardings)
    assert_trees_bit_equal(placed, case.experts)
    for leaf, sharding in zip(jax.tree.leaves(placed), jax.tree.leaves(shardings), strict=True):
        assert leaf.sharding == sharding
        assert len(leaf.addressable_shards) == 8
        expected = (1, *leaf.shape[1:]) if leaf.ndim else ()
        assert {shard.data.shape for shard in leaf.addressable_shards} == {expected}
    routing = jax.device_put(case.routing, NamedSharding(mesh, PartitionSpec()))
    assert_trees_bit_equal(routing, case.routing)


@pytest.mark.parametrize("sharded", [False, True], ids=["whole", "sharded"])
def test_orbax_saves_and_restores(case, sharded, tmp_path):
    experts = case.experts
    if sharded:
        mesh = jax.make_mesh((2, 4), ("tensor", "expert"))
        experts = jax.device_put(experts, jax_moe.expert_shardings(experts, mesh))
    checkpoint = pytest.importorskip("orbax.checkpoint", reason="orbax-checkpoint is not installed")
    with checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "layer", (experts, case.routing))
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "layer", (experts, case.routing))
    assert_trees_bit_equal(restored, (experts, case.routing))
    assert restored[0].gate_up.payload.sharding == experts.gate_up.payload.sharding
    assert isinstance(restored[0], jax_moe.Experts)


def exported(function, *operands):
    """The function as another process would load it, and what it answers here."""
    compiled = jax.jit(function)
    serialized = jax.export.export(compiled)(*operands).serialize()
    return jax.export.deserialize(bytearray(serialized)), compiled(*operands)


@pytest.mark.parametrize(
    "method", [jax_moe.Softmax(renormalize=False), jax_moe.DeepSeekV3(4, 2, np.float32(1.5)), jax_moe.Llama4()]
)
def test_a_function_of_a_router_is_exported_with_its_rule(method):
    """The rule is static: it travels in the file, and a router with another rule does not fit."""
    rng = np.random.default_rng(0)
    router = jax_moe.Router(jnp.asarray(rng.standard_normal((8, 16)), jnp.float32), k=np.int32(3), method=method)
    x = jnp.asarray(rng.standard_normal((5, 16)), jnp.float32)
    loaded, expected = exported(lambda router, x: router(x), router, x)
    assert_trees_bit_equal(loaded.call(router, x), expected)
    with pytest.raises(ValueError, match="Sigmoid"):
        loaded.call(dataclasses.replace(router, method=jax_moe.Sigmoid()), x)


def pytree_classes() -> list[type]:
    """Every dataclass of the package that JAX takes apart, however it is registered."""
    classes = set()
    for found in pkgutil.walk_packages(jax_moe.__path__, "jax_moe."):
        try:
            module = importlib.import_module(found.name)
        except ModuleNotFoundError as error:
            if error.name in ("cuda", "cutlass", "flax"):  # optional, and what needs them cannot be made without them
                continue
            raise
        classes |= {value for value in vars(module).values() if isinstance(value, type) and _is_pytree(value)}
    return sorted(classes, key=lambda cls: cls.__name__)


def _is_pytree(cls: type) -> bool:
    if not dataclasses.is_dataclass(cls) or not cls.__module__.startswith("jax_moe."):
        return False
    instance = object.__new__(cls)
    for field in dataclasses.fields(cls):
        object.__setattr__(instance, field.name, None)
    return not jax.tree_util.all_leaves([instance])


def _array(*shape: int, dtype=jnp.float32) -> jax.Array:
    return jnp.arange(math.prod(shape)).reshape(shape).astype(dtype)


PROJECTION = jax_moe.Projection(_array(2, 3, dtype=jnp.uint8), None, _array(2), bias=_array(2, 3))
METHOD = jax_moe.DeepSeekV3(4, 2, 1.5, scores="sqrtsoftplus")
EXAMPLES = [
    PROJECTION,
    jax_moe.PreparedProjection(**vars(PROJECTION), layout="another", out_features=48),
    jax_moe.Experts(PROJECTION, PROJECTION, layout="another"),
    jax_moe.Routing(_array(3, 2, dtype=jnp.int32), _array(3, 2)),
    jax_moe.Router(_array(8, 4), expert_scale=_array(8), k=3, method=METHOD, norm_eps=1e-6),
    jax_moe.HashRouter(_array(8, 4), _array(9, 3, dtype=jnp.int32), method=METHOD),
    jax_moe.SharedExpert(_array(2, 6, 4), _array(4, 6), gate=_array(1, 4), activation=jax_moe.SwiGLU(limit=7.0)),
]


@pytest.mark.parametrize("cls", pytree_classes(), ids=lambda cls: cls.__name__)
def test_a_function_of_each_pytree_of_the_package_is_exported(cls):
    """Its static fields travel in the file, those that have no default too."""
    (example,) = (example for example in EXAMPLES if type(example) is cls)
    for field in dataclasses.fields(cls):
        if field.metadata.get("static"):
            assert getattr(example, field.name) != field.default, f"{field.name}: the default would prove nothing"
    loaded, expected = exported(lambda tree: jax.tree.map(lambda leaf: leaf[::-1], tree), example)
    result = loaded.call(example)
    assert type(result) is cls
    assert_trees_bit_equal(result, expected)


def test_the_pytrees_of_the_package_are_found():
    assert {jax_moe.Experts, jax_moe.Router} <= set(pytree_classes())
    assert not {jax_moe.SwiGLU, jax_moe.DeepSeekV3} & set(pytree_classes())
