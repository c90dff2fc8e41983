"""The static launch plan: everything about one call that is known when it is traced."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from jax_moe import activations

Precision = Literal["w4a16", "w4a4"]
Combine = Literal["atomic", "ordered"]
WeightOn = Literal["output", "input"]
OUT_DTYPES = (jnp.bfloat16, jnp.float32)
NUM_OPERANDS = 14  # as ``ffi/decode.h`` lists them


@dataclasses.dataclass(frozen=True)
class Problem:
    """The shapes and options of one ``fused_moe`` call; hashable, so that it can be a static argument.

    ``num_experts`` counts the experts held locally (L), ``total_experts`` those that routes may name (E; None: the
    local ones are all). ``intermediate_size`` is the local I, padding of a prepared layout included.
    ``command_buffer`` says whether XLA may capture the call. ``absent`` has the positions of the optional operands that
    are not given, in the order of ``ffi/decode.h``.
    """

    num_tokens: int
    top_k: int
    num_experts: int
    hidden_size: int
    intermediate_size: int
    activation: activations.Activation
    precision: Precision
    combine: Combine
    weight_on: WeightOn
    out_dtype: jnp.dtype
    layout: str
    command_buffer: bool
    total_experts: int | None = None
    absent: tuple[int, ...] = ()

    @property
    def num_routes(self) -> int:
        """(token, slot) pairs: T*K."""
        return self.num_tokens * self.top_k

    @property
    def num_operands(self) -> int:
        """Those of the call that are given."""
        return NUM_OPERANDS - len(self.absent)

    def attributes(self) -> dict[str, object]:
        """The custom call's attributes, as the handlers' ``ffi/decode.h`` decodes them."""
        alpha, beta, limit = activations.parameters(self.activation)
        return {
            "precision": self.precision,
            "combine": self.combine,
            "weight_on": self.weight_on,
            "activation": self.activation.kind,
            "alpha": np.float32(alpha),
            "beta": np.float32(beta),
            "limit": np.float32(limit),
        }


def cpu_workspaces(problem: Problem) -> list[jax.ShapeDtypeStruct]:
    """Scratch buffers of the CPU handler, as extra results of the custom call, in the order it binds them.

    XLA allocates and reuses them like any temporary; the handler allocates nothing that grows with the model.
    Activations are widened to float32 once here, so that the inner loop need not.
    """
    tokens, routes, hidden = problem.num_tokens, problem.num_routes, problem.hidden_size
    in_place = 0 if problem.out_dtype == jnp.float32 else tokens
    sum_rows = routes if problem.combine == "ordered" else in_place
    int32, float32 = jnp.int32, jnp.float32
    return [
        jax.ShapeDtypeStruct((routes,), int32),  # route_order: permuted row -> route
        jax.ShapeDtypeStruct((problem.num_experts + 1,), int32),  # expert_starts: first permuted row
        jax.ShapeDtypeStruct((problem.num_experts,), int32),  # active_experts: those that have rows
        jax.ShapeDtypeStruct((tokens if problem.weight_on == "output" else routes, hidden), float32),  # activations
        jax.ShapeDtypeStruct((routes, problem.intermediate_size), float32),  # intermediate, rounded
        jax.ShapeDtypeStruct((sum_rows, hidden), float32),  # sums
    ]
