"""What a target is made of: a GPU architecture that kernels exist for, its cards, and the program of one call."""

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any

import jax

from jax_moe.kernels.specs import Spec
from jax_moe.problem import Precision, Problem
from jax_moe.product.problem import Product


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """What no call on a card can beat: the floor that times are compared with (``cli/floor.py``).

    Attributes:
      bytes_per_second: read from memory.
      flop_per_second: of products, by precision.
      source: where the two are from, in words.
    """

    bytes_per_second: float
    flop_per_second: Mapping[Precision, float]
    source: str


@dataclasses.dataclass(frozen=True)
class Card:
    """One model of GPU.

    Attributes:
      name: words of what JAX calls it (``device_kind``).
      multiprocessors: a persistent grid has a CTA, or several, for each. Where a call is lowered on a machine with the
        GPU, those that are there count: a slice of a GPU has fewer. On a GPU with fewer than a program was made for,
        the surplus CTAs run last; the results are the same.
      terabytes_per_second: of its memory, by the data sheet.
      costs: what its target chooses kernels by; measured on it, or derived as the target says.
      ceilings: None: measured where they are needed.
    """

    name: str
    multiprocessors: int
    terabytes_per_second: float
    costs: Any = dataclasses.field(repr=False, hash=False)  # may be a dictionary
    ceilings: Ceilings | None = dataclasses.field(default=None, repr=False, hash=False)


@dataclasses.dataclass(frozen=True)
class Launch:
    """One kernel of a call.

    Attributes:
      name: of the step, in attributes and messages.
      spec: the kernel.
      grid: CTAs.
      arguments: for each of ``spec.parameters`` an operand (``operands.py``, ``product/problem.py``), a workspace or
        "out" by name; a number; or None, a null pointer.
    """

    name: str
    spec: Spec
    grid: int
    arguments: Mapping[str, str | int | None]


@dataclasses.dataclass(frozen=True)
class Program:
    """What one call launches.

    Attributes:
      launches: in order; none without tokens.
      adds: name of the first launch that adds into the output, which must be zero by then; None: the output is written.
      workspaces: results 1, 2, ... of the call, by name, in order. The kernels write all that they read of them.
      weight_bytes: of each operand that holds weights.
      sizes: those that it was made for, as the handler names them (``ffi/cuda/kinds.h``).
    """

    launches: tuple[Launch, ...]
    adds: str | None
    workspaces: Mapping[str, jax.ShapeDtypeStruct]
    weight_bytes: Mapping[str, int]
    sizes: Mapping[str, int]

    def overlaps(self, launch: Launch) -> bool:
        """Whether a launch may start before the one in front of it has ended.

        The first one may not, whatever its kernel could do: what is in front of it writes the operands, which kernels
        read without a wait.
        """
        return launch.spec.overlap and launch is not self.launches[0]


@dataclasses.dataclass(frozen=True)
class Target:
    """A GPU architecture.

    Attributes:
      name: what the compiler calls it.
      generation: what people call it, and the cards that it was run on.
      compute_capabilities: of the devices that run its kernels, as JAX has them.
      layouts: the layout of prepared weights for each precision that it has kernels for.
      cards: known ones; the first is what programs are made for where no card is at hand.
      program: builds the program of one call of ``fused_moe`` for a card.
      product: builds that of a grouped product; None: there are no kernels for it.
    """

    name: str
    generation: str
    compute_capabilities: tuple[str, ...]
    layouts: Mapping[Precision, str]
    cards: tuple[Card, ...]
    program: Callable[[Problem, Card], Program]
    product: Callable[[Product, Card], Program] | None = None
