"""A target and its layouts dropped in (``made_up/``): a folder, rows in two tables, and everything works."""

import dataclasses
import functools

import cuda_call
import helpers
import jax
from made_up.layout import MadeUpLayout
from made_up.target import MADE_UP
import numpy as np
import pytest
import typer.testing

import jax_moe
from jax_moe import __main__, layouts
from jax_moe.kernels import lowering, targets

compiler = pytest.fixture(cuda_call.stand_in_compiler)
NAME = MADE_UP.name


@pytest.fixture(autouse=True)
def two_rows(monkeypatch):
    for name in MADE_UP.layouts.values():
        monkeypatch.setitem(layouts.LAYOUTS, name, MadeUpLayout(name))
    monkeypatch.setitem(targets.TARGETS, NAME, MADE_UP)


@dataclasses.dataclass
class _Gpu:
    compute_capability: str
    device_kind: str = "NVIDIA N7"
    platform: str = "gpu"


def _case(**options):
    return helpers.make_case(intermediate=48, bias=True, **options)


def _assert_equal(got, wanted):
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    jax.tree.map(np.testing.assert_array_equal, got, wanted)


def test_prepare_and_unprepare():
    experts = _case().experts
    for precision, layout in MADE_UP.layouts.items():
        prepared = jax_moe.prepare(experts, NAME, precision)
        assert prepared.layout == layout
        assert prepared.gate_up.payload.shape[1] == 64
        assert jax_moe.prepare(prepared, layout) is prepared
        _assert_equal(jax_moe.unprepare(prepared, experts.down.payload.shape[1], 48), experts)


def test_a_target_with_a_layout_for_each_precision_wants_to_know_which():
    experts = _case().experts
    with pytest.raises(ValueError, match=r"precision: got None, but sm_77x has a layout for each .*choose one"):
        jax_moe.prepare(experts, NAME)
    with pytest.raises(ValueError, match="precision: got 'w8', needs one of 'w4a16', 'w4a4', 'w4a4_dynamic'"):
        jax_moe.prepare(experts, NAME, "w8")
    assert jax_moe.prepare(experts, "sm_90a").layout == jax_moe.prepare(experts, "sm_90a", "w4a4").layout


def test_a_target_may_have_kernels_for_one_precision_only(monkeypatch, compiler):
    monkeypatch.setitem(targets.TARGETS, NAME, dataclasses.replace(MADE_UP, layouts={"w4a16": "made_up_v1"}))
    case = _case()
    assert jax_moe.prepare(case.experts, NAME).layout == "made_up_v1"
    with pytest.raises(ValueError, match="precision: got 'w4a4', sm_77x has kernels for w4a16"):
        jax_moe.prepare(case.experts, NAME, "w4a4")
    with pytest.raises(
        ValueError, match=r"got 'made_up_v1', .* with precision='w4a4' needs prepared weights: .*'sm_90a'"
    ):
        lowering.cuda_call(cuda_call.problem(layout="made_up_v1", precision="w4a4"))


def test_the_default_device_chooses_the_target(monkeypatch):
    monkeypatch.setattr(targets, "_default_device", lambda: _Gpu("7.7"))
    assert jax_moe.prepare(_case().experts, precision="w4a16").layout == MADE_UP.layouts["w4a16"]
    monkeypatch.setattr(targets, "_default_device", lambda: _Gpu("6.6"))
    with pytest.raises(ValueError, match=r"compute capability 6.6, kernels exist for 9.0, 10.0, 10.3, 7.7"):
        jax_moe.prepare(_case().experts)


def test_a_call_lowers_to_the_program_of_the_target(compiler):
    case = _case()
    prepared = jax_moe.prepare(case.experts, NAME, "w4a16")
    traced = jax.jit(jax_moe.fused_moe).trace(case.x, prepared, case.routing)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "made_up_w4a16_7" in text
    assert 'launches = "everything"' in text
    assert 'adds = "everything"' in text
    assert 'arguments = "operand:0 operand:4 result:1 result:0 i32:' in text


def test_a_target_without_products_says_so(compiler):
    with pytest.raises(NotImplementedError, match=r"ragged_dot: there are no kernels for Noether \(sm_77x\) yet"):
        lowering.cuda_call(cuda_call.product(layout="made_up_v1"))


def test_a_layout_is_only_taken_by_the_precision_that_it_is_for(compiler):
    case = _case()
    prepared = jax_moe.prepare(case.experts, NAME, "w4a4")
    traced = jax.jit(jax_moe.fused_moe).trace(case.x, prepared, case.routing)
    with pytest.raises(ValueError, match=r"got 'made_up_fp4_v1', .* with precision='w4a16' needs prepared weights"):
        traced.lower(lowering_platforms=("cuda",))


def test_the_card_at_hand_chooses_kernels_and_grid(monkeypatch, compiler):
    problem = cuda_call.problem(layout="made_up_v1")
    assert [(launch.spec.rows, launch.grid) for launch in lowering.launches(problem)] == [(7, 20)]
    monkeypatch.setattr(targets, "_gpus", lambda: [_Gpu("7.7", "NVIDIA N7 PCIe")])
    assert [(launch.spec.rows, launch.grid) for launch in lowering.launches(problem)] == [(9, 6)]
    assert lowering.cuda_call(problem).attributes["kernels"]["card"] == "N7"
    monkeypatch.setattr(targets, "_gpus", lambda: [_Gpu("9.0", "NVIDIA N7 PCIe")])
    assert [(launch.spec.rows, launch.grid) for launch in lowering.launches(problem)] == [(7, 20)]


@pytest.mark.parametrize("shape", [(2, 2), (1, 4), (4, 1)])
def test_on_a_mesh_the_weights_stay_and_slices_are_padded(shape):
    experts = helpers.make_case(experts=4, intermediate=64, bias=True).experts
    mesh = jax.make_mesh(shape, ("expert", "tensor"), devices=jax.devices()[:4])
    placed = jax.device_put(experts, jax_moe.expert_shardings(experts, mesh))
    prepared = jax_moe.prepare(placed, NAME, "w4a16")
    wanted = jax_moe.expert_shardings(prepared, mesh)
    for leaf, sharding in zip(jax.tree.leaves(prepared), jax.tree.leaves(wanted), strict=True):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
    assert prepared.gate_up.payload.shape[1] == 32 * max(2, shape[1])
    _assert_equal(jax_moe.unprepare(prepared, experts.down.payload.shape[1], 64), experts)


def test_the_commands_know_it(compiler):
    run = functools.partial(typer.testing.CliRunner().invoke, __main__.app)
    done = run(["compile", "--target", NAME, "--layer", "8,2,64,48", "--tokens", "4"])
    assert done.exit_code == 0, done.output
    assert [spec.name for spec in compiler] == ["made_up_w4a16_7"]
    done = run(["doctor"], env={"COLUMNS": "300"})
    (row,) = (line for line in done.output.splitlines() if "Noether (sm_77x)" in line)
    assert "compiled and emulated, never run on such a GPU" in row
    (row,) = (line for line in done.output.splitlines() if "(sm_90a)" in line)
    assert "never run" not in row
