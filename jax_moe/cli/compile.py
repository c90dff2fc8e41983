"""``python -m jax_moe compile``: fill the kernel cache ahead of time, on any machine that has the DSL."""

import concurrent.futures
import multiprocessing
from typing import Annotated

import jax.numpy as jnp
from rich.console import Console
from rich.table import Table
import typer

from jax_moe import activations, plan, progress, shapes
from jax_moe.kernels import compile as kernels, lowering
from jax_moe.kernels.sm90 import layout

_ACTIVATIONS = {
    cls.__name__: cls for cls in (activations.SwiGLU, activations.GeGLU, activations.ReLU2, activations.SiTU)
}


def compile(
    target: Annotated[str, typer.Option(help=f"One of {', '.join(kernels.TARGETS)}.")] = kernels.TARGETS[0],
    shape: Annotated[list[str] | None, typer.Option(help=f"Any of {', '.join(shapes.MODELS)}.")] = None,
    layer: Annotated[
        list[str] | None, typer.Option(help="L,K,H,I: local experts, top-k, hidden, intermediate.")
    ] = None,
    num_experts: Annotated[int | None, typer.Option(help="E: experts that routes may name; default L.")] = None,
    tokens: Annotated[str, typer.Option(help="Numbers of tokens, as 1,32 or 1-8192.")] = "1-8192",
    precision: Annotated[str, typer.Option(help="w4a16, w4a4, or both separated by a comma.")] = "w4a16",
    combine: Annotated[str, typer.Option(help="atomic, ordered, or both.")] = "atomic",
    weight_on: Annotated[str, typer.Option(help="output, input, or both.")] = "output",
    out_dtype: Annotated[str, typer.Option(help="bfloat16, float32, or both.")] = "bfloat16",
    activation: Annotated[
        str, typer.Option(help=f"{', '.join(_ACTIVATIONS)}, with alpha,beta,limit behind it where it takes them.")
    ] = "SwiGLU",
    gate_up_bias: Annotated[bool, typer.Option("--gate-up-bias", help="The gate/up projection has a bias.")] = False,
    down_bias: Annotated[bool, typer.Option("--down-bias", help="The down projection has a bias.")] = False,
    jobs: Annotated[int, typer.Option(help="Processes that compile.")] = 1,
    check: Annotated[bool, typer.Option("--check", help="Fail if a kernel spills, or a GEMM has no wgmma.")] = False,
) -> None:
    """Compile every kernel that calls of these shapes launch, into the cache; no GPU needed."""
    try:
        layers = [shapes.MODELS[name] for name in shape or []]
        layers += [shapes.LayerShape(*map(int, text.split(","))) for text in layer or []]
        counts = _numbers(tokens)
        function = parse_activation(activation)
        # The batch may be any of these; each has its own kernels.
        specs: dict[kernels.Spec, None] = {}
        for one in layers:
            for options in _product(precision, combine, weight_on, out_dtype):
                for count in counts:
                    problem = _problem(one, count, num_experts, target, function, *options)
                    for launch in lowering.launches(problem, biases=(gate_up_bias, down_bias)):
                        specs[launch.spec] = None
    except KeyError as error:
        raise typer.BadParameter(f"{error} is not known; see --help") from error
    except (TypeError, ValueError) as error:
        raise typer.BadParameter(str(error)) from error
    if not specs:
        raise typer.BadParameter("nothing to compile: give --shape or --layer")

    table = Table(title=f"{len(specs)} kernels for {target} in {kernels.cache_folder()}")
    for heading in ("kernel", "threads", "registers", "stack bytes", "shared bytes", "wgmma", "cubin bytes"):
        if heading == "kernel":
            table.add_column(heading, overflow="fold", min_width=40)
        else:
            table.add_column(heading, justify="right")
    failures = []
    for spec, kernel in _compile_all(list(specs), target, jobs):
        facts = (kernel.threads, kernel.registers, kernel.stack_bytes, kernel.shared_bytes)
        table.add_row(spec.name, *map(str, facts), str(kernel.tensor_core_instructions), str(len(kernel.image)))
        if kernel.stack_bytes > 0:
            failures.append(f"{spec.name} has a stack of {kernel.stack_bytes} bytes: it spills")
        if "gemm" in spec.name and kernel.tensor_core_instructions == 0:
            failures.append(f"{spec.name} has no wgmma")
    console = Console()
    console.print(table)
    if check and failures:
        console.print("\n".join(failures), style="red")
        raise typer.Exit(1)


def parse_activation(text: str) -> activations.Activation:
    """``SwiGLU`` or ``SwiGLU,1.702,1,7``: the name, then alpha, beta and limit (:func:`activations.parameters`)."""
    name, *numbers = text.split(",")
    cls = _ACTIVATIONS[name]
    if not numbers:
        return cls()
    alpha, beta, limit = map(float, numbers)
    bound = None if limit == float("inf") else limit
    if cls is activations.SwiGLU:
        return activations.SwiGLU(alpha, beta, bound)
    return activations.SiTU(beta, bound) if cls is activations.SiTU else cls()


def _numbers(text: str) -> list[int]:
    numbers = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        numbers += range(int(first), int(last or first) + 1)
    return numbers


def _product(*lists: str):
    if not lists:
        return [()]
    return [(value, *rest) for value in lists[0].split(",") for rest in _product(*lists[1:])]


def _problem(
    layer: shapes.LayerShape, tokens, num_experts, target, activation, precision, combine, weight_on, out_dtype
):
    block = layout.BLOCK_K  # jax_moe.prepare pads to whole ones
    return plan.Problem(
        num_tokens=tokens,
        top_k=layer.top_k,
        num_experts=layer.num_experts,
        hidden_size=layer.hidden_size,
        intermediate_size=-(-layer.intermediate_size // block) * block,
        activation=activation,
        precision=precision,
        combine=combine,
        weight_on=weight_on,
        out_dtype=jnp.dtype(out_dtype),
        layout=target,
        command_buffer=True,
        total_experts=num_experts,
    )


def _compile_all(specs, target, jobs):
    if jobs == 1:
        for spec in progress.track(specs, "compile"):
            yield spec, kernels.compiled(spec, target)
        return
    # Fresh processes: the compiler keeps its state in globals, and JAX's threads do not survive a fork.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(jobs, mp_context=context) as pool:
        results = pool.map(kernels.compiled, specs, [target] * len(specs))
        yield from zip(specs, progress.track(results, "compile", total=len(specs)), strict=True)
