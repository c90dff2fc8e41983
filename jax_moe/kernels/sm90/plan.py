"""Which kernel variants a call launches, as frozen values; importable without the DSL."""

import dataclasses
from jax_moe.kernels.sm90 import layout

SHARED_MEMORY = 232_448
"""Bytes of shared memory one thread block may use on sm_90."""

_RESERVED_PER_CTA = 1024  # what the driver keeps of an SM's shared memory for each resident block
_GATED_KINDS = (0, 1, 3)


@dataclasses.dataclass(frozen=True)
class Tile:
    """How a thread block is put together.

    Attributes:
      token_tile: N of the matrix product, 8 to 128 by 8.
      m_warpgroups: warpgroups that take different 128-row blocks of the weights (they share the tokens).
      k_warpgroups: warpgroups that take different 64-wide blocks of the contraction; their sums are added at the end.
      stage_blocks: 64-wide blocks of the contraction that are copied and announced together, a multiple of k_warpgroups.
      stages: how many of those are in flight.
      ctas_per_sm: resident thread blocks of one multiprocessor, all persistent.
    """

    token_tile: int
    m_warpgroups: int
    k_warpgroups: int
    stage_blocks: int
    stages: int
    ctas_per_sm: int

    @property
    def name(self) -> str:
        return (
            f"n{self.token_tile}m{self.m_warpgroups}k{self.k_warpgroups}b{self.stage_blocks}s{self.stages}"
            f"c{self.ctas_per_sm}"
        )

    @property
    def threads(self) -> int:
        return 128 * (1 + self.m_warpgroups * self.k_warpgroups)

    @property
    def stage_bytes(self) -> int:
        return self.stage_blocks * (self.m_warpgroups * layout.BLOCK_BYTES + self.token_tile * layout.BLOCK_K * 2)

    @property
    def reduction_bytes(self) -> int:
        return (self.k_warpgroups - 1) * layout.BLOCK_ROWS * self.token_tile * 4

    @property
    def shared_bytes(self) -> int:
        barriers = 16 * self.stages
        rows = 8 * self.token_tile
        return self.stages * self.stage_bytes + self.reduction_bytes + barriers + rows + 1024  # 1024: alignment


def with_most_stages(
    token_tile: int, m_warpgroups: int, k_warpgroups: int, stage_blocks: int, ctas_per_sm: int, limit: int = 64
) -> Tile:
    """A tile with as many stages as shared memory holds, at most ``limit``."""
    tile = Tile(token_tile, m_warpgroups, k_warpgroups, stage_blocks, 0, ctas_per_sm)
    available = SHARED_MEMORY // ctas_per_sm - (_RESERVED_PER_CTA if ctas_per_sm > 1 else 0)
    per_stage = tile.stage_bytes + 16
    return dataclasses.replace(tile, stages=min(limit, (available - tile.shared_bytes) // per_stage))


class _Launch:
    """What the handler needs to know to launch a GEMM kernel."""

    tile: Tile
    cluster = 1
    pdl = False

    @property
    def threads(self) -> int:
        return self.tile.threads

    @property
    def smem_bytes(self) -> int:
        return self.tile.shared_bytes


@dataclasses.dataclass(frozen=True)
class Gemm1Spec(_Launch):
    """x rows, gathered by route -> intermediate."""

    tile: Tile
    precision: str
    activation: int
    alpha: float
    beta: float
    limit: float
    has_bias: bool

    @property
    def gated(self) -> bool:
        return self.activation in _GATED_KINDS

    @property
    def name(self) -> str:
        numbers = "_".join(float(v).hex().replace(".", "p").replace("-", "m").replace("+", "")
                           for v in (self.alpha, self.beta, self.limit))  # fmt: skip
        bias = "_bias" if self.has_bias else ""
        return f"jax_moe_gemm1_{self.tile.name}_{self.precision}_a{self.activation}_{numbers}{bias}"

    def entry(self):
        from jax_moe.kernels.sm90 import gemm

        return gemm.Gemm1(self).entry()


@dataclasses.dataclass(frozen=True)
class Gemm2Spec(_Launch):
    """Intermediate -> out (atomic) or contributions (ordered)."""

    tile: Tile
    precision: str
    combine: str
    out_dtype: str
    has_bias: bool

    @property
    def name(self) -> str:
        bias = "_bias" if self.has_bias else ""
        return f"jax_moe_gemm2_{self.tile.name}_{self.precision}_{self.combine}_{self.out_dtype}{bias}"

    def entry(self):
        from jax_moe.kernels.sm90 import gemm

        return gemm.Gemm2(self).entry()


@dataclasses.dataclass(frozen=True)
class CombineSpec:
    """Contributions -> out, in slot order."""

    out_dtype: str
    cluster = 1
    pdl = False
    threads = 128
    smem_bytes = 0

    @property
    def name(self) -> str:
        return f"jax_moe_combine_{self.out_dtype}"

    def grid(self, num_tokens: int, hidden_size: int) -> int:
        """Thread blocks to launch: a thread takes four values."""
        return -(-num_tokens * (hidden_size // 4) // self.threads)

    def entry(self):
        from jax_moe.kernels.common import combine

        return combine.entry(self)


@dataclasses.dataclass(frozen=True)
class Plan:
    """The kernels of one call."""

    token_tile: int
    gemm1: Gemm1Spec
    gemm2: Gemm2Spec
    combine: CombineSpec | None

    def specs(self) -> tuple[Gemm1Spec | Gemm2Spec | CombineSpec, ...]:
        specs = (self.gemm1, self.gemm2)
        return specs if self.combine is None else (*specs, self.combine)


def max_tiles(num_routes: int, num_experts: int, token_tile: int) -> int:
    """Upper bound of the number of tiles, whatever the routing: each expert's last tile may hold one row."""
    return min(num_routes, (num_routes + num_experts * (token_tile - 1)) // token_tile)
