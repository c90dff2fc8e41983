"""``python -m jax_moe compile``: fill the kernel cache ahead of time, on any machine that has the DSL."""

import concurrent.futures
import contextlib
import dataclasses
import itertools
import multiprocessing
from typing import Annotated

import typer

from jax_moe import activations, parcels, problem, progress, shapes
from jax_moe.cli import options, show
from jax_moe.kernels import cache, compiler, lowering, targets
from jax_moe.kernels.specs import Spec
from jax_moe.product.problem import Product

_LETTERS = "L,K,H,I"  # as of bench, but with the experts that a device holds
_PRODUCT_LETTERS = "G,C,N"  # of x [T, C] and weights [G, N, C], G of them on a device
_HEADINGS = ("kernel", "threads", "registers", "stack bytes", "shared bytes", "tensor core", "cubin bytes")


@show.one_line_errors
def compile(
    target: Annotated[str, typer.Option(help=f"One of {', '.join(targets.TARGETS)}.")] = next(iter(targets.TARGETS)),
    model: Annotated[
        list[str] | None,
        # It had the other two names once, and messages of programs that were built then have them.
        typer.Option("--model", "--shape", "--layer", help=f"The layer: {options.models(_LETTERS)}; may be repeated."),
    ] = None,
    card: Annotated[
        str | None, typer.Option(help="Of the target: what the kernels are chosen for; default the GPU at hand.")
    ] = None,
    multiprocessors: Annotated[
        int | None, typer.Option(min=1, help="Of that card, where a GPU or a slice of it has others than the table.")
    ] = None,
    product: Annotated[
        list[str] | None,
        typer.Option(help=f"A grouped product (ragged_dot): {_PRODUCT_LETTERS}; G is 1 for linear; may be repeated."),
    ] = None,
    num_experts: Annotated[
        int | None, typer.Option(help="E: experts that routes may name, groups that have a size; default L, G.")
    ] = None,
    tokens: Annotated[str, typer.Option(help="Numbers of tokens, rows of x, as 1,32 or 1-8192.")] = "1-8192",
    precision: Annotated[str, typer.Option(help="Of w4a16, w4a4 and w4a4_dynamic, with commas.")] = "w4a16",
    combine: Annotated[str, typer.Option(help="atomic, ordered, or both separated by a comma.")] = "atomic",
    weight_on: Annotated[str, typer.Option(help="output, input, or both separated by a comma.")] = "output",
    out_dtype: Annotated[str, typer.Option(help="bfloat16, float32, or both separated by a comma.")] = "bfloat16",
    activation: Annotated[
        str,
        typer.Option(help=f"{', '.join(options.ACTIVATIONS)}, with alpha,beta,limit behind it where it takes them."),
    ] = "SwiGLU",
    gate_up_bias: Annotated[bool, typer.Option("--gate-up-bias", help="The gate_up projection has a bias.")] = False,
    down_bias: Annotated[bool, typer.Option("--down-bias", help="The down projection has a bias.")] = False,
    bias: Annotated[bool, typer.Option("--bias", help="The grouped product has a bias.")] = False,
    batch_invariant: Annotated[
        bool, typer.Option("--batch-invariant", help="Calls are batch invariant; of layers, with --combine ordered.")
    ] = False,
    jobs: Annotated[int, typer.Option(min=1, help="Processes that compile.")] = 1,
    check: Annotated[bool, typer.Option("--check", help="Fail if a kernel spills, or a GEMM has no MMA.")] = False,
) -> None:
    """Compile every kernel that calls of these shapes launch, into the cache; no GPU needed.

    --combine, --weight-on, --activation and the biases of gate_up and down are of layers, --bias is of products.
    """
    try:
        options.one_of("--target", target, targets.TARGETS)
        layers = [options.model("--model", text, _LETTERS) for text in model or []]
        products = [options.sizes("--product", text, _PRODUCT_LETTERS, blocks="CN") for text in product or []]
        function = options.activation("--activation", activation)
        precisions = options.choices("--precision", precision, problem.Precision)
        combines = options.choices("--combine", combine, problem.Combine)
        weights_on = options.choices("--weight-on", weight_on, problem.WeightOn)
        dtypes = options.dtypes("--out-dtype", out_dtype, problem.OUT_DTYPES)
        if batch_invariant and layers and combines != ["ordered"]:
            raise ValueError(f"--batch-invariant: got --combine {combine}, needs ordered")
        counts = options.numbers("--tokens", tokens)
        biases = {"gate_up.bias": gate_up_bias, "down.bias": down_bias}
        absent = tuple(name for name, is_given in biases.items() if not is_given)
        # The batch may be any of these; each has its own kernels.
        specs: dict[Spec, None] = {}
        modes = itertools.product(precisions, combines, weights_on, dtypes)
        with _planned(target, card, multiprocessors):
            for one, mode, count in itertools.product(layers, modes, counts):
                call = problem_of(one, count, num_experts, target, absent, function, mode, batch_invariant)
                of_a_mesh = parcels.of_call(call) if parcels.are_taken(call) else ()
                specs |= dict.fromkeys(launch.spec for each in (call, *of_a_mesh) for launch in lowering.launches(each))
            for one, mode, count in itertools.product(products, itertools.product(precisions, dtypes), counts):
                call = product_of(one, count, num_experts, target, bias, mode, batch_invariant)
                specs |= dict.fromkeys(launch.spec for launch in lowering.launches(call))
    except (NotImplementedError, TypeError, ValueError) as error:
        raise typer.BadParameter(str(error)) from error
    if not specs:
        raise typer.BadParameter("nothing to compile: give --model or --product")

    rows, failures = [], []
    try:
        for spec, kernel in _compile_all(list(specs), target, jobs):
            facts = (kernel.threads, kernel.registers, kernel.stack_bytes, kernel.shared_bytes)
            rows.append((spec.name, *map(str, facts), str(kernel.tensor_core_instructions), str(len(kernel.image))))
            if kernel.stack_bytes > compiler.MOST_STACK_BYTES:
                failures.append(f"{spec.name} has a stack of {kernel.stack_bytes} bytes: it spills")
            if spec.tensor_core_ptx and kernel.tensor_core_instructions == 0:
                failures.append(f"{spec.name} has no {spec.tensor_core_ptx}")
    except cache.MissingKernelError:
        # Its advice is to run this command where the compiler is.
        show.error("compile needs nvidia-cutlass-dsl: pip install nvidia-cutlass-dsl (a GPU is not needed)")
        raise typer.Exit(1) from None
    show.table(f"{len(specs)} kernels for {target} in {cache.cache_folder()}", _HEADINGS, rows)
    if check and failures:
        for failure in failures:
            show.error(failure)
        raise typer.Exit(1)


def _planned(target: str, card: str | None, multiprocessors: int | None) -> contextlib.AbstractContextManager[None]:
    """Within this, calls are planned for what the two options say."""
    if card is None:
        if multiprocessors is not None:
            raise ValueError("--multiprocessors: of which card? It needs --card")
        return contextlib.nullcontext()
    row = targets.card_named(targets.TARGETS[target], card)
    return targets.planned_for(dataclasses.replace(row, multiprocessors=multiprocessors or row.multiprocessors))


def problem_of(
    layer: shapes.LayerShape, tokens, num_experts, target, absent, activation, mode, batch_invariant=False
) -> problem.Problem:
    """The call of a layer with so many tokens; ``mode``: precision, combine, weight_on and out_dtype."""
    _check_number(num_experts, "L", layer.num_experts)
    precision, combine, weight_on, out_dtype = mode
    layout = targets.layout_for(target, precision)
    return problem.Problem(
        num_tokens=tokens,
        top_k=layer.top_k,
        local_experts=layer.num_experts,
        num_experts=num_experts,
        hidden_size=layer.hidden_size,
        intermediate_size=layout.padded_intermediate_size(layer.intermediate_size, activations.num_parts(activation)),
        activation=activation,
        precision=precision,
        combine=combine,
        weight_on=weight_on,
        out_dtype=out_dtype,
        layout=layout.name,
        command_buffer=True,
        batch_invariant=batch_invariant,
        absent=absent,
    )


def product_of(sizes: list[int], rows, num_groups, target, bias, mode, batch_invariant=False) -> Product:
    """The call of a grouped product with so many rows; ``mode``: precision and out_dtype."""
    local_groups, in_features, out_features = sizes
    _check_number(num_groups, "G", local_groups)
    precision, out_dtype = mode
    given = {"weights.block_scale": False, "weights.input_scale": precision == "w4a4", "weights.bias": bias}
    return Product(
        precision=precision,
        out_dtype=out_dtype,
        command_buffer=True,
        batch_invariant=batch_invariant,
        num_rows=rows,
        num_groups=num_groups or local_groups,
        local_groups=local_groups,
        in_features=in_features,
        out_features=out_features,
        layout=targets.layout_for(target, precision).name,
        absent=tuple(name for name, is_given in given.items() if not is_given),
    )


def _check_number(num_experts: int | None, letter: str, least: int) -> None:
    if num_experts is not None and num_experts < least:
        raise ValueError(f"--num-experts: got {num_experts}, needs at least {letter} = {least}")


def _compile_all(specs, target, jobs):
    if jobs == 1:
        for spec in progress.track(specs, "compile"):
            yield spec, cache.compiled(spec, target)
        return
    # Fresh processes: the compiler keeps its state in globals, and JAX's threads do not survive a fork.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(jobs, mp_context=context) as pool:
        results = pool.map(cache.compiled, specs, [target] * len(specs))
        yield from zip(specs, progress.track(results, "compile", total=len(specs)), strict=True)
