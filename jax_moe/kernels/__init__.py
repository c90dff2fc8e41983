"""The GPU kernels: their specs, their compilation and what a call launches (``ABI.md``)."""
