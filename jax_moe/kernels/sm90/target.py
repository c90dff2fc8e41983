"""Hopper: the target sm_90a and its cards."""

from typing import get_args

from jax_moe.kernels.sm90.device.weight_block import BLOCK_BYTES, BLOCK_K, BLOCK_ROWS
from jax_moe.kernels.sm90.program import build, build_product, Costs, FewUnits
from jax_moe.kernels.target import Card, Ceilings, Target
from jax_moe.problem import Precision

# Nanoseconds in which a multiprocessor gets through a 128 x 64 block of GEMM1's weights, by m warpgroups and by the
# rows that it is multiplied with; measured on an H200 (benchmarks/notes-h200.md), whose memory alone would take 136. Of
# 136 and 152 rows they are those of their neighbours' mean.
_H200_NANOSECONDS = {
    1: {8: 153, 16: 154},
    3: {16: 158, 24: 168, 32: 174, 40: 188, 48: 199},
    2: {32: 216, 48: 223, 64: 246, 80: 280, 96: 300, 112: 339, 128: 365, 136: 382, 144: 400, 152: 420},
}

# The same of an H100 SXM (3.07 TB/s read): of three blocks of a call, two of GEMM1 and one of GEMM2 (the same notes).
# Of 136 and 152 rows, which were not timed there, the line through 128 and 144.
_H100_NANOSECONDS = {
    1: {8: 212, 16: 217},
    3: {16: 218, 24: 226, 32: 232, 40: 243, 48: 258},
    2: {32: 248, 48: 269, 64: 301, 80: 341, 96: 383, 112: 422, 128: 461, 136: 480, 144: 500, 152: 520},
}

# Which form few units have: fitted to calls with T = 1 to 8, and products with one matrix, on an H200 (the notes, Few
# units, One matrix); clocks are alike, and so are these taken to be on other cards.
_H200_FEW_UNITS = FewUnits(pair=2500, alone=3000, block=1.04, turns=3, meeting=400, handing_over=12.5)

_READ = 0.84  # of the stated bandwidth: H100s of this project read at 2.75 to 2.87 of 3.35 TB/s (an H200 at 0.93)


def derived(multiprocessors: int, terabytes: float, teraflops: float) -> Costs:
    """Costs of a card that none were measured on.

    A block takes as long as on an H200, but at least what this card's tensor cores take to multiply it; and an expert's
    block at least what this card's memory takes to bring it (:class:`Costs`). Clocks are taken to be the same.

    Args:
      multiprocessors: of the card.
      terabytes: a second that its memory is stated to read.
      teraflops: of bf16 that it is stated to reach, without sparsity.
    """
    product = 2 * BLOCK_ROWS * BLOCK_K * multiprocessors / (teraflops * 1e3)  # with each row
    nanoseconds = {
        m_warpgroups: {rows: max(measured, rows * product) for rows, measured in by_rows.items()}
        for m_warpgroups, by_rows in _H200_NANOSECONDS.items()
    }
    return Costs(nanoseconds, _H200_FEW_UNITS, BLOCK_BYTES * multiprocessors / (_READ * terabytes * 1e3))


def _card(name: str, multiprocessors: int, terabytes: float, teraflops: float) -> Card:
    return Card(name, multiprocessors, terabytes, derived(multiprocessors, terabytes, teraflops))


_PRECISIONS = get_args(Precision)

# Multiprocessors, TB/s and TFLOP/s of bf16 as stated, by pages that repeat NVIDIA's figures.
# H100 SXM and PCIe: archive-lib.hpctech.co.jp/gpuproduct/nvidia-h100.html. H100 and H200: anandtech.com/show/21136.
# H100 NVL: gpu.blog/gpus/nvidia-h100-nvl (132), and 3.9 TB/s by grokipedia.com/page/210100120. GH200 with 96 GB (480
# GB at its CPU): 4 TB/s by nishikiout.net/entry/2023/08/09/143040. H20: willitrunai.com/es/gpus/h20-96gb, and 78
# multiprocessors by Geekbench. Not looked up but remembered: 835 TFLOP/s of the NVL, 4.9 TB/s of the GH200 with 144 GB.
SM90 = Target(
    name="sm_90a",
    generation="Hopper",
    compute_capabilities=("9.0",),
    layouts=dict.fromkeys(_PRECISIONS, "wgmma_v1"),
    cards=(
        Card("H200", 132, 4.8, Costs(_H200_NANOSECONDS, _H200_FEW_UNITS),
             Ceilings(4.46e12, dict.fromkeys(_PRECISIONS, 791e12), "measured on an H200")),
        Card("H100 80GB HBM3", 132, 3.35, Costs(_H100_NANOSECONDS, _H200_FEW_UNITS),
             Ceilings(3.07e12, dict.fromkeys(_PRECISIONS, 727e12), "measured on an H100 SXM")),
        _card("H100 PCIe", 114, 2.0, 756),
        _card("H100 NVL", 132, 3.9, 835),
        _card("GH200 480GB", 132, 4.0, 989),
        _card("GH200 144G", 132, 4.9, 989),
        _card("H20", 78, 4.0, 148),
    ),
    program=build,
    product=build_product,
)  # fmt: skip
