"""Qwen3-MoE models with one mistake each: what a comparison must tell from the right one.

``CLASSES`` compute something else, ``VALUES`` are other numbers of the model, ``LEAVES`` change an array of a layer.
"""

import numpy as np
import qwen3_reference


class TurnsBack(qwen3_reference.Model):
    def turn(self, x):
        return super().turn(x[::-1])[::-1]


class TurnsNeighbours(qwen3_reference.Model):
    def turn(self, x):
        return super().turn(x.reshape(*x.shape[:-1], -1, 2).swapaxes(-1, -2).reshape(x.shape))


class KeysOneLate(qwen3_reference.Model):
    def turn(self, x):
        return super().turn(np.concatenate([x[:1], x]))[1:] if x.shape[1] == self.kv_heads else super().turn(x)


class SeesAll(qwen3_reference.Model):
    def visible(self, position, length):
        return length


class SeesOneLess(qwen3_reference.Model):
    def visible(self, position, length):
        return max(position, 1)


class OtherKeys(qwen3_reference.Model):
    def keys_of(self, head):
        return head % self.kv_heads


class NoKeyNorm(qwen3_reference.Model):
    def normalize(self, x, weight):
        return x if x.shape[1] == self.kv_heads else super().normalize(x, weight)


class Subtracts(qwen3_reference.Model):
    """A LayerNorm, which takes the mean away."""

    def normalize(self, x, weight):
        return super().normalize(x - x.mean(-1, keepdims=True), weight)


class OwnInput(qwen3_reference.Model):
    """The router sees what comes out of the layer before, not its norm."""

    def experts(self, x, layer, rounding):
        return super().experts(x / layer["moe_norm"], layer, rounding)


CLASSES = [TurnsBack, TurnsNeighbours, KeysOneLate, SeesAll, SeesOneLess, OtherKeys, NoKeyNorm, Subtracts, OwnInput]
VALUES = {"theta": 1100.0, "epsilon": 1e-4, "top_k": 2, "renormalize": False}
LEAVES = {
    "query_norm": np.ones_like, "key_norm": np.ones_like, "attention_norm": np.ones_like, "moe_norm": np.ones_like,
    "router": lambda weight: weight[::-1], "gate_up": lambda weight: weight[:, ::-1], "down": lambda weight: weight / 2,
    "output": lambda weight: np.roll(weight, 32, axis=1), "value": lambda weight: weight[::-1],
}  # fmt: skip
