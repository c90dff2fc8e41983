"""``Problem``: everything about one call that is known when it is traced."""

import dataclasses
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jax_moe import activations
from jax_moe.operands import OPERANDS

Precision = Literal["w4a16", "w4a4", "w4a4_dynamic"]
Combine = Literal["atomic", "ordered"]
WeightOn = Literal["output", "input"]
XForm = Literal["bfloat16", "rounded", "parcels"]
OUT_DTYPES = (jnp.bfloat16, jnp.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What a call computes and how, without any size: keywords of :func:`jax_moe.fused_moe`, which explains them."""

    activation: activations.Activation
    precision: Precision
    combine: Combine
    weight_on: WeightOn
    out_dtype: Any
    command_buffer: bool
    batch_invariant: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem(Options):
    """All that is static about one call: its options and its sizes. Hashable, so that it can be a static argument.

    Attributes:
      num_tokens, top_k, hidden_size: T, K and H.
      local_experts: L, the experts that are held here.
      num_experts: E, those that routes may name; None: not known, at least the local ones.
      intermediate_size: the local I, padding of a prepared layout included.
      layout: of the experts.
      absent: the optional operands that are not given (``operands.py``).
      x_form: "rounded": x has gone through what w4a4 does to it: it is code * block scale, without the global scale.
        "parcels": that too, and the parcels that it came in (``parcels.py``) are an operand behind all others. On a GPU
        the custom call takes them in the place of x.
    """

    op: ClassVar[str] = "fused_moe"
    operand_names: ClassVar[tuple[str, ...]] = OPERANDS
    when_sharded: ClassVar[str] = (
        "Call jax_moe.sharded_moe(..., mesh=mesh), or put fused_moe in a jax.shard_map over all the mesh's axes."
    )

    num_tokens: int
    top_k: int
    local_experts: int
    num_experts: int | None = None
    hidden_size: int
    intermediate_size: int
    layout: str
    absent: tuple[str, ...]
    x_form: XForm = "bfloat16"

    @property
    def num_routes(self) -> int:
        """(token, slot) pairs: T*K."""
        return self.num_tokens * self.top_k

    @property
    def num_operands(self) -> int:
        """Those of ``operand_names`` that are given."""
        return len(self.operand_names) - len(self.absent)

    @property
    def has_gate_up_bias(self) -> bool:
        return "gate_up.bias" not in self.absent

    @property
    def has_down_bias(self) -> bool:
        return "down.bias" not in self.absent

    def without_parcels(self) -> "Problem":
        """The call that reads x itself."""
        return dataclasses.replace(self, x_form="rounded") if self.x_form == "parcels" else self

    def attributes(self) -> dict[str, object]:
        """The custom call's attributes, as the handlers' ``ffi/decode.h`` decodes them."""
        alpha, beta, limit = activations.parameters(self.activation)
        return {
            # Values of their own, because a library from before them would ignore an attribute, and round x again.
            "precision": self.precision + {"bfloat16": "", "rounded": "_rounded_x", "parcels": "_parcels"}[self.x_form],
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
    x_rows = tokens if problem.weight_on == "output" else routes
    int32, float32 = jnp.int32, jnp.float32
    workspaces = [
        jax.ShapeDtypeStruct((routes,), int32),  # route_order: permuted row -> route
        jax.ShapeDtypeStruct((problem.local_experts + 1,), int32),  # expert_starts: first permuted row
        jax.ShapeDtypeStruct((problem.local_experts,), int32),  # active_experts: those that have rows
        jax.ShapeDtypeStruct((x_rows, hidden), float32),  # activations
        jax.ShapeDtypeStruct((routes, problem.intermediate_size), float32),  # intermediate, rounded
        jax.ShapeDtypeStruct((sum_rows, hidden), float32),  # sums
    ]
    if problem.precision == "w4a4_dynamic":
        workspaces += [jax.ShapeDtypeStruct((rows,), float32) for rows in (x_rows, routes)]  # scales of the two
    return workspaces
