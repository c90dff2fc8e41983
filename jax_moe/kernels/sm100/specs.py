"""The GEMMs of sm_100f, and how their CTAs are put together: frozen values, importable without the DSL."""

import dataclasses

from jax_moe.kernels import specs
from jax_moe.kernels.sm100.device import weight_block
from jax_moe.problem import Precision

SHARED_MEMORY = 232_448
"""Bytes of shared memory that one CTA may use on sm_100."""

_RESERVED_PER_CTA = 1024  # what the driver keeps of a multiprocessor's shared memory for each resident CTA


@dataclasses.dataclass(frozen=True)
class Config:
    """How a CTA is put together.

    Attributes:
      token_tile: N of the products at most, a multiple of 16 up to 208 (tensor memory); the width of a tile, which is
        how much of it is multiplied, is a value of run time.
      stage_blocks: weight blocks that are copied and announced together; 1 for w4a4, whose blocks are 4 times as wide.
      stages: how many of those are in flight.
      ctas_per_sm: resident CTAs of one multiprocessor, all persistent.
      dequantisers: w4a16: warpgroups that dequantise, 1 or 2; else 0.
      pair: whether two CTAs of a cluster multiply 256 rows of weights with one tile, half of whose rows each of them
        loads.
    """

    token_tile: int
    stage_blocks: int
    stages: int
    ctas_per_sm: int
    dequantisers: int
    pair: bool = False

    @property
    def name(self) -> str:
        name = f"n{self.token_tile}b{self.stage_blocks}s{self.stages}c{self.ctas_per_sm}d{self.dequantisers}"
        return name + ("p" if self.pair else "")

    @property
    def granule(self) -> int:
        """What the width of a tile is a multiple of.

        PTX takes bf16 products of every eighth width, too; CUTLASS and DeepGEMM refuse such with 128 rows of A.
        """
        return 16 if self.pair or self.dequantisers else 8

    @property
    def threads(self) -> int:
        return 256 + 128 * self.dequantisers

    @property
    def stage_bytes(self) -> int:
        tokens = self.token_tile // (1 + self.pair) * weight_block.ROW_BYTES
        if self.dequantisers:
            return self.stage_blocks * (weight_block.BF16_BLOCK_BYTES + tokens)
        scales = -(-self.token_tile // weight_block.BLOCK_ROWS) * weight_block.SCALE_BYTES
        return self.stage_blocks * (weight_block.BLOCK_BYTES + tokens + scales)

    @property
    def shared_bytes(self) -> int:
        """Upper bound of what the kernel allocates."""
        barriers = 24 * self.stages + 256 + 16 * 8
        rows = 8 * self.token_tile  # GEMM2: output row and weight
        alignment = 1024
        return self.stages * self.stage_bytes + barriers + rows + alignment


def with_most_stages(
    precision: Precision, token_tile: int, ctas_per_sm: int, stage_blocks: int = 1, dequantisers: int = 0,
    pair: bool = False,
) -> Config:  # fmt: skip
    """A config with as many stages as shared memory holds."""
    if (precision == "w4a16") != bool(dequantisers) or (precision == "w4a4" and stage_blocks != 1):
        raise ValueError(f"{precision} with {stage_blocks} blocks in a stage, {dequantisers} dequantising warpgroups")
    config = Config(token_tile, stage_blocks, 0, ctas_per_sm, dequantisers, pair)
    available = SHARED_MEMORY // ctas_per_sm - (_RESERVED_PER_CTA if ctas_per_sm > 1 else 0)
    return dataclasses.replace(config, stages=(available - config.shared_bytes) // (config.stage_bytes + 24))


class _Tcgen05:
    config: Config
    tensor_core_ptx = "tcgen05.mma"

    @property
    def cluster(self) -> int:
        return 1 + self.config.pair


@dataclasses.dataclass(frozen=True)
class Gemm1Spec(_Tcgen05, specs.Gemm1Spec):
    """GEMM1 of this target."""

    implementation = "jax_moe.kernels.sm100.device.gemm1:Gemm1"

    @property
    def parameters(self) -> dict[str, str]:
        rows, h = ("bf16*", "bf16*") if self.precision == "w4a16" else ("u8*", "u8*")
        return {
            "x": rows, "x_scales": "u8*", "row_route": "i32*", "tile_expert": "i32*", "expert_tiles": "i32*",
            "payload": "u8*", "global_scale": "f32*", "input_scale": "f32*", "bias": "f32*",
            "down_input_scale": "f32*", "h": h, "hidden_size": "i32", "row_divisor": "i32", "local_experts": "i32",
            "m_blocks": "i32", "k_steps": "i32", "h_blocks": "i32",
        }  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Gemm2Spec(_Tcgen05, specs.Gemm2Spec):
    """GEMM2 of this target."""

    implementation = "jax_moe.kernels.sm100.device.gemm2:Gemm2"

    @property
    def parameters(self) -> dict[str, str]:
        h = "bf16*" if self.precision == "w4a16" else "u8*"
        return {
            "h": h, "row_route": "i32*", "row_weight": "f32*", "tile_expert": "i32*", "expert_tiles": "i32*",
            "payload": "u8*", "global_scale": "f32*", "input_scale": "f32*", "bias": "f32*",
            "out": specs.out_pointer(self.out_dtype),
            "hidden_size": "i32", "row_divisor": "i32", "local_experts": "i32", "m_blocks": "i32", "k_steps": "i32",
            "h_blocks": "i32",
        }  # fmt: skip


@dataclasses.dataclass(frozen=True)
class ProductSpec(_Tcgen05, specs.ProductSpec):
    """The grouped product of this target."""

    implementation = "jax_moe.kernels.sm100.device.product:Product"

    @property
    def parameters(self) -> dict[str, str]:
        return {
            "x": "bf16*" if self.precision == "w4a16" else "u8*", "x_scales": "u8*",
            "row_route": "i32*", "tile_expert": "i32*", "expert_tiles": "i32*", "group_ends": "i32*",
            "payload": "u8*", "global_scale": "f32*", "input_scale": "f32*", "bias": "f32*",
            "out": specs.out_pointer(self.out_dtype),
            "in_features": "i32", "out_features": "i32", "local_experts": "i32", "m_blocks": "i32", "k_steps": "i32",
        }  # fmt: skip
