"""The paper model of what expert-parallel ranks send one another, and the design of an all-to-all, as a prototype."""

import functools
import importlib.util
import itertools
import math
import pathlib
import re
import sys

import helpers
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import numpy as np
import pytest

import jax_moe
from jax_moe import shapes

ROOT = pathlib.Path(__file__).parents[1]


def _script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])  # scripts import one another
        spec.loader.exec_module(module)
    return module


scaling_model = _script("scaling_model")
model = scaling_model.exchange_model
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


def test_the_page_on_scaling_has_the_bytes():
    text, layer = (ROOT / "docs" / "scaling.md").read_text(), model.LAYERS[0]
    for n in (2, 4, 8):
        forms = [(model.replicated, {}), (model.spread, {}), (model.spread, {"x": model.NVFP4})]
        cells = [
            " / ".join(f"{form(layer, 8192, n, sums=sums, **x).total / 1e6:.0f}" for sums in (model.FP32, model.BF16))
            for form, x in forms
        ]
        assert re.search(
            rf"^\| n = {n}.*\| {' .. '.join(map(re.escape, cells)).replace('..', re.escape('|'))} \|$", text, re.M
        )


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


# --- The model of a run -----------------------------------------------------------------------------------------------

CONSTANTS = {
    "all_reduce float32": (20, 350), "all_reduce bfloat16": (21, 340), "all_gather": (12, 300),
    "reduce_scatter": (14, 310), "all_to_all": (16, 320),
}  # fmt: skip
"""Microseconds and GB/s."""
TOKENS = (8, 128, 1024, 8192)
ALONE = dict(zip(TOKENS, (150, 390, 700, 4000), strict=True))


def _collectives(n):
    rows = []
    for name, (latency, bandwidth) in CONSTANTS.items():
        for sent in (6e4, 1e6, 6e7):
            seconds = latency * 1e-6 + sent / bandwidth * 1e-9
            rows.append({"name": name, "devices": n, "bytes": sent, "sent_bytes": sent, "seconds": seconds})
    return rows


def _document(sizes, start=24.0, per_byte=1e-6, routing=11.0):
    """A run in which the model holds; the arithmetic written out once more, for qwen3-235b-a22b."""
    collectives = [row for n in sizes for row in _collectives(n)]
    row = {"model": "qwen3-235b-a22b", "precision": "w4a16"}
    rows = [
        row | {"tokens": T, "form": "one GPU", "sum_dtype": "", "devices": 1, "seconds": us / 1e6}
        for T, us in ALONE.items()
    ]
    for n, T, form, (sums, width) in itertools.product(
        sizes, TOKENS, ("replicated", "spread"), (("float32", 4), ("bfloat16", 2))
    ):
        time = ALONE[T] / n + (1 - 1 / n) * (start + T * 4096 * (2 + width) * per_byte)
        part = T * 4096 * (n - 1) / n / 1e3
        if form == "replicated":
            latency, bandwidth = CONSTANTS[f"all_reduce {sums}"]
            time += latency + 2 * part * width / bandwidth
        else:
            latency, bandwidth = CONSTANTS["all_gather"]
            time += latency + (2 * part + T * (n - 1) / n * 64 / 1e3) / bandwidth + routing
            latency, bandwidth = CONSTANTS["reduce_scatter" if sums == "float32" else "all_to_all"]
            time += latency + part * width / bandwidth
        rows.append(row | {"tokens": T, "form": form, "sum_dtype": sums, "devices": n, "seconds": time / 1e6})
    environment = {"cards": {"H": max(sizes)}, "jax": "0", "commit": "0", "time": "2026-01-01"}
    constants = scaling_model.constants(collectives)
    return {"environment": environment, "results": rows, "collectives": collectives, "constants": constants}


def test_constants_of_collectives_are_a_line():
    found = scaling_model.constants(_collectives(2) + _collectives(4))
    assert len(found) == 2 * len(CONSTANTS)
    for one in found:
        assert (one["microseconds"], one["gigabytes_per_second"]) == pytest.approx(CONSTANTS[one["name"]])


@pytest.mark.parametrize("fit_on", [None, {2}])
def test_the_model_finds_the_constants_of_a_run_where_it_holds(fit_on):
    rows, fitted = scaling_model.predict(_document((2, 4)), fit_on)
    (found,) = fitted.values()
    assert (found.start, found.per_byte, found.routing) == pytest.approx((24, 1e-6, 11), rel=1e-6)
    assert len(rows) == 2 * 4 * 2 * 2
    for row in rows:
        assert row["predicted"] == pytest.approx(row["seconds"])
        assert row["off"] == pytest.approx(0, abs=1e-9)


def test_the_error_of_the_model_is_said():
    document = _document((2,))
    (slow,) = [
        row
        for row in document["results"]
        if (row["form"], row["tokens"], row["sum_dtype"]) == ("spread", 128, "bfloat16")
    ]
    slow["seconds"] *= 1.5
    *_, last = scaling_model.errors(document)
    assert last.startswith("15 of 16 rows within 15%")
    rows, _ = scaling_model.predict(document)
    assert max(rows, key=lambda row: abs(row["off"]))["seconds"] == slow["seconds"]


def test_nothing_that_is_fitted_is_below_zero():
    document = _document((2,), per_byte=-2e-7)
    _, fitted = scaling_model.predict(document)
    (found,) = fitted.values()
    assert found.per_byte == 0
    assert found.start > 0


def test_what_is_expected_of_this_host_is_what_was_measured_there():
    document = _document((2, 4))
    (((model_name, precision, _), fitted),) = scaling_model.predict(document)[1].items()
    links = scaling_model.links_of(document)
    here, hosts, rack = scaling_model.PLACES
    for row in document["results"]:
        if row["devices"] == 1:
            continue
        case = (row["devices"], row["tokens"], row["form"], precision, row["sum_dtype"], model_name, fitted, links)
        time, one = scaling_model.expected(here, *case)
        assert time == pytest.approx(row["seconds"] * 1e6)
        assert one == ALONE[row["tokens"]]
    # Between hosts there is more to do; on other cards with other links both change.
    case = ("spread", precision, "bfloat16", model_name, fitted, links)
    assert scaling_model.expected(hosts, 16, 2048, *case) > scaling_model.expected(here, 16, 2048, *case)
    assert scaling_model.expected(rack, 16, 2048, *case) < scaling_model.expected(here, 16, 2048, *case)


def test_between_hosts_each_row_crosses_once():
    """16 GPUs of two hosts: of the 15 parts that a ring sends on, a network card has its own GPU's, once."""
    document, (_, hosts, _) = _document((2, 8)), scaling_model.PLACES
    (((name, precision, _), fitted),) = scaling_model.predict(document)[1].items()
    case = (16, 2048, "spread", precision, "bfloat16", name, fitted, scaling_model.links_of(document))
    here, _ = scaling_model.expected(scaling_model.PLACES[0], *case)
    across, _ = scaling_model.expected(hosts, *case)
    rows = model.rows_between_hosts(model.LAYERS[0], 2, 8)["spread"] * 2048 / 16
    link, routing = hosts.between, rows * 64
    assert across - here == pytest.approx(2 * link.microseconds + (rows * 4096 * 4 + routing) / link.gigabytes / 1e3)


def test_w4a4_gathers_what_it_multiplies():
    layer = model.LAYERS[0]
    assert scaling_model.sent(layer, 64, 4, "spread", "w4a4", "bfloat16") == model.spread(
        layer, 64, 4, model.NVFP4, model.BF16
    )
    assert scaling_model.sent(layer, 64, 4, "tensor-spread", "w4a16", "float32") == model.spread(layer, 64, 4)
    assert scaling_model.sent(layer, 64, 4, "tensor", "w4a4", "bfloat16") == model.replicated(layer, 64, 4, model.BF16)


def test_the_local_op_alone_is_fitted_but_not_recommended():
    document = _document((2,))
    for row in list(document["results"]):
        if row["form"] == "replicated":
            latency, bandwidth = CONSTANTS[f"all_reduce {row['sum_dtype']}"]
            width = {"float32": 4, "bfloat16": 2}[row["sum_dtype"]]
            seconds = row["seconds"] - latency / 1e6 - row["tokens"] * 4096 * width / bandwidth / 1e9
            document["results"].append(row | {"form": "local", "seconds": seconds})
    rows, _ = scaling_model.predict(document)
    assert len([row for row in rows if row["form"] == "local"]) == 8
    assert max(abs(row["off"]) for row in rows) < 1e-9
    assert "local" not in "".join(scaling_model.expectations(document))


def test_a_run_is_printed_with_what_to_expect_elsewhere():
    document = _document((2, 4))
    text = "\n".join([*scaling_model.markdown(document), *scaling_model.errors(document)])
    assert "| T = 8192 | 4000 |" in text
    assert "32 of 32 rows within 15%; mean error 0.0%" in text
    (table,) = scaling_model.expectations(document)
    places = [line.split(" | ")[:2] for line in table.splitlines()[2:]]
    assert [(place.removeprefix("| "), int(n)) for place, n in places] == [
        (place.name, n) for place in scaling_model.PLACES for n in place.sizes
    ]
