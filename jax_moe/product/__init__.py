"""The grouped product on its own (``jax_moe.ragged_dot``), and the dense layer that is one group (``jax_moe.linear``)."""
