"""The GEMMs of sm_90a, and how their CTAs are put together: frozen values, importable without the DSL."""

import dataclasses

from jax_moe.kernels import specs
from jax_moe.kernels.sm90.device import weight_block

SHARED_MEMORY = 232_448
"""Bytes of shared memory that one CTA may use on sm_90."""

_RESERVED_PER_CTA = 1024  # what the driver keeps of a multiprocessor's shared memory for each resident CTA


@dataclasses.dataclass(frozen=True)
class Config:
    """How a CTA is put together.

    Attributes:
      widths: rows that are multiplied, multiples of 8, ascending. The last is the token tile, N of the matrix product;
        a tile with padding takes the least that holds its rows. Each has its own code; with too many or too wide ones
        the compiler finds no registers and serialises ``wgmma`` (tests/test_kernels_compile.py looks).
      m_warpgroups: warpgroups that take different 128-row blocks of the weights (they share the tokens).
      k_warpgroups: warpgroups that take different 64-wide blocks of the contraction; their sums are added at the end.
      stage_blocks: 64-wide blocks of the contraction that are copied and announced together, a multiple of
        k_warpgroups.
      stages: how many of those are in flight.
      ctas_per_sm: resident CTAs of one multiprocessor, all persistent.
      cluster: CTAs of a cluster, 1 or 2. Two take the cluster's units in turn, and share the last where their number is
        odd: each takes half of its contraction, which has at least two blocks. Only with one m warpgroup.
    """

    widths: tuple[int, ...]
    m_warpgroups: int
    k_warpgroups: int
    stage_blocks: int
    stages: int
    ctas_per_sm: int
    cluster: int = 1

    @property
    def name(self) -> str:
        return (
            f"n{self.token_tile}m{self.m_warpgroups}k{self.k_warpgroups}b{self.stage_blocks}s{self.stages}"
            f"c{self.ctas_per_sm}"
            + (f"x{self.cluster}" if self.cluster > 1 else "")
            + "".join(f"w{width}" for width in self.widths[:-1])
        )

    @property
    def token_tile(self) -> int:
        return self.widths[-1]

    @property
    def threads(self) -> int:
        return 128 * (1 + self.m_warpgroups * self.k_warpgroups)

    @property
    def stage_bytes(self) -> int:
        tokens = self.token_tile * weight_block.BLOCK_K * 2
        return self.stage_blocks * (self.m_warpgroups * weight_block.BLOCK_BYTES + tokens)

    @property
    def reduction_bytes(self) -> int:
        """Sums of the other k warpgroups, and of the other CTA."""
        return (self.k_warpgroups - 1 + self.cluster - 1) * weight_block.BLOCK_ROWS * self.token_tile * 4

    @property
    def shared_bytes(self) -> int:
        """Upper bound of what the kernel allocates."""
        barriers = 16 * self.stages + 8 * (self.cluster - 1)
        units = 16 * self.cluster * self.stages + 16  # what begins with a stage; the producers' next, double-buffered
        rows = 12 * self.m_warpgroups * self.token_tile  # GEMM2: output row, weight, scale; a copy for each warpgroup
        alignment = 1024
        return self.stages * self.stage_bytes + self.reduction_bytes + barriers + units + rows + alignment


def with_most_stages(
    widths: tuple[int, ...],
    m_warpgroups: int,
    k_warpgroups: int,
    stage_blocks: int,
    ctas_per_sm: int,
    limit: int = 64,
    cluster: int = 1,
) -> Config:
    """A config with as many stages as shared memory holds, at most ``limit``."""
    config = Config(widths, m_warpgroups, k_warpgroups, stage_blocks, 0, ctas_per_sm, cluster)
    available = SHARED_MEMORY // ctas_per_sm - (_RESERVED_PER_CTA if ctas_per_sm > 1 else 0)
    per_stage = dataclasses.replace(config, stages=1).shared_bytes - config.shared_bytes
    return dataclasses.replace(config, stages=min(limit, (available - config.shared_bytes) // per_stage))


class _Wgmma:
    config: Config
    tensor_core_ptx = "wgmma.mma_async"
    maps_routes = False

    @property
    def cluster(self) -> int:
        return self.config.cluster


_ROUTES = {"expert_ids": "i32*", "expert_offset": "i32*"}


@dataclasses.dataclass(frozen=True)
class Gemm1Spec(_Wgmma, specs.Gemm1Spec):
    """GEMM1 of this target; ``maps_routes``: each CTA makes the tile map for itself (``few_routes.py``)."""

    maps_routes: bool = False

    implementation = "jax_moe.kernels.sm90.device.gemm1:Gemm1"

    @property
    def name(self) -> str:
        return super().name + ("_maps" if self.maps_routes else "")

    @property
    def parameters(self) -> dict[str, str]:
        tile_map = {"row_route": "i32*", "tile_expert": "i32*", "expert_tiles": "i32*"}
        return {
            "x": "bf16*", **(_ROUTES if self.maps_routes else tile_map), "payload": "u8*",
            "global_scale": "f32*", "input_scale": "f32*", "bias": "f32*", "down_input_scale": "f32*", "h": "bf16*",
            "hidden_size": "i32", "row_divisor": "i32", "local_experts": "i32", "m_blocks": "i32", "k_blocks": "i32",
            **({"num_routes": "i32"} if self.maps_routes else {}),
        }  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Gemm2Spec(_Wgmma, specs.Gemm2Spec):
    """GEMM2 of this target; ``maps_routes`` as GEMM1's. ``weighted``: if so, the weight of a row is its routing weight.

    Else it is 1. With a sort's map that says the weight, the field has no meaning.
    """

    maps_routes: bool = False
    weighted: bool = True

    implementation = "jax_moe.kernels.sm90.device.gemm2:Gemm2"

    @property
    def name(self) -> str:
        return super().name + ("_maps" if self.maps_routes else "") + ("" if self.weighted else "_ones")

    @property
    def parameters(self) -> dict[str, str]:
        tile_map = {"row_route": "i32*", "row_weight": "f32*", "tile_expert": "i32*", "expert_tiles": "i32*"}
        return {
            "h": "bf16*", **({**_ROUTES, "routing_weights": "f32*"} if self.maps_routes else tile_map),
            "payload": "u8*", "global_scale": "f32*", "input_scale": "f32*", "bias": "f32*",
            "out": specs.out_pointer(self.out_dtype),
            "hidden_size": "i32", "row_divisor": "i32", "local_experts": "i32", "m_blocks": "i32", "k_blocks": "i32",
            "h_blocks": "i32", **({"num_routes": "i32"} if self.maps_routes else {}),
        }  # fmt: skip


@dataclasses.dataclass(frozen=True)
class HRowsSpec(specs.RowPass):
    """The pass over h: rounds each row with a scale of its own (w4a4_dynamic)."""

    implementation = "jax_moe.kernels.sm90.device.h_rows:HRows"
    name = "jax_moe_h_rows"
    row_threads = 32

    @property
    def parameters(self) -> dict[str, str]:
        return {
            "h": "bf16*", "row_route": "i32*", "expert_tiles": "i32*", "row_scales": "f32*", "local_experts": "i32",
            "token_tile": "i32", "h_blocks": "i32",
        }  # fmt: skip


@dataclasses.dataclass(frozen=True)
class ProductSpec(_Wgmma, specs.ProductSpec):
    """The grouped product of this target."""

    implementation = "jax_moe.kernels.sm90.device.product:Product"

    @property
    def parameters(self) -> dict[str, str]:
        return {
            "x": "bf16*", "row_route": "i32*", "tile_expert": "i32*", "expert_tiles": "i32*", "group_ends": "i32*",
            "payload": "u8*", "global_scale": "f32*", "input_scale": "f32*", "bias": "f32*",
            "out": specs.out_pointer(self.out_dtype),
            "in_features": "i32", "out_features": "i32", "local_experts": "i32", "m_blocks": "i32", "k_blocks": "i32",
        }  # fmt: skip


@dataclasses.dataclass(frozen=True)
class LinearSpec(_Wgmma, specs.ProductSpec):
    """The product with one matrix, which needs no tile map: what its units are is known without one.

    Attributes:
      split: CTAs of a cluster, which share the contraction of a unit; in a config without clusters of its own.
    """

    split: int = 1

    def __post_init__(self):
        if self.config.cluster > 1:
            raise ValueError(f"config: got {self.config.name}, whose CTAs are in clusters already")

    implementation = "jax_moe.kernels.sm90.device.linear:Linear"

    @property
    def cluster(self) -> int:
        return self.split

    @property
    def name(self) -> str:
        return super().name.replace("product", "linear") + (f"_split{self.split}" if self.split > 1 else "")

    @property
    def parameters(self) -> dict[str, str]:
        return {
            "x": "bf16*", "group_sizes": "i32*", "group_offset": "i32*", "payload": "u8*", "global_scale": "f32*",
            "input_scale": "f32*", "bias": "f32*", "out": specs.out_pointer(self.out_dtype), "num_rows": "i32",
            "in_features": "i32", "out_features": "i32", "m_blocks": "i32", "k_blocks": "i32",
        }  # fmt: skip
