"""What a call lowers to on CUDA, without a GPU or the DSL: launches, workspaces, attributes, errors, the CLI."""

import dataclasses
import re
import shlex

import cuda_call
import helpers
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import product_cases
import pytest
import typer.testing

from jax_moe import activations, parcels
from jax_moe.cli import compile as command
from jax_moe.kernels import cache, lowering, specs, targets, tiling

compiler = pytest.fixture(autouse=True)(cuda_call.stand_in_compiler)


_STEPS_OF_MODES = [
    ({}, ["sort", "gemm1", "gemm2"]),
    ({"precision": "w4a4"}, ["sort", "x_rows", "gemm1", "gemm2"]),
    ({"weight_on": "input"}, ["sort", "x_rows", "gemm1", "gemm2"]),
    ({"combine": "ordered"}, ["sort", "gemm1", "gemm2", "combine"]),
    ({"combine": "ordered", "precision": "w4a4"}, ["sort", "x_rows", "gemm1", "gemm2", "combine"]),
    ({"precision": "w4a4_dynamic"}, ["sort", "x_rows", "gemm1", "h_rows", "gemm2"]),
    ({"precision": "w4a4_dynamic", "num_tokens": 1}, ["sort", "x_rows", "gemm1", "h_rows", "gemm2"]),
    ({"num_tokens": 0}, []),
    ({"num_tokens": 17}, ["sort", "gemm1", "gemm2"]),
    ({"num_tokens": 16}, ["gemm1", "gemm2"]),
    ({"num_tokens": 16, "combine": "ordered", "precision": "w4a4"}, ["x_rows", "gemm1", "gemm2", "combine"]),
]


@pytest.mark.parametrize(("changes", "steps"), _STEPS_OF_MODES, ids=str)
def test_each_mode_launches_its_kernels(changes, steps):
    attributes, workspaces = cuda_call.kernels_of(cuda_call.problem(**changes))
    assert attributes["launches"].split() == steps
    assert attributes["adds"] == ("gemm2" if steps and "combine" not in steps else "")
    assert len(attributes["workspace_bytes"]) == len(workspaces)
    for workspace, size in zip(workspaces, attributes["workspace_bytes"], strict=True):
        assert workspace.size * workspace.dtype.itemsize == size


def test_arguments_name_buffers_that_are_there():
    for changes, _ in _STEPS_OF_MODES:
        attributes, workspaces = cuda_call.kernels_of(cuda_call.problem(**changes, biases=(True, True)))
        for step in attributes["launches"].split():
            for argument in attributes[step]["arguments"].split():
                kind, _, value = argument.partition(":")
                limit = {"operand": 14, "result": 1 + len(workspaces), "i32": 2**31, "null": 1}[kind]
                assert int(value or 0) < limit, (step, argument)


def test_what_is_absent_is_null_and_what_is_there_is_not():
    names = ("input_scale", "bias", "down_input_scale")
    plain = cuda_call.arguments(cuda_call.problem(), "gemm1")
    assert [plain[name] for name in names] == ["null"] * 3
    quantised = cuda_call.arguments(cuda_call.problem(precision="w4a4", biases=(True, False)), "gemm1")
    assert [quantised[name] for name in names] == ["gate_up.input_scale", "gate_up.bias", "down.input_scale"]
    gemm2 = cuda_call.arguments(cuda_call.problem(biases=(False, True)), "gemm2")
    assert [gemm2[name] for name in names[:2]] == ["null", "down.bias"]


def test_gemm1_reads_x_or_what_the_pass_over_x_made():
    assert cuda_call.arguments(cuda_call.problem(), "gemm1")["x"] == "x"
    for changes, divisor in (({"precision": "w4a4"}, "4"), ({"weight_on": "input"}, "1")):
        problem = cuda_call.problem(**changes)
        assert cuda_call.arguments(problem, "x_rows")["x_rows"] == "x_rows"
        gemm1 = cuda_call.arguments(problem, "gemm1")
        assert (gemm1["x"], gemm1["row_divisor"]) == ("x_rows", divisor)


def test_gemm2_adds_into_the_output_or_stores_contributions():
    added = cuda_call.arguments(cuda_call.problem(), "gemm2")
    assert (added["out"], added["row_divisor"]) == ("out", "4")
    ordered = cuda_call.problem(combine="ordered")
    stored, combine = (cuda_call.arguments(ordered, step) for step in ("gemm2", "combine"))
    assert (stored["out"], stored["row_divisor"]) == ("contributions", "1")
    assert (combine["contributions"], combine["out"]) == ("contributions", "out")


def test_sizes_of_the_prepared_weights_are_those_that_prepare_makes():
    for activation in (activations.SwiGLU(), activations.ReLU2()):
        case = helpers.make_case(hidden=112, intermediate=176, activation=activation, bias=True)
        prepared = helpers.jax_moe.prepare(case.experts, "sm_90a", progress=False)
        text = cuda_call.lowered(case, activation=activation)
        weights = (("gate_up", prepared.gate_up), ("down", prepared.down))
        assert _dictionary(text, "weight_bytes") == {
            **{f"{name}.payload": weight.payload.nbytes for name, weight in weights},
            **{f"{name}.block_scale": 0 for name, _ in weights},
        }
        assert _dictionary(text, "sizes") == {
            "num_tokens": 5, "top_k": 2, "local_experts": 4, "num_parts": 2 if activation.gated else 1,
            "hidden_size": 112, "intermediate_size": prepared.gate_up.bias.shape[2], "out_bytes": 2,
        }  # fmt: skip


def _dictionary(text: str, name: str) -> dict[str, int]:
    """The dictionary of sizes of that name in a program's text."""
    found = re.search(rf"\b{name} = {{(.*?)}}", text)
    return {key.strip('"'): int(value) for key, value in re.findall(r"([\w.\"]+) = (\d+) : i64", found[1])}


def test_a_symbolic_number_of_tokens_is_refused():
    case = helpers.make_case()
    experts = helpers.jax_moe.prepare(case.experts, "sm_90a", progress=False)
    (tokens,) = jax.export.symbolic_shape("t")
    x, routing = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((tokens, *leaf.shape[1:]), leaf.dtype), (case.x, case.routing)
    )
    export = jax.export.export(
        jax.jit(helpers.jax_moe.fused_moe), platforms=["cuda"], disabled_checks=helpers.jax_moe.export_checks()
    )
    with pytest.raises(ValueError, match="x: got T = t, which is symbolic"):
        export(x, experts, routing)


def test_without_tokens_nothing_is_launched():
    for changes in ({}, {"precision": "w4a4"}, {"weight_on": "input"}):
        assert lowering.launches(cuda_call.problem(num_tokens=0, **changes)) == ()


def test_lowering_is_deterministic():
    case = helpers.make_case()
    texts = set()
    for _ in range(2):
        jax.clear_caches()
        texts.add(cuda_call.lowered(case))
    assert len(texts) == 1


def test_weights_that_are_not_prepared_are_refused():
    with pytest.raises(ValueError, match=r"experts.layout: got 'canonical', .* jax_moe.prepare\(experts, 'sm_90a'\)"):
        lowering.cuda_call(cuda_call.problem(layout="canonical"))


def test_sizes_that_the_kernels_cannot_count_are_refused():
    with pytest.raises(ValueError, match="local experts, the GPU kernels take at most 512"):
        lowering.cuda_call(cuda_call.problem(local_experts=513))
    with pytest.raises(ValueError, match="int32"):
        lowering.cuda_call(cuda_call.problem(num_tokens=2**29, top_k=16))
    with pytest.raises(ValueError, match="int32"):  # rows, of few tokens that are short
        lowering.cuda_call(cuda_call.problem(num_tokens=2**20, top_k=2**11, hidden_size=16))
    for combine in ("atomic", "ordered"):  # combine.py counts the output's vectors of four
        problem = cuda_call.problem(num_tokens=2**20, hidden_size=2**13, combine=combine)
        with pytest.raises(ValueError, match="int32"):
            lowering.cuda_call(problem)


def test_a_kernel_that_takes_other_parameters_is_refused(monkeypatch):
    stand_in = cache.compiled
    monkeypatch.setattr(
        cache, "compiled", lambda *args: dataclasses.replace(stand_in(*args), parameter_bytes=(8,) * 10 + (4,) * 4)
    )
    with pytest.raises(RuntimeError, match="takes parameters of"):
        lowering.cuda_call(cuda_call.problem())


@pytest.mark.parametrize("changes", [
    {},
    {"num_tokens": 8192, "combine": "ordered", "out_dtype": jnp.dtype(jnp.float32)},
    {"precision": "w4a4", "weight_on": "input", "activation": activations.SwiGLU(1.702, 1.0, 7.0)},
    {"activation": activations.SiTU(beta=2.5, linear_beta=None), "local_experts": 3},
    {"activation": activations.GeGLU(), "hidden_size": 64, "intermediate_size": 128},
    {"activation": activations.ReLU2(), "top_k": 1},
    {"num_tokens": 512, "num_experts": 128},
    {"activation": activations.SwiGLU(1.702, 1, 7), "num_experts": 17, "top_k": 20},
    {"combine": "ordered", "batch_invariant": True, "num_tokens": 2},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("biases", [(False, False), (True, True), (True, False), (False, True)])
def test_the_command_in_the_error_makes_the_kernels(compiler, monkeypatch, changes, biases):
    """Round trip: problem -> the error's command line -> the kernels that the problem needs."""
    problem = cuda_call.problem(**changes, biases=biases)
    calls = [problem, *(parcels.of_call(problem) if parcels.are_taken(problem) else [])]
    wanted = {launch.spec for call in calls for launch in lowering.launches(call)}
    _compile(problem)
    # By repr, which names the file that the other machine looks for: 1 and 1.0 are equal.
    assert set(map(repr, compiler)) == set(map(repr, wanted))


def test_the_command_in_the_error_makes_the_kernels_of_parcels(compiler):
    made, _ = parcels.of_call(cuda_call.problem(precision="w4a4"))
    wanted = {launch.spec for launch in lowering.launches(made)}
    _compile(made)
    assert set(map(repr, compiler)) > set(map(repr, wanted))


def _compile(call, target="sm_90a"):
    app = typer.Typer()
    app.command()(command.compile)
    arguments = ["--target", target, *shlex.split(" ".join(lowering.command_arguments(call)))]
    ran = typer.testing.CliRunner().invoke(app, arguments)
    assert ran.exit_code == 0, ran.output


def test_a_missing_kernel_says_which_command_makes_it(monkeypatch, tmp_path):
    def compiled(spec, target):
        raise cache.MissingKernelError("kernel so-and-so is not there.")

    monkeypatch.setattr(cache, "compiled", compiled)
    problem = cuda_call.problem(num_experts=64, biases=(True, False))
    with pytest.raises(cache.MissingKernelError) as error:
        lowering.cuda_call(problem)
    arguments = lowering.command_arguments(problem)
    command_line = " ".join(["python -m jax_moe compile --target sm_90a --card H200", *arguments])
    assert "kernel so-and-so is not there." in str(error.value)
    assert f"`{command_line}`" in str(error.value)
    assert "`pip install nvidia-cutlass-dsl`" in str(error.value)


def test_the_sort_has_room_for_what_it_is_asked_for():
    for routes in (1, 8, 100, 2048, 2049, 131072):
        for experts in (1, 7, 128, 512):
            spec = specs.sort_spec(routes, experts, 8, weighted=True)
            assert spec.warps <= 32
            assert 32 * spec.warps >= experts, "the sums over experts take a thread for each"
            shared = 4 * (spec.warps * experts + 3 * experts + spec.warps + 2)
            assert shared <= 227 * 1024


def test_workspaces_hold_the_worst_routing():
    """A tile map for every routing: one row on each of many experts, or all on one."""
    for tokens, top_k, experts, tile in ((1, 8, 128, 8), (64, 8, 128, 16), (300, 4, 8, 64)):
        routes, limit = tokens * top_k, tiling.max_tiles(tokens * top_k, experts, tile)
        spread = np.bincount(np.arange(routes) % experts, minlength=experts)
        uneven = np.minimum(np.ones(experts, int), routes)
        uneven[0] += max(0, routes - uneven.sum())
        for counts in (spread, uneven, np.array([routes])):
            assert np.ceil(counts / tile).sum() <= limit or counts.sum() > routes


# -- a grouped product ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({}, ["groups", "product"]),
        ({"precision": "w4a4", "bias": True}, ["groups", "x_rows", "product"]),
        ({"precision": "w4a4_dynamic"}, ["groups", "x_rows", "product"]),
        ({"num_rows": 0}, []),
        ({"num_rows": 0, "precision": "w4a4"}, []),
    ],
    ids=str,
)
def test_a_product_launches_its_kernels(changes, steps):
    attributes, workspaces = cuda_call.kernels_of(cuda_call.product(**changes))
    assert attributes["launches"].split() == steps
    assert attributes["adds"] == ""
    assert list(attributes["workspace_bytes"]) == [w.size * w.dtype.itemsize for w in workspaces]
    for step in steps:
        for argument in attributes[step]["arguments"].split():
            kind, _, value = argument.partition(":")
            limit = {"operand": 8, "result": 1 + len(workspaces), "i32": 2**31, "null": 1}[kind]
            assert int(value or 0) < limit, (step, argument)


def test_a_product_reads_x_or_what_the_pass_over_x_made():
    plain, quantised = (cuda_call.product(precision=precision, bias=True) for precision in ("w4a16", "w4a4"))
    names = ("x", "input_scale", "bias", "out")
    given = cuda_call.arguments(plain, "product")
    assert [given[name] for name in names] == ["x", "null", "weights.bias", "out"]
    assert cuda_call.arguments(plain, "groups")["row_group"] == "null"
    given = cuda_call.arguments(quantised, "product")
    assert [given[name] for name in names] == ["x_rows", "weights.input_scale", "weights.bias", "out"]
    rows = cuda_call.arguments(quantised, "x_rows")
    assert (rows["input_scale"], rows["row_group"], rows["x_rows"]) == ("weights.input_scale", "row_group", "x_rows")
    assert cuda_call.arguments(quantised, "groups")["row_group"] == "row_group"
    dynamic = cuda_call.product(precision="w4a4_dynamic", bias=True)
    given = cuda_call.arguments(dynamic, "product")
    assert [given[name] for name in names] == ["x_rows", "x_row_scales", "weights.bias", "out"]
    assert cuda_call.arguments(dynamic, "groups")["row_group"] == "null"


def test_scales_of_rows_are_not_for_blackwell_yet():
    with pytest.raises(ValueError, match="got 'w4a4_dynamic', sm_100f has kernels for w4a16, w4a4"):
        helpers.jax_moe.prepare(helpers.make_case().experts, "sm_100f", "w4a4_dynamic")
    for layout in ("tcgen05_fp4_v1", "tcgen05_bf16_v1"):
        for call in (cuda_call.problem, cuda_call.product):
            with pytest.raises(ValueError, match=r"_dynamic' needs .*: jax_moe.prepare\(\w+, 'sm_90a'\)$"):
                lowering.cuda_call(call(layout=layout, precision="w4a4_dynamic"))


def test_a_product_on_blackwell_reads_x_or_its_codes():
    plain = cuda_call.product(layout="tcgen05_bf16_v1")
    quantised = cuda_call.product(layout="tcgen05_fp4_v1", precision="w4a4")
    given = cuda_call.arguments(plain, "product")
    assert (given["x"], given["x_scales"], given["input_scale"]) == ("x", "null", "null")
    given = cuda_call.arguments(quantised, "product")
    assert (given["x"], given["x_scales"], given["input_scale"]) == ("x_codes", "x_scales", "weights.input_scale")
    rows = cuda_call.arguments(quantised, "x_rows")
    names = ("x", "x_codes", "x_scales", "row_group", "input_scale")
    assert [rows[name] for name in names] == [*names[:-1], "weights.input_scale"]
    assert cuda_call.arguments(quantised, "groups")["row_group"] == "row_group"


@pytest.mark.parametrize(
    ("layout", "precision"), [("wgmma_v1", "w4a16"), ("tcgen05_bf16_v1", "w4a16"), ("tcgen05_fp4_v1", "w4a4")]
)
def test_sizes_of_a_products_weights_are_those_that_are_packed(layout, precision):
    case = product_cases.make_case(0, [3, 2], 6, in_features=144, out_features=272, precision=precision)
    attributes, _ = cuda_call.kernels_of(case.problem(layout))
    packed = product_cases.pack(case.weights, layout)
    assert attributes["weight_bytes"] == {"weights.payload": packed.payload.nbytes, "weights.block_scale": 0}
    assert attributes["sizes"] == {
        "num_rows": 6, "num_groups": 2, "local_groups": 2, "in_features": 144, "out_features": 272, "out_bytes": 4,
    }  # fmt: skip


def test_products_that_the_kernels_cannot_run_are_refused():
    assert cuda_call.kernels_of(cuda_call.product(local_groups=specs.MAX_GROUPS, num_groups=10_000))
    with pytest.raises(ValueError, match="weights: got 4097 local groups, the GPU kernels take at most 4096"):
        lowering.cuda_call(cuda_call.product(local_groups=specs.MAX_GROUPS + 1))
    for sizes in (
        {"num_rows": 2**23, "in_features": 2**12},  # groups of 8 values of x
        {"num_rows": 2**23, "out_features": 2**12},  # and of the output
        {"num_rows": 2**31 - 1, "in_features": 16, "out_features": 16},
        {"num_groups": 2**31 - 1},
    ):
        with pytest.raises(ValueError, match="int32; call ragged_dot on parts of the tokens"):
            lowering.cuda_call(cuda_call.product(**sizes))
    with pytest.raises(ValueError, match=r"weights.layout: got 'canonical', .* jax_moe.prepare\(weights, 'sm_90a'\)"):
        lowering.cuda_call(cuda_call.product(layout="canonical"))
    (tokens,) = jax.export.symbolic_shape("t")
    with pytest.raises(ValueError, match="x: got T = t, which is symbolic"):
        lowering.cuda_call(cuda_call.product(num_rows=tokens))


@pytest.mark.parametrize("changes", [
    {}, {"num_rows": 1, "local_groups": 1, "num_groups": 1, "bias": True}, {"num_rows": 8192, "num_groups": 64},
    {"precision": "w4a4", "out_dtype": jnp.dtype(jnp.float32)}, {"in_features": 64, "out_features": 48},
    {"num_rows": 1, "batch_invariant": True},
    {"layout": "tcgen05_bf16_v1"}, {"layout": "tcgen05_fp4_v1", "precision": "w4a4", "num_rows": 8192, "bias": True},
], ids=str)  # fmt: skip
def test_the_command_in_a_products_error_makes_the_kernels(compiler, changes):
    product = cuda_call.product(**changes)
    wanted = {launch.spec for launch in lowering.launches(product)}
    _compile(product, targets.for_call(product.layout, product.precision)[0].name)
    assert set(map(repr, compiler)) == set(map(repr, wanted))


def test_a_products_missing_kernel_says_which_command_makes_it(monkeypatch):
    def compiled(spec, target):
        raise cache.MissingKernelError("kernel so-and-so is not there.")

    monkeypatch.setattr(cache, "compiled", compiled)
    with pytest.raises(cache.MissingKernelError) as error:
        lowering.cuda_call(cuda_call.product(bias=True))
    options = "--product 16,2880,2880 --num-experts 16 --tokens 40 --precision w4a16 --out-dtype bfloat16 --bias"
    assert f"`python -m jax_moe compile --target sm_90a --card H200 {options}`" in str(error.value)


def test_groups_use_the_multiprocessors_for_what_there_is_to_write():
    def grid(**changes):
        return cuda_call.program(cuda_call.product(**changes)).launches[0].grid

    assert grid(num_rows=1, out_features=16) == 1
    assert grid(num_rows=8192) == 132
