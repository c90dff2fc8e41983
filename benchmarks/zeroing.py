"""What the zeroing of the output costs in a captured call: the op with it, with it in line, and without it.

    python benchmarks/zeroing.py            # needs a GPU and a C++ compiler

``branch`` is the library as it is: the zeroing is a branch of the graph beside sort and GEMM1. ``in_line`` has a memset
before them on the stream instead, as an eager call has. ``without`` has none: it adds into whatever is there, so its
results are wrong and not looked at.

The effect is a percent, and a GPU's clock wanders by more. Hence:

- Every call gets the same random x. Calls that are chained by their outputs would compare different work: without
  zeroing outputs grow to inf and NaN, with it they shrink to zeros; either takes less power, and a card at its power
  limit then clocks higher. One call waits for the one before by a scalar that is always zero.
- A round times all variants within a fraction of a second, in an order of its own; what counts is the ratio within a
  round, and of these the median over the rounds, with a 95% bootstrap interval.
"""

import contextlib
import functools
import json
import pathlib
import random
import statistics
import sys
import tempfile

import typer

sys.path[:0] = [str(pathlib.Path(__file__).parents[1] / folder) for folder in (".", "tests", "tests/gpu", "benchmarks")]

import calls  # noqa: E402
import gpu_methods  # noqa: E402
import gpu_op  # noqa: E402

import jax_moe  # noqa: E402
from jax_moe import ffi, shapes  # noqa: E402
from jax_moe.cli import timing  # noqa: E402

_ASKED = "api.IsCapturing(stream, &result.captured, &entry))) return result;"
_IN_LINE = {"launch_sequence.h": (_ASKED, f"{_ASKED} result.captured = false;")}
_WITHOUT = _IN_LINE | {"cuda/stream_api.h": ("driver_.cuMemsetD8Async(Address(destination), 0, bytes, stream)", "0")}
_CHAIN = 8


def main(
    model: str = "qwen3-235b-a22b", tokens: str = "8192,2048", rounds: int = 60, output: pathlib.Path | None = None
) -> None:
    """Time the variants by turns; print a row of JSON for each number of tokens."""
    folder = pathlib.Path(tempfile.mkdtemp())
    targets = {
        "branch": ffi.TARGET,
        "in_line": calls.register_changed("in_line", _IN_LINE, folder),
        "without": calls.register_changed("without", _WITHOUT, folder),
    }
    weights, activation = gpu_methods.random_experts(model)
    rows = []
    for count in map(int, tokens.split(",")):
        runs = {name: _program(model, target, weights, activation, count) for name, target in targets.items()}
        rows.append({"model": model, "tokens": count, "rounds": rounds, **measure(runs, rounds)})
        print("ROW", json.dumps(rows[-1]), flush=True)
    if output:
        output.write_text(json.dumps({"environment": gpu_op.environment(), "results": rows}, indent=1) + "\n")


def _program(model, target, weights, activation, count):
    """``run(programs)`` of a chain whose calls go to ``target``; compiled and captured."""
    arguments, _ = timing.chain_arguments(shapes.MODELS[model], weights, count, _CHAIN, seed=count)
    chain = timing.op_chain(functools.partial(jax_moe.fused_moe, activation=activation), chained=False)
    run = functools.partial(timing.run, timing.captured(chain), arguments)
    with _target(target):
        run(4)
    return run


@contextlib.contextmanager
def _target(target: str):
    """Programs traced inside call ``target``."""
    original, ffi.TARGET = ffi.TARGET, target
    try:
        yield
    finally:
        ffi.TARGET = original


def measure(runs, rounds: int) -> dict:
    """Median seconds of a call by variant, and each variant's ratio to ``without``: median and 95% interval."""
    programs = timing.programs_in_a_row(timing.timed(runs["without"], 1))
    order, times = random.Random(0), {name: [] for name in runs}
    for number in range(-max(2, rounds // 10), rounds):  # the first ones let clock and temperature settle
        for name in order.sample(list(runs), len(runs)):
            seconds = timing.timed(runs[name], programs) / (programs * _CHAIN)
            if number >= 0:
                times[name].append(seconds)
    result: dict = {"seconds": {name: statistics.median(seconds) for name, seconds in times.items()}}
    for name in runs.keys() - {"without"}:
        ratios = [with_it / without for with_it, without in zip(times[name], times["without"], strict=True)]
        result[f"ratio_{name}"] = {"median": statistics.median(ratios), "interval": interval(ratios)}
    return result


def interval(values: list[float], resamples: int = 2000) -> list[float]:
    """A 95% bootstrap interval of the median."""
    choose = random.Random(1)
    medians = sorted(statistics.median(choose.choices(values, k=len(values))) for _ in range(resamples))
    return [medians[round(0.025 * (resamples - 1))], medians[round(0.975 * (resamples - 1))]]


if __name__ == "__main__":
    typer.run(main)
