"""Cases, methods of routing and digests for the tests of docs/determinism.md: the same for ever, on any machine."""

import dataclasses
import hashlib

import helpers
import jax
import jax.numpy as jnp
import numpy as np

import jax_moe
from jax_moe import routing


def numbers(shape, salt: int) -> np.ndarray:
    """uint32, the same for ever: NumPy may change what its generators give."""
    state = np.arange(salt * 1_000_003, salt * 1_000_003 + np.prod(shape, dtype=int), dtype=np.uint64)
    for _ in range(3):
        state = (state ^ (state >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
    return (state >> np.uint64(32)).astype(np.uint32).reshape(shape)


def floats(shape, salt: int) -> np.ndarray:
    """float32 in [-2, 2)."""
    return ((numbers(shape, salt) >> 8).astype(np.float32) - 2.0**23) / np.float32(2.0**22)


def case(tokens: int, num_experts=5, top_k=3, hidden=1056, intermediate=48) -> helpers.Case:
    """A case that is the same for ever; with a GEMM of more than one panel of the CPU's."""

    def projection(salt, lead, rows, columns, input_scale):
        scales = (numbers((*lead, rows, columns // 16), salt) % 16 + 0x30).astype(np.uint8)
        return jax_moe.Projection(
            jnp.asarray(numbers((*lead, rows, columns // 2), salt + 1).astype(np.uint8)),
            jnp.asarray(scales.view(jnp.float8_e4m3fn)),
            jnp.asarray((np.abs(floats(lead, salt + 2)) + 0.5) / np.float32(4 * columns**0.5)),
            jnp.asarray(input_scale),
            jnp.asarray(floats((*lead, rows), salt + 3)),
        )

    experts = jax_moe.Experts(
        projection(10, (num_experts, 2), intermediate, hidden, np.float32(1 / 700)),
        projection(20, (num_experts,), hidden, intermediate, np.float32(1 / 300) + np.zeros(num_experts, np.float32)),
    )
    ids = (np.arange(top_k) + numbers((tokens, 1), 2) % num_experts) % num_experts
    routes = jax_moe.Routing(jnp.asarray(ids, jnp.int32), jnp.asarray(floats((tokens, top_k), 3)))
    return helpers.Case(jnp.asarray(floats((tokens, hidden), 1), jnp.bfloat16), experts, routes)


def rows(case: helpers.Case, chosen) -> helpers.Case:
    x, routes = jax.tree.map(lambda a: a[np.asarray(chosen)], (case.x, case.routing))
    return dataclasses.replace(case, x=x, routing=routes)


def digest(*arrays) -> str:
    return hashlib.sha256(b"".join(np.ascontiguousarray(a).tobytes() for a in arrays)).hexdigest()[:16]


FUSED_MOE = {
    "w4a16-atomic": "c4eacffca905b580", "w4a16-ordered": "d4fafe1c3ecc27fa",
    "w4a4-atomic": "186cefaa0f7d5eb4", "w4a4-ordered": "33905244bbcba8b9",
}  # fmt: skip
"""Digests of outputs. One that has to change is a change of the numbers: say so in the change log."""

METHODS = {
    "Softmax": (6, jax_moe.Softmax()),
    "Softmax of all": (6, jax_moe.Softmax(renormalize=False)),
    "Sigmoid": (6, jax_moe.Sigmoid()),
    "Sigmoid of some": (6, jax_moe.Sigmoid(renormalize=True)),
    "Llama4": (1, jax_moe.Llama4()),
    "SparseMixer": (2, jax_moe.SparseMixer(0.2)),
    "DeepSeekV2": (6, jax_moe.DeepSeekV2()),
    "DeepSeekV3": (8, jax_moe.DeepSeekV3()),
    "DeepSeekV4": (6, jax_moe.DeepSeekV3(1, 1, scores="sqrtsoftplus")),
}


SCORES = ("sigmoid", "softmax", "sqrtsoftplus")


def every_route(logits) -> dict:
    """What each method makes of logits, and the scores of all experts, which some look at and ``HashRouter`` weighs."""
    routes = {name: jax_moe.route(logits, k, method) for name, (k, method) in METHODS.items()}
    made = {name: (made.expert_ids, made.weights) for name, made in routes.items()}
    return made | {kind: (routing.score(logits, kind),) for kind in SCORES}


def route_digests(routes) -> dict[str, str]:
    return {name: digest(*routing) for name, routing in routes.items()}


ROUTES = {
    "Softmax": "a67246ff883801f6", "Softmax of all": "b092a241b3a022f2", "Sigmoid": "146217c0ef16c564",
    "Sigmoid of some": "fe862ec23f4dccfa", "Llama4": "656e51e2bb655364", "SparseMixer": "02243148b671edd8",
    "DeepSeekV2": "3b64e04c7db9b07a", "DeepSeekV3": "28300e661be5f714", "DeepSeekV4": "2349e3eaad9162e6",
    "sigmoid": "c72f10908eb15b88", "softmax": "77a2703418b9cb8a",
    "sqrtsoftplus": "79c8305e3cff0c48",
}  # fmt: skip
"""Digests of what each method makes of the same logits."""
