"""PTX text as data: :mod:`ptx.parser`."""
