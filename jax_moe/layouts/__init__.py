"""How weights lie in memory: one object for each layout, and the table of them."""

from typing import Any

from jax_moe.kernels.sm90.layout import Wgmma
from jax_moe.kernels.sm100.layout import Tcgen05Bf16, Tcgen05Fp4
from jax_moe.layouts.base import E as E, I as I, Layout as Layout
from jax_moe.layouts.canonical import Canonical

LAYOUTS: dict[str, Layout] = {layout.name: layout for layout in (Canonical(), Wgmma(), Tcgen05Bf16(), Tcgen05Fp4())}


def get(name: str) -> Layout:
    """The layout of :attr:`jax_moe.Experts.layout`.

    Raises:
      ValueError: there is none of that name.
    """
    if name not in LAYOUTS:
        raise ValueError(f"experts.layout: got {name!r}, needs one of {', '.join(map(repr, LAYOUTS))}")
    return LAYOUTS[name]


def current_name(name: Any) -> Any:
    """What a layout that an earlier version called ``name`` is called now; ``name`` itself where it is not known."""
    return next((layout.name for layout in LAYOUTS.values() if name in layout.former_names), name)
