"""What each role of the sm_100f GEMMs executes, counted on the emulator: the figures that docs/blackwell.md is made of.

    python tests/count_instructions.py        # needs the DSL and g++; writes benchmarks/blackwell_counts.json

Counts are PTX instructions of warps (but moves, which ptxas folds into others), one expert, tiles that are full. They
are linear in the number of blocks and units, so runs with few blocks and with more give those of a block and of a unit.
``docs/blackwell.md`` is then written by ``python benchmarks/blackwell_paper.py``.
"""

import json
import pathlib
import sys

FILE = pathlib.Path(__file__).parents[1] / "benchmarks" / "blackwell_counts.json"
ROLES = {
    "epilogue": slice(0, 4), "products": slice(4, 5), "loads": slice(5, 6), "gather": slice(6, 8),
    "dequantise": slice(8, None),
}  # fmt: skip
"""Warps of a CTA (sm100/device/mainloop.py)."""

_UNITS = 2  # of each GEMM and CTA: matrices of this many m tiles
_FEW, _MORE = 2, 6  # blocks of 256 along K


def counts(precision, config, width):
    """Of both GEMMs: for each role its instructions for a block of 128 x 256 weights, and for a unit beside these."""
    few, more = (_run(precision, config, width, blocks) for blocks in (_FEW, _MORE))
    made = {}
    for gemm in ("gemm1", "gemm2"):
        blocks = {role: (more[gemm][role] - few[gemm][role]) / (_MORE - _FEW) for role in ROLES}
        units = {role: few[gemm][role] - _FEW * blocks[role] for role in ROLES}
        made[gemm] = {"block": _rounded(blocks), "unit": _rounded(units)}
    return made


def _rounded(values):
    return {role: round(value) for role, value in values.items() if value}


def _run(precision, config, width, blocks):
    """Instructions of each role for one unit of ``blocks`` blocks, summed over the CTAs that multiply together."""
    import emulated_call
    from helpers import make_exact_case
    import jax.numpy as jnp

    group = 2 if config.pair else 1
    totals = {}
    for gemm in ("gemm1", "gemm2"):
        rows, contraction = 128 * group * _UNITS, 256 * blocks
        hidden, intermediate = (contraction, rows // 2) if gemm == "gemm1" else (rows, contraction)
        case = make_exact_case(
            1, tokens=width, hidden=hidden, intermediate=intermediate, num_experts=1, top_k=1, precision=precision,
            combine="atomic", out_dtype=jnp.bfloat16,
        )  # fmt: skip
        call = emulated_call.prepare(case, "sm_100f", multiprocessors=group, config=config)
        call.run(order="eager", check=False)
        executed = {role: call.counts[gemm].by_operation(warps) for role, warps in ROLES.items()}
        totals[gemm] = {
            role: sum(count for operation, count in by_operation.items() if not operation.startswith("mov.")) / _UNITS
            for role, by_operation in executed.items()
        }
    return totals


def main() -> None:
    sys.path[:0] = [str(FILE.parents[1] / "tests")]
    from jax_moe.kernels.sm100 import program

    made = {}
    for precision, configs in program.CONFIGS.items():
        for config in configs:
            for width in (config.granule, config.token_tile):
                made[f"{precision} {config.name} {width}"] = counts(precision, config, width)
                print(precision, config.name, width, flush=True)
    FILE.write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    main()
