"""What describes a kernel, and the kernels that every target shares: frozen values, importable without the DSL."""

from collections.abc import Mapping
import dataclasses
from typing import Any, Protocol

MAX_EXPERTS = 512
"""Local experts that the sort has room for: a counter for each in each warp's part of shared memory."""

MAX_GROUPS = 4096
"""Local groups that a grouped product has room for in shared memory."""

PARAMETER_BYTES = {"i32": 4, "i32*": 8, "f32*": 8, "bf16*": 8, "u8*": 8}
"""Types of kernel parameters; a ``*`` is a pointer to global memory, aligned to 16 bytes."""

_SMALL = 2048  # routes that one CTA sorts in less time than a cluster takes to meet
_CLUSTER = 8  # CTAs; the most that a kernel may have on any GPU with clusters


def out_pointer(out_dtype: str) -> str:
    """The type of a pointer to the output."""
    return "bf16*" if out_dtype == "bfloat16" else "f32*"


class Spec(Protocol):
    """What describes a kernel; hashable, and its ``repr`` tells two of them apart."""

    @property
    def name(self) -> str:
        """Of the kernel, in messages, tables and the record of what has run on a GPU."""
        ...

    @property
    def implementation(self) -> str:
        """``module:class`` of the device code; only the compiler imports it (``device/entry.py``)."""
        ...

    @property
    def parameters(self) -> Mapping[str, str]:
        """Name and type (a key of :data:`PARAMETER_BYTES`) of what the kernel is launched with, in order."""
        ...

    @property
    def threads(self) -> int:
        """Of a CTA."""
        ...

    @property
    def cluster(self) -> int:
        """CTAs of a cluster; 1 is none."""
        ...

    @property
    def overlap(self) -> bool:
        """Programmatic dependent launch: CTAs may start before the kernel in front of them has ended."""
        ...

    @property
    def tensor_core_ptx(self) -> str | None:
        """The PTX instruction that multiplies matrices; None: the kernel has none."""
        ...


class _Gemm:
    """How both GEMMs of a call are launched on any target; ``config`` says how a CTA is put together."""

    config: Any
    overlap = True

    @property
    def threads(self) -> int:
        return self.config.threads


@dataclasses.dataclass(frozen=True)
class Gemm1Spec(_Gemm):
    """x rows, gathered by route -> intermediate: what a target's own spec is derived from.

    ``activation`` is its kind, with its parameters behind it.
    """

    config: Any
    precision: str
    activation: str
    gated: bool
    alpha: float
    beta: float
    limit: float
    has_bias: bool

    @property
    def name(self) -> str:
        numbers = "_".join(float(v).hex().replace(".", "p").replace("-", "m").replace("+", "")
                           for v in (self.alpha, self.beta, self.limit))  # fmt: skip
        bias = "_bias" if self.has_bias else ""
        return f"jax_moe_gemm1_{self.config.name}_{self.precision}_{self.activation}_{numbers}{bias}"


@dataclasses.dataclass(frozen=True)
class Gemm2Spec(_Gemm):
    """Intermediate -> out (atomic) or contributions (ordered): what a target's own spec is derived from."""

    config: Any
    precision: str
    combine: str
    out_dtype: str
    has_bias: bool

    @property
    def adds(self) -> bool:
        """Whether it adds into the output, or else stores."""
        return self.combine == "atomic"

    @property
    def name(self) -> str:
        bias = "_bias" if self.has_bias else ""
        return f"jax_moe_gemm2_{self.config.name}_{self.precision}_{self.combine}_{self.out_dtype}{bias}"


@dataclasses.dataclass(frozen=True)
class ProductSpec(_Gemm):
    """x rows -> out, of a grouped product: what a target's own spec is derived from."""

    config: Any
    precision: str
    out_dtype: str
    has_bias: bool

    adds = False

    @property
    def name(self) -> str:
        bias = "_bias" if self.has_bias else ""
        return f"jax_moe_product_{self.config.name}_{self.precision}_{self.out_dtype}{bias}"


TILE_MAP = {"expert_tiles": "i32*", "tile_expert": "i32*", "row_route": "i32*", "row_weight": "f32*"}
"""Workspaces that the sort writes and both GEMMs read; ``README.md`` says what is in them."""


@dataclasses.dataclass(frozen=True)
class SortSpec:
    """Routes -> permuted rows and tile map.

    Attributes:
      token_tile: rows of a tile.
      local_experts: L, at most :data:`MAX_EXPERTS`.
      warps: of a CTA.
      cluster: CTAs, all of one cluster.
      weighted: whether a row's weight is its routing weight; else it is 1.
      granule: 0: an expert's tiles are full but for the last one. Else they are balanced: as many tiles, each but the
        last of the same width, the least multiple of this that holds the rows.
    """

    token_tile: int
    local_experts: int
    warps: int
    cluster: int
    weighted: bool
    granule: int = 0

    def __post_init__(self):
        if self.granule and self.token_tile % self.granule:
            raise ValueError(f"granule: got {self.granule}, which does not divide a tile of {self.token_tile}")

    implementation = "jax_moe.kernels.device.sort:Sort"
    overlap = False
    tensor_core_ptx = None

    @property
    def parameters(self) -> dict[str, str]:
        return {
            "expert_ids": "i32*", "routing_weights": "f32*", "expert_offset": "i32*", **TILE_MAP, "cta_counts": "i32*",
            "num_routes": "i32",
        }  # fmt: skip

    @property
    def name(self) -> str:
        weight = "weighted" if self.weighted else "ones"
        balanced = f"g{self.granule}" if self.granule else ""
        return f"jax_moe_sort_n{self.token_tile}{balanced}e{self.local_experts}w{self.warps}c{self.cluster}_{weight}"

    @property
    def threads(self) -> int:
        return 32 * self.warps


def sort_spec(num_routes: int, local_experts: int, token_tile: int, weighted: bool, granule: int = 0) -> SortSpec:
    """The sort of so many routes.

    Raises:
      ValueError: more local experts than it has room for.
    """
    if local_experts > MAX_EXPERTS:
        raise ValueError(f"experts: got {local_experts} local experts, the GPU kernels take at most {MAX_EXPERTS}")
    if num_routes > _SMALL:
        return SortSpec(token_tile, local_experts, warps=32, cluster=_CLUSTER, weighted=weighted, granule=granule)
    # A warp for each 64 routes, a thread for each expert, and enough to mark many experts' padding side by side.
    warps = max(8, -(-num_routes // 64), -(-local_experts // 32))
    warps = 1 << (warps - 1).bit_length()
    return SortSpec(token_tile, local_experts, warps, cluster=1, weighted=weighted, granule=granule)


class _SmallKernel:
    """A kernel without clusters and tensor cores; unless it says so, it does not start early either."""

    cluster = 1
    overlap = False
    tensor_core_ptx = None


@dataclasses.dataclass(frozen=True)
class GroupsSpec(_SmallKernel):
    """Group sizes -> tile map of a grouped product, and zeros for the rows of no local group.

    Attributes:
      capacity: local groups that it has room for.
      out_dtype: of the output.
      has_row_group: whether the group of each row is written too, for the pass over x.
    """

    capacity: int
    out_dtype: str
    has_row_group: bool

    implementation = "jax_moe.kernels.device.groups:Groups"
    threads = 256

    @property
    def parameters(self) -> dict[str, str]:
        return {
            "group_sizes": "i32*", "group_offset": "i32*", "expert_tiles": "i32*", "tile_expert": "i32*",
            "row_route": "i32*", "group_ends": "i32*", "row_group": "i32*",
            "out": out_pointer(self.out_dtype), "num_rows": "i32",
            "num_groups": "i32", "local_groups": "i32", "token_tile": "i32", "row_vectors": "i32",
        }  # fmt: skip

    @property
    def name(self) -> str:
        return f"jax_moe_groups_e{self.capacity}_{self.out_dtype}{'_rows' if self.has_row_group else ''}"

    def grid(self, num_tiles: int, num_vectors: int, multiprocessors: int) -> int:
        """CTAs: no more than run at once, because each finds the groups for itself; a warp takes a tile."""
        work = max(num_tiles * 32, num_vectors // 8)
        return max(1, min(multiprocessors, -(-work // self.threads)))


def groups_spec(local_groups: int, out_dtype: str, has_row_group: bool) -> GroupsSpec:
    """The spec with room for so many groups: few kernels serve all.

    Raises:
      ValueError: more than any has room for.
    """
    if local_groups > MAX_GROUPS:
        raise ValueError(f"weights: got {local_groups} local groups, the GPU kernels take at most {MAX_GROUPS}")
    capacity = 128 if local_groups <= 128 else MAX_GROUPS
    return GroupsSpec(capacity, out_dtype, has_row_group)


@dataclasses.dataclass(frozen=True)
class XRowsSpec(_SmallKernel):
    """The pass over x: what GEMM1 multiplies, where that is not x itself.

    Attributes:
      quantise: round to NVFP4 (w4a4).
      per_route: a row for each route, multiplied by its routing weight (weight_on="input"); else for each token.
      codes: what is rounded becomes codes and block scales, for tensor cores that take them (that needs instructions of
        sm_100); else bf16 again, code * block scale.
      per_group: each row is rounded with the scale of its group, and rows of no local group are left out.
    """

    quantise: bool
    per_route: bool
    codes: bool = False
    per_group: bool = False

    def __post_init__(self):
        if self.codes and not self.quantise:
            raise ValueError("codes: got True, needs quantise")
        if self.per_group and (not self.quantise or self.per_route):
            raise ValueError("per_group: got True, needs quantise, and not per_route")

    threads = 256

    @property
    def overlap(self) -> bool:
        return self.codes

    @property
    def parameters(self) -> dict[str, str]:
        out = {"x_codes": "u8*", "x_scales": "u8*"} if self.codes else {"x_rows": "bf16*"}
        padded = {"padded_blocks": "i32"} if self.codes else {}
        group = {"row_group": "i32*"} if self.per_group else {}
        return {
            "x": "bf16*", "routing_weights": "f32*", "input_scale": "f32*", **out, **group,
            "num_rows": "i32", "row_divisor": "i32", "row_blocks": "i32", **padded,
        }  # fmt: skip

    @property
    def implementation(self) -> str:
        return f"jax_moe.kernels.device.x_rows:{'XCodes' if self.codes else 'XRows'}"

    @property
    def name(self) -> str:
        form = "_codes" if self.codes else "_nvfp4" if self.quantise else ""
        return f"jax_moe_x_rows{form}{'_weighted' if self.per_route else ''}{'_groups' if self.per_group else ''}"

    def grid(self, num_rows: int, width: int) -> int:
        """CTAs: a thread takes 16 values of rows of ``width``."""
        return -(-num_rows * (width // 16) // self.threads)


class RowPass(_SmallKernel):
    """A pass that finds a scale for each row (w4a4_dynamic), which ``row_threads`` threads look after."""

    row_threads: int
    threads = 128

    def grid(self, num_rows: int) -> int:
        """CTAs."""
        return -(-num_rows * self.row_threads // self.threads)


@dataclasses.dataclass(frozen=True)
class DynamicXRowsSpec(RowPass):
    """The pass over x that rounds each row with a scale of its own; ``per_route`` as of :class:`XRowsSpec`."""

    per_route: bool

    implementation = "jax_moe.kernels.device.dynamic_rows:XRows"
    row_threads = 128

    @property
    def parameters(self) -> dict[str, str]:
        return {
            "x": "bf16*", "routing_weights": "f32*", "x_rows": "bf16*", "row_scales": "f32*", "row_divisor": "i32",
            "row_blocks": "i32",
        }  # fmt: skip

    @property
    def name(self) -> str:
        return f"jax_moe_x_rows_dynamic{'_weighted' if self.per_route else ''}"


@dataclasses.dataclass(frozen=True)
class ParcelsSpec(_SmallKernel):
    """x and its routing -> parcels, in which tokens travel (``jax_moe/parcels.py``)."""

    implementation = "jax_moe.kernels.device.parcels:Parcels"
    name = "jax_moe_parcels"
    threads = 256

    @property
    def parameters(self) -> dict[str, str]:
        return {
            "x": "bf16*", "expert_ids": "i32*", "routing_weights": "f32*", "input_scale": "f32*", "out": "u8*",
            "num_tokens": "i32", "top_k": "i32", "row_blocks": "i32",
        }  # fmt: skip

    def num_threads(self, num_tokens: int, top_k: int, row_blocks: int) -> int:
        """One for each block of 16 values, in eights, and for each route."""
        return num_tokens * (-(-row_blocks // 8) * 8 + top_k)


@dataclasses.dataclass(frozen=True)
class ParcelRowsSpec(_SmallKernel):
    """The pass over x where x is parcels: bf16 again, code * block scale."""

    implementation = "jax_moe.kernels.device.parcels:ParcelRows"
    name = "jax_moe_parcel_rows"
    threads = 256

    @property
    def parameters(self) -> dict[str, str]:
        return {"x": "u8*", "x_rows": "bf16*", "num_rows": "i32", "top_k": "i32", "row_blocks": "i32"}

    def grid(self, num_rows: int, hidden_size: int) -> int:
        """CTAs: a thread takes 8 values."""
        return -(-num_rows * (hidden_size // 8) // self.threads)


@dataclasses.dataclass(frozen=True)
class CombineSpec(_SmallKernel):
    """Contributions -> out, in slot order (``combine="ordered"``)."""

    out_dtype: str

    implementation = "jax_moe.kernels.device.combine:Combine"
    threads = 128

    @property
    def parameters(self) -> dict[str, str]:
        return {
            "contributions": "f32*", "expert_ids": "i32*", "expert_offset": "i32*",
            "out": out_pointer(self.out_dtype), "num_tokens": "i32",
            "top_k": "i32", "hidden_size": "i32", "local_experts": "i32",
        }  # fmt: skip

    @property
    def name(self) -> str:
        return f"jax_moe_combine_{self.out_dtype}"

    def grid(self, num_tokens: int, hidden_size: int) -> int:
        """CTAs: a thread takes four values."""
        return -(-num_tokens * (hidden_size // 4) // self.threads)
