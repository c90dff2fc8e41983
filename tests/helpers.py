"""What the tests share: the one case generator, the one comparison, and programs in a fresh process."""

import dataclasses
import importlib.metadata
import math
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import statement

import jax_moe
from jax_moe import Experts, Projection, Routing, shapes
from jax_moe.cli import timing

PACKAGE_FOLDER = pathlib.Path(jax_moe.__file__).parents[1]
"""Where the package that is tested is imported from: the installed one, usually."""


def need_shipped_headers() -> None:
    """Skips a test that makes XLA's call frames by hand: the newest headers have other structs.

    What is shipped is built on the oldest supported jaxlib's headers and runs under all of them.
    """
    installed = importlib.metadata.version("jaxlib")
    if not installed.startswith("0.10."):
        pytest.skip(f"builds on the headers of jaxlib 0.10, which the library is shipped with; installed: {installed}")


SOURCE_FOLDER = pathlib.Path(__file__).parents[1]
"""The checkout these tests are in."""

ACTIVATIONS = (
    jax_moe.SwiGLU(),
    jax_moe.SwiGLU(alpha=1.702, beta=1.0, limit=7.0),
    jax_moe.SwiGLU(alpha=0.5, beta=-0.25, limit=0.75),  # of which most values clamp
    jax_moe.GeGLU(),
    jax_moe.ReLU2(),
    jax_moe.SiTU(),
    jax_moe.SiTU(beta=2.0, linear_beta=None),
)


@dataclasses.dataclass(frozen=True)
class Case:
    """The arguments of one ``fused_moe`` call, and that call."""

    x: jax.Array
    experts: Experts
    routing: Routing
    options: dict = dataclasses.field(default_factory=dict)

    def with_options(self, **options) -> "Case":
        return dataclasses.replace(self, options=self.options | options)

    def run(self, op=jax_moe.fused_moe, **options) -> np.ndarray:
        return np.asarray(op(self.x, self.experts, self.routing, **self.options | options))

    def check(self, op=jax_moe.fused_moe, **options) -> None:
        """Runs ``op`` and compares what it gives with the definition."""
        case = self.with_options(**options)
        assert_matches(case.run(op), case)


# --- The comparison -----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Relative errors against the dequantised definition, each with the largest that rounding explains."""

    frobenius: float
    frobenius_bound: float
    worst_row: float
    worst_row_bound: float
    row: int

    def __str__(self):
        return (
            f"relative Frobenius error {self.frobenius:.3g} (bound {self.frobenius_bound:.3g}), "
            f"worst row {self.row}: {self.worst_row:.3g} (bound {self.worst_row_bound:.3g})"
        )

    @property
    def passes(self) -> bool:
        return self.frobenius <= self.frobenius_bound and self.worst_row <= self.worst_row_bound


def compare(actual, value, bound) -> Comparison:
    """Compares ``actual`` ``[T, H]`` with a float64 value and its elementwise error bound, as ``statement.moe`` gives.

    The bound grows by the rounding of the output: one unit roundoff of its dtype. A row's error is its 2-norm over the
    2-norm of the value; both may not exceed the same norm of the bound. The worst row is the one with the least room.
    A row that must be exactly zero has a bound of zero.
    """
    actual = np.asarray(actual)
    assert actual.shape == value.shape, (actual.shape, value.shape)
    roundoff = {np.dtype(ml_dtypes.bfloat16): statement.U16, np.dtype(np.float32): statement.U32}[actual.dtype]
    error = actual.astype(np.float64) - value
    limit = bound * (1 + roundoff) + roundoff * np.abs(value)
    assert np.isfinite(value + limit).all(), "the definition overflows: compare() cannot judge"
    if not np.isfinite(error).all():
        return Comparison(np.inf, 0.0, np.inf, 0.0, int(np.argmin(np.isfinite(error).all(1))))
    if not value.size:
        return Comparison(0.0, 0.0, 0.0, 0.0, -1)
    norms, limits, sizes = (np.linalg.norm(a, axis=1) for a in (error, limit, value))
    row = int(np.argmax(np.where(limits > 0, norms / np.where(limits > 0, limits, 1), np.where(norms > 0, np.inf, 0))))
    total, scale = np.linalg.norm(value) or 1.0, sizes[row] or 1.0
    return Comparison(
        float(np.linalg.norm(error) / total),
        float(np.linalg.norm(limit) / total),
        float(norms[row] / scale),
        float(limits[row] / scale),
        row,
    )


def assert_matches(actual, case: Case) -> None:
    """Fails unless ``actual`` is what ``case`` must give, to within rounding."""
    options = {"activation": jax_moe.SwiGLU(), "precision": "w4a16"} | case.options
    out_dtype = options.pop("out_dtype", jnp.bfloat16)
    options.pop("combine", None)
    options.pop("batch_invariant", None)
    assert np.asarray(actual).dtype == out_dtype
    result = compare(actual, *statement.moe(case.x, case.experts, case.routing, **options))
    assert result.passes, f"{result} with {case.options}"


def assert_matches_sum(actual, case: Case, axes: dict[str, int], names: dict, *, on_gpu: bool = False) -> None:
    """As :func:`assert_matches`, for ``sharded_moe(..., sum_dtype=jnp.bfloat16)``.

    Args:
      actual: what it gave.
      case: with the options but those of the mesh.
      axes: of the mesh, and their sizes.
      names: ``sharded_moe``'s names of axes.
      on_gpu: a GPU computed it, where ``combine="atomic"`` rounds at each of K additions.
    """
    parts, scattered, spread = {}, [], _names(names.get("data_axis", "data"))
    for kind in ("expert", "tensor"):
        mine = _names(names.get(f"{kind}_axis", kind))
        parts[kind] = math.prod(axes.get(name, 1) for name in mine)
        if set(mine) & set(spread):
            assert set(mine) <= set(spread), "half an axis is scattered: not implemented here"
            scattered.append(kind)
    if parts == {"expert": 1, "tensor": 1}:
        assert_matches(actual, case)  # nothing to sum
        return
    options = {"activation": jax_moe.SwiGLU(), "precision": "w4a16", "combine": "atomic"} | case.options
    assert np.asarray(actual).dtype == options.pop("out_dtype", jnp.bfloat16)
    assert options.pop("expert_offset", 0) == 0
    roundings = case.routing.expert_ids.shape[1] if options.pop("combine") == "atomic" and on_gpu else 1
    made = statement.moe_parts(
        case.x, case.experts, case.routing, expert_parts=parts["expert"], tensor_parts=parts["tensor"], **options
    )
    result = compare(actual, *statement.sum_in_bfloat16(*made, scattered=scattered, roundings=roundings))
    assert result.passes, f"{result} over {axes} {names} with {case.options}"


def _names(axis) -> tuple[str, ...]:
    return () if axis is None else (axis,) if isinstance(axis, str) else tuple(axis)


def assert_bit_equal(actual, expected) -> None:
    """Same dtype, shape and bits."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    unsigned = np.dtype(f"u{actual.dtype.itemsize}")
    np.testing.assert_array_equal(actual.view(unsigned), expected.view(unsigned))


# --- Cases --------------------------------------------------------------------------------------------------------


def make_case(
    seed=0, *, tokens=5, hidden=48, intermediate=32, num_experts=4, top_k=2, activation=ACTIVATIONS[0], bias=False,
    routing="distinct", expert_offset=0, all_experts=None, **options,
) -> Case:  # fmt: skip
    """A random case with intermediates of order 1, gate and up scales that differ by up to 10x, and input scales.

    ``routing``: "distinct" experts per token, "any" (one may come twice), "one" expert for all, or "hostile": any, and
    ids that are local to nobody. Ids run over ``all_experts`` (default: those from 0 to the last local one).
    """
    rng = np.random.default_rng(seed)
    shape = shapes.LayerShape(num_experts, top_k, hidden, intermediate)
    experts = timing.random_experts(shape, rng, parts=2 if activation.gated else 1, bias=bias)
    ids = make_ids(rng, routing, tokens, top_k, all_experts or num_experts + expert_offset)
    weights = jnp.asarray(rng.uniform(0.05, 1, (tokens, top_k)) * rng.choice([1, 1, -1], (tokens, top_k)), jnp.float32)
    x = jnp.asarray(rng.normal(size=(tokens, hidden)), jnp.bfloat16)
    return Case(x, experts, Routing(ids, weights), {"activation": activation, "expert_offset": expert_offset} | options)


def make_ids(rng, kind: str, tokens: int, top_k: int, num_experts: int):
    if kind == "distinct":
        ids = [rng.permutation(num_experts)[:top_k] for _ in range(tokens)]
    elif kind == "one":
        ids = np.full((tokens, top_k), rng.integers(num_experts))
    else:
        ids = rng.integers(0, num_experts, (tokens, top_k))
    ids = np.asarray(ids, np.int64).reshape(tokens, top_k)
    if kind == "hostile":
        nowhere = rng.choice([-1, -num_experts, num_experts, 2**31 - 1, -(2**31)], (tokens, top_k))
        ids = np.where(rng.random((tokens, top_k)) < 0.4, nowhere, ids)
    return jnp.asarray(ids, jnp.int32)


def make_exact_case(
    seed=0, *, tokens=16, hidden=64, intermediate=128, num_experts=8, top_k=4, gated=True, **options
) -> Case:
    """A case of which every partial sum, in any order, is exact in float32: every right answer has the same bits.

    x and the weights are 0 or +-1 times powers of two, few of them not 0, scales and routing weights powers of two. A
    gate's bias of 64 puts its sigmoid at exactly 1. ``test_helpers.py`` shows that the grid is fine enough.

    With ``precision="w4a4_dynamic"`` rows of x have the largest value 21/16 or half of it, so that their scales are
    powers of two. Those of the intermediate are none: what GEMM2's sums become is rounded, so K is 1, and down has no
    bias.
    """
    rng = np.random.default_rng(seed)
    is_dynamic = options.get("precision") == "w4a4_dynamic"
    top_k = 1 if is_dynamic else top_k

    def weights(lead, rows, columns):
        codes = rng.choice(np.uint8([0, 2, 10]), (*lead, rows, columns), p=[0.75, 0.125, 0.125])  # 0, 1, -1
        payload = codes[..., 0::2] | codes[..., 1::2] << 4
        scales = rng.choice([1.0, 2.0], (*lead, rows, columns // 16)).astype(ml_dtypes.float8_e4m3fn)
        return jnp.asarray(payload), jnp.asarray(scales), jnp.asarray(rng.choice([0.5, 1.0], lead), jnp.float32)

    def integers(shape):
        return rng.integers(-2, 3, shape).astype(np.float32)

    gate_up_bias = integers((num_experts, 2 if gated else 1, intermediate))
    gate_up_bias[:, 0] += 64 if gated else 0
    gate_up = weights((num_experts, 2 if gated else 1), intermediate, hidden)
    down = weights((num_experts,), hidden, intermediate)
    experts = Experts(
        Projection(*gate_up, jnp.float32(2.0**-8), jnp.asarray(gate_up_bias)),
        Projection(*down, jnp.full(num_experts, 2.0**-4, jnp.float32), jnp.asarray(integers((num_experts, hidden)))),
    )
    ids = make_ids(rng, "distinct", tokens, top_k, num_experts)
    routing = Routing(ids, jnp.asarray(rng.choice([0.5, 1.0], (tokens, top_k)), jnp.float32))
    x = jnp.asarray(rng.integers(-1, 2, (tokens, hidden)), jnp.bfloat16)
    if is_dynamic:
        x = x.at[:, 0].set(21 / 16) * jnp.asarray(rng.choice([0.5, 1.0], (tokens, 1)), jnp.bfloat16)
        experts = dataclasses.replace(experts, down=dataclasses.replace(experts.down, bias=None))
    activation = jax_moe.SwiGLU() if gated else jax_moe.ReLU2()
    return Case(x, experts, routing, {"activation": activation} | options)


def without_input_scales(experts: Experts) -> Experts:
    """As before calibration."""
    gate_up, down = (dataclasses.replace(p, input_scale=None) for p in (experts.gate_up, experts.down))
    return dataclasses.replace(experts, gate_up=gate_up, down=down)


# --- Programs in a process of their own ---------------------------------------------------------------------------


def run_python(program: str, *args, **environment) -> str:
    """Runs a Python program in a fresh process, on the CPU, warnings being errors; returns what it prints."""
    path = os.pathsep.join(map(str, [PACKAGE_FOLDER, pathlib.Path(__file__).parent, os.environ.get("PYTHONPATH", "")]))
    env = os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu"} | environment
    command = [sys.executable, "-W", "error", "-c", program, *map(str, args)]
    ran = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout
