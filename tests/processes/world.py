"""What a check has to do with: the devices of all processes, and programs that run on them."""

from collections.abc import Callable
import dataclasses
import pathlib
from typing import Any

import helpers
import jax
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh
import numpy as np

import jax_moe
from jax_moe import ffi


@dataclasses.dataclass(frozen=True)
class World:
    """The devices of all processes.

    Attributes:
      devices: all of them.
      folder: one that all processes see.
      compiles: the target of a GPU for which programs are lowered, so that their kernels are in the cache, and not run.
    """

    devices: list[jax.Device]
    folder: pathlib.Path
    compiles: str | None = None

    @property
    def on_gpus(self) -> bool:
        return self.devices[0].platform == "gpu"

    def mesh(self, axis: str) -> Mesh:
        """All devices over one axis."""
        return jax.make_mesh((len(self.devices),), (axis,), axis_types=(AxisType.Auto,), devices=self.devices)

    def barrier(self, name: str) -> None:
        """Waits for all processes."""
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(name)

    def prepare(self, experts: jax_moe.Experts, precision: Any = "w4a16") -> jax_moe.Experts:
        """For the devices at hand: on CPUs they stay canonical."""
        return jax_moe.prepare(experts, self.compiles, precision, progress=False)

    def run(self, function: Callable[..., Any], *arguments: Any, eagerly: bool = True) -> list[Any]:
        """What ``function(*arguments)`` gives, eagerly and under ``jax.jit``; on a GPU captured, more than once.

        Nothing where programs are only lowered.
        """
        if self.compiles:
            _lower(function, *arguments)
            return []
        results = [function(*arguments)] if eagerly else []
        options = {"xla_gpu_graph_min_graph_size": 1} if self.on_gpus else {}
        jitted, before = jax.jit(function, compiler_options=options), ffi.counters()
        results += [jax.block_until_ready(jitted(*arguments)) for _ in range(3 if self.on_gpus else 1)]
        if self.on_gpus:
            assert ffi.counters().captured > before.captured, "the call was not captured"
        return results

    def alone(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """What a program of this process alone gives, on its first device; None where programs are only lowered."""
        if self.compiles:
            _lower(function, *arguments)
            return None
        return jax.tree.map(np.asarray, jax.jit(function)(*arguments))


def _lower(function: Callable[..., Any], *arguments: Any) -> None:
    """Its kernels are in the cache then."""
    jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",))


def assert_same(got: Any, expected: Any) -> None:
    """Each process's parts of global arrays have the bits of the same parts of ``expected``."""

    def compare(array: jax.Array, whole: Any) -> None:
        whole = np.asarray(whole)
        assert (array.shape, array.dtype) == (whole.shape, whole.dtype)
        assert array.addressable_shards
        for shard in array.addressable_shards:
            values = np.asarray(shard.data), whole[shard.index]
            if whole.dtype.itemsize > 1:  # of a sum that is zero the sign depends on the order
                values = [value + np.zeros((), whole.dtype) for value in values]
            helpers.assert_bit_equal(*values)

    assert jax.tree.structure(got) == jax.tree.structure(expected)
    jax.tree.map(compare, got, expected)


def assert_near(got: jax.Array, expected: np.ndarray, bound: float) -> None:
    """Each process's parts are within ``bound`` of the largest value."""
    for shard in got.addressable_shards:
        error = np.asarray(shard.data, np.float32) - np.asarray(expected[shard.index], np.float32)
        assert np.abs(error).max() <= bound * np.abs(np.asarray(expected, np.float32)).max()


def spread(array: Any, sharding: jax.sharding.Sharding) -> jax.Array:
    """An array of which each process gives its own part, as one that comes from a data pipeline."""
    whole = np.asarray(array)
    return jax.make_array_from_callback(whole.shape, sharding, whole.__getitem__)
