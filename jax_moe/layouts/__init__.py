"""How weights lie in memory: one object for each layout, and the table of them. Nothing else asks."""

from jax_moe.layouts.base import Layout
from jax_moe.layouts.canonical import Canonical
from jax_moe.kernels.sm90.layout import Wgmma

LAYOUTS: dict[str, Layout] = {layout.name: layout for layout in (Canonical(), Wgmma())}


def get(name: str) -> Layout:
    """The layout of :attr:`jax_moe.Experts.layout`.

    Raises:
      ValueError: there is none of that name.
    """
    if name not in LAYOUTS:
        raise ValueError(f"experts.layout: got {name!r}, needs one of {', '.join(map(repr, LAYOUTS))}")
    return LAYOUTS[name]


def current_name(name: str) -> str:
    """What a layout that an earlier version called ``name`` is called now; ``name`` itself where it is not known."""
    return next((layout.name for layout in LAYOUTS.values() if name in layout.former_names), name)
