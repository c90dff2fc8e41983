"""Hopper: the target sm_90a and its cards."""

from jax_moe.kernels.sm90.program import build, build_product
from jax_moe.kernels.target import Card, Target

# Nanoseconds in which a multiprocessor gets through a 128 x 64 block of GEMM1's weights, by m warpgroups and by the
# rows that it is multiplied with; measured on an H200 (benchmarks/notes-h200.md), whose memory alone would take 136.
_H200_NANOSECONDS = {
    1: {8: 153, 16: 154},
    3: {16: 158, 24: 168, 32: 174, 40: 188, 48: 199},
    2: {32: 216, 48: 223, 64: 246, 80: 280, 96: 300, 112: 339, 128: 365, 144: 400},
}

SM90 = Target(
    name="sm_90a",
    generation="Hopper",
    compute_capabilities=("9.0",),
    layouts={"w4a16": "wgmma_v1", "w4a4": "wgmma_v1"},
    cards=(
        Card("H200", 132, 4.8, _H200_NANOSECONDS),
        # Its memory is slower; until its own blocks are measured it chooses as an H200 does.
        Card("H100 80GB HBM3", 132, 3.35, _H200_NANOSECONDS),
    ),
    program=build,
    product=build_product,
)
