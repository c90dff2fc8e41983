"""The paper model of what expert-parallel ranks send one another, and the design of an all-to-all, as a prototype."""

import functools
import importlib.util
import itertools
import math
import pathlib
import re

import helpers
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import numpy as np
import pytest

import jax_moe
from jax_moe import shapes

ROOT = pathlib.Path(__file__).parents[1]


def _model():
    spec = importlib.util.spec_from_file_location("exchange_model", ROOT / "benchmarks" / "exchange_model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


model = _model()
SMALL = model.Layer("small", num_experts=8, top_k=2, hidden_size=64)


def test_layers_are_those_of_the_project():
    for layer in model.LAYERS:
        if (shape := shapes.MODELS.get(layer.name)) is not None:
            assert (layer.num_experts, layer.top_k, layer.hidden_size) == (
                shape.num_experts, shape.top_k, shape.hidden_size,
            )  # fmt: skip
    names = {layer.name for layer in model.LAYERS} - {"deepseek-r1"}  # there it is one of its shards
    assert names < shapes.MODELS.keys()


@pytest.mark.parametrize(("experts", "top_k", "n"), [(4, 2, 2), (8, 2, 4), (8, 3, 2), (6, 3, 3), (4, 4, 2), (8, 1, 8)])
def test_expected_ranks_of_every_choice(experts, top_k, n):
    choices = list(itertools.combinations(range(experts), top_k))
    mean = sum(len({expert // (experts // n) for expert in choice}) for choice in choices) / len(choices)
    assert model.expected_ranks(model.Layer("", experts, top_k, 16), n) == pytest.approx(mean)


@pytest.mark.parametrize("n", [2, 4, 8, 16, 64])
@pytest.mark.parametrize("layer", model.LAYERS, ids=lambda layer: layer.name)
def test_expected_ranks_of_random_tokens(layer, n):
    """For DeepSeek's router too, which first chooses groups of experts."""
    if layer.num_experts % n:
        with pytest.raises(ValueError, match="do not divide"):
            model.expected_ranks(layer, n)
        return
    rng, tokens = np.random.default_rng(n), 4000
    group = np.arange(layer.num_experts) // (layer.num_experts // layer.groups)
    group_scores = rng.random((tokens, layer.groups))
    chosen_groups = np.argsort(group_scores, axis=1)[:, : layer.chosen_groups]
    is_candidate = (group[None, :, None] == chosen_groups[:, None]).any(-1)
    scores = np.where(is_candidate, rng.random((tokens, layer.num_experts)), 2.0)
    ranks = np.argsort(scores, axis=1)[:, : layer.top_k] // (layer.num_experts // n)
    counts = np.array([len(set(row)) for row in ranks.tolist()])
    error = counts.std() / math.sqrt(tokens)
    assert abs(counts.mean() - model.expected_ranks(layer, n)) <= 4 * error + 1e-12


def test_bytes_counted_by_hand():
    """8 tokens of 64 values on 4 ranks, 2 tokens each."""
    # In a ring a rank passes on 3 of 4 parts of the sum, [2, 64] each, once to reduce and once to spread.
    assert model.replicated(SMALL, 8, 4) == model.Sent(0, 2 * 3 * (2 * 64 * 4))
    # It gets 6 tokens: 64 values of 2 bytes, 2 ids and 2 weights of 4; it sends 6 sums of 64 values of 4 or 2 bytes.
    assert model.spread(SMALL, 8, 4) == model.Sent(6 * (128 + 16), 6 * 256)
    assert model.spread(SMALL, 8, 4, sums=model.BF16).after == 6 * 128
    # NVFP4: 32 bytes of codes and 4 block scales.
    assert model.spread(SMALL, 8, 4, x=model.NVFP4).before == 6 * (36 + 16)
    # Of 28 pairs of experts 4 share a rank: 52/28 ranks a token, so a rank sees 13/28 of the others' 6 tokens.
    sent = model.all_to_all(SMALL, 8, 4)
    assert sent.before == pytest.approx(6 * 13 / 28 * 128 + 6 * 16)
    assert sent.after == pytest.approx(6 * 13 / 28 * 256)
    # However they choose, a rank gets no more than all tokens: then an all-to-all is a gather.
    assert model.all_to_all(SMALL, 8, 4, imbalance=10.0) == model.spread(SMALL, 8, 4)


def test_rows_between_hosts():
    rows = model.rows_between_hosts(SMALL, 2, 2)
    assert rows["spread"] == pytest.approx(1)
    assert rows["all-to-all, flat"] == pytest.approx(52 / 28 / 2)
    assert rows["all-to-all, once a host"] == pytest.approx((1 - 2 * 6 / 28 + 1) / 2)  # of 28 pairs 12 share a host


@pytest.mark.parametrize("n", [8, 16, 64])
@pytest.mark.parametrize("layer", model.LAYERS[:3], ids=lambda layer: layer.name)
def test_at_the_crossover_both_take_the_same_time(layer, n):
    ring, ideal, today = model.LINKS["NVL72"]
    for other in (ideal, today):
        tokens = model.least_tokens(layer, n, ring, other, model.NVFP4, model.BF16)

        def difference(tokens, link=other):
            spread = model.spread(layer, n * tokens, n, model.NVFP4, model.BF16)
            return model.all_to_all(layer, n * tokens, n, model.NVFP4, model.BF16).time(link) - spread.time(ring)

        if tokens == math.inf:
            assert difference(1) > 0
            assert difference(1e6) > 0
        else:
            assert difference(tokens) == pytest.approx(0, abs=1e-6)
            assert difference(2 * tokens) < 0 < difference(tokens / 2)


def test_times_of_equal_links():
    link = model.Link(20, 360)
    assert model.Sent(0, 3.6e6).time(link) == 30  # one collective, with its latency
    assert model.Sent(3.6e5, 3.6e6).time(link) == 51
    assert model.least_tokens(SMALL, 4, link, link, model.BF16, model.BF16) == 0
    everyone = model.Layer("", 4, 4, 64)  # each token visits each rank
    assert model.least_tokens(everyone, 4, link, link, model.BF16, model.BF16) == math.inf


def test_the_page_has_the_tables():
    text = (ROOT / "docs" / "all-to-all.md").read_text()
    for table in model.tables():
        assert table in text, table


# --- What the program sends -------------------------------------------------------------------------------------------

_BYTES = {"u8": 1, "s8": 1, "f8e4m3fn": 1, "s16": 2, "bf16": 2, "s32": 4, "f32": 4}


def _sent(hlo: str, n: int) -> dict[str, float]:
    """Bytes on the wire of a rank by the collective, of HLO that is not yet optimised; routing's apart."""
    found: dict[str, float] = {}
    operation = re.compile(r" = (\w+)\[([\d,]+)\]\S* (all-gather|all-reduce|reduce-scatter|all-to-all)\(")
    for dtype, shape, name in operation.findall(hlo):
        sizes = [int(size) for size in shape.split(",")]
        whole = math.prod(sizes) * _BYTES[dtype]
        sent = {"all-reduce": 2 * (n - 1) / n, "reduce-scatter": n - 1}.get(name, (n - 1) / n) * whole
        key = "routing" if sizes[-1] == SMALL.top_k else name
        found[key] = found.get(key, 0) + sent
    return found


def _case(tokens: int):
    return helpers.make_case(1, tokens=tokens, hidden=SMALL.hidden_size, num_experts=SMALL.num_experts, top_k=2)


def _mesh(n: int):
    return jax.make_mesh((n,), ("expert",), axis_types=(AxisType.Auto,))


@pytest.mark.parametrize("n", [2, 4, 8])
def test_bytes_of_the_program(n):
    """XLA:CPU gathers bfloat16 as float32, so types are read where they are still those that a GPU's program has."""
    tokens, case, mesh = 16, _case(16), _mesh(n)

    def hlo(data_axis):
        run = jax.jit(functools.partial(jax_moe.sharded_moe, mesh=mesh, data_axis=data_axis))
        shardings = jax_moe.expert_shardings(case.experts, mesh)
        lowered = run.lower(case.x, jax.device_put(case.experts, shardings), case.routing)
        compiled = lowered.compile().as_text()
        return lowered.compiler_ir("hlo").as_hlo_text(), compiled

    plain, compiled = hlo("data")
    assert _sent(plain, n) == {"all-reduce": model.replicated(SMALL, tokens, n).total}
    assert _sent(compiled, n) == _sent(plain, n)
    plain, compiled = hlo("expert")
    routing = model.routing_bytes(SMALL, tokens, n)
    expected = model.spread(SMALL, tokens, n)
    assert _sent(plain, n) == {
        "all-gather": expected.before - routing, "routing": routing, "reduce-scatter": expected.after
    }  # fmt: skip
    widened = model.spread(SMALL, tokens, n, x=model.FP32)
    assert _sent(compiled, n)["all-gather"] == widened.before - routing


# --- The design -------------------------------------------------------------------------------------------------------


def all_to_all_moe(x, experts, routing, *, n: int, axis: str = "expert"):
    """The form of docs/all-to-all.md on one rank, inside ``shard_map``: x and routing are of its T/n tokens.

    XLA:CPU has no ``ragged_all_to_all``; ``all_to_all`` of whole parts puts the same rows in the same places.
    """
    capacity, local = x.shape[0], experts.down.global_scale.shape[0]
    me = jax.lax.axis_index(axis)
    every = jax.tree.map(lambda a: jax.lax.all_gather(a, axis), routing)  # [n, T/n, K]
    visits = (every.expert_ids[..., None] // local == jnp.arange(n)).any(2)  # [sender, token, rank]
    order = jnp.argsort(~visits, axis=1, stable=True)  # the tokens of a sender that visit a rank come first
    counts = visits.sum(1)  # [sender, rank]

    rows = x[order[me].T]  # [rank, T/n, H]; a ragged exchange sends the first counts[me, rank] of each part
    received = jax.lax.all_to_all(rows, axis, 0, 0)
    is_row = jnp.arange(capacity) < counts[:, me, None]
    received = jnp.where(is_row[..., None], received, jnp.nan)  # what no one sent may be anything

    def of_rows(a):  # [n, T/n, K] -> [T, K], in the order of the rows
        return jnp.take_along_axis(a, order[:, :, me, None], axis=1).reshape(n * capacity, -1)

    elsewhere = (me + 1) % n * local  # an expert of another rank: the route is skipped
    ids = jnp.where(is_row.reshape(-1, 1), of_rows(every.expert_ids), elsewhere)
    local_routing = jax_moe.Routing(ids, of_rows(every.weights))
    y = jax_moe.fused_moe(
        received.reshape(n * capacity, -1), experts, local_routing, expert_offset=me * local,
        num_experts=n * local, out_dtype=jnp.float32, combine="ordered",
    )  # fmt: skip
    back = jax.lax.all_to_all(y.reshape(n, capacity, -1), axis, 0, 0)  # [rank, T/n, H], in the order that they left
    back = jnp.where((jnp.arange(capacity) < counts[me][:, None])[..., None], back, jnp.nan)
    place = jnp.argsort(order[me], axis=0)  # of a token among the rows that a rank got
    total = jnp.zeros((capacity, x.shape[1]), jnp.float32)
    for rank in range(n):  # in this order on every run
        total += jnp.where(visits[me][:, rank, None], back[rank][place[:, rank]], 0)
    return total.astype(x.dtype), counts[me], jnp.isnan(y).any(keepdims=True)


@pytest.mark.parametrize("n", [2, 4, 8])
def test_the_design_gives_the_same_bits_and_sends_what_the_model_says(n):
    case, mesh = helpers.make_exact_case(3, tokens=16), _mesh(n)
    shardings = jax_moe.expert_shardings(case.experts, mesh)
    experts = jax.device_put(case.experts, shardings)
    x, routing = jax.device_put((case.x, case.routing), NamedSharding(mesh, P("expert")))
    specs = jax.tree.map(lambda sharding: sharding.spec, shardings)
    run = jax.shard_map(
        functools.partial(all_to_all_moe, n=n), mesh=mesh, in_specs=(P("expert"), specs, P("expert")),
        out_specs=P("expert"),
    )  # fmt: skip
    y, counts, touched = jax.jit(run)(x, experts, routing)
    assert not touched.any()  # no expert ran on a row that no one sent
    helpers.assert_bit_equal(y, case.run())
    num_experts = case.experts.down.global_scale.shape[0]
    ranks = np.asarray(case.routing.expert_ids) // (num_experts // n)
    assert np.asarray(counts).sum() == sum(len(set(row)) for row in ranks.tolist())
