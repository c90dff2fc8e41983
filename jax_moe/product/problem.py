"""``Product``: everything about one grouped product that is known when it is traced, and its operands."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jax_moe.problem import Precision

OPERANDS = (
    "x", "group_sizes", "group_offset",
    "weights.payload", "weights.block_scale", "weights.global_scale", "weights.input_scale", "weights.bias",
)  # fmt: skip
"""In order, as ``ffi/decode_product.h`` has them; those with a dot are leaves of :class:`jax_moe.Projection`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Product:
    """All that is static about one grouped product. Hashable, so that it can be a static argument.

    Attributes:
      precision, out_dtype, command_buffer, batch_invariant: as :func:`jax_moe.ragged_dot` takes them.
      num_rows, in_features, out_features: T, C and N.
      num_groups: E, the groups that have a size.
      local_groups: G, those whose matrices are held here.
      layout: of the weights.
      absent: the optional operands that are not given.
    """

    op: ClassVar[str] = "ragged_dot"
    operand_names: ClassVar[tuple[str, ...]] = OPERANDS
    when_sharded: ClassVar[str] = (
        "Put ragged_dot in a jax.shard_map over all the mesh's axes, with group_offset where they divide the groups."
    )

    precision: Precision
    out_dtype: Any
    command_buffer: bool
    batch_invariant: bool = False
    num_rows: int
    num_groups: int
    local_groups: int
    in_features: int
    out_features: int
    layout: str
    absent: tuple[str, ...]

    @property
    def has_bias(self) -> bool:
        return "weights.bias" not in self.absent

    def attributes(self) -> dict[str, object]:
        """The custom call's attributes, as the handlers' ``ffi/decode_product.h`` decodes them."""
        return {"precision": self.precision}


def cpu_workspaces(product: Product) -> list[jax.ShapeDtypeStruct]:
    """Scratch buffers of the CPU handler, as extra results of the custom call, in the order it binds them."""
    workspaces = [
        jax.ShapeDtypeStruct((product.local_groups + 1,), jnp.int32),  # group_starts: first row
        jax.ShapeDtypeStruct((product.local_groups,), jnp.int32),  # active_groups: those that have rows
        jax.ShapeDtypeStruct((product.num_rows, product.in_features), jnp.float32),  # x_rows: rounded
    ]
    if product.precision == "w4a4_dynamic":
        workspaces.append(jax.ShapeDtypeStruct((product.num_rows,), jnp.float32))  # x_row_scales
    return workspaces
