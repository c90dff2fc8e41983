"""The kernels that every target shares, as frozen values; importable without the DSL."""

import dataclasses

MAX_EXPERTS = 512
"""Local experts that the sort has room for: a counter for each in each warp's part of shared memory."""

WORK_COUNTERS = 2
"""Words behind ``expert_tiles[L]``, one for each GEMM (``common/schedule.py``)."""

_SMALL = 2048  # routes that one thread block sorts in less time than a cluster takes to meet
_CLUSTER = 8  # blocks; the most that any GPU with clusters takes


@dataclasses.dataclass(frozen=True)
class SortSpec:
    """Routes -> permuted rows and tile map (``ABI.md``, "Tile map").

    Attributes:
      token_tile: rows of a tile.
      num_experts: L, at most :data:`MAX_EXPERTS`.
      warps: of a thread block.
      cluster: thread blocks, all of one cluster.
      weighted: whether a row's weight is its routing weight; else it is 1.
    """

    token_tile: int
    num_experts: int
    warps: int
    cluster: int
    weighted: bool

    @property
    def name(self) -> str:
        weight = "weighted" if self.weighted else "ones"
        return f"jax_moe_sort_n{self.token_tile}e{self.num_experts}w{self.warps}c{self.cluster}_{weight}"

    @property
    def threads(self) -> int:
        return 32 * self.warps

    @property
    def grid(self) -> int:
        return self.cluster

    def entry(self):
        from jax_moe.kernels import sort

        return sort.Sort(self).entry()


def sort_spec(num_routes: int, num_experts: int, token_tile: int, weighted: bool) -> SortSpec:
    """The sort of so many routes.

    Raises:
      ValueError: more local experts than it has room for.
    """
    if num_experts > MAX_EXPERTS:
        raise ValueError(f"experts: got {num_experts} local experts, the GPU kernels take at most {MAX_EXPERTS}")
    if num_routes > _SMALL:
        return SortSpec(token_tile, num_experts, warps=32, cluster=_CLUSTER, weighted=weighted)
    # A warp for each 64 routes, a thread for each expert, and enough to mark many experts' padding side by side.
    warps = max(8, -(-num_routes // 64), -(-num_experts // 32))
    return SortSpec(token_tile, num_experts, warps=1 << (warps - 1).bit_length(), cluster=1, weighted=weighted)


@dataclasses.dataclass(frozen=True)
class RowsSpec:
    """The pass over x: what GEMM1 multiplies, where that is not x itself (``ABI.md``, ``x_rows``).

    Attributes:
      quantise: round to NVFP4 and back (w4a4).
      per_route: a row for each route, multiplied by its routing weight (weight_on="input"); else for each token.
    """

    quantise: bool
    per_route: bool

    threads = 256

    @property
    def name(self) -> str:
        return f"jax_moe_rows{'_nvfp4' if self.quantise else ''}{'_weighted' if self.per_route else ''}"

    def grid(self, num_rows: int, hidden_size: int) -> int:
        """Thread blocks: a thread takes 16 values."""
        return -(-num_rows * (hidden_size // 16) // self.threads)

    def entry(self):
        from jax_moe.kernels import rows

        return rows.Rows(self).entry()


@dataclasses.dataclass(frozen=True)
class CombineSpec:
    """Contributions -> out, in slot order (``combine="ordered"``)."""

    out_dtype: str

    threads = 128

    @property
    def name(self) -> str:
        return f"jax_moe_combine_{self.out_dtype}"

    def grid(self, num_tokens: int, hidden_size: int) -> int:
        """Thread blocks to launch: a thread takes four values."""
        return -(-num_tokens * (hidden_size // 4) // self.threads)

    def entry(self):
        from jax_moe.kernels.common import combine

        return combine.entry(self)
