"""Hopper: the target sm_90a and its cards."""

from jax_moe.kernels.sm90.device.weight_block import BLOCK_BYTES, BLOCK_K, BLOCK_ROWS
from jax_moe.kernels.sm90.program import build, build_product, Costs
from jax_moe.kernels.target import Card, Ceilings, Target

# Nanoseconds in which a multiprocessor gets through a 128 x 64 block of GEMM1's weights, by m warpgroups and by the
# rows that it is multiplied with; measured on an H200 (benchmarks/notes-h200.md), whose memory alone would take 136. Of
# 136 and 152 rows they are those of their neighbours' mean.
_H200_NANOSECONDS = {
    1: {8: 153, 16: 154},
    3: {16: 158, 24: 168, 32: 174, 40: 188, 48: 199},
    2: {32: 216, 48: 223, 64: 246, 80: 280, 96: 300, 112: 339, 128: 365, 136: 382, 144: 400, 152: 420},
}

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
    return Costs(nanoseconds, BLOCK_BYTES * multiprocessors / (_READ * terabytes * 1e3))


def _card(name: str, multiprocessors: int, terabytes: float, teraflops: float) -> Card:
    return Card(name, multiprocessors, terabytes, derived(multiprocessors, terabytes, teraflops))


# Multiprocessors, TB/s and TFLOP/s of bf16 as stated, by pages that repeat NVIDIA's figures; only an H200 was measured.
# H100 SXM and PCIe: archive-lib.hpctech.co.jp/gpuproduct/nvidia-h100.html. H100 and H200: anandtech.com/show/21136.
# H100 NVL: gpu.blog/gpus/nvidia-h100-nvl (132), and 3.9 TB/s by grokipedia.com/page/210100120. GH200 with 96 GB (480
# GB at its CPU): 4 TB/s by nishikiout.net/entry/2023/08/09/143040. H20: willitrunai.com/es/gpus/h20-96gb, and 78
# multiprocessors by Geekbench. Not looked up but remembered: 835 TFLOP/s of the NVL, 4.9 TB/s of the GH200 with 144 GB.
SM90 = Target(
    name="sm_90a",
    generation="Hopper",
    compute_capabilities=("9.0",),
    layouts={"w4a16": "wgmma_v1", "w4a4": "wgmma_v1"},
    cards=(
        Card("H200", 132, 4.8, Costs(_H200_NANOSECONDS),
             Ceilings(4.46e12, {"w4a16": 791e12, "w4a4": 791e12}, "measured on an H200")),
        _card("H100 80GB HBM3", 132, 3.35, 989),
        _card("H100 PCIe", 114, 2.0, 756),
        _card("H100 NVL", 132, 3.9, 835),
        _card("GH200 480GB", 132, 4.0, 989),
        _card("GH200 144G", 132, 4.9, 989),
        _card("H20", 78, 4.0, 148),
    ),
    program=build,
    product=build_product,
)  # fmt: skip
