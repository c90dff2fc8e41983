"""The table of targets, and which of them a device, a layout or a user's word stands for."""

from collections.abc import Iterator
import contextlib
import contextvars
import dataclasses
import re
from typing import Any, get_args

import jax

from jax_moe import layouts
from jax_moe.experts import CANONICAL
from jax_moe.kernels.sm90.target import SM90
from jax_moe.kernels.sm100.target import SM100
from jax_moe.kernels.target import Card, Target
from jax_moe.problem import Precision

TARGETS: dict[str, Target] = {target.name: target for target in (SM90, SM100)}


def layout_for(name: str | None, precision: Precision | None, argument: str = "target") -> layouts.Layout:
    """The layout that weights need on a target; ``name`` may also be a layout's own, None is JAX's default device.

    ``argument``: what a caller calls ``name``.

    Raises:
      ValueError: no such target or precision, no kernels for the device, or the target needs to know the precision.
    """
    if precision is not None and precision not in get_args(Precision):
        raise ValueError(f"precision: got {precision!r}, needs one of {', '.join(map(repr, get_args(Precision)))}")
    if name is None:
        device = _default_device()
        if device.platform != "gpu":
            return layouts.get(CANONICAL)
        target = for_device(device)
    elif name in layouts.LAYOUTS:
        return layouts.get(name)
    elif name in TARGETS:
        target = TARGETS[name]
    else:
        known = ", ".join(map(repr, (*TARGETS, *layouts.LAYOUTS)))
        raise ValueError(f"{argument}: got {name!r}, needs one of {known}")
    if precision not in (None, *target.layouts):
        raise ValueError(f"precision: got {precision!r}, {target.name} has kernels for {', '.join(target.layouts)}")
    wanted = set(target.layouts.values()) if precision is None else {target.layouts[precision]}
    if len(wanted) > 1:
        raise ValueError(
            f"precision: got None, but {target.name} has a layout for each ({dict(target.layouts)}): choose one"
        )
    return layouts.get(wanted.pop())


def for_device(device: Any) -> Target:
    """The target whose kernels run on a GPU.

    Raises:
      ValueError: there are none for it.
    """
    capability = device.compute_capability
    for target in TARGETS.values():
        if capability in target.compute_capabilities:
            return target
    known = ", ".join(capability for target in TARGETS.values() for capability in target.compute_capabilities)
    raise ValueError(f"target: a GPU of compute capability {capability}, kernels exist for {known}")


def for_call(
    layout: str, precision: Precision, argument: str = "experts", function: str = "fused_moe"
) -> tuple[Target, Card]:
    """What runs a call on weights of this layout: the GPU at hand if it does, else the first target that does.

    ``argument``: what a caller of ``function`` calls the weights.

    Raises:
      ValueError: no target multiplies weights of this layout in this precision.
    """
    fitting = [target for target in TARGETS.values() if target.layouts.get(precision) == layout]
    if not fitting:
        advice = ", or ".join(
            f"jax_moe.prepare({argument}, {target.name!r}"
            + (f", {precision!r})" if len(set(target.layouts.values())) > 1 else ")")
            for target in TARGETS.values()
            if precision in target.layouts
        )
        raise ValueError(
            f"{argument}.layout: got {layout!r}, on a GPU {function} with precision={precision!r} needs prepared "
            f"weights: {advice}"
        )
    card = _planned.get()
    for target in fitting:
        if card is not None and card.name in [row.name for row in target.cards]:
            return target, card
    for device in _gpus():
        for target in fitting:
            if device.compute_capability in target.compute_capabilities:
                return target, card_of(target, device)
    return fitting[0], fitting[0].cards[0]


def card_of(target: Target, device: Any) -> Card:
    """The row of a GPU, or the first one, with as many multiprocessors as the GPU has (or its slice, with MIG)."""
    card = row_of(target, device) or target.cards[0]
    there = getattr(device, "core_count", None)
    return dataclasses.replace(card, multiprocessors=there) if there else card


def row_of(target: Target, device: Any) -> Card | None:
    """The row of a GPU, as it is in the table; None if there is none."""
    for card in target.cards:
        if re.search(rf"\b{re.escape(card.name)}\b", device.device_kind):  # a GH200 is no H200, and that is no H20
            return card
    return None


def card_named(target: Target, name: str) -> Card:
    """A row by its name.

    Raises:
      ValueError: there is none of that name.
    """
    for card in target.cards:
        if card.name == name:
            return card
    known = ", ".join(repr(card.name) for card in target.cards)
    raise ValueError(f"card: got {name!r}, {target.name} has {known}")


@contextlib.contextmanager
def planned_for(card: Card) -> Iterator[None]:
    """Within this, calls that ``card``'s target runs are planned for it, and not for what is at hand."""
    token = _planned.set(card)
    try:
        yield
    finally:
        _planned.reset(token)


_planned: contextvars.ContextVar[Card | None] = contextvars.ContextVar("planned", default=None)


def _default_device() -> Any:
    device = jax.config.jax_default_device or jax.local_devices()[0]  # pyright: ignore[reportAttributeAccessIssue]
    return jax.local_devices(backend=device)[0] if isinstance(device, str) else device


def _gpus() -> list[Any]:
    return [device for device in jax.local_devices() if device.platform == "gpu"]
