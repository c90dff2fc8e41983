"""The operands of fused_moe's custom call: the one list of them in Python, as ``ffi/decode.h`` has that of C++."""

from collections.abc import Iterable
import operator
from typing import Any

from jax_moe.experts import Experts

OPERANDS = (
    "x", "expert_ids", "routing_weights", "expert_offset",
    "gate_up.payload", "gate_up.block_scale", "gate_up.global_scale", "gate_up.input_scale", "gate_up.bias",
    "down.payload", "down.block_scale", "down.global_scale", "down.input_scale", "down.bias",
)  # fmt: skip
"""In order. The first three lead with tokens; those with a dot are leaves of :class:`jax_moe.Experts`."""

NUM_OF_TOKENS = OPERANDS.index("expert_offset")
"""How many lead with tokens."""


def expert_operands(experts: Experts) -> dict[str, Any]:
    """The operands that ``experts`` are, by name and in order; an absent one is None."""
    return {name: operator.attrgetter(name)(experts) for name in OPERANDS if "." in name}


def fill(given: Iterable[Any], absent: tuple[str, ...], value: Any, names: tuple[str, ...] = OPERANDS) -> list[Any]:
    """One item for each of ``names``, where ``given`` has none for those in ``absent``: they get ``value``."""
    rest = iter(given)
    return [value if name in absent else next(rest) for name in names]
