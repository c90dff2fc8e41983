"""``python -m jax_moe bench``: time the op on this machine's default device."""

from collections.abc import Mapping
import dataclasses
import functools
import json
import os
import platform
from typing import Annotated, Any

import jax
import typer

import jax_moe
from jax_moe import arguments, problem, progress, shapes
from jax_moe.cli import floor, options, show, timing
from jax_moe.kernels import targets
from jax_moe.kernels.cache import MissingKernelError

_CHAIN = 16
"""Calls in a program on a GPU; on a CPU one call is long enough to be timed by itself."""

_LETTERS = "E,K,H,I"


@show.one_line_errors
def bench(
    model: Annotated[str, typer.Option(help=f"The layer: {options.models(_LETTERS)}.")] = "16,4,1024,512",
    tokens: Annotated[str, typer.Option(help="Numbers of tokens, as 1,32 or 1-8.")] = "1,32,256",
    precision: Annotated[str, typer.Option(help="Of w4a16, w4a4 and w4a4_dynamic, with commas.")] = "w4a16,w4a4",
    combine: Annotated[str, typer.Option(help="atomic or ordered.")] = "atomic",
    batch_invariant: Annotated[
        bool, typer.Option("--batch-invariant", help="As fused_moe's option; needs --combine ordered.")
    ] = False,
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs; the median is shown.")] = 20,
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1, help="Seed of weights, tokens and routing.")] = 0,
    output: Annotated[str | None, typer.Option("--json", help="Write the results to this file as well.")] = None,
) -> None:
    """Time fused_moe under jit, on a GPU in a command buffer; random weights, tokens and routing."""
    try:
        shape = options.model("--model", model, _LETTERS)
        if shape.top_k > shape.num_experts:
            raise ValueError(f"--model: got K = {shape.top_k}, needs at most E = {shape.num_experts}")
        counts = options.numbers("--tokens", tokens)
        kinds = options.choices("--precision", precision, problem.Precision)
        arguments.choice("--combine", combine, problem.Combine)
        if batch_invariant and combine != "ordered":
            raise ValueError(f"--batch-invariant: got --combine {combine}, needs ordered")
        if output is not None:
            output = os.path.expanduser(output)
            open(output, "a").close()  # whether it can be written is known before anything is measured
        layouts = {kind: targets.layout_for(None, kind).name for kind in kinds}
        canonical = timing.random_experts(shape, seed)
    except OSError as error:
        raise typer.BadParameter(
            f"--json: got {output!r}, needs a file that can be written: {error.strerror}"
        ) from error
    except (TypeError, ValueError) as error:
        raise typer.BadParameter(str(error)) from error

    mode = {"combine": combine, "batch_invariant": batch_invariant}
    device, ceilings = jax.devices()[0], floor.at_hand()
    results = []
    try:
        experts = None
        for kind, count in progress.track([(kind, count) for kind in kinds for count in counts], "bench"):
            if experts is None or experts.layout != layouts[kind]:  # only one layout's at a time: they may be large
                experts = jax_moe.prepare(canonical, layouts[kind])
            seconds, touched = time_op(experts, shape, count, kind, mode, repeats, seed)
            gflops = shape.flops(count) / seconds / 1e9
            gigabytes = touched * shape.weight_bytes_per_expert / seconds / 1e9
            result = {"precision": kind, "tokens": count, "seconds": seconds, "gflops": gflops, "weight_gbs": gigabytes}
            if ceilings:
                result["floor_seconds"] = floor.layer_seconds(shape, count, touched, ceilings, kind)
            results.append(result)
    except MissingKernelError as error:
        show.error(str(error))
        raise typer.Exit(1) from None
    title = f"fused_moe on {device.device_kind}: {model}, combine={combine}" + ", batch invariant" * batch_invariant
    rows = [
        (r["precision"], str(r["tokens"]), f"{r['seconds'] * 1e3:.3f}", f"{r['gflops']:.1f}", f"{r['weight_gbs']:.2f}")
        for r in results
    ]
    headings = ("precision", "T", "median ms", "GFLOP/s", "GB/s of weights")
    if ceilings:
        rows = [(*row, f"{r['seconds'] / r['floor_seconds']:.2f}") for row, r in zip(rows, results, strict=True)]
        headings += ("x floor",)
        rate = ", ".join(f"{flop / 1e12:.0f} TFLOP/s for {kind}" for kind, flop in ceilings.flop_per_second.items())
        title += f"; floor: {ceilings.bytes_per_second / 1e12:.2f} TB/s, {rate}, {ceilings.source}"
    show.table(title, headings, rows)
    if output is not None:
        facts = {"jax": jax.__version__, "jax_moe": jax_moe.__version__, "python": platform.python_version()}
        document = {**facts, "device": device.device_kind, "model": model, **mode, "results": results}
        if ceilings:
            document["ceilings"] = dataclasses.asdict(ceilings)
        with open(output, "w") as file:
            json.dump(document, file, indent=2)


def time_op(
    experts: jax_moe.Experts,
    shape: shapes.LayerShape,
    tokens: int,
    precision: Any,
    mode: Mapping[str, Any],
    repeats: int,
    seed: int,
) -> tuple[float, float]:
    """Median seconds of one call, on random tokens and routing, and how many experts it touches in the mean.

    ``mode``: further options of it.
    """
    on_gpu = jax.default_backend() == "gpu"
    length = _CHAIN if on_gpu else 1
    op = functools.partial(jax_moe.fused_moe, precision=precision, **mode)
    chain = timing.op_chain(op, chained=on_gpu and tokens <= timing.CHAINED_TOKENS)
    arguments, touched = timing.chain_arguments(shape, experts, tokens, length, seed + tokens)
    run = functools.partial(timing.run, timing.captured(chain), arguments)
    return timing.seconds_per_call(run, length, repeats), touched
