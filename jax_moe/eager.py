"""Programs of this package outside ``jax.jit``."""

from collections.abc import Callable
import functools
from typing import Any

import jax
import jax.core
from jax.extend.core import Primitive
import jax.numpy as jnp


def run_eagerly(primitive: Primitive, *operands, **static):
    """A primitive outside ``jax.jit``: a program of its own, as for those of JAX."""
    with jax.disable_jit(False):  # else the jitted function would come back here
        return as_one_op(primitive.name, _jitted(primitive, **static), *operands)


def as_one_op(name: str, function: Callable[..., Any], *args: Any) -> Any:
    """``function(*args)``, looked at as a whole for what ``jax_debug_nans`` and ``jax_debug_infs`` are to find.

    JAX itself, having found a NaN in what a program returns, runs the program again op by op. For our primitives that
    is the same program again, and an eager ``jax.shard_map`` that is given a NaN comes back to itself: neither ends.

    Raises:
      FloatingPointError: found one.
    """
    config: Any = jax.config
    tests = [("nan", jnp.isnan, config.jax_debug_nans), ("inf", jnp.isinf, config.jax_debug_infs)]
    tests = [(kind, is_kind) for kind, is_kind, wanted in tests if wanted]
    if not tests:
        return function(*args)
    with jax.debug_nans(False), jax.debug_infs(False):
        results = function(*args)
        for result in jax.tree.leaves(results):
            if isinstance(result, jax.core.Tracer) or not jnp.issubdtype(result.dtype, jnp.floating):
                continue
            for kind, is_kind in tests:
                if is_kind(result).any():
                    raise FloatingPointError(f"invalid value ({kind}) encountered in {name}")
    return results


@functools.lru_cache(maxsize=256)  # of eager calls: T is part of the problem, and every batch may have another
def _jitted(primitive: Primitive, **static):
    def run(*operands):
        return primitive.bind(*operands, **static)

    run.__name__ = primitive.name.removeprefix("jax_moe_")  # in logs and profiles
    return jax.jit(run)
