"""Blackwell: the target sm_100f and its cards."""

from jax_moe.kernels.sm100.program import build, build_product, Costs
from jax_moe.kernels.target import Card, Ceilings, Target

# From data sheets, with 7.2 of 8 TB/s and 1.855 GHz; nothing here was measured. docs/blackwell.md has the sums.
_B200 = Costs(memory=703, fill=76, product={"w4a4": 2.0, "w4a16": 8.0}, tile=60, pair=60)

# Of a B200: measured by others, or not at all.
_ON_PAPER = Ceilings(7.2e12, {"w4a16": 2.25e15, "w4a4": 5.7e15}, "a B200's on paper")

SM100 = Target(
    name="sm_100f",
    generation="Blackwell",
    compute_capabilities=("10.0", "10.3"),
    layouts={"w4a16": "tcgen05_bf16_v1", "w4a4": "tcgen05_fp4_v1"},
    cards=(Card("B200", 148, 8.0, _B200, _ON_PAPER), Card("B300", 148, 8.0, _B200, _ON_PAPER)),
    program=build,
    product=build_product,
)
