"""Numbers that host code and device code share; importable without the DSL."""

WORK_COUNTERS = 2
"""Words behind ``expert_tiles[L]``, one for each GEMM (``schedule.py``)."""
