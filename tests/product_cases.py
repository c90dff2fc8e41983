"""Grouped products: cases, their definition in plain NumPy, and their weights as kernels read them."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import statement

import jax_moe
from jax_moe.experts import CANONICAL, Projection
from jax_moe.product.problem import Product

LAYOUT = "wgmma_v1"
"""Hopper's, where no other is named."""


@dataclasses.dataclass(frozen=True)
class ProductCase:
    """The arguments of one grouped product; the weights are canonical, of lead ``[G]``."""

    x: jax.Array
    group_sizes: np.ndarray
    weights: Projection
    group_offset: int = 0
    precision: str = "w4a16"
    out_dtype: type = jnp.float32

    @property
    def out_features(self) -> int:
        return self.weights.payload.shape[1]

    def problem(self, layout: str = LAYOUT) -> Product:
        """All that is static about the call, of weights in that layout."""
        absent = [f"weights.{name}" for name in ("input_scale", "bias") if getattr(self.weights, name) is None]
        if layout != CANONICAL:
            absent.append("weights.block_scale")
        return Product(
            precision=self.precision, out_dtype=jnp.dtype(self.out_dtype), command_buffer=True,
            num_rows=self.x.shape[0], num_groups=len(self.group_sizes), local_groups=self.weights.payload.shape[0],
            in_features=self.x.shape[1], out_features=self.out_features, layout=layout, absent=tuple(absent),
        )  # fmt: skip

    def operands(self, layout: str = LAYOUT) -> dict[str, jax.Array]:
        """Those that are there, by name, with the weights in that layout."""
        packed = pack(self.weights, layout)
        leaves = {f"weights.{field.name}": getattr(packed, field.name) for field in dataclasses.fields(Projection)}
        sizes, offset = jnp.asarray(self.group_sizes, jnp.int32), jnp.int32(self.group_offset)
        operands = {"x": self.x, "group_sizes": sizes, "group_offset": offset, **leaves}
        return {name: value for name, value in operands.items() if value is not None}


def pack(weights: Projection, layout: str = LAYOUT) -> Projection:
    """Canonical weights of lead ``[G]`` in that layout."""
    return jax_moe.prepare(weights, layout, progress=False)


def local_rows(case: ProductCase) -> list[range]:
    """The rows of each local group: negative sizes count as 0, and what goes beyond the rows is cut off."""
    sizes = np.maximum(np.asarray(case.group_sizes, np.int64), 0)
    ends = np.minimum(np.cumsum(sizes), case.x.shape[0])
    starts = np.concatenate([[0], ends[:-1]])
    rows = []
    for local in range(case.weights.payload.shape[0]):
        group = local + case.group_offset
        has_size = 0 <= group < len(sizes)
        rows.append(range(int(starts[group]), int(ends[group])) if has_size else range(0))
    return rows


def defined(case: ProductCase) -> tuple[np.ndarray, np.ndarray]:
    """The product in float64 ``[T, N]``, and a bound of what summing it in float32 may be off by."""
    value, bound = (np.zeros((case.x.shape[0], case.out_features)) for _ in range(2))
    matrices = statement.dequantize(statement.unpack(np.asarray(case.weights.payload)), case.weights.block_scale)
    for local, rows in enumerate(local_rows(case)):
        x, scale = np.asarray(case.x, np.float32)[list(rows)], np.float32(1)
        if case.precision == "w4a4":
            scale = np.asarray(case.weights.input_scale)[local]
            x = statement.dequantize(*statement.quantize(x, scale))
        elif case.precision == "w4a4_dynamic":
            scale = statement.row_scales(x)[:, None]
            x = statement.dequantize(*statement.quantize(x, scale[:, 0]))
        bias = 0.0 if case.weights.bias is None else np.asarray(case.weights.bias, np.float64)[local]
        scale = np.asarray(scale, np.float64) * np.float64(case.weights.global_scale[local])
        made = statement._project(x.astype(np.float64), matrices[local].astype(np.float64), scale, bias)
        value[list(rows)], bound[list(rows)] = made
    return value, bound


def expected(case: ProductCase) -> np.ndarray:
    """The output of a case of which all sums are exact: rounded once."""
    value, _ = defined(case)
    exact = value.astype(np.float32)
    assert (exact == value).all(), "not an exact case"
    return exact.astype(case.out_dtype)


def make_case(
    seed: int, group_sizes, rows: int, *, in_features=144, out_features=80, local_groups=None, group_offset=0,
    bias=True, exact=True, precision="w4a16", out_dtype=jnp.float32,
) -> ProductCase:  # fmt: skip
    """A case; ``exact``: every partial sum is exact in float32, so that every right answer has the same bits.

    Then x and the codes are 0 or +-1, and scales have few bits. Groups differ in all their scales, and those of the
    inputs not by powers of two only: which group's is taken shows in the rounding as well. With a scale for each row
    of x (w4a4_dynamic) its largest value is 21/16 times a power of two, which makes the scale a power of two.
    """
    rng = np.random.default_rng(seed)
    count = len(group_sizes) if local_groups is None else local_groups
    group = np.arange(count)
    if exact:
        codes = np.uint8([0, 0, 0, 0, 0, 0, 2, 10])[rng.integers(0, 8, (count, out_features, in_features))]
        scales = rng.choice([1.0, 2.0], (count, out_features, in_features // 16)).astype(ml_dtypes.float8_e4m3fn)
        global_scale, biases = 2.0 ** (group % 3 - 1), rng.integers(-2, 3, (count, out_features))
        input_scale = np.asarray([1, 1.5, 1.25])[group % 3] * 2.0 ** -(8 + group % 2)
        x = rng.integers(-1, 2, (rows, in_features))
        if precision == "w4a4_dynamic":
            x = np.where(np.arange(in_features) == 0, 21 / 16, x) * 2.0 ** rng.integers(-1, 2, (rows, 1))
    else:
        codes = rng.integers(0, 16, (count, out_features, in_features), dtype=np.uint8)
        scales = rng.uniform(0.25, 4, (count, out_features, in_features // 16)).astype(ml_dtypes.float8_e4m3fn)
        global_scale, biases = rng.uniform(0.02, 0.2, count), rng.normal(size=(count, out_features))
        input_scale, x = rng.uniform(0.5, 2, count) / 448, rng.normal(size=(rows, in_features))
    weights = Projection(
        jnp.asarray(codes[..., 0::2] | codes[..., 1::2] << 4), jnp.asarray(scales),
        jnp.asarray(global_scale, jnp.float32), jnp.asarray(input_scale, jnp.float32) if precision == "w4a4" else None,
        jnp.asarray(biases, jnp.float32) if bias else None,
    )  # fmt: skip
    sizes = np.asarray(group_sizes, np.int64).astype(np.int32)
    return ProductCase(jnp.asarray(x, jnp.bfloat16), sizes, weights, group_offset, precision, out_dtype)
