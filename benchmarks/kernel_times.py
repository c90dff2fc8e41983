"""Each kernel of a call on a GPU, config by config: where the costs of a card come from (a target's ``target.py``).

    python benchmarks/kernel_times.py --model qwen3-235b-a22b --tokens 8,512 --config n48m3k1b2c1w32w40
    python benchmarks/kernel_times.py ... --compile-only     # where the DSL is: fills the kernel cache, needs no GPU

A call is a list of launches, and the handler takes any list. So a step is timed in the call that it belongs to: the
call with a few more launches of it, minus the call as it is, divided by their number. A GEMM counts its units of work
in words that the sort sets to zero, so the sort goes before each further one, and its own time is taken off. A call of
few routes may have no sort: what is under its name then is noise. All else is as in gpu_op.py. With --even every
expert has T * K / E rows, and what is printed too are the costs of a card: in how many nanoseconds a multiprocessor
gets through a weight block of GEMM1 and of GEMM2. Configs in `program.CONFIGS` are right (tests/gpu/test_op.py); others
are only timed. On sm_100f there are no others.
"""

from collections.abc import Iterator
import contextlib
import dataclasses
import importlib
import itertools
import json
import re
from typing import Annotated, Any

import gpu_methods
from gpu_op import environment, floor_seconds
import jax
import jax.numpy as jnp
import typer

import jax_moe
from jax_moe import shapes
from jax_moe.cli import timing
from jax_moe.cli.compile import problem_of
from jax_moe.kernels import cache, lowering, targets
from jax_moe.kernels.sm90.specs import with_most_stages
from jax_moe.kernels.target import Launch, Target

_MORE = 4
"""Further launches of a step."""


def program_of(target: Target) -> Any:
    """The module that chooses a target's configs: it has ``CONFIGS``, ``best_config`` and ``build``."""
    return importlib.import_module(target.program.__module__)


def config_named(text: str, target: Target) -> Any:
    """A config by name, of sm_90a any: n8m1k2b4c1, with a limit of stages n8m1k2b4c1s5, or widths n48m3k1b2c1w32w40."""
    configs = program_of(target).CONFIGS
    configs = list(itertools.chain(*configs.values())) if isinstance(configs, dict) else list(configs)
    if target.name != "sm_90a":
        known = {config.name: config for config in configs}
        if text not in known:
            raise typer.BadParameter(f"--config: got {text}, needs one of {', '.join(known)}")
        return known[text]
    found = re.fullmatch(r"n(\d+)m(\d+)k(\d+)b(\d+)c(\d+)(?:s(\d+))?((?:w\d+)*)", text)
    if found is None:
        raise typer.BadParameter(f"--config: got {text}, needs one such as n8m1k2b4c1, n8m1k2b4c1s5, n48m3k1b2c1w32w40")
    *numbers, limit, widths = found.groups()
    token_tile, *others = map(int, numbers)
    widths = (*map(int, widths.split("w")[1:]), token_tile)
    return with_most_stages(widths, *others, *([int(limit)] if limit else []))


def with_more(launches: tuple[Launch, ...], steps: tuple[str, ...]) -> tuple[Launch, ...]:
    """The list with ``steps``, those that it has, again so many times, behind the last of them."""
    names = [launch.name for launch in launches]
    steps = tuple(step for step in steps if step in names)
    if not steps:
        return launches
    place = names.index(steps[-1]) + 1
    again = [launches[names.index(step)] for step in steps]
    more = [dataclasses.replace(launch, name=f"{launch.name}_{i}") for i in range(_MORE) for launch in again]
    return (*launches[:place], *more, *launches[place:])


@contextlib.contextmanager
def calls_made_of(target: Target, config: Any, steps: tuple[str, ...]) -> Iterator[None]:
    """Within, calls have this config, or the one that is chosen, and launch ``steps`` more often."""
    program = program_of(target)

    def build(p, card):
        made = program.build(p, card)
        return dataclasses.replace(made, launches=with_more(made.launches, steps)) if steps else made

    chosen = program.best_config
    targets.TARGETS[target.name] = dataclasses.replace(target, program=build)
    if config is not None:
        program.best_config = lambda *_, **__: config
    try:
        yield
    finally:
        targets.TARGETS[target.name] = target
        program.best_config = chosen


def block_nanoseconds(row: dict[str, Any], shape: shapes.LayerShape, multiprocessors: int) -> dict[str, float]:
    """Of GEMM1 and GEMM2 of sm_90a, whose experts have a tile each: for a 128 x 64 block of weights."""
    values = shape.num_experts * shape.hidden_size * shape.intermediate_size / (128 * 64 * multiprocessors)
    return {"block1": row["gemm1"] * 1e9 / (2 * values), "block2": row["gemm2"] * 1e9 / values}


def main(
    model: Annotated[str, typer.Option(help=f"One of {', '.join(shapes.MODELS)}.")] = "qwen3-235b-a22b",
    tokens: Annotated[str, typer.Option(help="Numbers of tokens, separated by commas.")] = "8,128,512,2048",
    precision: Annotated[str, typer.Option(help="w4a16 or w4a4.")] = "w4a16",
    combine: Annotated[str, typer.Option(help="atomic or ordered.")] = "atomic",
    config: Annotated[list[str] | None, typer.Option(help="By name, not the chosen one; may be repeated.")] = None,
    even: Annotated[bool, typer.Option("--even", help="Every expert has the same number of rows.")] = False,
    repeats: Annotated[int, typer.Option(help="Timed runs; the median counts.")] = 9,
    output: Annotated[str | None, typer.Option(help="JSON file for the results.")] = None,
    compile_only: Annotated[bool, typer.Option("--compile-only", help="Compile the kernels and stop.")] = False,
    target_name: Annotated[str, typer.Option("--target", help="With --compile-only: for which GPU.")] = "sm_90a",
) -> None:
    """Time the steps of calls; see the module's text."""
    shape, length, rows = shapes.MODELS[model], 4, []
    target = targets.TARGETS[target_name] if compile_only else targets.for_device(jax.devices()[0])
    configs = [config_named(name, target) for name in config] if config else [None]
    if compile_only:
        for count, one in itertools.product(map(int, tokens.split(",")), configs):
            mode = (precision, combine, "output", jnp.dtype(jnp.bfloat16))
            call = problem_of(shape, count, None, target.name, ("gate_up.bias", "down.bias"), jax_moe.SwiGLU(), mode)
            with calls_made_of(target, one, ()):
                for launch in lowering.launches(call):
                    cache.compiled(launch.spec, target.name)
        return
    make = gpu_methods.ours(model, precision, combine, draw=timing.even_routings if even else timing.routings)
    for count in map(int, tokens.split(",")):
        for one in configs:
            seconds = {}
            for steps in ((), ("sort",), ("sort", "gemm1"), ("sort", "gemm2")):
                with calls_made_of(target, one, steps):
                    chain = make(count, length)
                    seconds[steps[-1:]] = timing.seconds_per_call(chain.run, length, repeats, limit=3)
            step = {name[0]: (seconds[name] - seconds[()]) / _MORE for name in seconds if name}
            floor = floor_seconds(shape, count, chain.touched, precision)
            row = {
                "tokens": count, "config": one.name if one else "chosen", "call": seconds[()], "floor": floor,
                "sort": step["sort"], **{gemm: step[gemm] - step["sort"] for gemm in ("gemm1", "gemm2")},
            }  # fmt: skip
            if even:
                row |= block_nanoseconds(row, shape, jax.devices()[0].core_count)
            rows.append(row)
            times = "  ".join(f"{name} {row[name] * 1e6:8.1f}" for name in ("sort", "gemm1", "gemm2", "call", "floor"))
            costs = f"  {row['block1']:6.1f} {row['block2']:6.1f} ns a block" if even else ""
            print(f"T {count:5}  {row['config']:24} {times} us{costs}", flush=True)
    if output:
        with open(output, "w") as file:
            json.dump({"environment": environment(), "model": model, "results": rows}, file, indent=1)


if __name__ == "__main__":
    typer.run(main)
