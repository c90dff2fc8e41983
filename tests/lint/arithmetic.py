"""Integer instructions on numbers."""

from collections.abc import Sequence


def exact(operation: Sequence[str], numbers: Sequence[int]) -> int | None:
    """The result, as a signed 32-bit integer; None: an operation that is not known here.

    Args:
      operation: the parts between the dots.
      numbers: the operands.
    """
    name, (a, b) = operation[0], (numbers[0], numbers[-1])
    if name in ("mul", "mad") and operation[1] != "lo":
        return None
    result = {
        "add": lambda: a + b, "sub": lambda: a - b, "neg": lambda: -a, "min": lambda: min(a, b),
        "max": lambda: max(a, b), "and": lambda: a & b, "or": lambda: a | b, "xor": lambda: a ^ b, "not": lambda: ~a,
        "mul": lambda: a * b,
        "shl": lambda: a << b if 0 <= b < 32 else 0, "shr": lambda: a >> b if a >= 0 and 0 <= b < 32 else None,
        "mad": lambda: a * numbers[1] + b,
    }.get(name, lambda: None)()  # fmt: skip
    return None if result is None else (result + 2**31) % 2**32 - 2**31
