"""How much of a captured call's time the zeroing of the output takes: the op beside itself with the zeroing removed.

    python benchmarks/zeroing.py            # needs a GPU and a C++ compiler

Both run in one process and by turns, because a GPU's clock wanders by more than what is measured. The handler without
zeroing adds into whatever is there, so its results are wrong and not looked at.
"""

import json
import pathlib
import statistics
import sys
import tempfile

import typer

sys.path[:0] = [str(pathlib.Path(__file__).parents[1] / folder) for folder in (".", "tests", "tests/gpu", "benchmarks")]

import calls  # noqa: E402
import gpu_op  # noqa: E402

from jax_moe import ffi, shapes  # noqa: E402

_REMOVED = {
    "cuda/handler.cc": ("driver_.cuMemsetD8Async(Address(destination), 0, bytes, stream)", "0"),
    "launch_sequence.h": ("if (plan.atomic && result.captured) {", "if (false) {"),
}


def main(model: str = "qwen3-235b-a22b", tokens: str = "1,128,8192", rounds: int = 15) -> None:
    """Time both by turns and print the ratio of the medians."""
    changed = calls.register_changed("no_zeroing_at_all", _REMOVED, pathlib.Path(tempfile.mkdtemp()))
    make = gpu_op._ours(shapes.MODELS[model], "w4a16", "atomic")
    for count in map(int, tokens.split(",")):
        runs = {}
        for name, target in (("with", ffi.TARGET), ("without", changed)):
            original, ffi.TARGET = ffi.TARGET, target
            run, *_ = make(count, gpu_op._CHAIN)
            run(4)
            ffi.TARGET = original
            runs[name] = run
        programs = max(1, min(50, round(0.05 / gpu_op._timed(runs["with"], 1))))
        times = {name: [] for name in runs}
        for _ in range(rounds):
            for name, run in runs.items():
                times[name].append(gpu_op._timed(run, programs) / (programs * gpu_op._CHAIN))
        medians = {name: statistics.median(seconds) for name, seconds in times.items()}
        row = {"model": model, "tokens": count, **medians, "ratio": medians["with"] / medians["without"]}
        print("ROW", json.dumps(row), flush=True)


if __name__ == "__main__":
    typer.run(main)
