"""The GPU kernels: targets, programs, compilation (``README.md``)."""
