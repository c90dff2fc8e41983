"""A lint over a kernel's PTX: :func:`lint.check.check`."""
