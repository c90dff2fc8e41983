"""flax.nnx modules. The only part of the package that needs flax: ``pip install jax_moe[nn]``."""

from jax_moe.nn.moe import MoE as MoE, Quantized as Quantized
