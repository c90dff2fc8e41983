"""Products with NVFP4 weights outside a MoE layer: ``jax_moe.ragged_dot``, and ``jax_moe.linear`` of one group."""
