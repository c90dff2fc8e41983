"""``python -m jax_moe bench``: time the op on this machine's default device."""

import functools
import json
import platform
from typing import Annotated, Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table
import typer

import jax_moe
from jax_moe import arguments, plan, progress, shapes
from jax_moe.cli import timing

_CHAIN = 16
"""Calls in a program on a GPU; on a CPU one call is long enough to be timed alone."""


def bench(
    model: Annotated[str, typer.Option(help=f"One of {', '.join(shapes.MODELS)}; or E,K,H,I.")] = "16,4,1024,512",
    tokens: Annotated[str, typer.Option(help="Numbers of tokens, separated by commas.")] = "1,32,256",
    precision: Annotated[str, typer.Option(help="w4a16, w4a4, or both separated by a comma.")] = "w4a16,w4a4",
    combine: Annotated[str, typer.Option(help="atomic or ordered.")] = "atomic",
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs; the median is shown.")] = 20,
    seed: Annotated[int, typer.Option(help="Seed of weights, tokens and routing.")] = 0,
    output: Annotated[str | None, typer.Option("--json", help="Write the results to this file as well.")] = None,
) -> None:
    """Time fused_moe under jit, on a GPU in a command buffer; random weights, tokens and routing."""
    try:
        shape = shapes.MODELS[model] if model in shapes.MODELS else shapes.LayerShape(*map(int, model.split(",")))
        counts, kinds = [int(count) for count in tokens.split(",")], precision.split(",")
        if min(counts) < 1:
            raise ValueError(f"tokens: got {min(counts)}, needs at least 1")
        for kind in kinds:
            arguments.choice("precision", kind, plan.Precision)
        arguments.choice("combine", combine, plan.Combine)
        experts = random_experts(shape, seed)
    except (TypeError, ValueError) as error:
        raise typer.BadParameter(f"{error}; see --help") from error

    device = jax.devices()[0]
    table = Table(title=f"fused_moe on {device.device_kind}: {model}, combine={combine}")
    for heading in ("precision", "T", "median ms", "GFLOP/s", "GB/s of weights"):
        table.add_column(heading, justify="right")
    rows = []
    for kind, count in progress.track([(kind, count) for kind in kinds for count in counts], "bench"):
        seconds = time_op(experts, shape, count, kind, combine, repeats, seed)
        gflops = shape.flops(count) / seconds / 1e9
        gigabytes = shape.touched_experts(count) * shape.weight_bytes_per_expert / seconds / 1e9
        rows.append({"precision": kind, "tokens": count, "seconds": seconds, "gflops": gflops, "weight_gbs": gigabytes})
        table.add_row(kind, str(count), f"{seconds * 1e3:.3f}", f"{gflops:.1f}", f"{gigabytes:.2f}")
    Console().print(table)
    if output:
        facts = {"jax": jax.__version__, "jax_moe": jax_moe.__version__, "python": platform.python_version()}
        document = {**facts, "device": device.device_kind, "model": model, "combine": combine, "results": rows}
        with open(output, "w") as file:
            json.dump(document, file, indent=2)


def random_experts(shape: shapes.LayerShape, seed: int) -> jax_moe.Experts:
    """Random experts with input scales, prepared for the default device."""
    keys = jax.random.split(jax.random.key(seed), 5)
    wide = (shape.num_experts, shape.intermediate_size, shape.hidden_size)
    tall = (shape.num_experts, shape.hidden_size, shape.intermediate_size)
    gate, up = (jax.random.normal(key, wide, jnp.bfloat16) * wide[2] ** -0.5 for key in keys[:2])
    down = jax.random.normal(keys[2], tall, jnp.bfloat16) * tall[2] ** -0.5
    experts = jax_moe.quantize_experts(gate, up, down)
    x = jax.random.normal(keys[3], (64, shape.hidden_size), jnp.bfloat16)
    logits = jax.random.normal(keys[4], (64, shape.num_experts))
    return jax_moe.prepare(jax_moe.calibrate(experts, x, jax_moe.route(logits, shape.top_k)))


def time_op(
    experts: jax_moe.Experts,
    shape: shapes.LayerShape,
    tokens: int,
    precision: Any,
    combine: Any,
    repeats: int,
    seed: int,
) -> float:
    """Median seconds of one call, on random tokens and routing."""
    on_gpu = jax.default_backend() == "gpu"
    length = _CHAIN if on_gpu else 1
    op = functools.partial(jax_moe.fused_moe, precision=precision, combine=combine)
    chain = timing.op_chain(op, chained=on_gpu and tokens <= timing.CHAINED_TOKENS)
    arguments, _ = timing.chain_arguments(shape, experts, tokens, length, seed + tokens)
    run = functools.partial(timing.run, timing.captured(chain), arguments)
    return timing.seconds_per_call(run, length, repeats)
