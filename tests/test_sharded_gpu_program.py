"""``sharded_moe`` as it is lowered for GPUs, compiled by XLA for eight virtual CPU devices.

jaxlib 0.11.2 ended the process when it compiled such a program: prepared experts had an empty array, sharded over the
mesh, among the operands of the custom call. XLA's passes are the same for a CPU, so no GPU is needed to see that, but
each jaxlib must be asked. Nothing is run: the kernels are stand-ins.
"""

import functools
import re

import cuda_call
import helpers
import jax
import jax.export
from jax.interpreters import mlir
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import pytest

import jax_moe
from jax_moe import ffi, parcels_primitive, primitive

compiler = pytest.fixture(autouse=True)(cuda_call.stand_in_compiler)

# Mesh axes, and the names of axes that are not the default.
MESHES = {
    "experts": ({"expert": 4}, {}),
    "tensor": ({"tensor": 2}, {}),
    "both": ({"expert": 2, "tensor": 2}, {}),
    "tokens apart": ({"data": 2, "expert": 2, "tensor": 2}, {}),
    "tokens over the experts' axis": ({"expert": 4}, {"data_axis": "expert"}),
    "tokens over both axes": ({"expert": 2, "tensor": 2}, {"data_axis": ("expert", "tensor")}),
}


@pytest.fixture(scope="module", autouse=True)
def stand_in_handler():
    """XLA compiles no call that a platform has no handler of; on a CPU nobody makes parcels by one."""
    jax.ffi.register_ffi_target(ffi.PARCELS_TARGET, ffi._capsule("JaxMoeFusedMoeCpu"), platform="cpu")


@pytest.fixture(autouse=True)
def gpu_lowering():
    """The GPU's lowering, on the CPU platform."""
    owners = {primitive.fused_moe_p: primitive, parcels_primitive.parcels_p: parcels_primitive}
    for made, owner in owners.items():
        mlir.register_lowering(made, owner._lower_cuda, platform="cpu")
    yield
    for made, owner in owners.items():
        mlir.register_lowering(made, owner._lower_cpu, platform="cpu")


def placed_case(mesh, tokens=16, target="sm_90a", **options):
    """Prepared experts on the mesh (I = 96: three slices of 32 are no whole blocks), and where each array is."""
    precision = options.get("precision", "w4a16")
    case = helpers.make_case(1, tokens=tokens, hidden=64, intermediate=96, num_experts=8, bias=True, **options)
    experts = jax.device_put(case.experts, jax_moe.expert_shardings(case.experts, mesh))
    experts = jax_moe.prepare(experts, target, precision)
    x, routing = jax.device_put((case.x, case.routing), NamedSharding(mesh, P()))
    return x, experts, routing


def make_mesh(axes, axis_type=AxisType.Auto):
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(axis_type,) * len(axes))


def compile_it(function, *arguments, count: int) -> None:
    lowered = jax.jit(function).lower(*arguments)
    assert lowered.as_text().count(f"@{ffi.TARGET}(") == count
    assert f'"{ffi.TARGET}"' in lowered.compile().as_text() or not count


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize(("precision", "combine"), [("w4a16", "atomic"), ("w4a4", "ordered")])
@pytest.mark.parametrize("name", MESHES)
def test_it_compiles(name, precision, combine, axis_type):
    axes, names = MESHES[name]
    mesh = make_mesh(axes, axis_type)
    run = functools.partial(jax_moe.sharded_moe, mesh=mesh, precision=precision, combine=combine, **names)
    compile_it(run, *placed_case(mesh), count=1)


@pytest.mark.parametrize(
    ("name", "target", "weight_on", "travels"),
    [
        ("tokens over the experts' axis", "sm_90a", "output", True),
        ("tokens over both axes", "sm_90a", "output", True),
        ("tokens over the experts' axis", "sm_90a", "input", False),
        ("tokens over the experts' axis", "sm_100f", "output", False),  # tcgen05_fp4_v1: codes, in a layout of its own
        ("experts", "sm_90a", "output", False),
        ("tokens apart", "sm_90a", "output", False),
    ],
)
def test_w4a4_gathers_parcels(name, target, weight_on, travels):
    """A kernel makes them, one collective moves them, and the call's pass over x reads them."""
    axes, names = MESHES[name]
    mesh = make_mesh(axes)
    run = functools.partial(jax_moe.sharded_moe, mesh=mesh, precision="w4a4", weight_on=weight_on, **names)
    lowered = jax.jit(run).lower(*placed_case(mesh, precision="w4a4", target=target))
    text = lowered.as_text()
    launches = [found.split() for found in re.findall(r'launches = "([\w ]*)"', text)]
    sort = ["sort"] * (target != "sm_90a")  # which few routes do not need
    assert launches == [*[["parcels"]] * travels, [*sort, "x_rows", "gemm1", "gemm2"]]
    assert text.count(f"@{ffi.PARCELS_TARGET}(") == travels
    assert ('precision = "w4a4_parcels"' in text) is travels
    assert ('precision = "w4a4"' in text) is not travels
    if travels:  # one collective in front of the call, of H = 64 in 36 bytes and K = 2 in 16, a multiple of 8
        (gather,) = re.findall(r'"stablehlo.all_gather".*-> tensor<(\w+)>', text)
        assert gather == "16x56xui8"
        compiled = lowered.compile().as_text()
        assert re.findall(r"= (\w+)\[\d+,\d+\]\S* all-gather\(", compiled) == ["u8"]
        made = dict(re.findall(r"^ *(?:ROOT )?(%[\w.-]+) = (.*)", compiled, re.M))
        (call,) = [line for line in made.values() if f'"{ffi.TARGET}"' in line]
        assert made[re.search(r"custom-call\([^%]*(%[\w.-]+)", call)[1]].startswith("u8[16,56]")
        # Nobody reads x in bfloat16, and so XLA does not make it: of its block scales there are bytes alone.
        assert "16x4xf8E4M3FN" in text
        assert "f8e4m3fn[16,4]" not in compiled


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_it_compiles_under_set_mesh(axis_type):
    mesh = make_mesh({"expert": 4}, axis_type)
    arguments = placed_case(mesh)
    with jax.set_mesh(mesh):
        compile_it(jax_moe.sharded_moe, *arguments, count=1)


def test_it_compiles_with_the_shardings_of_jit():
    mesh = make_mesh({"expert": 2, "tensor": 2})
    x, experts, routing = placed_case(mesh)
    shardings = (NamedSharding(mesh, P()), jax_moe.expert_shardings(experts, mesh), NamedSharding(mesh, P()))
    run = jax.jit(functools.partial(jax_moe.sharded_moe, mesh=mesh), in_shardings=shardings)
    run.lower(x, experts, routing).compile()


def test_it_compiles_in_a_scan_over_stacked_layers():
    mesh = make_mesh({"expert": 2, "tensor": 2})
    x, experts, routing = placed_case(mesh)
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), experts)

    def layers(x, stacked, routing):
        return jax.lax.scan(lambda x, e: (jax_moe.sharded_moe(x, e, routing, mesh=mesh), None), x, stacked)[0]

    compile_it(layers, x, stacked, routing, count=1)


@pytest.mark.parametrize("name", MESHES)
def test_without_tokens_there_is_no_call(name):
    axes, names = MESHES[name]
    mesh = make_mesh(axes)
    run = functools.partial(jax_moe.sharded_moe, mesh=mesh, **names)
    compile_it(run, *placed_case(mesh, tokens=0), count=0)


def test_it_can_be_exported_for_gpus():
    mesh = make_mesh({"expert": 4})
    arguments = placed_case(mesh)
    run = jax.jit(functools.partial(jax_moe.sharded_moe, mesh=mesh))
    exported = jax.export.export(run, platforms=("cuda",), disabled_checks=jax_moe.export_checks())(*arguments)
    again = jax.export.deserialize(exported.serialize())
    assert again.nr_devices == 4
    assert again.mlir_module().count(f"@{ffi.TARGET}(") == 1


def test_a_shard_map_of_ones_own_without_tokens():
    """Its slice of x has no elements and is sharded: there, the call itself would end the process."""
    mesh = make_mesh({"data": 4})
    x, experts, routing = placed_case(mesh, tokens=0)
    tokens = P("data", None)
    specs = jax.tree.map(lambda _: P(), experts)
    run = jax.shard_map(jax_moe.fused_moe, mesh=mesh, in_specs=(tokens, specs, tokens), out_specs=tokens)
    compile_it(run, x, experts, routing, count=0)


def test_no_operand_of_the_primitive_is_empty():
    """An eager ``shard_map`` runs each primitive as a program of its own, with whatever it takes sharded."""
    mesh = make_mesh({"expert": 4})
    x, experts, routing = placed_case(mesh)
    experts = helpers.without_input_scales(experts)
    traced = jax.make_jaxpr(functools.partial(jax_moe.sharded_moe, mesh=mesh))(x, experts, routing)
    (run,) = [e.params["jaxpr"] for e in traced.eqns if e.primitive.name == "shard_map"]
    (call,) = [e for e in run.eqns if e.primitive is primitive.fused_moe_p]
    assert all(operand.aval.size for operand in call.invars)
    assert call.params["problem"].absent == (
        "gate_up.block_scale", "gate_up.input_scale", "down.block_scale", "down.input_scale",
    )  # fmt: skip
