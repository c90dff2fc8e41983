"""flax.nnx modules. The only part of the package that needs flax."""

from jax_moe.nn.moe import MoE as MoE, Quantized as Quantized
