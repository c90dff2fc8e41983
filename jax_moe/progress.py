"""Progress bars, in one style."""

from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def track(items: Iterable[T], description: str, *, total: int | None = None, enabled: bool = True) -> Iterator[T]:
    """Iterates over ``items`` with a bar on a terminal, if it takes longer than a second; never in a log file."""
    import tqdm  # here, because importing jax_moe must stay quick

    return iter(tqdm.tqdm(items, desc=description, total=total, delay=1.0, disable=None if enabled else True))
