"""Calls as they lower on CUDA, without a GPU or the DSL: for test_lowering.py and test_abi.py."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

import jax_moe
from jax_moe import activations
from jax_moe.kernels import cache, lowering, specs
from jax_moe.kernels.compiler import CompiledKernel
from jax_moe.kernels.target import Program
from jax_moe.parcels import Parcels
from jax_moe.problem import Problem
from jax_moe.product.problem import Product


def stand_in_compiler(monkeypatch):
    """A fixture that stands in for the compiler; gives the specs that it was asked for."""
    asked = []

    def compiled(spec, target):
        asked.append(spec)
        size = tuple(specs.PARAMETER_BYTES[kind] for kind in spec.parameters.values())
        return CompiledKernel(spec.name.encode() + b"\xff\0", spec.name, 128, 1024, size, 64, 0, 1)

    monkeypatch.setattr(cache, "compiled", compiled)
    return asked


def problem(*, biases=(False, False), **changes) -> Problem:
    """A call on Hopper; ``biases``: whether gate_up and down have one."""
    absent = [name for name, is_given in zip(("gate_up.bias", "down.bias"), biases, strict=True) if not is_given]
    original = Problem(
        num_tokens=40, top_k=4, local_experts=16, hidden_size=2880, intermediate_size=2880,
        activation=activations.SwiGLU(), precision="w4a16", combine="atomic", weight_on="output",
        out_dtype=jnp.dtype(jnp.bfloat16), layout="wgmma_v1", command_buffer=True,
        absent=tuple(absent),
    )  # fmt: skip
    return dataclasses.replace(original, **changes)


def product(*, bias=False, **changes) -> Product:
    """A grouped product; on Hopper, if no layout says otherwise."""
    absent = ["weights.block_scale"] + ["weights.input_scale"] * (changes.get("precision", "w4a16") == "w4a16")
    original = Product(
        precision="w4a16", out_dtype=jnp.dtype(jnp.bfloat16), command_buffer=True, num_rows=40, num_groups=16,
        local_groups=16, in_features=2880, out_features=2880, layout="wgmma_v1",
        absent=(*absent, *["weights.bias"] * (not bias)),
    )  # fmt: skip
    return dataclasses.replace(original, **changes)


def program(call: Problem | Product | Parcels) -> Program:
    """What a call launches."""
    return lowering._planned(call)[2]


def kernels_of(call: Problem | Product | Parcels):
    """The attribute ``kernels`` of a call, and its workspaces."""
    lowered = lowering.cuda_call(call)
    return lowered.attributes["kernels"], lowered.workspaces


def arguments(call: Problem | Product | Parcels, step: str) -> dict[str, str]:
    """What a kernel is launched with, by the name of the parameter: a buffer's name, a number or "null"."""
    made = program(call)
    (launch,) = (launch for launch in made.launches if launch.name == step)
    results = ["out", *made.workspaces]

    def named(argument: str) -> str:
        kind, _, value = argument.partition(":")
        buffers = {"operand": call.operand_names, "result": results}
        return buffers[kind][int(value)] if kind in buffers else value or kind

    given = kernels_of(call)[0][step]["arguments"].split()
    return dict(zip(launch.spec.parameters, map(named, given), strict=True))


def lowered(case, **options) -> str:
    """The program of one ``fused_moe`` call on CUDA, its experts prepared, as StableHLO."""
    experts = jax_moe.prepare(case.experts, "sm_90a", progress=False)
    traced = jax.jit(functools.partial(jax_moe.fused_moe, **options)).trace(case.x, experts, case.routing)
    return traced.lower(lowering_platforms=("cuda",)).as_text()
