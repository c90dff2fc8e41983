"""A custom call with attributes as one likes, nested ones too, which ``jax.ffi.ffi_call`` does not take."""

import jax
from jax.extend.core import Primitive
from jax.interpreters import mlir

_raw_call_p = Primitive("jax_moe_test_raw_call")
_raw_call_p.multiple_results = True


class _Attributes(dict):
    """By identity, so that a dictionary of arrays can be the parameter of a primitive."""

    __hash__ = object.__hash__  # type: ignore[assignment]

    def __eq__(self, other):
        return self is other


def raw_call(target: str, result_types, attributes: dict, *operands) -> list[jax.Array]:
    """The results of custom call ``target``; for use under ``jax.jit``."""
    return _raw_call_p.bind(
        *operands, target=target, result_types=tuple(result_types), attributes=_Attributes(attributes)
    )


@_raw_call_p.def_abstract_eval
def _result_types(*_, result_types, **__):
    return [jax.core.ShapedArray(result.shape, result.dtype) for result in result_types]


def _lower(ctx, *operands, target, attributes, **_):
    return jax.ffi.ffi_lowering(target)(ctx, *operands, **attributes)


mlir.register_lowering(_raw_call_p, _lower)
