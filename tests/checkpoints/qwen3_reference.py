"""Qwen3-MoE in plain NumPy and float64, token by token where that is plainest: what the example must compute.

It shares nothing with the example or with ``jax_moe`` but the dequantised weights. ``rounding`` is called with each
value that the example stores or multiplies in less than float32, so a test can round where the example does.
"""

from collections.abc import Callable
import dataclasses
from typing import Any

import numpy as np

Rounding = Callable[[str, np.ndarray], np.ndarray]


def exact(place: str, values: np.ndarray) -> np.ndarray:
    return values


@dataclasses.dataclass(frozen=True)
class Model:
    """float64 weights: a dict for each layer, matrices ``[out, in]``, experts ``[E, ...]``."""

    embed: np.ndarray
    unembed: np.ndarray
    norm: np.ndarray
    layers: list[dict[str, Any]]
    heads: int
    kv_heads: int
    top_k: int
    renormalize: bool
    theta: float
    epsilon: float

    def logits(self, tokens: np.ndarray, rounding: Rounding = exact) -> np.ndarray:
        """``[S, V]`` for the tokens ``[S]`` of one sequence."""
        x = self.embed[tokens]
        for layer in self.layers:
            x = x + self.attention(self.normalize(x, layer["attention_norm"]), layer, rounding)
            x = x + self.experts(self.normalize(x, layer["moe_norm"]), layer, rounding)
        return rounding("x", self.normalize(x, self.norm)) @ self.unembed.T

    def normalize(self, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + self.epsilon) * weight

    def attention(self, x: np.ndarray, layer: dict[str, Any], rounding: Rounding) -> np.ndarray:
        x = rounding("x", x)
        length = len(x)
        query = (x @ layer["query"].T).reshape(length, self.heads, -1)
        key, value = ((x @ layer[name].T).reshape(length, self.kv_heads, -1) for name in ("key", "value"))
        query = rounding("query", self.turn(self.normalize(query, layer["query_norm"])))
        key = rounding("key", self.turn(self.normalize(key, layer["key_norm"])))
        value = rounding("value", value)
        y = np.zeros_like(query)
        for head in range(self.heads):
            mine = self.keys_of(head)
            for position in range(length):
                seen = self.visible(position, length)
                scores = key[:seen, mine] @ query[position, head] / np.sqrt(query.shape[-1])
                weights = np.exp(scores - scores.max())
                y[position, head] = rounding("probability", weights / weights.sum()) @ value[:seen, mine]
        return rounding("attention", y.reshape(length, -1)) @ layer["output"].T

    def keys_of(self, head: int) -> int:
        """The head of keys and values that a query head reads."""
        return head // (self.heads // self.kv_heads)

    def visible(self, position: int, length: int) -> int:
        """How many keys a position reads."""
        return position + 1

    def turn(self, x: np.ndarray) -> np.ndarray:
        """Rotary embedding: each pair (d, d + D/2) is a complex number that turns with the position."""
        half = x.shape[-1] // 2
        pairs = x[..., :half] + 1j * x[..., half:]
        angles = np.arange(len(x))[:, None] * self.theta ** (-np.arange(half) / half)
        turned = pairs * np.exp(1j * angles)[:, None]
        return np.concatenate([turned.real, turned.imag], -1)

    def experts(self, x: np.ndarray, layer: dict[str, Any], rounding: Rounding) -> np.ndarray:
        logits = x @ layer["router"].T
        y = np.zeros_like(x)
        for token, row in enumerate(logits):
            probability = np.exp(row - row.max())
            probability /= probability.sum()
            chosen = np.argsort(-probability, kind="stable")[: self.top_k]
            total = probability[chosen].sum() if self.renormalize else 1.0
            seen = rounding("moe_x", x[token])
            for expert in chosen:
                gate, up = (part @ seen for part in layer["gate_up"][expert])
                h = rounding("intermediate", gate / (1 + np.exp(-gate)) * up)
                y[token] += probability[expert] / total * (layer["down"][expert] @ h)
        return y
