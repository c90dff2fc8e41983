"""The commands of ``python -m jax_moe``, one module each."""
