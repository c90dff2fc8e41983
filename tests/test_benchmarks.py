"""What the benchmarks measure is the op, call after call; their JAX parts run here on a CPU with a tiny model."""

import collections
import functools
import importlib.util
import json
import pathlib
import re
import sys
import time

import cuda_call
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import typer
import typer.testing

import jax_moe
from jax_moe import nvfp4, preparation, shapes
from jax_moe.cli import timing
from jax_moe.kernels import records
from jax_moe.kernels.sm90.target import SM90

FOLDER = pathlib.Path(__file__).parents[1] / "benchmarks"
TINY = shapes.LayerShape(num_experts=4, top_k=2, hidden_size=64, intermediate_size=32)


@pytest.fixture
def script(monkeypatch):
    """Imports a file of benchmarks/; the models are a tiny one, and weights are prepared for this machine."""
    monkeypatch.setattr(sys, "path", [str(FOLDER), *sys.path])
    monkeypatch.setattr(shapes, "MODELS", {"tiny": TINY})
    monkeypatch.setattr(jax_moe, "prepare", lambda experts, *_, **__: experts)

    def load(name):
        spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.mark.parametrize("chained", [False, True])
def test_a_chain_is_its_calls_one_after_the_other(chained):
    case = helpers.make_case(hidden=64, intermediate=32, num_experts=4, top_k=2, combine="ordered")
    (x, weights, ids, routing_weights), _ = timing.chain_arguments(TINY, case.experts, 5, 3, seed=1)
    op = functools.partial(jax_moe.fused_moe, combine="ordered")
    got = timing.captured(timing.op_chain(op, chained=chained))(x, weights, ids, routing_weights)
    expected = [x]
    for call in zip(ids, routing_weights, strict=True):
        expected.append(op(expected[-1] if chained else x, weights, jax_moe.Routing(*call)))
    np.testing.assert_array_equal(got, expected[-1])


def test_calls_of_a_chain_wait_for_one_another():
    """XLA must not find out that ``after`` is always 0: without the dependency calls could overlap."""
    text = jax.jit(lambda y, x: x + timing.after(y)).lower(jnp.ones((2, 2)), jnp.int32(1)).compile().as_text()
    assert "compare" in text
    for value in (1.0, 0.0, jnp.nan, jnp.inf):
        assert timing.after(jnp.full((1, 1), value)) == 0


def test_routings_are_distinct_experts_and_say_how_many_are_touched():
    for shape in (TINY, shapes.LayerShape(3, 3, 16, 16)):
        ids, weights, touched = timing.routings(shape, tokens=6, length=5, seed=0)
        assert ids.shape == weights.shape == (5, 6, shape.top_k)
        assert all(len(set(token)) == shape.top_k for call in ids for token in call)
        assert set(ids.reshape(-1)) == set(range(shape.num_experts))
        assert touched == np.mean([len(set(call.reshape(-1))) for call in ids])
        np.testing.assert_allclose(weights.sum(-1), 1)


def test_the_time_of_a_call_is_the_median_over_programs_and_calls(monkeypatch):
    clock, asked = [0.0], []
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    def run(programs):
        asked.append(programs)
        clock[0] += 0.02 * programs * (3 if len(asked) == 5 else 1)  # one disturbed run

    assert timing.seconds_per_call(run, length=4, repeats=5) == pytest.approx(0.005)
    assert asked == [4, 1, 2, 2, 2, 2, 2, 2]


@pytest.mark.parametrize("method", ["jax_moe w4a16/atomic", "jax_moe w4a4/ordered", "ragged_dot", "ragged_dot_cudnn"])
def test_a_row_of_the_gpu_benchmark(script, monkeypatch, method):
    script("gpu_methods")
    gpu_op = script("gpu_op")
    monkeypatch.setattr(gpu_op, "_DEFAULT_CHAIN", 2)
    row = gpu_op._row(gpu_op._method("tiny", method), "tiny", method, 3, repeats=3)
    assert row["tokens"] == 3
    assert 0 < row["seconds"] == pytest.approx(row["ratio"] * row["floor_seconds"])
    assert row["weight_bytes_per_second"] * row["seconds"] == pytest.approx(
        row["touched_experts"] * 3 * 64 * 32 * 4.5 / 8
    )
    assert row["flop_per_second"] * row["seconds"] == pytest.approx(6 * 3 * 2 * 64 * 32)
    assert ("eager_host_seconds" in row) == method.startswith("jax_moe")


def test_the_peer_computes_the_op(script):
    gpu_methods = script("gpu_methods")
    case = helpers.make_case(hidden=64, intermediate=32, num_experts=4, top_k=2, tokens=40)
    gate_up, down = (
        nvfp4.dequantize(p.payload, p.block_scale) * p.global_scale[..., None, None]
        for p in (case.experts.gate_up, case.experts.down)
    )
    both, down = jnp.concatenate([gate_up[:, 0], gate_up[:, 1]], 1).swapaxes(1, 2), down.swapaxes(1, 2)
    weights = (w.astype(jnp.bfloat16) for w in (both, down))
    got = gpu_methods.ragged_dot_op(case.x, *weights, case.routing.expert_ids, case.routing.weights)
    expected = case.run(out_dtype=jnp.float32)
    # Weights, both factors of the activation, the intermediate and the output are rounded to bf16.
    assert np.linalg.norm(got - expected) < 4 * 2**-8 * np.linalg.norm(expected)


@pytest.mark.parametrize("groups", [1, 4])
def test_the_products_benchmark_multiplies_what_its_peer_does(script, groups):
    module = script("gpu_product")
    case = module.Case(groups, min(groups, 2), 64, 32, 24)
    sizes = case.sizes(3)
    assert (sizes.sum(1) == case.rows).all()
    assert (sizes <= case.tokens).all()  # a token's groups are distinct
    x = jax.random.normal(jax.random.key(0), (case.rows, 64), jnp.bfloat16)
    product, weights, _ = module.ours(case, module.random_weights(case), "w4a16")
    peer, _, _ = module.bf16(case)
    dense = nvfp4.dequantize(weights.payload, weights.block_scale) * weights.global_scale[:, None, None]
    for call in map(jnp.asarray, sizes):
        expected = np.float64(peer(x, dense.swapaxes(1, 2).astype(jnp.bfloat16), call, jnp.int32(0)))
        got = np.float64(product(x, weights, call, jnp.int32(0)))
        # The peer's weights are rounded to bf16, and both outputs.
        assert np.linalg.norm(got - expected) < 2 * 2**-8 * np.linalg.norm(expected)
    row = module.measure(case, "w4a16", (product, weights, 2), 1)
    assert row["touched"] == (case.sizes(2) > 0).sum(1).mean()
    assert row["ratio"] == row["seconds"] / row["floor_seconds"] > 0


def test_the_routes_that_humming_is_given(script):
    """Each expert's routes in order, padded to whole blocks with the number of routes."""
    script("gpu_methods")
    ids = np.array([[1, 3], [3, 0], [3, 1]])
    sorted_ids, expert_ids = script("gpu_humming").sort(ids, block=2)
    assert sorted_ids.tolist() == [3, 6, 0, 5, 1, 2, 4, 6]
    assert expert_ids.tolist() == [0, 1, 3, 3]


def test_an_interval_of_the_median_holds_the_median(script):
    for name in ("gpu_methods", "gpu_op"):
        script(name)
    zeroing = script("zeroing")
    for file, (original, _) in zeroing._WITHOUT.items():
        assert original in (helpers.SOURCE_FOLDER / "ffi" / file).read_text(), "the change no longer applies"
    values = list(np.random.default_rng(0).normal(1, 0.01, 60))
    low, high = zeroing.interval(values)
    assert 0.99 < low < np.median(values) < high < 1.01
    turns = collections.Counter()
    runs = {name: functools.partial(lambda name, _: turns.update([name]), name) for name in ("branch", "without")}
    assert zeroing.measure(runs, 4)["ratio_branch"].keys() == {"median", "interval"}
    assert turns["branch"] == turns["without"] - 1  # one run to see how long it takes


def test_a_step_that_is_timed_is_launched_more_often_in_its_call(script, monkeypatch):
    kernel_times = script("kernel_times")
    cuda_call.stand_in_compiler(monkeypatch)
    call = cuda_call.problem(combine="ordered")
    plain = [launch.name for launch in cuda_call.program(call).launches]
    config = kernel_times.config_named("n16m1k2b4c2s2", SM90)
    with kernel_times.calls_made_of(SM90, config, ("sort", "gemm1")):
        attributes, _ = cuda_call.kernels_of(call)
        assert {launch.spec.config for launch in cuda_call.program(call).launches if "gemm" in launch.name} == {config}
    names = attributes["launches"].split()
    assert [name for name in names if name in plain] == plain
    assert names[2:4] == ["sort_0", "gemm1_0"]
    assert sum(name.startswith("gemm1") for name in names) == 1 + kernel_times._MORE
    assert {key: value for key, value in attributes["gemm1_3"].items()} == attributes["gemm1"]
    assert [launch.name for launch in cuda_call.program(call).launches] == plain
    few = cuda_call.program(cuda_call.problem(num_tokens=1)).launches  # without a sort
    assert kernel_times.with_more(few, ("sort",)) == few
    more = kernel_times.with_more(few, ("sort", "gemm1"))
    assert [launch.name for launch in more] == ["gemm1", *(f"gemm1_{i}" for i in range(4)), "gemm2"]


def _first_hour(script, monkeypatch, tmp_path, done, arguments=()):
    """Runs the command with stand-ins for the processes that it starts; its file, and its exit code."""
    script("gpu_op")
    first_hour = script("first_hour")
    monkeypatch.setattr(first_hour, "run", lambda command, minutes, **_: done(first_hour, " ".join(map(str, command))))
    app = typer.Typer()
    app.command()(first_hour.main)
    file = tmp_path / "results.json"
    result = typer.testing.CliRunner().invoke(app, [str(file), *arguments])
    return json.loads(file.read_text()) if file.exists() else None, result


_GPU = '{"card": "NVIDIA B200", "compute_capability": "10.0", "devices": 1, "target": "sm_100f"}'


def _all_well(first_hour, command):
    if "junitxml" in command:
        report = re.search(r"--junitxml=(\S+)", command)[1]
        cases = '<testcase classname="a" name="b"/><testcase classname="a" name="c"><skipped message="no"/></testcase>'
        pathlib.Path(report).write_text(f"<testsuites><testsuite>{cases}</testsuite></testsuites>")
        return first_hour.Done(0, "===== ERROR SUMMARY: 0 errors" if "--tool" in command else "2 passed")
    if "--output" in command:
        pathlib.Path(command.split()[-1]).write_text('{"results": [{"tokens": 1}], "failures": []}')
    return first_hour.Done(0, _GPU)


def test_the_first_hour_writes_one_file_of_everything(script, monkeypatch, tmp_path):
    monkeypatch.setattr("shutil.which", lambda name: __file__)
    document, result = _first_hour(script, monkeypatch, tmp_path, _all_well)
    assert result.exit_code == 0, result.output
    assert {step["status"] for step in document["steps"].values()} == {"passed"}
    assert len([name for name in document["steps"] if name.startswith("sanitizer")]) == 4
    assert document["target"] == "sm_100f"
    assert document["steps"]["correctness"]["facts"] | {"output": ""} == {
        "passed": 1, "skipped": 1, "why_skipped": ["no"], "failures": {}, "returncode": 0, "output": "",
    }  # fmt: skip
    assert document["steps"]["benchmark of the kernels"]["facts"]["results"][1]["results"] == [{"tokens": 1}]


def test_the_first_hour_goes_on_after_a_failure_and_says_what_was_skipped(script, monkeypatch, tmp_path):
    def done(first_hour, command):
        if "gpu_op.py" in command:
            return first_hour.Done(None, "hung")
        return first_hour.Done(1, "no tests ran") if "pytest" in command else _all_well(first_hour, command)

    monkeypatch.setattr("shutil.which", lambda name: None)
    document, result = _first_hour(script, monkeypatch, tmp_path, done, ["--quick"])
    statuses = {name: step["status"] for name, step in document["steps"].items()}
    assert statuses == {
        "machine": "passed", "correctness": "failed", "sanitizer memcheck": "skipped",
        "benchmark of the op": "failed", "benchmark of the kernels": "passed",
    }  # fmt: skip
    assert result.exit_code == 1
    assert "no compute-sanitizer" in document["steps"]["sanitizer memcheck"]["why"]
    assert "not done after 20 minutes\nhung" in document["steps"]["benchmark of the op"]["why"]


def test_the_first_hour_without_a_gpu_skips_all_and_fails(script, monkeypatch, tmp_path):
    def done(first_hour, command):
        return first_hour.Done(0, "") if "doctor" in command or "smi" in command else first_hour.Done(1, "no GPU")

    document, result = _first_hour(script, monkeypatch, tmp_path, done)
    assert result.exit_code == 1
    steps = document["steps"]
    assert {step["why"] for name, step in steps.items() if name != "machine"} == {"no GPU"}
    assert steps["machine"]["status"] == "passed"


def test_only_a_file_that_passed_changes_what_doctor_says(script, monkeypatch, tmp_path):
    """Of a copy of the record: nothing here may claim a run."""
    copy = tmp_path / "runs.json"
    copy.write_text(records.FILE.read_text())
    monkeypatch.setattr(records, "FILE", copy)
    before = records.runs_of("sm_100f")
    monkeypatch.setattr("shutil.which", lambda name: None)  # skipped sanitizers do not stand in the way
    document, _ = _first_hour(script, monkeypatch, tmp_path, _all_well)
    for broken in (
        document | {"target": None},
        document | {"steps": document["steps"] | {"correctness": {"status": "failed"}}},
    ):
        (tmp_path / "results.json").write_text(json.dumps(broken))
        _, result = _first_hour(script, monkeypatch, tmp_path, _all_well, ["--accept"])
        assert result.exit_code == 2
        assert records.runs_of("sm_100f") == before
    (tmp_path / "results.json").write_text(json.dumps(document))
    _, result = _first_hour(script, monkeypatch, tmp_path, _all_well, ["--accept"])
    assert result.exit_code == 0, result.output
    assert records.runs_of("sm_100f")[len(before) :][0]["card"] == "NVIDIA B200"
    assert records.runs_of("sm_90a") == json.loads(records.FILE.read_text())["sm_90a"] != []


# --- Several devices --------------------------------------------------------------------------------------------------


@pytest.fixture
def scaling(script, monkeypatch):
    """benchmarks/gpu_scaling.py with programs of two calls, of which those of more than 4 tokens are not chained."""
    for name in ("gpu_op", "exchange_model", "scaling_model"):
        script(name)
    programs = script("scaling_programs")
    module = script("gpu_scaling")
    monkeypatch.setattr(timing, "CHAINED_TOKENS", 4)
    for name, value in {"_ROW_SECONDS": 0.001, "_POISON_BYTES": 2**17, "ROWS": (8, 64)}.items():
        monkeypatch.setattr(module, name, value)
    for name, value in {"LENGTH": 2, "COLUMNS": 64}.items():
        monkeypatch.setattr(programs, name, value)
    return module


def _scale(scaling, *arguments):
    app = typer.Typer()
    app.command()(scaling.main)
    return typer.testing.CliRunner().invoke(app, ["--model", "tiny", "--devices", "2", "--repeats", "1", *arguments])


def test_scaling_is_measured_and_every_row_checked(scaling, tmp_path):
    file = tmp_path / "results.json"
    result = _scale(scaling, "--tokens", "4,8", "--output", str(file))
    assert result.exit_code == 0, result.output
    document = json.loads(file.read_text())
    alone = {row["tokens"]: row["seconds"] for row in document["results"] if row["devices"] == 1}
    several = [row for row in document["results"] if row["devices"] == 2]
    assert not document["failures"]
    assert [(row["form"], row["sum_dtype"], row["tokens"]) for row in several] == [
        (form, sums, tokens)
        for forms in (("replicated", "spread"), ("tensor",))
        for tokens in (4, 8)
        for form in forms
        for sums in ("float32", "bfloat16")
    ]
    for row in several:
        assert row["equal"]
        assert row["error"] <= row["bound"] == scaling.bound(2, row["sum_dtype"], 2)
        assert row["efficiency"] == pytest.approx(alone[row["tokens"]] / 2 / row["seconds"])
        assert row.get("weak_efficiency") == (alone[4] / row["seconds"] if row["tokens"] == 8 else None)
    assert {row["name"] for row in document["constants"]} == set(scaling.programs.COLLECTIVES)
    assert {(row["name"], row["bytes"]) for row in document["collectives"]} >= {
        ("all_gather", 8 * 64 * 2), ("all_reduce float32", 64 * 64 * 4),
    }  # fmt: skip
    assert _scale(scaling, "--table", str(file)).stdout in result.stdout
    assert "12 of 12 rows equal one GPU's output" in result.stdout
    assert f"t(1, 4) / t(2, 8) = {max(row.get('weak_efficiency', 0) for row in several):.0%}" in result.stdout


def test_the_local_op_alone_sends_nothing(scaling, tmp_path):
    """And is what each device adds to the sum: here of device 0, that of experts 0 and 1."""
    file = tmp_path / "results.json"
    result = _scale(scaling, "--tokens", "8", "--form", "local", "--no-collectives", "--output", str(file))
    assert result.exit_code == 0, result.output
    rows = [row for row in json.loads(file.read_text())["results"] if row["devices"] == 2]
    assert [(row["sum_dtype"], row["finite"]) for row in rows] == [("float32", True), ("bfloat16", True)]
    assert all(row["operations"].keys() == {"copy"} and row["efficiency"] > 0 for row in rows)
    mesh, canonical = scaling.programs.make_mesh(jax.devices()[:2], "expert"), timing.random_experts(TINY, 0)
    weights = jax.device_put(canonical, jax_moe.expert_shardings(canonical, mesh))
    case = scaling.programs.Case("w4a16", 8, "local", "float32")
    x, _, ids, routing_weights = arguments = scaling.programs.arguments(TINY, case, mesh, weights)
    mine = np.where(np.asarray(ids[0]) < 2, routing_weights[0], 0)
    expected = jax_moe.fused_moe(np.asarray(x), canonical, jax_moe.Routing(np.asarray(ids[0]), mine))
    first = scaling.programs.program(case, mesh)(*arguments)[0].addressable_shards[0].data
    assert scaling.difference(np.asarray(first), np.asarray(expected))[0] < 1e-6


def test_rows_that_have_no_time_left_are_named(scaling, tmp_path):
    file = tmp_path / "results.json"
    _scale(scaling, "--tokens", "4", "--form", "spread", "--seconds", "0", "--no-collectives", "--output", str(file))
    document = json.loads(file.read_text())
    assert not document["results"]
    assert {failure["error"] for failure in document["failures"]} == {"not measured: the time was up"}
    assert [(failure["devices"], failure["tokens"]) for failure in document["failures"]] == [
        (1, 2), (1, 4), (2, 4), (2, 4),
    ]  # fmt: skip


def test_one_wrong_token_on_several_devices_is_seen(scaling, monkeypatch):
    right = jax_moe.sharded_moe

    def wrong(*args, **options):
        return right(*args, **options).at[3].multiply(1.05)

    monkeypatch.setattr(jax_moe, "sharded_moe", wrong)
    result = _scale(scaling, "--tokens", "8", "--form", "replicated", "--no-collectives")
    assert result.exit_code == 1
    assert result.stdout.count("WRONG") == 2


def test_the_difference_that_a_row_may_have(scaling):
    expected = np.random.default_rng(0).normal(size=(512, 64)).astype(np.float32)
    limit = scaling.bound(8, "bfloat16", 4)
    assert scaling.bound(8, "float32", 4) < limit < 0.011
    assert scaling.difference(expected * (1 + limit / 2), expected) == pytest.approx((limit / 2, limit / 2), rel=1e-3)
    lost = expected.copy()
    lost[7] = 0
    assert scaling.difference(lost, expected)[1] == pytest.approx(1)
    assert scaling.difference(lost[:-1], expected) == (np.inf, np.inf)
    lost[7] = np.nan
    assert scaling.difference(lost, expected) == (np.inf, np.inf)


@pytest.mark.parametrize("tokens", [4, 8])
@pytest.mark.parametrize("form", ["replicated", "spread", "tensor-spread"])
def test_every_call_of_a_chain_sends_what_it_needs(scaling, form, tokens):
    """XLA gathers only once what all calls have in common, and early what waits for nothing."""
    mesh = scaling.programs.make_mesh(jax.devices()[:2], scaling.programs.FORMS[form].axis)
    canonical = timing.random_experts(TINY, 0)
    weights = jax.device_put(canonical, jax_moe.expert_shardings(canonical, mesh))
    case = scaling.programs.Case("w4a16", tokens, form, "float32")
    program = scaling.programs.program(case, mesh)
    arguments = scaling.programs.arguments(TINY, case, mesh, weights)
    sent = scaling.programs.operations(program.lower(*arguments).compile())
    if form == "replicated":
        assert sent == {"all-reduce": 2, "copy": sent["copy"]}
        return
    assert sent == {"all-gather": 6, "reduce-scatter": 2, "copy": sent["copy"]}


@pytest.mark.parametrize(
    ("form", "tokens", "waits"),
    [
        ("replicated", 4, ""), ("replicated", 8, "ids"), ("spread", 4, "ids weights"), ("spread", 8, "x ids weights"),
    ],
)  # fmt: skip
def test_what_of_a_call_waits_for_the_last_one(scaling, monkeypatch, form, tokens, waits):
    calls = []

    def op(x, weights, routing, **_):
        calls.append({"x": x, "ids": routing.expert_ids, "weights": routing.weights})
        return x

    monkeypatch.setattr(jax_moe, "sharded_moe", op)
    monkeypatch.setattr(scaling.programs, "_captured", lambda chain: chain)
    monkeypatch.setattr(timing, "after", lambda y: jnp.int32(1))
    mesh = scaling.programs.make_mesh(jax.devices()[:2], "expert")
    case = scaling.programs.Case("w4a16", tokens, form, "float32")
    x, _, ids, routing_weights = arguments = scaling.programs.arguments(TINY, case, mesh, None)
    scaling.programs.program(case, mesh)(*arguments)
    given = {"x": x, "ids": ids[1], "weights": routing_weights[1]}
    changed = [name for name in given if (np.asarray(calls[1][name]) != np.asarray(given[name])).any()]
    assert " ".join(changed) == waits


@pytest.mark.parametrize("axis", ["expert", "tensor"])
@pytest.mark.parametrize("n", [1, 2])
def test_types_of_prepared_experts_are_those_that_prepare_makes(scaling, monkeypatch, axis, n):
    monkeypatch.setattr(jax_moe, "prepare", preparation.prepare)
    mesh = scaling.programs.make_mesh(jax.devices()[:n], axis)
    types = scaling.programs.prepared_types(TINY, "sm_90a", "w4a16", mesh)
    canonical = timing.random_experts(TINY, 0)
    made = jax_moe.prepare(jax.device_put(canonical, jax_moe.expert_shardings(canonical, mesh)), "sm_90a")
    assert jax.tree.structure(types) == jax.tree.structure(made)
    for got, leaf in zip(jax.tree.leaves(types), jax.tree.leaves(made), strict=True):
        assert (got.shape, got.dtype) == (leaf.shape, leaf.dtype)
        assert got.sharding.is_equivalent_to(leaf.sharding, leaf.ndim)


def test_kernels_are_compiled_for_all_that_is_measured(scaling, monkeypatch):
    monkeypatch.setattr(jax_moe, "prepare", preparation.prepare)
    asked = cuda_call.stand_in_compiler(monkeypatch)
    monkeypatch.setattr(
        scaling.jax.config, "update", lambda *_: None
    )  # the platform and its devices: as tests have them
    result = _scale(scaling, "--tokens", "4,8", "--precision", "w4a4", "--compile-for", "sm_90a")
    assert result.exit_code == 0, result.output
    assert re.findall(r"on (.*): (\d+) programs", result.stdout) == [
        ("{'expert': 1}", "2"), ("{'expert': 2}", "8"), ("{'tensor': 2}", "4"),
    ]  # fmt: skip
    assert asked
