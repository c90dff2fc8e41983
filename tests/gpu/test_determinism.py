"""What docs/determinism.md promises of a GPU: the same bits in replays, batches, plans, programs, processes, on a mesh.

Where nothing can run, every program of a test is lowered before the test is skipped.
"""

import collections
import dataclasses
import functools
import importlib

import calls
import frozen
import helpers
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import numpy as np
import product_cases
import pytest

import jax_moe
from jax_moe import check
from jax_moe.kernels import lowering
from jax_moe.problem import Options

program = importlib.import_module(calls.target().program.__module__)
_CAPTURE = {"xla_gpu_graph_min_graph_size": 1}
_EAGER = {"xla_gpu_enable_command_buffer": ""}
_PRECISIONS = ["w4a16", "w4a4"]
_ORDERED = dict(combine="ordered", out_dtype=jnp.float32)
_INVARIANT = _ORDERED | {"batch_invariant": True}


def _case(tokens, top_k=4, **options) -> helpers.Case:
    case = helpers.make_case(21, tokens=tokens, hidden=528, intermediate=304, num_experts=16, top_k=top_k, bias=True)
    return case.with_options(**_ORDERED | options)


def _run(case: helpers.Case, compiler_options=_CAPTURE, times: int = 3) -> np.ndarray:
    """The last of some results: the first call may be eager, the next is captured, then come replays.

    Where nothing can run, lowers it; ``calls.require_gpu`` comes behind the last one of a test.
    """
    case = calls.prepared(case)
    run = jax.jit(functools.partial(jax_moe.fused_moe, **case.options), compiler_options=compiler_options)
    arguments = case.x, case.experts, case.routing
    if calls.why_not_run():
        calls.lower(run, *arguments)
        return np.zeros((case.x.shape), case.options["out_dtype"])
    for _ in range(times):
        out = run(*arguments)
    return np.asarray(out)


def _configs(case: helpers.Case):
    """How both GEMMs of a call are put together."""
    static = {"weight_on": "output", "command_buffer": True} | case.options
    offset = static.pop("expert_offset", 0)
    experts = calls.prepared(case).experts
    problem = check.check(
        case.x,
        experts,
        case.routing,
        Options(**static),
        expert_offset=offset,
        num_experts=static.pop("num_experts", None),
    )
    return tuple(launch.spec.config for launch in lowering.launches(problem) if launch.name in ("gemm1", "gemm2"))


def _order(configs) -> tuple[int, ...]:
    """Of each GEMM's sums: into how many it puts the blocks of the contraction by turns."""
    return tuple(getattr(config, "k_warpgroups", 1) for config in configs)


# --- Batches and plans --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", _PRECISIONS)
def test_a_token_has_the_same_bits_in_any_batch_of_one_order(poison, precision):
    """From 1 token to 3000, other plans and other places in a tile; compared where the page promises it."""
    whole, results = _case(3000, precision=precision), collections.defaultdict(list)
    shuffled = np.random.default_rng(0).permutation(3000)
    for count in (1, 9, 20, 90, 300, 1200, 3000):
        chosen = shuffled[:count]
        part = frozen.rows(whole, chosen)
        poison(0.5)
        results[_order(_configs(part))].append((chosen, _run(part)))
    calls.require_gpu()
    for results_of_one_order in results.values():
        *smaller, (largest, expected) = results_of_one_order
        place = {token: row for row, token in enumerate(largest)}
        for chosen, got in smaller:
            helpers.assert_bit_equal(got, expected[[place[token] for token in chosen]])


@pytest.mark.parametrize("precision", _PRECISIONS)
def test_a_token_has_the_same_bits_in_any_batch(poison, precision):
    """Where calls are batch invariant, and nowhere else: without that, few tokens have orders of their own."""
    whole, results, usual = _case(1000, precision=precision, **_INVARIANT), {}, {}
    shuffled = np.random.default_rng(1).permutation(1000)
    for count in (1, 2, 3, 8, 9, 33, 64, 200, 1000):
        part = frozen.rows(whole, shuffled[:count])
        poison(0.5)
        results[count], usual[count] = _run(part), _run(part.with_options(batch_invariant=False))
    calls.require_gpu()
    for count, got in results.items():
        helpers.assert_bit_equal(got, results[1000][:count])
    if precision == "w4a16" and hasattr(program, "BATCH_INVARIANT"):  # w4a4: see below
        assert [count for count, got in usual.items() if (got != results[count]).any()]


@pytest.mark.parametrize("precision", _PRECISIONS)
def test_a_row_of_a_product_has_the_same_bits_among_any(poison, precision):
    """The same of ``ragged_dot`` and ``linear``."""
    sizes = dict(in_features=1040, out_features=400)
    case = product_cases.make_case(5, [700], 700, **sizes, exact=False, precision=precision)
    results = {True: {}, False: {}}
    for is_invariant, of_counts in results.items():
        function, weights = calls.product(case, batch_invariant=is_invariant)
        run = jax.jit(function, compiler_options=_CAPTURE)
        for count in (1, 8, 9, 40, 130, 700):
            arguments = case.x[:count], jnp.full((1,), count, jnp.int32), jnp.int32(0), weights
            poison(0.5)
            if calls.why_not_run():
                calls.lower(run, *arguments)
            else:
                of_counts[count] = np.asarray(run(*arguments))
    calls.require_gpu()
    for count, got in results[True].items():
        helpers.assert_bit_equal(got, results[True][700][:count])
    if precision == "w4a16" and hasattr(program, "BATCH_INVARIANT"):
        assert (results[False][1] != results[True][1]).any()


@pytest.mark.parametrize("precision", _PRECISIONS)
@pytest.mark.parametrize("tokens", [9, 300])
def test_a_token_does_not_depend_on_its_neighbours(poison, tokens, precision):
    """The same program, whatever the others are: other values, another order, all of them at other experts."""
    case = _case(tokens, precision=precision)
    expected = _run(case)
    order = np.random.default_rng(1).permutation(tokens)
    reordered = _run(frozen.rows(case, order))
    elsewhere = dataclasses.replace(
        case,
        x=case.x.at[1:].set(-case.x[:-1]),
        routing=dataclasses.replace(case.routing, expert_ids=case.routing.expert_ids.at[1:].set(3)),
    )
    alone = _run(elsewhere)
    calls.require_gpu()
    helpers.assert_bit_equal(reordered, expected[order])
    helpers.assert_bit_equal(alone[:1], expected[:1])


@pytest.mark.parametrize("precision", _PRECISIONS)
def test_every_plan_of_one_order_gives_the_same_bits(poison, monkeypatch, precision):
    """Whatever would be chosen: widths, stages and warpgroups are not seen in the sums."""
    case, results = _case(300, precision=precision), collections.defaultdict(dict)
    configs = program.CONFIGS[precision] if isinstance(program.CONFIGS, dict) else program.CONFIGS
    configs = dict.fromkeys((*configs, *getattr(program, "BATCH_INVARIANT", ())))
    for config in configs:
        monkeypatch.setattr(program, "best_config", lambda *_, config=config, **__: config)
        assert _configs(case) == (config, config)
        poison(0.5)
        results[_order((config, config))][config.name] = _run(case)
    calls.require_gpu()
    for same in results.values():
        first = next(iter(same.values()))
        assert [name for name, result in same.items() if (result.view(np.uint32) != first.view(np.uint32)).any()] == []
    if precision == "w4a16" and len(results) > 1:  # so few bits are multiplied in w4a4 that most sums are exact
        first, other = (next(iter(same.values())) for same in results.values())
        assert (first != other).any()  # else the page could promise more


# --- Replays and programs -----------------------------------------------------------------------------------------


def _same_bits_again_and_again(case: helpers.Case, poison, times: int = 1000) -> None:
    case = calls.prepared(case)
    run = calls.jit(functools.partial(jax_moe.fused_moe, **case.options), _CAPTURE)
    poison(0.5)
    first = run(case.x, case.experts, case.routing)
    unsigned = {4: jnp.uint32, 2: jnp.uint16}[first.dtype.itemsize]
    bits = lambda a: jax.lax.bitcast_convert_type(a, unsigned)  # noqa: E731
    count = jax.jit(lambda total, a, b: total + jnp.sum(bits(a) != bits(b)))
    differing = jnp.zeros((), jnp.int32)
    for _ in range(times):
        differing = count(differing, run(case.x, case.experts, case.routing), first)
    assert int(differing) == 0


@pytest.mark.parametrize("out_dtype", [jnp.float32, jnp.bfloat16], ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("precision", _PRECISIONS)
@pytest.mark.parametrize("tokens", [9, 700])
def test_replays_of_ordered_sums(poison, tokens, precision, out_dtype):
    _same_bits_again_and_again(_case(tokens, precision=precision, out_dtype=out_dtype), poison)


@pytest.mark.parametrize("form", ["FEW_UNITS", "SPLIT_UNITS"])
def test_replays_of_sums_that_warpgroups_and_ctas_share(poison, monkeypatch, form):
    """They are added in one order, however late each is."""
    if not hasattr(program, form):
        pytest.skip("needs a Hopper GPU: others have no such form")
    config = getattr(program, form)
    monkeypatch.setattr(program, "best_config", lambda *_, **__: config)
    case = helpers.make_case(
        8, tokens=2, hidden=2048, intermediate=1536, num_experts=8, top_k=4, precision="w4a16", **_ORDERED
    )
    assert _configs(case) == (config, config)
    _same_bits_again_and_again(case, poison, times=10_000)


@pytest.mark.parametrize("out_dtype", [jnp.float32, jnp.bfloat16], ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("top_k", [1, 2])
def test_replays_of_atomic_sums_of_at_most_two(poison, top_k, out_dtype):
    """0 + a + b is 0 + b + a."""
    _same_bits_again_and_again(_case(700, top_k, combine="atomic", out_dtype=out_dtype), poison)


@pytest.mark.parametrize("precision", _PRECISIONS)
def test_two_contributions_have_one_sum(precision):
    """In fp32 atomic and ordered give the same, then; in bfloat16 atomic rounds each first."""
    ordered, atomic = _run(_case(64, 2, precision=precision)), _run(_case(64, 2, precision=precision, combine="atomic"))
    calls.require_gpu()
    helpers.assert_bit_equal(atomic + np.float32(0), ordered + np.float32(0))


@pytest.mark.parametrize("precision", _PRECISIONS)
def test_eager_captured_and_replayed_calls_have_the_same_bits(poison, precision):
    case = _case(130, precision=precision)
    poison(0.5)
    eager, first, replayed = _run(case, _EAGER, times=1), _run(case, times=1), _run(case, times=5)
    calls.require_gpu()
    helpers.assert_bit_equal(first, eager)
    helpers.assert_bit_equal(replayed, eager)


_IN_A_PROCESS = """
import sys
import numpy as np
import frozen, jax_moe
case = frozen.case(37).with_options(precision="w4a4", combine="ordered", out_dtype=np.float32)
experts = jax_moe.prepare(case.experts, precision="w4a4", progress=False)
np.save(sys.argv[1], jax_moe.fused_moe(case.x, experts, case.routing, **case.options))
"""


def test_another_process_gives_the_same_bits(tmp_path):
    """Where there is no GPU, the CPU does, and what it always gave."""
    results = []
    for name in ("one", "other"):
        path = tmp_path / f"{name}.npy"
        environment = {"JAX_PLATFORMS": "cpu" if calls.why_not_run() else "", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        helpers.run_python(_IN_A_PROCESS, path, **environment)
        results.append(np.load(path))
        if calls.why_not_run():
            assert frozen.digest(results[0]) == frozen.FUSED_MOE["w4a4-ordered"]
            calls.require_gpu()
    helpers.assert_bit_equal(*results)


# --- route --------------------------------------------------------------------------------------------------------


def test_routes_have_the_bits_of_the_cpu_whatever_the_batch():
    logits = jnp.asarray(frozen.floats((96, 128), 5)) * 2
    route = calls.jit(frozen.every_route, {})
    whole = route(logits)
    assert frozen.route_digests(whole) == frozen.ROUTES
    assert frozen.route_digests(frozen.every_route(logits)) == frozen.ROUTES
    for count in (1, 7, 33):
        first = jax.tree.map(lambda a, count=count: a[:count], whole)
        jax.tree.map(helpers.assert_bit_equal, route(logits[:count]), first)


# --- On a mesh ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", _PRECISIONS)
@pytest.mark.parametrize(
    ("axis", "top_k", "names"),
    [("data", 4, {}), ("expert", 2, {}), ("expert", 2, {"data_axis": "expert"})],
    ids=["tokens", "two experts a token", "two experts a token, tokens over them"],
)
def test_two_gpus_have_the_bits_of_one(poison, axis, top_k, names, precision):
    """Tokens alone are spread; or a token's contributions are two, which have one sum wherever they are made."""
    mesh = jax.make_mesh((2,), (axis,), axis_types=(AxisType.Auto,), devices=calls.devices(2))
    case = _case(1200, top_k, precision=precision)
    halved = frozen.rows(case, range(600))
    assert _order(_configs(case)) == _order(_configs(halved))  # each GPU's plan is for its own tokens
    expected = _run(case)
    placed = calls.prepare(jax.device_put(case.experts, jax_moe.expert_shardings(case.experts, mesh)), precision)
    data = names.get("data_axis", "data" if axis == "data" else None)
    x, routing = jax.device_put((case.x, case.routing), NamedSharding(mesh, P(data, None)))
    options = {k: v for k, v in case.options.items() if k != "expert_offset"}
    run = calls.jit(functools.partial(jax_moe.sharded_moe, mesh=mesh, **names, **options), _CAPTURE)
    for _ in range(3):
        poison(0.25)
        got = run(x, placed, routing)
    helpers.assert_bit_equal(np.asarray(got) + np.float32(0), expected + np.float32(0))


@pytest.mark.parametrize("names", [{}, {"data_axis": "expert"}], ids=["replicated", "spread"])
def test_a_token_has_the_same_bits_in_any_batch_on_four_gpus(poison, names):
    """Four parts, in the order of devices."""
    mesh = jax.make_mesh((4,), ("expert",), axis_types=(AxisType.Auto,), devices=calls.devices(4))
    case, results = _case(1000, **_INVARIANT), {}
    placed = calls.prepare(jax.device_put(case.experts, jax_moe.expert_shardings(case.experts, mesh)))
    options = {k: v for k, v in case.options.items() if k != "expert_offset"}
    run = jax.jit(functools.partial(jax_moe.sharded_moe, mesh=mesh, **names, **options), compiler_options=_CAPTURE)
    for count in (4, 8, 200, 1000):
        part = frozen.rows(case, range(count))
        where = NamedSharding(mesh, P("expert" if names else None, None))
        x, routing = jax.device_put((part.x, part.routing), where)
        poison(0.25)
        if calls.why_not_run():
            calls.lower(run, x, placed, routing)
        else:
            results[count] = np.asarray(run(x, placed, routing))
    calls.require_gpu()
    for count, got in results.items():
        helpers.assert_bit_equal(got, results[1000][:count])
