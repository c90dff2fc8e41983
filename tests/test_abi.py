"""What a call on CUDA passes to its kernels, argument by argument; without a GPU or the DSL."""

import dataclasses
import pathlib
import re

import cuda_call
import helpers
import jax.numpy as jnp
import pytest

from jax_moe import activations, parcels
from jax_moe.kernels import lowering, specs, steps, tiling
from jax_moe.kernels.targets import TARGETS
from jax_moe.operands import OPERANDS

compiler = pytest.fixture(autouse=True)(cuda_call.stand_in_compiler)

_DECODE = (pathlib.Path(__file__).parents[1] / "ffi/decode.h").read_text()
_DECODED = re.findall(r'"([\w.]+)"', re.search(r"kOperandNames\[kNumOperands\] = \{(.*?)\}", _DECODE, re.DOTALL)[1])
# Of a call in which no two sizes are alike.
_ALL = dict(num_tokens=40, top_k=4, local_experts=16, num_experts=64, hidden_size=576, intermediate_size=192,
            activation=activations.ReLU2(), precision="w4a4", combine="ordered", biases=(True, True))  # fmt: skip
_TILE_MAP = "expert_tiles tile_expert row_route row_weight"
_SORT = f"expert_ids routing_weights expert_offset {_TILE_MAP} cta_counts 160"
_ROWS = "row_route tile_expert expert_tiles"
_ABI = [
    ({}, {
        "sort": _SORT,
        "x_rows": "x routing_weights gate_up.input_scale x_rows 40 1 36",
        "gemm1": f"x_rows {_ROWS} gate_up.payload gate_up.global_scale gate_up.input_scale gate_up.bias "
                 "down.input_scale h 576 4 16 2 9",
        "gemm2": "h row_route row_weight tile_expert expert_tiles down.payload down.global_scale down.input_scale "
                 "down.bias contributions 576 1 16 5 3 4",
        "combine": "contributions expert_ids expert_offset out 40 4 576 16",
    }),
    ({"weight_on": "input", "combine": "atomic", "precision": "w4a16"}, {
        "sort": _SORT,
        "x_rows": "x routing_weights null x_rows 160 4 36",
        "gemm1": f"x_rows {_ROWS} gate_up.payload gate_up.global_scale null gate_up.bias null h 576 1 16 2 9",
        "gemm2": "h row_route row_weight tile_expert expert_tiles down.payload down.global_scale null down.bias out "
                 "576 4 16 5 3 4",
    }),
    ({"precision": "w4a4_dynamic"}, {
        "sort": _SORT,
        "x_rows": "x null x_rows x_row_scales 1 36",
        "gemm1": f"x_rows {_ROWS} gate_up.payload gate_up.global_scale x_row_scales gate_up.bias null h 576 4 16 2 9",
        "h_rows": "h row_route expert_tiles h_row_scales 16 8 4",
        "gemm2": "h row_route row_weight tile_expert expert_tiles down.payload down.global_scale h_row_scales "
                 "down.bias contributions 576 1 16 5 3 4",
        "combine": "contributions expert_ids expert_offset out 40 4 576 16",
    }),
    ({"precision": "w4a4_dynamic", "weight_on": "input", "num_tokens": 1}, {  # a sort all the same
        "sort": _SORT.replace("160", "4"),
        "x_rows": "x routing_weights x_rows x_row_scales 4 36",
        "gemm1": f"x_rows {_ROWS} gate_up.payload gate_up.global_scale x_row_scales gate_up.bias null h 576 1 16 2 9",
        "h_rows": "h row_route expert_tiles h_row_scales 16 8 4",
        "gemm2": "h row_route row_weight tile_expert expert_tiles down.payload down.global_scale h_row_scales "
                 "down.bias contributions 576 1 16 5 3 4",
        "combine": "contributions expert_ids expert_offset out 1 4 576 16",
    }),
    ({"num_tokens": 16}, {  # 64 routes need no sort
        "x_rows": "x routing_weights gate_up.input_scale x_rows 16 1 36",
        "gemm1": "x_rows expert_ids expert_offset gate_up.payload gate_up.global_scale "
                 "gate_up.input_scale gate_up.bias down.input_scale h 576 4 16 2 9 64",
        "gemm2": "h expert_ids expert_offset routing_weights down.payload down.global_scale down.input_scale "
                 "down.bias contributions 576 1 16 5 3 4 64",
        "combine": "contributions expert_ids expert_offset out 16 4 576 16",
    }),
    ({"num_tokens": 16, "weight_on": "input", "combine": "atomic", "precision": "w4a16"}, {
        "x_rows": "x routing_weights null x_rows 64 4 36",
        "gemm1": "x_rows expert_ids expert_offset gate_up.payload gate_up.global_scale null gate_up.bias "
                 "null h 576 1 16 2 9 64",
        "gemm2": "h expert_ids expert_offset null down.payload down.global_scale null down.bias out "
                 "576 4 16 5 3 4 64",
    }),
]  # fmt: skip


def test_operands_are_those_that_the_handlers_decode():
    assert list(OPERANDS) == _DECODED


def test_parcels_have_the_operands_that_the_handler_decodes():
    decode = (pathlib.Path(__file__).parents[1] / "ffi/decode_parcels.h").read_text()
    found = re.search(r"kParcelOperandNames\[kNumParcelOperands\] = \{(.*?)\}", decode, re.DOTALL)
    assert list(parcels.Parcels.operand_names) == re.findall(r'"(\w+)"', found[1])


def test_parcels_are_made_and_taken_in_the_place_of_x():
    made, taken = parcels.of_call(cuda_call.problem(**_ALL))
    assert [launch.name for launch in cuda_call.program(made).launches] == ["parcels"]
    arguments = "x expert_ids routing_weights input_scale out 40 4 36"
    assert " ".join(cuda_call.arguments(made, "parcels").values()) == arguments
    attributes, workspaces = cuda_call.kernels_of(made)
    assert (workspaces, attributes["adds"], attributes["weight_bytes"]) == ([], "", {})
    assert attributes["sizes"] == {"num_tokens": 40, "top_k": 4, "hidden_size": 576}
    assert attributes["parcels"]["grid"] == -(-40 * (40 + 4) // 256)  # 36 blocks in eights, and 4 routes
    assert " ".join(cuda_call.arguments(taken, "x_rows").values()) == "x x_rows 40 4 36"
    assert cuda_call.kernels_of(taken)[0]["x_rows"]["grid"] == 40 * 576 // 8 // 256 + 1
    assert " ".join(cuda_call.arguments(taken, "gemm1").values()) == _ABI[0][1]["gemm1"]
    assert taken.attributes()["precision"] == "w4a4_parcels"
    assert parcels.num_bytes(4, 576) == 8 * 4 + 288 + 36 + 4
    assert cuda_call.program(dataclasses.replace(made, num_tokens=0)).launches == ()


def test_parcels_count_in_int32():
    made, _ = parcels.of_call(cuda_call.problem(**_ALL | {"num_tokens": 2**26}))
    with pytest.raises(ValueError, match="sharded_moe on parts of the tokens"):
        lowering.cuda_call(made)


_NAMES = ["w4a4 ordered", "weight on input", "dynamic", "dynamic input", "few", "few input"]


@pytest.mark.parametrize(("changes", "expected"), _ABI, ids=_NAMES)
def test_arguments_are_those_of_the_abi(changes, expected):
    problem = cuda_call.problem(**{**_ALL, **changes})
    assert [launch.name for launch in cuda_call.program(problem).launches] == list(expected)
    for step, wanted in expected.items():
        assert " ".join(cuda_call.arguments(problem, step).values()) == wanted, step


def test_each_parameter_is_given_what_is_called_so():
    """By name where the names are the same; the rest is this list."""
    others = {
        "payload": "gate_up.payload down.payload", "global_scale": "gate_up.global_scale down.global_scale",
        "input_scale": "gate_up.input_scale down.input_scale", "bias": "gate_up.bias down.bias",
        "down_input_scale": "down.input_scale", "x": "x x_rows", "out": "out contributions",
    }  # fmt: skip
    for problem in (cuda_call.problem(**_ALL), cuda_call.problem(**{**_ALL, "num_tokens": 16})):
        for launch in cuda_call.program(problem).launches:
            for name, argument in cuda_call.arguments(problem, launch.name).items():
                assert argument.isdigit() or argument in others.get(name, name).split(), (launch.name, name)
                assert argument.isdigit() == (launch.spec.parameters[name] == "i32")


@pytest.mark.parametrize(("change", "message"), [
    ({"x": "routing_weights"}, r"gemm1.x: got 'routing_weights' \(f32\*\), the kernel takes bf16\*"),
    ({"row_route": "row_weight"}, "the kernel takes i32"),
    ({"hidden_size": None}, "the kernel takes i32"),
    ({"x": 7}, "the kernel takes bf16"),
    ({"H": 576}, "the launch of gemm1 differ in H"),
], ids=str)  # fmt: skip
def test_an_argument_of_another_type_or_name_is_refused(monkeypatch, change, message):
    target = TARGETS["sm_90a"]

    def wrong(problem, card):
        made = target.program(problem, card)
        launches = [dataclasses.replace(one, arguments={**one.arguments, **change}) if one.name == "gemm1" else one
                    for one in made.launches]  # fmt: skip
        return dataclasses.replace(made, launches=tuple(launches))

    monkeypatch.setitem(TARGETS, target.name, dataclasses.replace(target, program=wrong))
    with pytest.raises(RuntimeError, match=message):
        lowering.cuda_call(cuda_call.problem(**_ALL))


def test_workspaces_are_those_of_the_abi():
    problem = cuda_call.problem(**_ALL)
    made = cuda_call.program(problem)
    tile = made.launches[0].spec.token_tile
    tiles = tiling.max_tiles(160, 16, tile)
    shapes = {name: (w.shape, jnp.dtype(w.dtype).name) for name, w in made.workspaces.items()}
    assert shapes == {
        "expert_tiles": ((16 + 1 + 2,), "int32"), "tile_expert": ((tiles,), "int32"),
        "row_route": ((tiles * tile,), "int32"), "row_weight": ((tiles * tile,), "float32"),
        "cta_counts": ((1, 16), "int32"), "h": ((tiles, 4, tile, 64), "bfloat16"),
        "x_rows": ((40, 576), "bfloat16"), "contributions": ((160, 576), "float32"),
    }  # fmt: skip
    many = cuda_call.program(cuda_call.problem(**{**_ALL, "num_tokens": 8192, "weight_on": "input"})).workspaces
    assert many["cta_counts"].shape == (8, 16)
    assert many["x_rows"].shape == (8192 * 4, 576)


def test_launches_have_their_grids_and_attributes():
    problem = cuda_call.problem(**{**_ALL, "num_tokens": 8192, "biases": (False, False)})
    attributes, _ = cuda_call.kernels_of(problem)
    ctas = cuda_call.program(problem).launches[2].spec.config.ctas_per_sm
    names = ("grid", "threads", "cluster", "shared", "overlap")
    got = {step: tuple(int(attributes[step][name]) for name in names) for step in _ABI[0][1]}
    assert got == {
        "sort": (8, 128, 8, 1024, 0), "x_rows": (8192 * 36 // 256, 128, 1, 1024, 0),
        "gemm1": (132 * ctas, 128, 1, 1024, 1), "gemm2": (132 * ctas, 128, 1, 1024, 1),
        "combine": (8192 * 144 // 128, 128, 1, 1024, 0),
    }  # fmt: skip
    assert lowering.launches(cuda_call.problem(num_tokens=17))[1].grid == 264  # two CTAs a multiprocessor
    assert [specs.XRowsSpec(True, False).grid(rows, 16) for rows in (1, 256, 257)] == [1, 1, 2]
    assert [specs.CombineSpec("float32").grid(rows, 16) for rows in (1, 32, 33)] == [1, 1, 2]


def test_the_first_launch_of_a_call_overlaps_nothing():
    """What is in front of it writes x and the routing, which GEMM1 without a sort reads at once."""
    for precision, overlaps in (("w4a16", [0, 1]), ("w4a4", [0, 1, 1])):  # w4a4: the pass over x is first
        attributes, _ = cuda_call.kernels_of(cuda_call.problem(num_tokens=1, precision=precision))
        assert [int(attributes[step]["overlap"]) for step in attributes["launches"].split()] == overlaps


def test_few_routes_have_no_more_ctas_than_units_and_no_tile_map():
    """4 routes are at most 4 tiles, of 45 row blocks of gate_up (64 values each) and 23 of down."""
    made = cuda_call.program(cuda_call.problem(num_tokens=1))
    assert [launch.grid for launch in made.launches] == [4 * 45, 4 * 23]
    assert list(made.workspaces) == ["h"]
    assert made.workspaces["h"].shape == (4, 45, 8, 64)


@pytest.mark.parametrize(("weight_on", "rows", "divisor"), [("output", 40, 1), ("input", 160, 4)])
def test_x_as_codes_is_padded_to_whole_blocks(weight_on, rows, divisor):
    launch, workspaces = steps.x_codes(cuda_call.problem(**{**_ALL, "weight_on": weight_on}), 256)
    assert launch.arguments.keys() == launch.spec.parameters.keys()
    got = " ".join(str(launch.arguments[name]) for name in launch.spec.parameters)
    assert got == f"x routing_weights gate_up.input_scale x_codes x_scales {rows} {divisor} 36 48"
    assert launch.spec == specs.XRowsSpec(quantise=True, per_route=weight_on == "input", codes=True)
    assert launch.grid == -(-rows * 48 // 256)
    shapes = {name: (w.shape, jnp.dtype(w.dtype).name) for name, w in workspaces.items()}
    assert shapes == {"x_codes": ((rows, 384), "uint8"), "x_scales": ((rows, 48), "uint8")}


def test_x_as_codes_counts_in_int32():
    """Rows of H = 16 are padded sixteenfold."""
    call = {**_ALL, "num_tokens": 2**25, "top_k": 1, "hidden_size": 16}
    steps.sort(cuda_call.problem(**{**call, "num_tokens": 2**26}), 8)
    steps.x_codes(cuda_call.problem(**call), 256)
    with pytest.raises(ValueError, match="count in int32"):
        steps.x_codes(cuda_call.problem(**{**call, "num_tokens": 2**27}), 256)
    with pytest.raises(ValueError, match="codes: got True, needs quantise"):
        specs.XRowsSpec(quantise=False, per_route=True, codes=True)


def test_specs_say_what_the_call_says():
    swiglu = activations.SwiGLU(1.5, 2.5, 7.0)
    problem = cuda_call.problem(activation=swiglu, combine="ordered", biases=(True, False))
    _, gemm1, gemm2, combine = (launch.spec for launch in cuda_call.program(problem).launches)
    assert (gemm1.alpha, gemm1.beta, gemm1.limit) == (1.5, 2.5, 7.0)
    assert (gemm1.has_bias, gemm2.has_bias) == (True, False)
    assert (gemm2.out_dtype, combine.out_dtype) == ("float32", "bfloat16")
    assert cuda_call.program(cuda_call.problem(biases=(False, True))).launches[2].spec.out_dtype == "bfloat16"
    for weight_on in ("output", "input"):
        sort, x_rows, *_ = cuda_call.program(cuda_call.problem(precision="w4a4", weight_on=weight_on)).launches
        assert sort.spec.weighted == (weight_on == "output")
        assert (x_rows.spec.quantise, x_rows.spec.per_route) == (True, weight_on == "input")


def test_the_target_says_whether_the_call_may_be_captured():
    case = helpers.make_case()
    assert "@jax_moe_fused_moe_v2(" in cuda_call.lowered(case)
    assert "@jax_moe_fused_moe_v2_no_capture(" in cuda_call.lowered(case, command_buffer=False)


@pytest.mark.parametrize("present", [(True, False), (False, True)])
def test_each_bias_is_found_among_the_operands(present):
    case = helpers.make_case(bias=True)
    experts = case.experts
    if not present[0]:
        experts = dataclasses.replace(experts, gate_up=dataclasses.replace(experts.gate_up, bias=None))
    if not present[1]:
        experts = dataclasses.replace(experts, down=dataclasses.replace(experts.down, bias=None))
    text = cuda_call.lowered(dataclasses.replace(case, experts=experts))
    assert ("operand:8 " in text, "operand:13 " in text) == present


def test_only_the_sort_cares_for_the_experts_elsewhere():
    """Kernels index by L; E only chooses the tile."""
    few, many = (cuda_call.kernels_of(cuda_call.problem(**{**_ALL, "num_experts": e}))[0] for e in (None, 17))
    for step in _ABI[0][1]:
        assert few[step]["arguments"] == many[step]["arguments"]


def test_the_options_are_attributes_on_a_gpu_too():
    text = cuda_call.lowered(helpers.make_case(), precision="w4a4", combine="ordered")
    for name, value in {
        "precision": '"w4a4"',
        "combine": '"ordered"',
        "activation": '"swiglu"',
        "alpha": "1.0",
    }.items():
        assert f"{name} = {value}" in text
