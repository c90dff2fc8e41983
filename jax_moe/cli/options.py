"""Options that are more than a word or a number, read in one place: every mistake names its option.

The functions take the option's name and its text, and raise TypeError or ValueError.
"""

from collections.abc import Iterable
import contextlib
import re
from typing import Any

import jax.numpy as jnp

from jax_moe import activations, arguments, nvfp4, shapes

ACTIVATIONS = {
    cls.__name__: cls for cls in (activations.SwiGLU, activations.GeGLU, activations.ReLU2, activations.SiTU)
}


def one_of(option: str, text: str, names: Iterable[str]) -> str:
    """One of ``names``."""
    if text not in names:
        raise ValueError(f"{option}: got {text!r}, needs one of {', '.join(names)}")
    return text


def choices(option: str, text: str, allowed) -> list[Any]:
    """Values of a ``Literal``, separated by commas."""
    values = text.split(",")
    for value in values:
        arguments.choice(option, value, allowed)
    return values


def dtypes(option: str, text: str, allowed) -> list[jnp.dtype]:
    """Some of the ``allowed`` dtypes, separated by commas."""
    return [arguments.dtype(option, value, allowed) for value in text.split(",")]


_MOST = 10**6
"""Far more than a call has tokens or a model layers; and a range of so many is still a small list."""


def numbers(option: str, text: str, *, least: int = 1) -> list[int]:
    """Numbers and ranges that include both ends: ``1,32`` or ``1-8192``; none below ``least`` or above a million."""
    found = []
    for part in text.split(","):
        match = re.fullmatch(r"([0-9]+)(?:-([0-9]+))?", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (least - 1, 0)
        if not least <= first <= last <= _MOST:
            raise ValueError(
                f"{option}: got {part!r}, needs numbers from {least} to {_MOST}, as 1,32, or ranges, as 1-8192"
            )
        found += range(first, last + 1)
    return found


def models(letters: str) -> str:
    """What :func:`model` takes, for help and errors."""
    return f"one of {', '.join(shapes.MODELS)}, or {letters}"


def model(option: str, text: str, letters: str) -> shapes.LayerShape:
    """A model's name, or experts, top-k, hidden and intermediate size, as ``128,8,2048,768``, which are ``letters``."""
    if text in shapes.MODELS:
        return shapes.MODELS[text]
    return shapes.LayerShape(*sizes(option, text, letters, blocks="HI", needs=models(letters)))


def sizes(option: str, text: str, letters: str, *, blocks: str, needs: str | None = None) -> list[int]:
    """Positive integers separated by commas, one for each of ``letters``; those in ``blocks`` fill whole blocks."""
    numbers, names = text.split(","), letters.split(",")
    if len(numbers) != len(names) or not all(re.fullmatch(r"0*[1-9][0-9]*", number) for number in numbers):
        raise ValueError(f"{option}: got {text!r}, needs {needs or letters}: {len(names)} positive integers")
    found = list(map(int, numbers))
    for name, size in zip(names, found, strict=True):
        if name in blocks and size % nvfp4.BLOCK_SIZE:
            raise ValueError(f"{option}: got {name} = {size}, needs a multiple of {nvfp4.BLOCK_SIZE}")
    return found


def activation(option: str, text: str) -> activations.Activation:
    """``SwiGLU`` or ``SwiGLU,1.702,1,7``: the name, then alpha, beta and limit (:func:`activations.parameters`)."""
    word, *numbers = text.split(",")
    with contextlib.suppress(KeyError, ValueError):
        if not numbers:
            return ACTIVATIONS[word]()
        alpha, beta, limit = map(float, numbers)
        bound = None if limit == float("inf") else limit
        values = {"SwiGLU": (alpha, beta, bound), "SiTU": (beta, bound)}.get(word, ())
        function = ACTIVATIONS[word](*values)
        if activations.parameters(function) == (alpha, beta, limit):  # else it takes no such number
            return function
    raise ValueError(
        f"{option}: got {text!r}, needs one of {', '.join(ACTIVATIONS)}, by itself or with alpha,beta,limit behind it: "
        "three numbers, 0,0,inf where it takes none"
    )
