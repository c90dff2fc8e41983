"""``jax_moe.ragged_dot`` and ``linear`` on a GPU, compared with bfloat16 weights in JAX, as ratios to the floor.

    python benchmarks/gpu_product.py --output results.json
    python benchmarks/gpu_product.py --product 128,8,4096,3072 --tokens 1,32,2048 --peer
    JAX_MOE_CACHE_DIR=kernels python benchmarks/gpu_product.py --compile-for sm_90a        (on any machine)

A product is G,K,C,N: x [T * K, C] times G matrices [N, C], each token's K rows in distinct random groups; with G = 1 it
is `linear`. Chains of calls in a command buffer, each waiting for the one before and with its own
group sizes, as in gpu_op.py, whose floors these are: the bytes of the touched matrices, or the FLOP. The peer is
`jax.lax.ragged_dot`, of one matrix `jnp.dot`, whose weights have 3.56 times the bytes.
"""

from collections.abc import Callable
import dataclasses
import itertools
import json
import pathlib
from typing import Annotated, Any

from gpu_op import ceilings, environment
import jax
import jax.numpy as jnp
import numpy as np
import typer

import jax_moe
from jax_moe import shapes
from jax_moe.cli import floor, options, timing
from jax_moe.cli.compile import product_of
from jax_moe.kernels import cache, lowering
from jax_moe.problem import Precision

Method = tuple[Callable[..., jax.Array], Any, int]
"""One call, its weights, and how many calls make a chain."""

LENGTH = 16
PEER_LENGTH = 2  # jax.lax.ragged_dot's dense lowering takes half a second a call for many tokens
PRODUCTS = ("128,8,4096,3072", "128,8,1536,4096", "8,2,4096,28672", "1,1,4096,4096", "1,1,4096,14336")
"""gate_up and down of qwen3-235b-a22b, gate_up of mixtral-8x7b, and two dense layers."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A product and how many rows it has in each call."""

    groups: int
    top_k: int
    in_features: int
    out_features: int
    tokens: int

    @property
    def rows(self) -> int:
        return self.tokens * self.top_k

    def sizes(self, length: int) -> np.ndarray:
        """Group sizes int32 ``[length, G]`` of random routings."""
        layer = shapes.LayerShape(self.groups, self.top_k, self.in_features, self.out_features)
        ids, _, _ = timing.routings(layer, self.tokens, length, seed=self.tokens)
        return np.stack([np.bincount(call.ravel(), minlength=self.groups) for call in ids]).astype(np.int32)

    def floor_seconds(self, touched: float, precision: Precision) -> float:
        matrix = self.in_features * self.out_features
        return floor.seconds(touched * matrix * 4.5 / 8, 2 * self.rows * matrix, ceilings(), precision)


def random_weights(case: Case) -> jax_moe.Projection:
    """Canonical, with scales under which products are of order 1."""
    rng, groups = np.random.default_rng(0), case.groups
    return timing.random_projection(rng, (groups,), case.out_features, case.in_features, (3, 6, groups))


def chain_of(product):
    """Calls of ``product(x, weights, sizes, wait)`` one after the other; ``wait`` is an int32 zero."""

    def chain(x, weights, sizes):
        wait = jnp.int32(0)
        for call in sizes:
            y = product(x, weights, call, wait)
            wait = timing.after(y)
        return y

    return chain


def ours(case: Case, weights: jax_moe.Projection, precision) -> Method:
    """The product of this library."""

    def product(x, weights, sizes, wait):
        if case.groups == 1:  # linear has no operand that could wait but the sizes
            return jax_moe.ragged_dot(x, weights, sizes + wait, precision=precision)
        return jax_moe.ragged_dot(x, weights, sizes, group_offset=wait, precision=precision)

    return product, weights, LENGTH


def bf16(case: Case) -> Method:
    """JAX's own, with bfloat16 weights ``[G, C, N]``."""

    def product(x, weights, sizes, wait):
        if case.groups == 1:
            return jnp.dot(x + wait.astype(x.dtype), weights[0])
        return jax.lax.ragged_dot(x, weights, sizes + wait)

    shape = (case.groups, case.in_features, case.out_features)
    weights = jax.random.normal(jax.random.key(0), shape, jnp.bfloat16) * case.in_features**-0.5
    return product, weights, LENGTH if case.groups == 1 else PEER_LENGTH


def measure(case: Case, method: str, made: Method, repeats: int) -> dict:
    """One row."""
    product, weights, length = made
    sizes = case.sizes(length)
    x = jax.random.normal(jax.random.key(case.tokens), (case.rows, case.in_features), jnp.bfloat16)
    arguments = x, weights, list(map(jnp.asarray, sizes))
    run = timing.captured(chain_of(product))
    seconds = timing.seconds_per_call(lambda count: timing.run(run, arguments, count), length, repeats, limit=2)
    touched = float((sizes > 0).sum(1).mean())
    floor = case.floor_seconds(touched, method if method in ("w4a16", "w4a4") else "w4a16")
    return {
        **dataclasses.asdict(case), "method": method, "seconds": seconds, "touched": touched,
        "floor_seconds": floor, "ratio": seconds / floor,
    }  # fmt: skip


def compile_for(case: Case, precision, target: str) -> None:
    """Fills the kernel cache with what a call launches on a GPU; no GPU needed."""
    sizes = [case.groups, case.in_features, case.out_features]
    call = product_of(sizes, case.rows, case.groups, target, False, (precision, jnp.dtype(jnp.bfloat16)))
    for launch in lowering.launches(call):
        cache.compiled(launch.spec, target)


def main(
    product: Annotated[list[str] | None, typer.Option(help="G,K,C,N; may be repeated.")] = None,
    tokens: Annotated[str, typer.Option(help="Numbers of tokens, separated by commas.")] = "1,8,32,128,512,2048,8192",
    precision: Annotated[str, typer.Option(help="w4a16, w4a4, or both separated by a comma.")] = "w4a16",
    peer: Annotated[bool, typer.Option("--peer", help="Also JAX's own products, of bfloat16 weights.")] = False,
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs; the median counts.")] = 9,
    output: Annotated[pathlib.Path | None, typer.Option(help="JSON file for the results.")] = None,
    compile_target: Annotated[str | None, typer.Option("--compile-for", help="Only compile kernels for this.")] = None,
) -> None:
    """Time grouped and dense products; see the module's text."""
    precisions = options.choices("--precision", precision, Precision)
    counts = options.numbers("--tokens", tokens)
    rows = []
    for text in product or PRODUCTS:
        groups, top_k, columns, features = options.sizes("--product", text, "G,K,C,N", blocks="CN")
        cases = [Case(groups, top_k, columns, features, count) for count in counts]
        if compile_target:
            for case, kind in itertools.product(cases, precisions):
                compile_for(case, kind, compile_target)
            continue
        weights = random_weights(cases[0])
        methods = {kind: ours(cases[0], jax_moe.prepare(weights, precision=kind), kind) for kind in precisions}
        if peer:
            methods["bf16"] = bf16(cases[0])
        for case, (method, made) in itertools.product(cases, methods.items()):
            rows.append(measure(case, method, made, repeats))
            microseconds, ratio = rows[-1]["seconds"] * 1e6, rows[-1]["ratio"]
            print(f"{text:16} T {case.tokens:5} {method:6} {microseconds:9.1f} us {ratio:7.2f} x floor", flush=True)
            if output:
                output.write_text(json.dumps({"environment": environment(), "results": rows}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
