"""What the devices of an expert-parallel group send one another, on paper: bytes on the wire, and time.

    python benchmarks/exchange_model.py      # prints the tables of docs/all-to-all.md

Three forms of exchange, of T tokens in all on n ranks, each of which holds E/n experts:

    replicated   every rank has all tokens; the partial sums [T, H] are all-reduced
    spread       every rank has T/n tokens; x is all-gathered, the partial sums are reduce-scattered
    all-to-all   every rank has T/n tokens; a token goes once to each rank that holds one of its experts, and one
                 partial sum comes back from each of those

Bytes are those of the busiest rank in one direction, as a ring exchanges them: what it receives before its experts run,
and sends after. Routing, 8 bytes a slot, is gathered in both of the last two.
"""

from collections.abc import Iterator
import dataclasses
import math

BF16, FP32, NVFP4 = 2.0, 4.0, 0.5 + 1 / 16
"""Bytes a value; NVFP4: a code of 4 bits, and a block scale of 8 for 16 of them."""


@dataclasses.dataclass(frozen=True)
class Layer:
    """A model's MoE layer: E experts, of which a token chooses K, all equally likely; hidden size H.

    ``groups``: DeepSeek's router chooses among the experts of ``chosen_groups`` of so many groups.
    """

    name: str
    num_experts: int
    top_k: int
    hidden_size: int
    groups: int = 1
    chosen_groups: int = 1


LAYERS = (
    Layer("qwen3-235b-a22b", 128, 8, 4096),
    Layer("deepseek-r1", 256, 8, 7168, groups=8, chosen_groups=4),
    Layer("gpt-oss-120b", 128, 4, 2880),
    Layer("mixtral-8x7b", 8, 2, 4096),
)


def expected_ranks(layer: Layer, n: int) -> float:
    """Over how many of n ranks the experts of a token are spread, on average."""
    _check_divides(layer, n)
    parts = max(1, layer.groups // n)  # groups that a rank has experts of
    per_part = layer.num_experts // max(n, layer.groups)  # experts of each of them
    candidates = layer.num_experts * layer.chosen_groups // layer.groups
    missed = 0.0  # the probability that a rank has none
    for chosen in range(parts + 1):
        ways = math.comb(parts, chosen) * math.comb(layer.groups - parts, layer.chosen_groups - chosen)
        likelihood = ways / math.comb(layer.groups, layer.chosen_groups) if chosen <= layer.chosen_groups else 0.0
        others = candidates - chosen * per_part
        missed += likelihood * math.comb(others, layer.top_k) / math.comb(candidates, layer.top_k)
    return n * (1 - missed)


def _check_divides(layer: Layer, n: int) -> None:
    if layer.num_experts % n or (layer.groups % n and n % layer.groups):
        raise ValueError(f"n: {n} ranks do not divide {layer.name}'s {layer.num_experts} experts evenly")


@dataclasses.dataclass(frozen=True)
class Link:
    """How an exchange goes: microseconds of the smallest one, and GB/s in each direction of a large one."""

    microseconds: float
    gigabytes: float

    def time(self, sent: float) -> float:
        """Microseconds of one collective in which the busiest rank sends so many bytes."""
        return self.microseconds + sent / self.gigabytes / 1e3


@dataclasses.dataclass(frozen=True)
class Sent:
    """Bytes of the busiest rank in one direction, before the experts run and after."""

    before: float
    after: float

    @property
    def total(self) -> float:
        return self.before + self.after

    def time(self, link: Link) -> float:
        """Microseconds of the collectives, one after the other."""
        return sum(link.time(sent) for sent in (self.before, self.after) if sent)


def routing_bytes(layer: Layer, tokens: int, n: int) -> float:
    """The all-gather of expert ids (int32) and weights (float32)."""
    return tokens * (n - 1) / n * layer.top_k * (4 + 4)


def replicated(layer: Layer, tokens: int, n: int, sums: float = FP32) -> Sent:
    """``sums``: bytes a value of the partial sums."""
    return Sent(0.0, 2 * (n - 1) / n * tokens * layer.hidden_size * sums)


def spread(layer: Layer, tokens: int, n: int, x: float = BF16, sums: float = FP32) -> Sent:
    """``x``: bytes a value of the gathered tokens."""
    rows = tokens * (n - 1) / n
    return Sent(rows * layer.hidden_size * x + routing_bytes(layer, tokens, n), rows * layer.hidden_size * sums)


def all_to_all(layer: Layer, tokens: int, n: int, x: float = BF16, sums: float = FP32, imbalance: float = 1.0) -> Sent:
    """``imbalance``: tokens of the rank that gets most of them, over the mean. It never gets more than all."""
    share = min(1.0, imbalance * expected_ranks(layer, n) / n)  # of all tokens that visit the busiest rank
    rows = tokens * (n - 1) / n * share
    return Sent(rows * layer.hidden_size * x + routing_bytes(layer, tokens, n), rows * layer.hidden_size * sums)


def rows_between_hosts(layer: Layer, hosts: int, per_host: int) -> dict[str, float]:
    """Rows of H values that a GPU's network card sends for each of its tokens, in one exchange, by how it is done.

    A gather that knows of hosts brings a token to each other host once. So may an all-to-all, if its tokens go on over
    NVLink; a flat one brings a token to each other rank that it visits.
    """
    remote = (hosts - 1) / hosts
    return {
        "spread": hosts * remote,
        "all-to-all, flat": expected_ranks(layer, hosts * per_host) * remote,
        "all-to-all, once a host": expected_ranks(layer, hosts) * remote,
    }


LINKS = {  # NCCL's rings; an all-to-all as good as the best; XLA's ragged_all_to_all of today
    "H200": (Link(20, 360), Link(20, 360), Link(40, 0.35 * 450)),
    "NVL72": (Link(20, 720), Link(25, 720), Link(40, 0.35 * 900)),
}
"""H200, one host: measured on 4 of them; latencies were 15 to 30 us. GB200 NVL72: the same latency, and 80% of nominal,
which TensorRT-LLM's all-to-all attains, with latencies of 19 us there and 31 back. Today's: 35% of nominal, which XLA's
device kernel attains on GB200 where its work is even (xla#47868), and a latency that is assumed: twice a ring's."""
IMBALANCE = 1.2  # of the tables: how many more tokens the busiest rank gets than the mean; assumed, and mild


def least_tokens(layer: Layer, n: int, ring: Link, other: Link, x: float, sums: float, imbalance: float = 1.0) -> float:
    """From how many tokens a rank on an all-to-all over ``other`` is faster than a gather and scatter over ``ring``.

    Both are 2 collectives; packing and adding rows in memory is left out. Infinite: never.
    """
    slower = 2 * (other.microseconds - ring.microseconds)
    saved = spread(layer, n, n, x, sums).total / ring.gigabytes
    saved = (saved - all_to_all(layer, n, n, x, sums, imbalance).total / other.gigabytes) / 1e3  # of 1 token a rank
    return math.inf if saved <= 1e-12 else max(0.0, slower) / saved


RANKS = (2, 4, 8, 16, 32, 64)
PLACES = [(name, n) for name, counts in (("H200", (4, 8)), ("NVL72", (4, 8, 16, 32, 64))) for n in counts]


def table(*rows: list[str]) -> str:
    """Rows as Markdown; the first is the head."""
    rows = (rows[0], ["---"] * len(rows[0]), *rows[1:])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def tables() -> Iterator[str]:
    """The tables of docs/all-to-all.md."""

    def share(layer: Layer, n: int) -> str:
        return "" if layer.num_experts % n else f"{expected_ranks(layer, n) / n:.0%}"

    def crossovers(layer: Layer, link: str, n: int) -> str:
        if layer.num_experts % n:
            return ""
        ring, *others = LINKS[link]
        found = [least_tokens(layer, n, ring, other, NVFP4, BF16, IMBALANCE) for other in others]
        return " / ".join("never" if tokens == math.inf else f"{math.ceil(tokens)}" for tokens in found)

    def between(layer: Layer, hosts: int) -> list[str]:
        rows = rows_between_hosts(layer, hosts, 8).values()
        return [f"{layer.name}, {hosts} hosts", *(f"{row:.1f}" for row in rows)]

    head = ["D/n", *(f"n = {n}" for n in RANKS)]
    yield table(head, *([layer.name, *(share(layer, n) for n in RANKS)] for layer in LAYERS))
    head = ["tokens a rank", *(f"{link}, n = {n}" for link, n in PLACES)]
    yield table(head, *([layer.name, *(crossovers(layer, *place) for place in PLACES)] for layer in LAYERS))
    head = ["rows sent for each token, hosts of 8 GPUs", *rows_between_hosts(LAYERS[0], 2, 8)]
    yield table(head, *(between(LAYERS[0], hosts) for hosts in (2, 4, 8)))


if __name__ == "__main__":
    print(*tables(), sep="\n\n")
