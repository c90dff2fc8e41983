"""Mutants of a kernel in whole calls, and which of them nothing notices.

    python tests/emulator/mutate.py sm_100f w4a4 gemm1

from the root of the checkout, with CuTe DSL. Each mutant (``mutants.py``) runs an exact call in three orders; it is
noticed by a wrong result, or by an error of the emulator: a race, a deadlock, poison that decides something, and so on.
Printed are the survivors, with how often warps executed their line, and counts by operation.
"""

import argparse
import ast
import collections
import os
import pathlib
import sys

ROOT = pathlib.Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]
os.environ["JAX_PLATFORMS"] = "cpu"

import emulated_call  # noqa: E402
from helpers import make_exact_case  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from ptx import parser  # noqa: E402

import emulator  # noqa: E402
from emulator import mutants  # noqa: E402

RUNS = (("random", 1), ("starved", 2), ("random", 3))  # orders, and their seeds
SIZES = dict(tokens=12, num_experts=3, top_k=2, hidden=1600, intermediate=320)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("target", choices=["sm_90a", "sm_100f"])
    arguments.add_argument("precision", choices=["w4a16", "w4a4"])
    arguments.add_argument("launch", help="whose kernel is changed: gemm1, gemm2, sort, ...")
    arguments.add_argument("--combine", default="ordered")
    arguments.add_argument("--sizes", type=ast.literal_eval, default=SIZES, help="of make_exact_case, as a dictionary")
    arguments.add_argument("--multiprocessors", type=int, default=1)
    given = arguments.parse_args()
    case = make_exact_case(
        3, precision=given.precision, combine=given.combine, out_dtype=jnp.float32, **(SIZES | given.sizes)
    )
    expected = np.asarray(case.run())

    def run(kernels, order, seed):
        call = emulated_call.prepare(case, given.target, multiprocessors=given.multiprocessors)
        output = call.run(kernels=kernels, order=order, seed=seed, most_instructions=most)
        # With many values along K not every sum is exact any more.
        return call, np.abs(output - expected).max() <= 1e-5 * np.abs(expected).max()

    most = 2**40
    call, is_right = run(None, *RUNS[0])
    assert is_right, "the kernels themselves are wrong"
    most = 3 * sum(map(int, call.counts.values()))
    counts = call.counts[given.launch]
    executed = dict(
        zip((i.line for i in counts.kernel.instructions), counts.by_instruction.sum(1).tolist(), strict=True)
    )
    spec = next(launch.spec for launch in call.program.launches if launch.name == given.launch)
    print(f"{spec.name}: {most // 3} warp instructions a call", flush=True)
    table = collections.defaultdict(collections.Counter)
    for mutant in mutants.mutants(emulated_call.ptx(spec, given.target)[0]):
        how = "survived" if executed.get(mutant.line, 0) else "never executed"
        try:
            kernels = {given.launch: emulator.Kernel(mutant.text, "mutant")} if how == "survived" else {}
            for order, seed in RUNS if kernels else ():
                if not run(kernels, order, seed)[1]:
                    how = "result"
                    break
        except (emulator.EmulatorError, parser.PTXError) as error:
            kinds = ("not ordered", "deadlock", "poison")
            how = next((kind for kind in kinds if kind in str(error)), "other error")
        table[mutant.what, mutant.operation][how] += 1
        if how == "survived":
            where = f"line {mutant.line}, executed {executed[mutant.line]} times"
            print(f"survived: {mutant.what} {mutant.operation}, {where}", flush=True)
    for (what, operation), numbers in sorted(table.items()):
        print(f"{what:12} {operation:70} " + ", ".join(f"{how}: {n}" for how, n in sorted(numbers.items())))


if __name__ == "__main__":
    main()
