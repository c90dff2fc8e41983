"""How this package's dataclasses become pytrees that every JAX transformation and ``jax.export`` accept."""

import dataclasses
import json
import operator
import typing
from typing import Any, TypeVar

import jax
import jax.export

_Class = TypeVar("_Class", bound=type)


def register(cls: _Class) -> _Class:
    """Class decorator for a dataclass.

    Its static fields, whose metadata say so, may hold what JSON has a scalar for (None, bools, numbers, NumPy's too,
    strings) and dataclasses of such scalars (a routing method, an activation). A dataclass is written as its class name
    and fields; the field's annotation says which classes a file may name. ``jax.tree_util.register_dataclass`` does not
    say how to write them, so by itself it does not let an exported function that takes one be serialised.
    """
    data = [field.name for field in dataclasses.fields(cls) if not field.metadata.get("static")]
    static = [field.name for field in dataclasses.fields(cls) if field.metadata.get("static")]

    def from_children(aux_data, children):
        return cls(**dict(zip(data + static, (*children, *aux_data), strict=True)))

    def serialize(values: tuple) -> bytes:
        return json.dumps([_encode(value) for value in values], default=operator.methodcaller("item")).encode()

    def deserialize(encoded: bytes) -> tuple:
        hints = typing.get_type_hints(cls)
        return tuple(_decode(value, hints[name]) for name, value in zip(static, json.loads(encoded), strict=True))

    jax.tree_util.register_dataclass(cls)
    jax.export.register_pytree_node_serialization(
        cls,
        serialized_name=f"jax_moe.{cls.__name__}",
        serialize_auxdata=serialize,
        deserialize_auxdata=deserialize,
        from_children=from_children,
    )
    return cls


def _encode(value: Any) -> Any:
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return value
    return {type(value).__name__: dataclasses.asdict(value)}


def _decode(value: Any, annotation: Any) -> Any:
    if not isinstance(value, dict):
        return value
    ((name, fields),) = value.items()
    classes = {known.__name__: known for known in typing.get_args(annotation) or (annotation,)}
    return classes[name](**fields)
