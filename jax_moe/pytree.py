"""How this package's dataclasses become pytrees that every JAX transformation and ``jax.export`` accept."""

import dataclasses
import json
from typing import TypeVar

import jax
import jax.export

_Class = TypeVar("_Class", bound=type)


def register(cls: _Class) -> _Class:
    """Class decorator for a dataclass whose static fields, if any, are strings.

    ``jax.tree_util.register_dataclass`` alone is not enough to serialise an exported function that takes one.
    """
    data = [field.name for field in dataclasses.fields(cls) if not field.metadata.get("static")]
    static = [field.name for field in dataclasses.fields(cls) if field.metadata.get("static")]

    def from_children(aux_data, children):
        return cls(**dict(zip(data + static, (*children, *aux_data), strict=True)))

    jax.tree_util.register_dataclass(cls)
    jax.export.register_pytree_node_serialization(
        cls,
        serialized_name=f"jax_moe.{cls.__name__}",
        serialize_auxdata=lambda values: json.dumps(values).encode(),
        deserialize_auxdata=json.loads,
        from_children=from_children,
    )
    return cls
