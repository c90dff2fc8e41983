"""Quantise the experts of one layer, route tokens to them, call the op under jit, and see how exact and how fast it is.

Run it:  python examples/quickstart.py        (about 5 s)

It prints, on two cores of a Xeon with AVX-512:

                       fused_moe: T=64 H=512 I=256 E=16 K=4
    ┏━━━━━━━━━━━┳━━━━━━━━━┳━━━━━━━━━━━━━━━━━┳━━━━━━━━━━━━━━━━┳━━━━━━━━━━━━━━━┓
    ┃ precision ┃ combine ┃ error to oracle ┃ error to dense ┃ time per call ┃
    ┡━━━━━━━━━━━╇━━━━━━━━━╇━━━━━━━━━━━━━━━━━╇━━━━━━━━━━━━━━━━╇━━━━━━━━━━━━━━━┩
    │ w4a16     │ atomic  │         1.0e-06 │        1.6e-01 │       1.22 ms │
    │ w4a16     │ ordered │         1.0e-06 │        1.6e-01 │       1.29 ms │
    │ w4a4      │ atomic  │         0.0e+00 │        2.3e-01 │       1.27 ms │
    │ w4a4      │ ordered │         0.0e+00 │        2.3e-01 │       1.39 ms │
    └───────────┴─────────┴─────────────────┴────────────────┴───────────────┘
    expert weights: 12.58 MB in bfloat16, 3.54 MB in NVFP4

"Error to oracle" compares with ``jax_moe.reference``, the same function in readable float32 ``jnp``. Only the order of
float32 sums differs, so nearly all elements round to the same bfloat16. "Error to dense" compares with the layer before
quantisation: that is what NVFP4 costs on random numbers; ``language_model.py`` shows what it costs a trained model.
"""

import time

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table
import typer

import jax_moe

TOKENS, HIDDEN, INTERMEDIATE, EXPERTS, TOP_K = 64, 512, 256, 16, 4


def dense_moe(x, gate, up, down, routing):
    """The layer before quantisation, in float32: every expert computes every token and the routing picks."""
    slots = jax.nn.one_hot(routing.expert_ids, len(gate)) * routing.weights[..., None]  # [T, K, E]
    h = jax.nn.silu(jnp.einsum("th,eih->tei", x, gate)) * jnp.einsum("th,eih->tei", x, up)
    return jnp.einsum("tei,ehi,tke->th", h, down, slots)


def relative_error(got, want) -> float:
    """Relative error in the Frobenius norm."""
    got, want = got.astype(jnp.float32), want.astype(jnp.float32)
    return float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want))


def seconds_per_call(f, *args, calls: int = 20) -> float:
    """The best of some calls, after one that compiles."""
    jax.block_until_ready(f(*args))
    times = []
    for _ in range(calls):
        start = time.perf_counter()
        jax.block_until_ready(f(*args))
        times.append(time.perf_counter() - start)
    return min(times)


def main() -> None:
    """Quantise a layer's experts, run it under jit, and print how exact and how fast it is."""
    # A layer's dense weights, [out, in] as checkpoints store them; tokens; the router's logits.
    keys = jax.random.split(jax.random.key(0), 5)
    gate, up = (jax.random.normal(k, (EXPERTS, INTERMEDIATE, HIDDEN)) / HIDDEN**0.5 for k in keys[:2])
    down = jax.random.normal(keys[2], (EXPERTS, HIDDEN, INTERMEDIATE)) / INTERMEDIATE**0.5
    x = jax.random.normal(keys[3], (TOKENS, HIDDEN), jnp.bfloat16)
    logits = jax.random.normal(keys[4], (TOKENS, EXPERTS))

    # Once, when the model is loaded: 4-bit weights, and the scales of activations that w4a4 needs.
    routing = jax_moe.route(logits, TOP_K)
    experts = jax_moe.quantize_experts(gate, up, down)
    experts = jax_moe.calibrate(experts, x, routing)
    ready = jax_moe.prepare(experts)  # the layout of this device's kernels; on a CPU the experts as they are

    # In the model, under jit. Experts and Routing are pytrees: they go in and out like arrays.
    def layer(op, precision, combine):
        @jax.jit
        def run(x, experts, logits):
            return op(x, experts, jax_moe.route(logits, TOP_K), precision=precision, combine=combine)

        return run

    dense = jax.jit(dense_moe)(x.astype(jnp.float32), gate, up, down, routing)
    table = Table(title=f"fused_moe: T={TOKENS} H={HIDDEN} I={INTERMEDIATE} E={EXPERTS} K={TOP_K}")
    for column in ("precision", "combine", "error to oracle", "error to dense", "time per call"):
        table.add_column(column, justify="left" if column in ("precision", "combine") else "right")
    for precision in ("w4a16", "w4a4"):
        oracle = layer(jax_moe.reference.fused_moe, precision, "ordered")(x, experts, logits)
        for combine in ("atomic", "ordered"):
            run = layer(jax_moe.fused_moe, precision, combine)
            y = run(x, ready, logits)
            milliseconds = 1e3 * seconds_per_call(run, x, ready, logits)
            errors = relative_error(y, oracle), relative_error(y, dense)
            table.add_row(precision, combine, *(f"{error:.1e}" for error in errors), f"{milliseconds:.2f} ms")

    Console().print(table)
    weights = (gate, up, down)
    before, after = (sum(leaf.nbytes for leaf in jax.tree.leaves(tree)) for tree in (weights, experts))
    print(f"expert weights: {before / 2e6:.2f} MB in bfloat16, {after / 1e6:.2f} MB in NVFP4")


if __name__ == "__main__":
    typer.run(main)
