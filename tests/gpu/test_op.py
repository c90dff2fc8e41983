"""``fused_moe`` on a GPU against its definition, and against the CPU handler bit for bit where sums are exact."""

import functools
import importlib
import threading

import calls
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import statement

import jax_moe

# Where the target of this machine chooses a config.
program = importlib.import_module(calls.target().program.__module__)
_CAPTURE = {"xla_gpu_graph_min_graph_size": 1}
_EAGER = {"xla_gpu_enable_command_buffer": ""}
_PRECISIONS = ["w4a16", "w4a4", "w4a4_dynamic"] if "w4a4_dynamic" in calls.target().layouts else ["w4a16", "w4a4"]
_SHAPES = {
    "one token": dict(tokens=1, hidden=64, intermediate=64, num_experts=4, top_k=2),
    "ragged": dict(tokens=37, hidden=112, intermediate=80, num_experts=5, top_k=3),
    "many experts": dict(tokens=64, hidden=256, intermediate=128, num_experts=96, top_k=8),
    "long": dict(tokens=700, hidden=384, intermediate=320, num_experts=8, top_k=2),
}


def _op(compiler_options=_CAPTURE, **options):
    return calls.jit(functools.partial(jax_moe.fused_moe, **options), compiler_options)


def _check(out: np.ndarray, case: helpers.Case) -> None:
    """As ``helpers.assert_matches``; with room for what adding bf16 atomically rounds besides.

    Each of the K contributions c is rounded to bf16, and so is each of the K - 1 sums that it is added to, which is at
    most the sum of all |c|: K times the unit roundoff of bf16 times that sum.
    """
    if case.options.get("combine", "atomic") == "ordered" or out.dtype == np.float32:
        helpers.assert_matches(out, case)
        return
    options = {"activation": jax_moe.SwiGLU(), "precision": "w4a16"} | case.options
    for name in ("combine", "out_dtype"):
        options.pop(name, None)
    ids, weights = case.routing.expert_ids, case.routing.weights
    slots = ids.shape[1]
    sizes = 0.0
    for k in range(slots):
        routing = jax_moe.Routing(ids[:, k : k + 1], weights[:, k : k + 1])
        sizes = sizes + np.abs(statement.moe(case.x, case.experts, routing, **options)[0])
    value, bound = statement.moe(case.x, case.experts, case.routing, **options)
    result = helpers.compare(out, value, bound + slots * statement.U16 * sizes)
    assert result.passes, f"{result} with {case.options}"


def _run(case: helpers.Case, times=3, compiler_options=_CAPTURE) -> np.ndarray:
    """The result of the last of some calls: the first is eager, then one is captured, then there are replays."""
    prepared = calls.prepared(case)
    op = _op(compiler_options, **case.options)
    for _ in range(times):
        out = op(prepared.x, prepared.experts, prepared.routing)
    return np.asarray(out)


@pytest.mark.parametrize("combine", ["atomic", "ordered"])
@pytest.mark.parametrize("precision", _PRECISIONS)
@pytest.mark.parametrize("shape", _SHAPES)
def test_shapes(poison, shape, precision, combine):
    case = helpers.make_case(1, **_SHAPES[shape], precision=precision, combine=combine)
    poison(1)
    _check(_run(case), case)


@pytest.mark.parametrize("out_dtype", [jnp.bfloat16, jnp.float32], ids=str)
@pytest.mark.parametrize("combine", ["atomic", "ordered"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", helpers.ACTIVATIONS, ids=str)
def test_activations_and_biases(poison, activation, bias, combine, out_dtype):
    case = helpers.make_case(
        2,
        tokens=19,
        hidden=192,
        intermediate=96,
        activation=activation,
        bias=bias,
        combine=combine,
        out_dtype=out_dtype,
    )
    poison(1)
    _check(_run(case), case)


@pytest.mark.parametrize("precision", _PRECISIONS)
@pytest.mark.parametrize("combine", ["atomic", "ordered"])
def test_weight_on_the_input(poison, precision, combine):
    case = helpers.make_case(3, tokens=33, hidden=128, intermediate=64, precision=precision, combine=combine,
                             weight_on="input")  # fmt: skip
    poison(1)
    _check(_run(case), case)


@pytest.mark.parametrize("combine", ["atomic", "ordered"])
@pytest.mark.parametrize("routing", ["any", "one", "hostile"])
def test_routings(poison, routing, combine):
    case = helpers.make_case(4, tokens=130, hidden=128, intermediate=64, num_experts=6, top_k=4, routing=routing,
                             expert_offset=3, all_experts=20, combine=combine)  # fmt: skip
    poison(1)
    _check(_run(case), case)


@pytest.mark.parametrize("weight_on", ["output", "input"])
@pytest.mark.parametrize(("precision", "combine"), [("w4a16", "atomic"), ("w4a4", "ordered")])
@pytest.mark.parametrize("routing", ["any", "one", "hostile"])
def test_few_routes(poison, routing, precision, combine, weight_on):
    """So few that no sort goes first; an expert has several tiles, or none."""
    case = helpers.make_case(4, tokens=13, hidden=192, intermediate=160, num_experts=6, top_k=4, routing=routing,
                             expert_offset=3, all_experts=12, precision=precision, combine=combine, weight_on=weight_on,
                             bias=True)  # fmt: skip
    poison(1)
    _check(_run(case), case)


@pytest.mark.parametrize("combine", ["atomic", "ordered"])
def test_no_tokens(combine):
    case = helpers.make_case(5, tokens=0, combine=combine)
    assert _run(case).shape == (0, 48)


@pytest.mark.parametrize("tokens", [2, 9, 33, 129, 513, 2049, 8192])
def test_every_size_of_batch(poison, tokens):
    """Each takes other tiles, and another sort."""
    case = helpers.make_case(6, tokens=tokens, hidden=256, intermediate=192, num_experts=16, top_k=4, combine="ordered")
    poison(1)
    _check(_run(case), case)


def _configs(precision):
    return program.CONFIGS[precision] if isinstance(program.CONFIGS, dict) else program.CONFIGS


@pytest.mark.parametrize("tokens", [11, 300])
@pytest.mark.parametrize(
    ("precision", "config"),
    [
        pytest.param(precision, config, id=f"{config.name}-{precision}")
        for precision in _PRECISIONS
        for config in _configs(precision)
    ],
)
def test_every_config(poison, monkeypatch, config, tokens, precision):
    """Whatever would be chosen; experts have several tiles or few rows, stages a rest, CTAs several units."""
    monkeypatch.setattr(program, "best_config", lambda *_, **__: config)
    monkeypatch.setattr(program, "fitted", lambda config, *_: config, raising=False)  # sm_90a's
    case = helpers.make_case(tokens, tokens=tokens, hidden=528, intermediate=304, num_experts=24, top_k=4,
                             precision=precision)  # fmt: skip
    poison(1)
    _check(_run(case), case)


@pytest.mark.parametrize("options", [dict(), dict(precision="w4a4", combine="ordered", out_dtype=jnp.float32)], ids=str)
@pytest.mark.parametrize("sizes", [(1, 1088, 704), (8, 528, 2112)], ids=str)
@pytest.mark.parametrize("form", ["FEW_UNITS", "SPLIT_UNITS"])
def test_the_forms_for_few_units(poison, monkeypatch, form, sizes, options):
    """Whatever would be chosen; warpgroups have unequal parts, and in the last sizes CTAs take several units."""
    if not hasattr(program, form):
        pytest.skip("needs a Hopper GPU: others have no such form")
    monkeypatch.setattr(program, "best_config", lambda *_, **__: getattr(program, form))
    tokens, hidden, intermediate = sizes
    case = helpers.make_case(tokens, tokens=tokens, hidden=hidden, intermediate=intermediate, num_experts=8, top_k=4,
                             bias=True, **options)  # fmt: skip
    poison(1)
    _check(_run(case), case)


@pytest.mark.parametrize("tokens", [1, 16, 200])
def test_calls_in_a_row_share_workspaces_and_no_routing(poison, tokens):
    """One program, one graph: what a call's kernels wrote for its routing is not what the next call's read."""
    cases = [
        helpers.make_case(seed, tokens=tokens, hidden=256, intermediate=128, num_experts=32, top_k=2)
        for seed in range(30, 42)
    ]
    first = calls.prepared(cases[0])

    def program(x, experts, routings):
        outs = []
        for routing in routings:  # each waits for the one before it
            offset = jnp.isnan(outs[-1][0, 0]).astype(jnp.int32) if outs else jnp.int32(0)
            outs.append(jax_moe.fused_moe(x, experts, routing, expert_offset=offset))
        return outs

    op = calls.jit(program, _CAPTURE)
    for _ in range(6):
        poison(0.5)
        outs = op(first.x, first.experts, [case.routing for case in cases])
    for out, case in zip(outs, cases, strict=True):
        _check(np.asarray(out), helpers.dataclasses.replace(cases[0], routing=case.routing))


def test_many_addresses_eager_and_captured(poison):
    case = helpers.make_case(7, tokens=48, hidden=256, intermediate=128, num_experts=8)
    prepared = calls.prepared(case)
    for options in (_EAGER, _CAPTURE):
        op, kept = _op(options, **case.options), []
        for i in range(24):
            poison(0.5)
            x = case.x * (1 + i % 3)
            out = op(x, prepared.experts, prepared.routing)
            kept += [x, out] if i % 3 else [x]
            _check(np.asarray(out), helpers.dataclasses.replace(case, x=x))


def test_ordered_mode_gives_the_same_bits_ten_thousand_times(poison):
    case = helpers.make_case(8, tokens=64, hidden=512, intermediate=256, num_experts=16, top_k=4, combine="ordered",
                             out_dtype=jnp.float32)  # fmt: skip
    prepared = calls.prepared(case)
    op = _op(**case.options)
    first = op(prepared.x, prepared.experts, prepared.routing)
    differing = jnp.zeros((), jnp.int32)
    differ = jax.jit(lambda total, a, b: total + jnp.sum(a != b))
    for _ in range(10_000):
        differing = differ(differing, op(prepared.x, prepared.experts, prepared.routing), first)
    assert int(differing) == 0


@pytest.mark.parametrize("precision", ["w4a16", "w4a4"])
def test_layers_in_a_scan(precision):
    cases = [helpers.make_case(seed, tokens=16, hidden=128, intermediate=64, precision=precision) for seed in range(3)]
    prepared = [calls.prepared(case) for case in cases]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[(p.experts, p.routing) for p in prepared])

    def layers_of(x, layers):
        def layer(carry, weights):
            return carry, jax_moe.fused_moe(carry, *weights, precision=precision)

        return jax.lax.scan(layer, x, layers)[1]

    scan = calls.jit(layers_of, _CAPTURE)
    for _ in range(3):
        outs = np.asarray(scan(cases[0].x, stacked))
    for out, case in zip(outs, cases, strict=True):
        _check(out, helpers.dataclasses.replace(case, x=cases[0].x))


@pytest.mark.parametrize("precision", _PRECISIONS)
@pytest.mark.parametrize("combine", ["atomic", "ordered"])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("tokens", [1, 16, 300, 2500])
def test_exact_sums_have_the_bits_of_the_cpu_handler(poison, tokens, gated, combine, precision):
    case = helpers.make_exact_case(11, tokens=tokens, gated=gated, precision=precision, combine=combine,
                                   out_dtype=jnp.float32)  # fmt: skip
    poison(1)
    got = _run(case)
    cpu = jax.devices("cpu")[0]
    x, experts, routing = jax.device_put((case.x, case.experts, case.routing), cpu)
    expected = jax.jit(functools.partial(jax_moe.fused_moe, **case.options))(x, experts, routing)
    # Zeros may differ in sign: 0 - 0 depends on the order.
    helpers.assert_bit_equal(got + 0.0, np.asarray(expected) + 0.0)


@pytest.mark.parametrize("combine", ["atomic", "ordered"])
def test_two_devices_at_once(poison, combine):
    """One jitted function from two threads, each with a device, weights and tokens of its own."""
    cases = [helpers.make_case(seed, tokens=64, hidden=256, intermediate=128, combine=combine) for seed in (12, 13)]
    op, prepared_cases, failures = _op(**cases[0].options), [calls.prepared(case) for case in cases], []
    if calls.why_not_run():  # here, because a thread cannot skip a test
        op(prepared_cases[0].x, prepared_cases[0].experts, prepared_cases[0].routing)
    calls.devices(2)

    def work(number):
        case, prepared, device = cases[number], prepared_cases[number], jax.devices()[number]
        arguments = jax.device_put((prepared.x, prepared.experts, prepared.routing), device)
        for _ in range(20):
            try:
                _check(np.asarray(op(*arguments)), case)
            except AssertionError as error:
                failures.append((number, str(error)))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
