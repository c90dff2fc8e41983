"""Which kernels the lint looks at."""

import functools
import itertools

import compiled_once
import cuda_call
import jax.numpy as jnp
from ptx import parser

from jax_moe import activations, parcels, shapes
from jax_moe.kernels import lowering
from jax_moe.kernels.compiler import CompiledKernel
from jax_moe.kernels.sm90 import program as sm90_program
from jax_moe.kernels.sm100 import program as sm100_program
from jax_moe.kernels.specs import Spec
from jax_moe.kernels.targets import TARGETS

_SWIGLU, _GPT_OSS = activations.SwiGLU(), activations.SwiGLU(alpha=1.702, beta=1.0, limit=7.0)
_ACTIVATIONS = (_SWIGLU, _GPT_OSS, activations.GeGLU(), activations.ReLU2(), activations.SiTU())


@functools.cache
def compiled(spec: Spec, target: str) -> tuple[CompiledKernel, parser.Kernel]:
    """A kernel as machine code and as PTX."""
    kernel, text = compiled_once.kernel_and_ptx(spec, target)
    return kernel, parser.parse(text)


def problem(target: str, precision: str, **changes):
    return cuda_call.problem(precision=precision, layout=TARGETS[target].layouts[precision], **changes)


def some_specs(target: str) -> list[Spec]:
    """Each config, each option and each small kernel at least once."""
    specs = set()
    for precision in ("w4a4", "w4a16"):
        for index, config in enumerate(_configs(target, precision)):
            options = dict(activation=_ACTIVATIONS[index % 5], combine=("atomic", "ordered")[index % 2])
            options |= dict(
                biases=(index % 3 == 1,) * 2, out_dtype=jnp.dtype((jnp.bfloat16, jnp.float32)[index // 2 % 2])
            )
            specs |= set(_gemms(target, problem(target, precision, **options), config))
        for weight_on in ("output", "input"):
            call = problem(target, precision, weight_on=weight_on, combine="ordered")
            calls = [call, *(parcels.of_call(call) if parcels.are_taken(call) else [])]
            launches = [launch for each in calls for launch in lowering.launches(each)]
            specs |= {launch.spec for launch in launches if not launch.spec.tensor_core_ptx}
        # Few routes may have kernels of their own.
        call = problem(target, precision, num_tokens=1, combine="ordered" if precision == "w4a4" else "atomic")
        specs |= {launch.spec for launch in lowering.launches(call)}
        if TARGETS[target].product is not None:  # of which a config changes only what those of GEMM1 have
            layout = TARGETS[target].layouts[precision]
            call = cuda_call.product(precision=precision, num_rows=1, bias=precision == "w4a4", layout=layout)
            specs |= {launch.spec for launch in lowering.launches(call)}
        if target == "sm_90a":  # of one matrix, where CTAs share a unit: with k warpgroups and with m warpgroups
            configs = (sm90_program.CONFIGS[0], sm90_program.CONFIGS[2 if precision == "w4a16" else 9])
            specs |= {sm90_program.linear_spec(call, config, 4) for config in configs}
            specs.add(sm90_program.linear_spec(call, sm90_program.FEW_UNITS, 1))
    if "w4a4_dynamic" in TARGETS[target].layouts:
        for config in (sm90_program.CONFIGS[2], sm90_program.CONFIGS[9]):  # epilogues of m warpgroups that meet
            specs |= set(_gemms(target, problem(target, "w4a4_dynamic"), config))
        for weight_on in ("output", "input"):
            call = problem(target, "w4a4_dynamic", num_tokens=1, weight_on=weight_on)
            specs |= {launch.spec for launch in lowering.launches(call)}
        specs |= {launch.spec for launch in lowering.launches(cuda_call.product(precision="w4a4_dynamic"))}
    return sorted(specs, key=lambda spec: spec.name)


def all_specs(target: str) -> list[Spec]:
    """All that the published models launch, and each config in every precision, combine and activation."""
    specs = set()
    for model, tokens in itertools.product(shapes.MODELS.values(), shapes.TOKENS):
        for precision, combine in itertools.product(("w4a4", "w4a16"), ("atomic", "ordered")):
            call = problem(
                target, precision, combine=combine, num_tokens=tokens, local_experts=model.num_experts,
                top_k=model.top_k, hidden_size=model.hidden_size, intermediate_size=model.intermediate_size,
            )  # fmt: skip
            specs |= {launch.spec for launch in lowering.launches(call)}
    for precision, activation in itertools.product(TARGETS[target].layouts, _ACTIVATIONS):
        for config in _configs(target, precision):
            for combine, dtype in (("atomic", jnp.bfloat16), ("atomic", jnp.float32), ("ordered", jnp.bfloat16)):
                options = dict(activation=activation, combine=combine, out_dtype=jnp.dtype(dtype))
                biases = (activation is not _SWIGLU,) * 2
                specs |= set(_gemms(target, problem(target, precision, biases=biases, **options), config))
    return sorted(specs, key=lambda spec: spec.name)


def _configs(target: str, precision: str):
    if target == "sm_90a":
        return (*sm90_program.CONFIGS, sm90_program.FEW_UNITS, sm90_program.SPLIT_UNITS)
    return sm100_program.CONFIGS[precision]


def _gemms(target: str, call, config) -> tuple[Spec, Spec]:
    return (sm90_program if target == "sm_90a" else sm100_program).gemms(call, config)
