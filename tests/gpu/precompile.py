"""Compiles what these tests launch into the cache, for a GPU machine without the DSL.

Run ``python tests/gpu/precompile.py`` where the DSL is, with JAX_MOE_CACHE_DIR set to a folder that both machines see.
"""

import pathlib
import sys

sys.path[:0] = [str(pathlib.Path(__file__).parent), str(pathlib.Path(__file__).parents[1])]

import test_small_kernels  # noqa: E402

from jax_moe.kernels import compile as kernels  # noqa: E402

for spec in test_small_kernels.SPECS:
    print(kernels.compiled(spec, test_small_kernels.TARGET))
