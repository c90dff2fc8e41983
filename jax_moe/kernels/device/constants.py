"""Numbers that host code and device code share; importable without the DSL."""

WORK_COUNTERS = 2
"""Words behind ``expert_tiles[L]``, one for each GEMM (``schedule.py``)."""

FEW_ROUTES = 64
"""Routes that a CTA of a GEMM makes a tile map of by itself (``few_routes.py``); whole warps."""
