"""Calls as they lower on CUDA, without a GPU or the DSL: for test_lowering.py and test_abi.py."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

import jax_moe
from jax_moe import activations, plan
from jax_moe.kernels import compile as kernels, lowering

PARAMETER_BYTES = {"sort": (8,) * 8 + (4,), "x_rows": (8,) * 4 + (4,) * 3, "gemm1": (8,) * 10 + (4,) * 5,
                   "gemm2": (8,) * 10 + (4,) * 6, "combine": (8,) * 4 + (4,) * 4}  # fmt: skip
"""Of each step's kernel, as ABI.md lists them."""

_STEPS = {
    "SortSpec": "sort",
    "RowsSpec": "x_rows",
    "Gemm1Spec": "gemm1",
    "Gemm2Spec": "gemm2",
    "CombineSpec": "combine",
}


def stand_in_compiler(monkeypatch):
    """A fixture that stands in for the compiler; gives the specs that it was asked for."""
    asked = []

    def compiled(spec, target):
        asked.append(spec)
        size = PARAMETER_BYTES[_STEPS[type(spec).__name__]]
        return kernels.CompiledKernel(spec.name.encode() + b"\xff\0", spec.name, 128, 1024, size, 64, 0, 1)

    monkeypatch.setattr(kernels, "compiled", compiled)
    return asked


def problem(**changes) -> plan.Problem:
    original = plan.Problem(
        num_tokens=40, top_k=4, num_experts=16, hidden_size=2880, intermediate_size=2880,
        activation=activations.SwiGLU(), precision="w4a16", combine="atomic", weight_on="output",
        out_dtype=jnp.dtype(jnp.bfloat16), layout="sm_90a", command_buffer=True,
    )  # fmt: skip
    return dataclasses.replace(original, **changes)


def kernels_of(call: plan.Problem, biases=(False, False)):
    """The attribute ``kernels`` of a call, and its workspaces."""
    lowered = lowering.cuda_call(call, biases=biases)
    return lowered.attributes["kernels"], lowered.workspaces


def lowered(case, **options) -> str:
    """The program of one ``fused_moe`` call on CUDA, its experts prepared, as StableHLO."""
    experts = jax_moe.prepare(case.experts, "sm_90a", progress=False)
    traced = jax.jit(functools.partial(jax_moe.fused_moe, **options)).trace(case.x, experts, case.routing)
    return traced.lower(lowering_platforms=("cuda",)).as_text()
