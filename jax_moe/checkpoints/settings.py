"""Settings of ``config.json``, read with checks: nothing of another type, and no null, becomes a model of its own."""

import dataclasses
import math
from typing import Any

from jax_moe.checkpoints.files import brief, CheckpointError

Config = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Settings:
    """The text model's part of ``config.json``, as one layer sees it.

    Each reader takes the names that a setting has had; a list has a value for each layer. ``default`` is the value of a
    configuration without the setting; without a default it is required. They raise CheckpointError, naming the file and
    the key, for a value of another type or out of range, null included, and for two names with different values.

    Attributes:
      config: the settings.
      where: the file, for messages.
      layer: number of the layer, or None where it must not matter.
    """

    config: Config
    where: str
    layer: int | None = None

    def integer(self, *keys: str, default: int | None = None, least: int = 1) -> int:
        """An integer in ``[least, 2**31)``."""
        key, value = self._find(keys, default)
        if type(value) is not int or not least <= value < 2**31:
            raise self.error(key, value, "a positive integer" if least == 1 else f"an integer of at least {least}")
        return value

    def number(self, *keys: str, default: float | None = None, least: float | None = None) -> float:
        """A finite number, of at least ``least``; positive if that is None."""
        key, value = self._find(keys, default)
        fits = type(value) in (int, float) and (value > 0 if least is None else least <= value) and value < math.inf
        if not fits:
            raise self.error(key, value, "a positive number" if least is None else f"a number of at least {least}")
        return float(value)

    def flag(self, *keys: str, default: bool | None = None) -> bool:
        """True or false."""
        return self.choice(*keys, known=(True, False), default=default)

    def choice(self, *keys: str, known: tuple, default: Any = None) -> Any:
        """One of ``known``."""
        key, value = self._find(keys, default)
        if not any(type(value) is type(candidate) and value == candidate for candidate in known):
            raise self.error(key, value, " or ".join(map(repr, known)))
        return value

    def only(self, key: str, value: Any) -> None:
        """Checks that a setting which this family is not known with other values of is absent or ``value``."""
        self.choice(key, known=(value,), default=value)

    def value(self, *keys: str) -> Any:
        """Whatever it is for this layer: None where it is absent."""
        return self._find(keys, None)[1]

    def key(self, *keys: str) -> str:
        """Which of the names the configuration has."""
        return next((key for key in keys if self.config.get(key) is not None), keys[0])

    def error(self, key: str, found: Any, expected: str) -> CheckpointError:
        """The error that a setting is not what it should be."""
        layer = f" of layer {self.layer}" if isinstance(self.config.get(key), list) else ""
        return CheckpointError(f"{self.where}: {key}{layer}: found {brief(found)}, expected {expected}")

    def _find(self, keys: tuple[str, ...], default: Any) -> tuple[str, Any]:
        given = [key for key in keys if self.config.get(key) is not None]
        if not given:
            null = next((key for key in keys if key in self.config), None)
            return (keys[0], default) if null is None else (null, None)
        key, value = given[0], self.config[given[0]]
        other = next((other for other in given if self.config[other] != value), None)
        if other is not None:
            raise self.error(other, self.config[other], f"{brief(value)} as in {key}, which is the same setting")
        if not isinstance(value, list):
            return key, value
        if self.layer is None:
            raise CheckpointError(f"{self.where}: {key}: found a value for each layer; say which layer is meant")
        if self.layer >= len(value):
            raise CheckpointError(
                f"{self.where}: {key}: found {len(value)} values, expected one for layer {self.layer}"
            )
        return key, value[self.layer]
