"""Small calls whose outputs a real Hopper GPU gave (``record_sm90.py``), and the emulator must give too."""

import pathlib

import helpers
import jax.numpy as jnp

FILE = pathlib.Path(__file__).with_name("sm90_outputs.npz")

_ORDERED = dict(combine="ordered", out_dtype=jnp.float32)
_SMALL = dict(tokens=5, num_experts=4, top_k=2, hidden=128, intermediate=64)
_RAGGED = dict(tokens=20, num_experts=8, top_k=4, hidden=320, intermediate=192)

CALLS = {
    # Every sum is exact, and so are all roundings but those that the definition has: one right answer.
    "exact relu2 w4a16": lambda: helpers.make_exact_case(1, gated=False, precision="w4a16", **_SMALL, **_ORDERED),
    "exact relu2 w4a4": lambda: helpers.make_exact_case(2, gated=False, precision="w4a4", **_RAGGED, **_ORDERED),
    "exact swiglu w4a16": lambda: helpers.make_exact_case(3, precision="w4a16", **_RAGGED, **_ORDERED),
    "exact swiglu w4a4, weight on input": lambda: helpers.make_exact_case(
        4, precision="w4a4", weight_on="input", **_SMALL, **_ORDERED
    ),
    # Sums that round, and approximate instructions.
    "random swiglu w4a16": lambda: helpers.make_case(5, precision="w4a16", bias=True, **_RAGGED, **_ORDERED),
    "random swiglu w4a4": lambda: helpers.make_case(6, precision="w4a4", bias=True, **_RAGGED, **_ORDERED),
}
