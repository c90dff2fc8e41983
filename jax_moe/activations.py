"""Activation functions of an expert, as small frozen objects with their parameters.

Each takes the fp32 pre-activations and returns the fp32 intermediate. Gated ones take two arguments
(gate, up), the others one. ``kind`` is the name that travels to the C++ handler and the kernels
(``ffi/problem.h`` has the same list).
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class SwiGLU:
    """``(up + beta) * gate * sigmoid(alpha * gate)``, with both inputs clamped to ``limit`` first.

    ``SwiGLU()`` is the usual one (Qwen, DeepSeek, Mixtral). gpt-oss is ``SwiGLU(alpha=1.702, beta=1.0,
    limit=7.0)``: gate is clamped from above only, up from both sides (its reference implementation).
    """

    alpha: float = 1.0
    beta: float = 0.0
    limit: float | None = None

    kind: ClassVar[str] = "swiglu"
    gated: ClassVar[bool] = True

    def __call__(self, gate: jax.Array, up: jax.Array) -> jax.Array:
        if self.limit is not None:
            gate = jnp.minimum(gate, self.limit)
            up = jnp.clip(up, -self.limit, self.limit)
        return (up + self.beta) * (gate * jax.nn.sigmoid(self.alpha * gate))


@dataclasses.dataclass(frozen=True)
class GeGLU:
    """``gelu_tanh(gate) * up``, the tanh approximation of GELU (Hendrycks & Gimpel 2016)."""

    kind: ClassVar[str] = "geglu"
    gated: ClassVar[bool] = True

    def __call__(self, gate: jax.Array, up: jax.Array) -> jax.Array:
        return jax.nn.gelu(gate, approximate=True) * up


@dataclasses.dataclass(frozen=True)
class ReLU2:
    """``relu(up) ** 2``, without a gate (So et al. 2021; Nemotron-H)."""

    kind: ClassVar[str] = "relu2"
    gated: ClassVar[bool] = False

    def __call__(self, up: jax.Array) -> jax.Array:
        return jnp.square(jnp.maximum(up, 0))


@dataclasses.dataclass(frozen=True)
class SiTU:
    """``beta * tanh(gate / beta) * sigmoid(gate) * linear_beta * tanh(up / linear_beta)``.

    The soft-clamped SwiGLU of Kimi K3, whose values are the defaults; ``linear_beta=None`` leaves ``up``
    as it is.
    """

    beta: float = 4.0
    linear_beta: float | None = 25.0

    kind: ClassVar[str] = "situ"
    gated: ClassVar[bool] = True

    def __call__(self, gate: jax.Array, up: jax.Array) -> jax.Array:
        if self.linear_beta is not None:
            up = self.linear_beta * jnp.tanh(up / self.linear_beta)
        return self.beta * jnp.tanh(gate / self.beta) * jax.nn.sigmoid(gate) * up


Activation = SwiGLU | GeGLU | ReLU2 | SiTU


def num_parts(activation: Activation) -> int:
    """P, the matrices in front of it: gate and up, or up only."""
    return 2 if activation.gated else 1


def parameters(activation: Activation) -> tuple[float, float, float]:
    """The three numbers that travel to the handler: (alpha, beta, limit); infinity means "no limit".

    Python floats, whatever the activation was made with: kernels are looked up by their ``repr``.
    """
    alpha, beta, limit = 0.0, 0.0, None
    match activation:
        case SwiGLU():
            alpha, beta, limit = activation.alpha, activation.beta, activation.limit
        case SiTU():
            beta, limit = activation.beta, activation.linear_beta
    return float(alpha), float(beta), float("inf") if limit is None else float(limit)
