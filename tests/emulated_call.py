"""A whole call on the emulator: the launches of its program, over its operands and workspaces."""

import dataclasses
import functools
from typing import Any

import compiled_once
import emulator
from emulator import Array, Launch, Memory
from helpers import Case
import jax
import jax.numpy as jnp
import numpy as np
from product_cases import ProductCase

import jax_moe
from jax_moe import check, nvfp4, parcels, parcels_primitive
from jax_moe.kernels import targets
from jax_moe.kernels.sm90 import program as sm90_program
from jax_moe.kernels.sm100 import program as sm100_program
from jax_moe.kernels.specs import Spec
from jax_moe.kernels.target import Program
from jax_moe.operands import expert_operands
from jax_moe.problem import Options, Problem
from jax_moe.product.problem import Product


@dataclasses.dataclass
class Call:
    """A call that is ready to run.

    Attributes:
      problem: what is static about it.
      program: what it launches.
      target: the architecture.
      memory: with all buffers.
      arrays: operands, workspaces and "out", by name.
    """

    problem: Problem | Product
    program: Program
    target: str
    memory: Memory
    arrays: dict[str, Array]
    counts: dict[str, emulator.Counts] = dataclasses.field(default_factory=dict)

    def run(self, *, kernels: dict[str, emulator.Kernel] | None = None, **options: Any) -> np.ndarray:
        """Runs all launches; the output. ``kernels``: instead of a launch's own, by its name. ``options``: of run."""
        # An atom of scales is copied whole: of sm_100f's w4a4 also those of rows that nobody has written or multiplies.
        options = {"written": (self.target, self.problem.precision) != ("sm_100f", "w4a4")} | options
        launches = []
        for launch in self.program.launches:
            kernel, shared_bytes = compiled(launch.spec, self.target)
            given = [launch.arguments[name] for name in launch.spec.parameters]
            launches.append(
                Launch(
                    (kernels or {}).get(launch.name, kernel), launch.grid,
                    [self.arrays[value] if isinstance(value, str) else value for value in given],
                    launch.spec.threads, launch.spec.cluster, shared_bytes, self.program.overlaps(launch),
                    getattr(getattr(launch.spec, "config", None), "ctas_per_sm", None),
                )
            )  # fmt: skip
        counts = emulator.run(launches, self.memory, **options)
        self.counts = {launch.name: count for launch, count in zip(self.program.launches, counts, strict=True)}
        return self.arrays["out"].read()


def prepare(
    case: Case, target: str, *, multiprocessors: int = 3, config: Any = None, travels: bool = False, **options: Any
) -> Call:
    """The call that ``case`` is on a GPU with so many multiprocessors, its weights prepared for ``target``.

    ``config``: of sm_100f, instead of the one that the program would choose. ``travels``: it is given parcels.
    """
    options = {"activation": jax_moe.SwiGLU(), "precision": "w4a16"} | case.options | options
    offset, num_experts = options.pop("expert_offset", 0), options.pop("num_experts", None)
    static = {"combine": "atomic", "weight_on": "output", "out_dtype": jnp.bfloat16, "command_buffer": True} | options
    experts = jax_moe.prepare(case.experts, target, static["precision"], progress=False)
    problem = check.check(
        case.x, experts, case.routing, Options(**static), expert_offset=offset, num_experts=num_experts
    )
    if travels:
        _, problem = parcels.of_call(problem)
    made_for, card = targets.for_call(problem.layout, problem.precision)
    assert made_for.name == target
    card = dataclasses.replace(card, multiprocessors=multiprocessors)
    program = made_for.program(problem, card) if config is None else sm100_program.with_config(problem, card, config)
    operands = {
        "x": case.x, "expert_ids": case.routing.expert_ids, "routing_weights": case.routing.weights,
        "expert_offset": jnp.int32(offset), **expert_operands(experts),
    }  # fmt: skip
    for name in ("gate_up.payload", "down.payload"):
        operands[name] = nvfp4.payload_bytes(operands[name])
    if travels:
        scale = experts.gate_up.input_scale
        make = functools.partial(parcels_primitive.make, layout=problem.layout, command_buffer=True)
        operands["x"] = jax.jit(make)(case.x, case.routing, scale)
    return _call(problem, program, target, operands, case.x.shape)


def prepare_product(
    case: ProductCase,
    target: str = "sm_90a",
    *,
    multiprocessors: int = 3,
    config: Any = None,
    form: tuple[Any, int] | None = None,
) -> Call:
    """The grouped product that ``case`` is on a GPU with so many multiprocessors; ``config`` as in :func:`prepare`.

    ``form``: of a product of one matrix on sm_90a, its config and split.
    """
    layout = targets.TARGETS[target].layouts[case.precision]
    problem = case.problem(layout)
    made_for, card = targets.for_call(problem.layout, problem.precision)
    assert made_for.name == target
    assert made_for.product is not None
    card = dataclasses.replace(card, multiprocessors=multiprocessors)
    program = made_for.product(problem, card)
    if config is not None:
        program = sm100_program.product_with_config(problem, card, config)
    if form is not None:
        program = sm90_program.linear_with_form(problem, card, *form)
    return _call(problem, program, target, case.operands(layout), (problem.num_rows, problem.out_features))


def _call(problem: Problem | Product, program: Program, target: str, operands, shape) -> Call:
    memory = Memory()
    arrays = {name: memory.array(np.asarray(value), name) for name, value in operands.items() if value is not None}
    for name, workspace in program.workspaces.items():
        arrays[name] = memory.poisoned(workspace.shape, workspace.dtype, name)
    dtype = jnp.dtype(problem.out_dtype)
    if program.adds or not program.launches:
        arrays["out"] = memory.array(np.zeros(shape, dtype), "out", strict=True)
    else:
        arrays["out"] = memory.poisoned(shape, dtype, "out", strict=True)
    return Call(problem, program, target, memory, arrays)


@functools.cache
def compiled(spec: Spec, target: str) -> tuple[emulator.Kernel, int]:
    """The kernel of ``spec``, and its dynamic shared memory."""
    text, shared_bytes = ptx(spec, target)
    return emulator.Kernel(text, spec.name), shared_bytes


def ptx(spec: Spec, target: str) -> tuple[str, int]:
    """The PTX of ``spec``, and the dynamic shared memory that it is launched with."""
    kernel, text = compiled_once.kernel_and_ptx(spec, target)
    return text, kernel.shared_bytes
