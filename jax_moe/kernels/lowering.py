"""A call on a CUDA device as the custom call has it: attributes, kernels included, and further results.

``ffi/cuda/program.h`` says how the attributes are read.
"""

from collections.abc import Mapping
import dataclasses
import shlex

import jax
import jax.numpy as jnp
import numpy as np

from jax_moe import activations
from jax_moe.kernels import cache, compiler, steps, targets
from jax_moe.kernels.specs import PARAMETER_BYTES
from jax_moe.kernels.target import Card, Launch, Program, Target
from jax_moe.parcels import Parcels
from jax_moe.problem import Problem
from jax_moe.product.problem import Product


@dataclasses.dataclass(frozen=True)
class CudaCall:
    """Attributes of the custom call beside those that every platform has, and its further results, in order."""

    attributes: dict[str, object]
    workspaces: list[jax.ShapeDtypeStruct]


def cuda_call(problem: Problem | Product | Parcels) -> CudaCall:
    """What a call launches, its kernels compiled or taken from the cache.

    Raises:
      ValueError: the weights are not prepared for a GPU, or a size is beyond what the kernels take.
      NotImplementedError: the GPU has no kernels for such a call yet.
      MissingKernelError: a kernel would have to be compiled, and the DSL is not installed.
    """
    rows = problem.num_rows if isinstance(problem, Product) else problem.num_tokens
    if not isinstance(rows, int):
        raise ValueError(
            f"x: got T = {rows}, which is symbolic; GPU kernels are chosen for a number of tokens: "
            "export a program for each"
        )
    target, card, program = _planned(problem)
    buffers = _buffers(program, problem)
    try:
        kernels: dict[str, object] = {
            launch.name: _kernel_attributes(program, launch, buffers, target.name) for launch in program.launches
        }
    except cache.MissingKernelError as error:
        chosen_for = ["--card", shlex.quote(card.name)]
        if card.multiprocessors != targets.card_named(target, card.name).multiprocessors:
            chosen_for += ["--multiprocessors", str(card.multiprocessors)]
        command = ["python -m jax_moe compile --target", target.name, *chosen_for, *command_arguments(problem)]
        advice = f"Either `pip install {compiler.PACKAGE}`, or run `{' '.join(command)}` on a machine that has it (no "
        advice += "GPU needed) and copy its folder of kernels here (JAX_MOE_CACHE_DIR names another place)."
        raise cache.MissingKernelError(f"{error} {advice}") from None
    workspaces = list(program.workspaces.values())
    kernels |= {
        "launches": " ".join(launch.name for launch in program.launches),
        "adds": program.adds or "",
        "sizes": _int64s(program.sizes),
        "weight_bytes": _int64s(program.weight_bytes),
        "workspace_bytes": np.array([w.size * w.dtype.itemsize for w in workspaces], np.int64),
        "card": card.name,  # for whoever reads the program: what its kernels were chosen for
    }
    return CudaCall({"kernels": kernels}, workspaces)


def launches(problem: Problem | Product | Parcels) -> tuple[Launch, ...]:
    """The launches that :func:`cuda_call` would compile kernels for, in order."""
    return _planned(problem)[2].launches


def _planned(problem: Problem | Product | Parcels) -> tuple[Target, Card, Program]:
    """What runs a call, and how."""
    if isinstance(problem, Parcels):
        return *targets.for_call(problem.layout, "w4a4"), steps.parcels(problem)
    if not isinstance(problem, Product):
        target, card = targets.for_call(problem.layout, problem.precision)
        return target, card, target.program(problem, card)
    target, card = targets.for_call(problem.layout, problem.precision, "weights", "ragged_dot")
    if target.product is None:
        raise NotImplementedError(f"ragged_dot: there are no kernels for {target.generation} ({target.name}) yet")
    return target, card, target.product(problem, card)


def command_arguments(problem: Problem | Product | Parcels) -> list[str]:
    """Arguments with which ``python -m jax_moe compile`` makes the kernels of ``problem``."""
    if isinstance(problem, Parcels):  # they are made with those of any layer, and depend on none
        sizes = f"{problem.top_k},{problem.top_k},{problem.hidden_size},{problem.hidden_size}"
        return [f"--layer {sizes}", f"--tokens {problem.num_tokens}", "--precision w4a4"]
    if isinstance(problem, Product):
        return [
            f"--product {problem.local_groups},{problem.in_features},{problem.out_features}",
            f"--num-experts {problem.num_groups}",
            f"--tokens {problem.num_rows}",
            f"--precision {problem.precision}",
            f"--out-dtype {jnp.dtype(problem.out_dtype).name}",
            *["--bias"] * problem.has_bias,
            *["--batch-invariant"] * problem.batch_invariant,
        ]
    alpha, beta, limit = activations.parameters(problem.activation)
    arguments = [
        f"--layer {problem.local_experts},{problem.top_k},{problem.hidden_size},{problem.intermediate_size}",
        f"--tokens {problem.num_tokens}",
        f"--precision {problem.precision}",
        f"--combine {problem.combine}",
        f"--weight-on {problem.weight_on}",
        f"--out-dtype {jnp.dtype(problem.out_dtype).name}",
        f"--activation {type(problem.activation).__name__},{alpha!r},{beta!r},{limit!r}",
    ]
    if problem.num_experts is not None:
        arguments.append(f"--num-experts {problem.num_experts}")
    if problem.has_gate_up_bias:
        arguments.append("--gate-up-bias")
    if problem.has_down_bias:
        arguments.append("--down-bias")
    if problem.batch_invariant:
        arguments.append("--batch-invariant")
    return arguments


def _kernel_attributes(
    program: Program, launch: Launch, buffers: Mapping[str, tuple[str, str]], target: str
) -> dict[str, object]:
    spec = launch.spec
    if set(launch.arguments) != set(spec.parameters):
        differing = sorted(set(launch.arguments) ^ set(spec.parameters))
        raise RuntimeError(f"jax_moe: {spec.name} and the launch of {launch.name} differ in {', '.join(differing)}")
    arguments = [_argument(launch, name, kind, buffers) for name, kind in spec.parameters.items()]
    kernel = cache.compiled(spec, target)
    sizes = tuple(PARAMETER_BYTES[kind] for kind in spec.parameters.values())
    if sizes != kernel.parameter_bytes:
        raise RuntimeError(
            f"jax_moe: kernel {spec.name} takes parameters of {kernel.parameter_bytes} bytes, its spec says {sizes}"
        )
    numbers = {
        "grid": launch.grid,
        "threads": kernel.threads,
        "cluster": spec.cluster,
        "shared": kernel.shared_bytes,
        "overlap": program.overlaps(launch),
    }
    return {"image": kernel.image, "name": kernel.symbol, "arguments": " ".join(arguments), **_int64s(numbers)}


_OPERAND_TYPES = {
    "x": "bf16*", "expert_ids": "i32*", "expert_offset": "i32*", "gate_up.payload": "u8*", "down.payload": "u8*",
    "group_sizes": "i32*", "group_offset": "i32*", "weights.payload": "u8*",
}  # fmt: skip
"""Of those that are not f32."""

_POINTERS = {"int32": "i32*", "float32": "f32*", "bfloat16": "bf16*", "uint8": "u8*"}


def _buffers(program: Program, problem: Problem | Product | Parcels) -> dict[str, tuple[str, str]]:
    """Of every buffer of a call: where it is, and what a kernel's pointer to it is."""
    types = _OPERAND_TYPES | ({"x": "u8*"} if isinstance(problem, Problem) and problem.x_form == "parcels" else {})
    buffers = {name: (f"operand:{i}", types.get(name, "f32*")) for i, name in enumerate(problem.operand_names)}
    results = {"out": problem.out_dtype} | {name: w.dtype for name, w in program.workspaces.items()}
    return buffers | {
        name: (f"result:{i}", _POINTERS[jnp.dtype(dtype).name]) for i, (name, dtype) in enumerate(results.items())
    }


def _argument(launch: Launch, name: str, kind: str, buffers: Mapping[str, tuple[str, str]]) -> str:
    value = launch.arguments[name]
    if value is None:
        place, given = "null", kind if kind.endswith("*") else "a pointer"
    elif isinstance(value, str):
        place, given = buffers[value]
    else:
        place, given = f"i32:{value}", "i32"
    if given != kind:
        raise RuntimeError(f"jax_moe: {launch.name}.{name}: got {value!r} ({given}), the kernel takes {kind}")
    return place


def _int64s(numbers: Mapping[str, int]) -> dict[str, np.int64]:
    return {name: np.int64(number) for name, number in numbers.items()}
