"""What scales of each row gain over calibrated ones: the error of 4-bit activations, on a CPU.

    python benchmarks/activation_scales.py

A layer with random weights, T tokens that it is calibrated on, and T others that both kinds of w4a4 compute. Errors are
relative to what w4a16 computes of the same tokens: of all of them, and the median of each token's own.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

import jax_moe
from jax_moe import shapes
from jax_moe.cli import timing

SHAPE = shapes.LayerShape(num_experts=8, top_k=2, hidden_size=1024, intermediate_size=512)
TOKENS = 512


def normal(rng) -> np.ndarray:
    """Every token alike."""
    return rng.normal(size=(TOKENS, SHAPE.hidden_size))


def heavy_values(rng) -> np.ndarray:
    """Student's t with 3 degrees of freedom."""
    return rng.standard_t(3, size=(TOKENS, SHAPE.hidden_size))


def heavy_tokens(rng) -> np.ndarray:
    """Tokens of different size, by a factor of e as one standard deviation."""
    return normal(rng) * rng.lognormal(0, 1, (TOKENS, 1))


def massive_tokens(rng) -> np.ndarray:
    """One token in 128 has a value of 2000, as the first tokens of a text have in many models."""
    x = normal(rng)
    x[:: TOKENS // 4, 7] = 2000
    return x


def later_ones_larger(rng) -> np.ndarray:
    """4 times the tokens that the layer was calibrated on."""
    return 4 * normal(rng)


CASES = {
    "normal": (normal, normal),
    "heavy-tailed values": (heavy_values, heavy_values),
    "tokens of many sizes": (heavy_tokens, heavy_tokens),
    "a few massive tokens": (massive_tokens, massive_tokens),
    "4 times what was seen": (normal, later_ones_larger),
}


def errors(got: jax.Array, wanted: jax.Array) -> tuple[float, float]:
    """Relative, of all tokens and of the median token."""
    error, size = (np.linalg.norm(np.asarray(a, np.float64), axis=1) for a in (got - wanted, wanted))
    return float(np.linalg.norm(error) / np.linalg.norm(size)), float(np.median(error / size))


def main() -> None:
    """Prints the table."""
    rng = np.random.default_rng(0)
    experts = timing.random_experts(SHAPE, 0)
    gate_up, down = (dataclasses.replace(p, input_scale=None) for p in (experts.gate_up, experts.down))
    experts = dataclasses.replace(experts, gate_up=gate_up, down=down)
    ids, weights, _ = timing.routings(SHAPE, TOKENS, 1, 0)
    routing = jax_moe.Routing(jnp.asarray(ids[0]), jnp.asarray(weights[0]))
    print(f"{'x':24} {'w4a4: all':>10} {'median':>8} {'w4a4_dynamic: all':>18} {'median':>8}")
    for name, (seen, given) in CASES.items():
        calibrated = jax_moe.calibrate(experts, jnp.asarray(seen(rng), jnp.bfloat16), routing)
        x = jnp.asarray(given(rng), jnp.bfloat16)
        run = functools.partial(jax_moe.fused_moe, combine="ordered", out_dtype=jnp.float32)
        wanted = run(x, experts, routing)
        static = errors(run(x, calibrated, routing, precision="w4a4"), wanted)
        dynamic = errors(run(x, experts, routing, precision="w4a4_dynamic"), wanted)
        print(f"{name:24} {static[0]:10.1%} {static[1]:8.1%} {dynamic[0]:18.1%} {dynamic[1]:8.1%}")


if __name__ == "__main__":
    main()
