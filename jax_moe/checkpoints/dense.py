"""Experts that a checkpoint keeps in bfloat16 or FP8, quantised to NVFP4 while they are read."""

import dataclasses
import functools

import jax
import numpy as np

from jax_moe.checkpoints.families import Family
from jax_moe.checkpoints.files import CheckpointError, Files
from jax_moe.checkpoints.linear import Linear, read_plain
from jax_moe.quantize import quantize_matrix


@dataclasses.dataclass(frozen=True)
class Dense:
    """One projection of every expert, as :class:`jax_moe.checkpoints.stored.Stored` has it, without input scales.

    Attributes:
      files, prefix: the checkpoint, and what stands before an expert's number ("model.layers.3.mlp.experts.").
      parts: the name of the linear layer of each part.
      num_experts, num_rows, contraction: E, N and C.
    """

    files: Files
    prefix: str
    parts: tuple[str, ...]
    num_experts: int
    num_rows: int
    contraction: int

    format_name = "quantised on loading"
    has_input_scale = False

    @property
    def num_parts(self) -> int:
        return len(self.parts)

    @property
    def has_bias(self) -> bool:
        return any(self._module(0, part) + ".bias" in self.files.names() for part in range(self.num_parts))

    # Each leaf, and each slice of one, reads the matrix anew: memory then holds one, and XLA computes no more of the
    # rounding than it needs. The global scale is that of all rows, so a slice needs them all.

    def payload(self, expert: int, part: int, rows: slice = slice(None)) -> np.ndarray:
        """uint8 ``[N, C/2]``, or ``rows`` of it."""
        return np.asarray(_leaf(self._read(expert, part).weight, 0))[rows]

    def block_scale(self, expert: int, part: int, rows: slice = slice(None)) -> np.ndarray:
        """float8_e4m3fn ``[N, C/16]``, or ``rows`` of it."""
        return np.asarray(_leaf(self._read(expert, part).weight, 1))[rows]

    def global_scale(self, expert: int, part: int) -> np.ndarray:
        """float32 ``[]``."""
        return np.asarray(_leaf(self._read(expert, part).weight, 2))

    def input_scale(self, expert: int, part: int) -> None:
        """None: nothing was calibrated."""

    def bias(self, expert: int, part: int) -> np.ndarray:
        """float32 ``[N]``.

        Raises:
          CheckpointError: this expert has none.
        """
        bias = self._read(expert, part).bias
        if bias is None:
            raise CheckpointError(f"{self.files.directory}: {self._module(expert, part)}.bias: found no such tensor")
        return bias

    def _module(self, expert: int, part: int) -> str:
        return f"{self.prefix}{expert}.{self.parts[part]}"

    def _read(self, expert: int, part: int) -> Linear:
        linear = read_plain(self.files, self._module(expert, part))
        if linear.weight.shape != (self.num_rows, self.contraction):
            raise CheckpointError(
                f"{self.files.directory}: {self._module(expert, part)}.weight: found {list(linear.weight.shape)}, "
                f"expected {[self.num_rows, self.contraction]}"
            )
        if linear.bias is not None and not self.has_bias:
            raise CheckpointError(
                f"{self.files.directory}: {self._module(expert, part)}.bias: found a bias, expected none as expert 0"
            )
        return linear


@functools.partial(jax.jit, static_argnames="leaf")
def _leaf(matrix: jax.Array, leaf: int) -> jax.Array:
    return quantize_matrix(matrix)[leaf]


def find(
    files: Files, module: str, family: Family, num_experts: int, hidden: int, intermediate: int
) -> tuple[Dense, Dense]:
    """gate_up and down of the experts of ``module``, one linear layer for each part of each expert.

    Raises:
      CheckpointError: there is no such layer, or one tensor too many.
    """
    prefix = f"{module}.experts."
    present = files.under(prefix)
    for linears in family.projections:
        if f"{prefix}0.{linears[0]}.weight" in present:
            modules = {f"{prefix}{expert}.{name}" for expert in range(num_experts) for name in linears}
            unexplained = {name for name in present if name.rpartition(".")[0] not in modules}
            if unexplained:
                raise CheckpointError(f"{files.info(min(unexplained))}: found a tensor that is of none of the experts")
            return (
                Dense(files, prefix, linears[:-1], num_experts, intermediate, hidden),
                Dense(files, prefix, linears[-1:], num_experts, hidden, intermediate),
            )
    raise CheckpointError(
        f"{files.info(min(present))}: found no {prefix}0.{family.projections[0][0]}.weight, expected a matrix for each "
        "linear layer of each expert: only these are quantised on loading"
    )
