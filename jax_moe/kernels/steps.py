"""The steps of a call that every target shares: their kernels, and the workspaces that they write (``README.md``)."""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from jax_moe import activations
from jax_moe.kernels import specs, tiling
from jax_moe.kernels.device.constants import WORK_COUNTERS
from jax_moe.kernels.target import Card, Launch, Program
from jax_moe.parcels import Parcels
from jax_moe.problem import Precision, Problem
from jax_moe.product.problem import Product

Workspaces = dict[str, jax.ShapeDtypeStruct]

TILE_MAP = tuple(specs.TILE_MAP)
_INT32_MAX = 2**31 - 1
_MOST_THREADS = 1024


def same(*names: str) -> dict[str, str]:
    """Arguments of parameters that are called what their buffers are."""
    return {name: name for name in names}


def sort(p: Problem, token_tile: int, granule: int = 0) -> tuple[Launch, Workspaces]:
    """Routes -> tile map; ``granule``: of balanced tiles (``specs.SortSpec``).

    Raises:
      ValueError: more experts or rows than the kernels can count.
    """
    spec = specs.sort_spec(p.num_routes, p.local_experts, token_tile, p.weight_on == "output", granule)
    tiles = num_tiles(p, token_tile)
    buffers = same("expert_ids", "routing_weights", "expert_offset", *TILE_MAP, "cta_counts")
    return Launch("sort", spec, spec.cluster, {**buffers, "num_routes": p.num_routes}), {
        "expert_tiles": jax.ShapeDtypeStruct((p.local_experts + 1 + WORK_COUNTERS,), jnp.int32),
        "tile_expert": jax.ShapeDtypeStruct((tiles,), jnp.int32),
        "row_route": jax.ShapeDtypeStruct((tiles * token_tile,), jnp.int32),
        "row_weight": jax.ShapeDtypeStruct((tiles * token_tile,), jnp.float32),
        "cta_counts": jax.ShapeDtypeStruct((spec.cluster, p.local_experts), jnp.int32),
    }


def num_tiles(p: Problem, token_tile: int) -> int:
    """Tiles that a call may have.

    Raises:
      ValueError: more rows than the kernels can count.
    """
    tiles = tiling.max_tiles(p.num_routes, p.local_experts, token_tile)
    vectors = max(num_x_rows(p) * p.hidden_size // 8, p.num_tokens * p.hidden_size // 4)  # of x and of the output
    _check_count(max(tiles * token_tile, vectors), f"T*K = {p.num_routes} routes of H = {p.hidden_size}", "fused_moe")
    return tiles


def _check_count(count: int, got: str, function: str) -> None:
    if count > _INT32_MAX - _MOST_THREADS:  # the last CTA counts beyond it
        raise ValueError(f"x: got {got}, the GPU kernels count in int32; call {function} on parts of the tokens")


def num_x_rows(p: Problem) -> int:
    """Rows that GEMM1 gathers from: one for each token, or for each route where x is multiplied by its weight."""
    return p.num_routes if p.weight_on == "input" else p.num_tokens


def x_rows(p: Problem) -> tuple[Launch, Workspaces]:
    """The pass over x: makes what GEMM1 multiplies, rounded to NVFP4 (w4a4) or weighted (weight_on="input")."""
    if p.x_form == "parcels":
        return _parcel_rows(p)
    quantise, per_route, rows = p.precision == "w4a4", p.weight_on == "input", num_x_rows(p)
    if p.precision == "w4a4_dynamic":
        return _dynamic_rows(rows, p.hidden_size, p.top_k if per_route else 1, per_route)
    spec = specs.XRowsSpec(quantise=quantise, per_route=per_route)
    arguments = {
        **same("x", "routing_weights", "x_rows"), "input_scale": "gate_up.input_scale" if quantise else None,
        "num_rows": rows, "row_divisor": p.top_k if per_route else 1, "row_blocks": p.hidden_size // 16,
    }  # fmt: skip
    workspaces = {"x_rows": jax.ShapeDtypeStruct((rows, p.hidden_size), jnp.bfloat16)}
    return Launch("x_rows", spec, spec.grid(rows, p.hidden_size), arguments), workspaces


def _dynamic_rows(rows: int, width: int, row_divisor: int, per_route: bool) -> tuple[Launch, Workspaces]:
    """The pass over x that finds the scale of each row; rows of x of no local group too."""
    spec = specs.DynamicXRowsSpec(per_route)
    arguments = {
        **same("x", "x_rows"), "routing_weights": "routing_weights" if per_route else None,
        "row_scales": "x_row_scales", "row_divisor": row_divisor, "row_blocks": width // 16,
    }  # fmt: skip
    workspaces = {
        "x_rows": jax.ShapeDtypeStruct((rows, width), jnp.bfloat16),
        "x_row_scales": jax.ShapeDtypeStruct((rows,), jnp.float32),
    }
    return Launch("x_rows", spec, spec.grid(rows), arguments), workspaces


def _input_scale(precision: Precision, given: str, found: str) -> str | None:
    """What a GEMM takes as ``input_scale``: that operand, or the workspace of each row's scale."""
    return {"w4a16": None, "w4a4": given, "w4a4_dynamic": found}[precision]


def _parcel_rows(p: Problem) -> tuple[Launch, Workspaces]:
    """The pass over x that is rounded already, and comes in parcels."""
    spec, row_blocks = specs.ParcelRowsSpec(), p.hidden_size // 16
    arguments = {**same("x", "x_rows"), "num_rows": p.num_tokens, "top_k": p.top_k, "row_blocks": row_blocks}
    workspaces = {"x_rows": jax.ShapeDtypeStruct((p.num_tokens, p.hidden_size), jnp.bfloat16)}
    return Launch("x_rows", spec, spec.grid(p.num_tokens, p.hidden_size), arguments), workspaces


def x_codes(p: Problem, block_k: int) -> tuple[Launch, Workspaces]:
    """The pass over x of w4a4 where the tensor cores multiply NVFP4: codes and block scales.

    ``block_k``: rows are padded with zeros to whole blocks of so many values.

    Raises:
      ValueError: more values than the kernels can count.
    """
    per_route, rows, width = p.weight_on == "input", num_x_rows(p), -(-p.hidden_size // block_k) * block_k
    _check_count(rows * width // 16, f"T*K = {p.num_routes} routes of H = {p.hidden_size}", "fused_moe")
    spec = specs.XRowsSpec(quantise=True, per_route=per_route, codes=True)
    arguments = {
        **same("x", "routing_weights", "x_codes", "x_scales"), "input_scale": "gate_up.input_scale", "num_rows": rows,
        "row_divisor": p.top_k if per_route else 1, "row_blocks": p.hidden_size // 16, "padded_blocks": width // 16,
    }  # fmt: skip
    return Launch("x_rows", spec, spec.grid(rows, width), arguments), _codes(rows, width)


def _codes(rows: int, width: int) -> Workspaces:
    return {
        "x_codes": jax.ShapeDtypeStruct((rows, width // 2), jnp.uint8),
        "x_scales": jax.ShapeDtypeStruct((rows, width // 16), jnp.uint8),
    }


_Gemm1 = TypeVar("_Gemm1", bound=specs.Gemm1Spec)
_Gemm2 = TypeVar("_Gemm2", bound=specs.Gemm2Spec)


def gemms(p: Problem, config: Any, gemm1: type[_Gemm1], gemm2: type[_Gemm2]) -> tuple[_Gemm1, _Gemm2]:
    """The specs of both GEMMs. They have the same widths: GEMM1 leaves ``h`` rows beyond a tile's width unwritten, and
    GEMM2 does not multiply them.
    """
    alpha, beta, limit = activations.parameters(p.activation)
    out_dtype = str(p.out_dtype) if p.combine == "atomic" else "float32"
    return (
        gemm1(config, p.precision, p.activation.kind, p.activation.gated, alpha, beta, limit, p.has_gate_up_bias),
        gemm2(config, p.precision, p.combine, out_dtype, p.has_down_bias),
    )


def gemm1_arguments(p: Problem, maps_routes: bool = False) -> dict[str, str | int | None]:
    """What every target's GEMM1 takes; x and the numbers of its blocks are the target's.

    ``maps_routes``: it makes the tile map for itself, of the routes; else it reads the sort's.
    """
    return {
        **(_routes(p) if maps_routes else same("row_route", "tile_expert", "expert_tiles")), "h": "h",
        "payload": "gate_up.payload", "global_scale": "gate_up.global_scale",
        "input_scale": _input_scale(p.precision, "gate_up.input_scale", "x_row_scales"),
        "bias": "gate_up.bias" if p.has_gate_up_bias else None,
        "down_input_scale": "down.input_scale" if p.precision == "w4a4" else None,
        "row_divisor": 1 if p.weight_on == "input" else p.top_k,
        "hidden_size": p.hidden_size, "local_experts": p.local_experts,
    }  # fmt: skip


def gemm2_arguments(p: Problem, maps_routes: bool = False) -> dict[str, str | int | None]:
    """What every target's GEMM2 takes; the numbers of its blocks are the target's. ``maps_routes`` as of GEMM1."""
    is_ordered = p.combine == "ordered"
    weights = {"routing_weights": "routing_weights" if p.weight_on == "output" else None}
    return {
        **(_routes(p) | weights if maps_routes else same(*TILE_MAP)), "h": "h",
        "payload": "down.payload", "global_scale": "down.global_scale",
        "input_scale": _input_scale(p.precision, "down.input_scale", "h_row_scales"),
        "bias": "down.bias" if p.has_down_bias else None,
        "out": "contributions" if is_ordered else "out",
        "row_divisor": 1 if is_ordered else p.top_k,
        "hidden_size": p.hidden_size, "local_experts": p.local_experts,
    }  # fmt: skip


def _routes(p: Problem) -> dict[str, str | int | None]:
    return {**same("expert_ids", "expert_offset"), "num_routes": p.num_routes}


def combine(p: Problem) -> tuple[Launch, Workspaces]:
    """Contributions -> out, in slot order."""
    spec = specs.CombineSpec(str(p.out_dtype))
    arguments = {
        **same("contributions", "expert_ids", "expert_offset", "out"), "num_tokens": p.num_tokens, "top_k": p.top_k,
        "hidden_size": p.hidden_size, "local_experts": p.local_experts,
    }  # fmt: skip
    workspaces = {"contributions": jax.ShapeDtypeStruct((p.num_routes, p.hidden_size), jnp.float32)}
    return Launch("combine", spec, spec.grid(p.num_tokens, p.hidden_size), arguments), workspaces


def sizes(p: Problem, intermediate_size: int) -> dict[str, int]:
    """``Program.sizes`` of a call; ``intermediate_size``: I with the padding that a bias of gate_up has."""
    return {
        "num_tokens": p.num_tokens, "top_k": p.top_k, "local_experts": p.local_experts,
        "num_parts": activations.num_parts(p.activation), "hidden_size": p.hidden_size,
        "intermediate_size": intermediate_size, "out_bytes": jnp.dtype(p.out_dtype).itemsize,
    }  # fmt: skip


# -- a grouped product ----------------------------------------------------------------------------------------------


def groups(p: Product, token_tile: int, card: Card) -> tuple[Launch, Workspaces]:
    """Group sizes -> tile map, and the zeros of the rows that no local group has.

    Raises:
      ValueError: more groups, rows or values than the kernels can count.
    """
    quantised = p.precision == "w4a4"
    spec = specs.groups_spec(p.local_groups, str(p.out_dtype), quantised)
    tiles = tiling.max_tiles(p.num_rows, p.local_groups, token_tile)
    row_vectors = _check_rows(p, max(tiles * token_tile, p.num_groups))
    arguments = {
        **same("group_sizes", "group_offset", "expert_tiles", "tile_expert", "row_route", "group_ends", "out"),
        "row_group": "row_group" if quantised else None, "num_rows": p.num_rows, "num_groups": p.num_groups,
        "local_groups": p.local_groups, "token_tile": token_tile, "row_vectors": row_vectors,
    }  # fmt: skip
    grid = spec.grid(tiles, p.num_rows * row_vectors, card.multiprocessors)
    workspaces = {
        "expert_tiles": jax.ShapeDtypeStruct((p.local_groups + 1 + WORK_COUNTERS,), jnp.int32),
        "tile_expert": jax.ShapeDtypeStruct((tiles,), jnp.int32),
        "row_route": jax.ShapeDtypeStruct((tiles * token_tile,), jnp.int32),
        "group_ends": jax.ShapeDtypeStruct((p.local_groups,), jnp.int32),
    }
    if quantised:
        workspaces["row_group"] = jax.ShapeDtypeStruct((p.num_rows,), jnp.int32)
    return Launch("groups", spec, grid, arguments), workspaces


def _check_rows(p: Product, others: int) -> int:
    """Vectors of 16 bytes in a row of the output. ``others``: of what else the kernels count.

    Raises:
      ValueError: more rows or values than the kernels can count.
    """
    row_vectors = p.out_features * jnp.dtype(p.out_dtype).itemsize // 16
    count = max(others, p.num_rows * max(p.in_features // 8, row_vectors))
    _check_count(count, f"T = {p.num_rows} rows of C = {p.in_features}, for N = {p.out_features}", "ragged_dot")
    return row_vectors


def rounded_rows(p: Product, per_group: bool = True) -> tuple[Launch, Workspaces]:
    """The pass over x of w4a4: the rows of local groups, rounded to NVFP4 with the scales of their groups.

    Not ``per_group``: all rows, with the first scale. Of w4a4_dynamic: all rows, each with its own.
    """
    if p.precision == "w4a4_dynamic":
        return _dynamic_rows(p.num_rows, p.in_features, 1, per_route=False)
    spec = specs.XRowsSpec(quantise=True, per_route=False, per_group=per_group)
    arguments = {
        **same("x", "x_rows", *(["row_group"] if per_group else [])),
        "routing_weights": None, "input_scale": "weights.input_scale",
        "num_rows": p.num_rows, "row_divisor": 1, "row_blocks": p.in_features // 16,
    }  # fmt: skip
    workspaces = {"x_rows": jax.ShapeDtypeStruct((p.num_rows, p.in_features), jnp.bfloat16)}
    return Launch("x_rows", spec, spec.grid(p.num_rows, p.in_features), arguments), workspaces


def group_codes(p: Product, block_k: int) -> tuple[Launch, Workspaces]:
    """The same as codes and block scales; rows are padded as :func:`x_codes` says.

    Raises:
      ValueError: more values than the kernels can count.
    """
    width = -(-p.in_features // block_k) * block_k
    _check_count(p.num_rows * width // 16, f"T = {p.num_rows} rows of C = {p.in_features}", "ragged_dot")
    spec = specs.XRowsSpec(quantise=True, per_route=False, codes=True, per_group=True)
    arguments = {
        **same("x", "x_codes", "x_scales", "row_group"), "routing_weights": None, "input_scale": "weights.input_scale",
        "num_rows": p.num_rows, "row_divisor": 1, "row_blocks": p.in_features // 16, "padded_blocks": width // 16,
    }  # fmt: skip
    return Launch("x_rows", spec, spec.grid(p.num_rows, width), arguments), _codes(p.num_rows, width)


def product_arguments(p: Product) -> dict[str, str | int | None]:
    """What every target's product takes; x and the numbers of its blocks are the target's."""
    tile_map = same("row_route", "tile_expert", "expert_tiles", "group_ends")
    return {**tile_map, **_matrices(p), "local_experts": p.local_groups}


def linear_arguments(p: Product) -> dict[str, str | int | None]:
    """What a product of one matrix takes that needs no tile map, but for x and the numbers of its blocks.

    Raises:
      ValueError: more rows or values than the kernels can count.
    """
    _check_rows(p, p.num_rows)
    return {**same("group_sizes", "group_offset"), **_matrices(p), "num_rows": p.num_rows}


def _matrices(p: Product) -> dict[str, str | int | None]:
    return {
        "out": "out", "payload": "weights.payload", "global_scale": "weights.global_scale",
        "input_scale": _input_scale(p.precision, "weights.input_scale", "x_row_scales"),
        "bias": "weights.bias" if p.has_bias else None,
        "in_features": p.in_features, "out_features": p.out_features,
    }  # fmt: skip


def product_program(p: Product, launches: tuple[Launch, ...], workspaces: Workspaces, bytes_per_matrix: int) -> Program:
    """The program of a grouped product of these launches; ``bytes_per_matrix``: of prepared weights."""
    return Program(
        launches=launches if p.num_rows else (),
        adds=None,
        workspaces=workspaces,
        weight_bytes={"weights.payload": p.local_groups * bytes_per_matrix, "weights.block_scale": 0},
        sizes={
            "num_rows": p.num_rows, "num_groups": p.num_groups, "local_groups": p.local_groups,
            "in_features": p.in_features, "out_features": p.out_features,
            "out_bytes": jnp.dtype(p.out_dtype).itemsize,
        },
    )  # fmt: skip


# -- parcels --------------------------------------------------------------------------------------------------------


def parcels(p: Parcels) -> Program:
    """The program of a call that makes parcels, on any target.

    Raises:
      ValueError: more values than the kernel can count.
    """
    spec, row_blocks = specs.ParcelsSpec(), p.hidden_size // 16
    threads = spec.num_threads(p.num_tokens, p.top_k, row_blocks)
    _check_count(threads, f"T = {p.num_tokens} tokens of H = {p.hidden_size}", p.op)
    launch = Launch("parcels", spec, -(-threads // spec.threads), {
        **same(*p.operand_names, "out"), "num_tokens": p.num_tokens, "top_k": p.top_k, "row_blocks": row_blocks,
    })  # fmt: skip
    return Program(
        launches=(launch,) if p.num_tokens else (),
        adds=None,
        workspaces={},
        weight_bytes={},
        sizes={"num_tokens": p.num_tokens, "top_k": p.top_k, "hidden_size": p.hidden_size},
    )
