"""Checks of single arguments: the errors name the argument, what it got and what it needs."""

import jax
import jax.core
import jax.numpy as jnp
import numpy as np


def array(name: str, value, dtype, shape) -> tuple[int, ...]:
    """Checks dtype (None: any) and shape; returns the shape.

    A string in ``shape`` stands for any size, and "..." at its start for any leading axes.
    """
    _is_array(name, value)
    if dtype is not None and value.dtype != dtype:
        raise TypeError(f"{name}: got dtype {value.dtype}, needs {jnp.dtype(dtype)}")
    leading = max(len(value.shape) - len(shape) + 1, 0) if shape[:1] == ("...",) else 0
    last = shape[1:] if shape[:1] == ("...",) else shape
    matches = len(value.shape) == leading + len(last) and all(
        isinstance(want, str) or got == want for got, want in zip(value.shape[leading:], last, strict=True)
    )
    if not matches:
        wanted = ", ".join(map(str, shape))
        raise ValueError(f"{name}: got shape {tuple(value.shape)}, needs [{wanted}]")
    return tuple(value.shape)


def instance(name: str, value, expected) -> None:
    """Checks the type of ``value``: a class or a union of classes."""
    if not isinstance(value, expected):
        names = " or ".join(cls.__name__ for cls in getattr(expected, "__args__", (expected,)))
        got = f"the class {value.__name__} itself" if isinstance(value, type) else type(value).__name__
        raise TypeError(f"{name}: got {got}, needs {names}")


def integer(name: str, value) -> int:
    """Checks that ``value`` is an integer, Python's or NumPy's, and returns it as an int."""
    if not isinstance(value, int | np.integer) or isinstance(value, bool):
        raise TypeError(f"{name}: got {value!r}, needs an int")
    return int(value)


def choice(name: str, value, choices) -> None:
    """Checks that ``value`` is one of a ``Literal``'s."""
    allowed = choices.__args__
    if value not in allowed:
        raise ValueError(f"{name}: got {value!r}, needs one of {', '.join(map(repr, allowed))}")


def floats(name: str, value, shape) -> tuple[int, ...]:
    """Checks that ``value`` is an array of any float dtype, and its shape as :func:`array` does."""
    _is_array(name, value)
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise TypeError(f"{name}: got dtype {value.dtype}, needs floats")
    return array(name, value, None, shape)


def in_one_place(name: str, value) -> None:
    """Checks that an array's values are not spread over devices, as far as that is known."""
    if not isinstance(value, jax.Array):
        return
    sharding = jax.typeof(value).sharding if isinstance(value, jax.core.Tracer) else value.sharding
    if not sharding.is_fully_replicated:
        raise ValueError(f"{name}: got an array spread over {sharding.num_devices} devices, needs it in one place")


def dtype(name: str, value, allowed) -> jnp.dtype:
    """Checks that ``value`` names one of the ``allowed`` dtypes, and returns it."""
    try:
        found = None if value is None else jnp.dtype(value)
    except TypeError:
        found = None
    if found is None or found not in allowed:
        needs = " or ".join(jnp.dtype(candidate).name for candidate in allowed)
        raise TypeError(f"{name}: got {found or repr(value)}, needs {needs}")
    return found


def _is_array(name: str, value) -> None:
    if not hasattr(value, "shape") or not hasattr(value, "dtype"):
        raise TypeError(f"{name}: got {type(value).__name__}, needs an array")
