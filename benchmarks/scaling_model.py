"""What a file of benchmarks/gpu_scaling.py says: its tables and picture, and a model of it that goes beyond.

    python benchmarks/scaling_model.py results.json     # measured, predicted, error; then what to expect elsewhere

The model: t(n, T) = local(n, T) + exchange(n, T), in which

    local     = t(1, T) / n + (1 - 1/n) (start + T H (2 + s) per_byte)
    exchange  = the sum over the form's collectives of latency + bytes sent by a rank / bandwidth
                (+ routing, where tokens are spread)

Of the op's work on one GPU, t(1, T), each of n devices has 1/n: its experts' weights, or its slice of each, and its
share of the routes. Two things each of them does alone: starting three kernels, and passing over all tokens: x is read
(2 bytes a value), the output zeroed and added to (s bytes). ``start``, ``per_byte`` and ``routing`` (what the gathers
of ids and weights take beside that of x) are fitted, to all rows of a model, precision and mesh axis together, in least
relative squares and none below 0; nothing else is. t(1, T) is measured, latencies and bandwidths are those of the
collectives in the same file, bytes are those of benchmarks/exchange_model.py. To see what that is worth elsewhere,
``--fit-on 2`` fits to the rows of 2 devices alone and predicts the others.

Beyond the file: between measured T, t(1, T) is a straight line; above, it grows in proportion. A number of devices
that was not measured has the constants of the nearest. Other places are in :data:`PLACES`, with what is assumed there.
"""

from collections.abc import Iterator
import dataclasses
import json
import pathlib
from typing import Annotated

import exchange_model
from exchange_model import Layer, Link, table
import numpy as np
import scipy.optimize
import typer

from jax_moe import shapes
from jax_moe.cli import floor
from jax_moe.kernels import targets

MODELS = shapes.MODELS | {"deepseek-r1": shapes.LayerShape(256, 8, 7168, 2048)}
ONE = "one GPU"
"""The form of t(1)."""
LOCAL = "local"
"""The form without an exchange."""

_SPREAD = ("spread", "tensor-spread")
_WIDTHS = {"float32": exchange_model.FP32, "bfloat16": exchange_model.BF16}


def constants(collectives: list[dict]) -> list[dict]:
    """Of each collective and number of devices: microseconds of the smallest, and GB/s that a rank sends of a large."""
    found = []
    for name, n in dict.fromkeys((row["name"], row["devices"]) for row in collectives):
        mine = [row for row in collectives if (row["name"], row["devices"]) == (name, n)]
        sent, seconds = (np.array([row[key] for row in mine]) for key in ("sent_bytes", "seconds"))
        latency, per_byte = np.linalg.lstsq(np.stack([1 / seconds, sent / seconds], 1), np.ones(len(mine)))[0]
        found.append(
            {"name": name, "devices": n, "microseconds": latency * 1e6, "gigabytes_per_second": 1e-9 / per_byte}
        )
    return found


# --- The model; times are in microseconds -----------------------------------------------------------------------------

Links = dict[str, dict[int, Link]]
"""By collective and number of devices."""


def links_of(document: dict) -> Links:
    links: Links = {}
    for one in document["constants"]:
        link = Link(one["microseconds"], one["gigabytes_per_second"])
        links.setdefault(one["name"], {})[one["devices"]] = link
    return links


def nearest(by_size: dict[int, Link], n: int) -> Link:
    return by_size[min(by_size, key=lambda size: abs(np.log(size / n)))]


def layer_of(model: str) -> Layer:
    known = {layer.name: layer for layer in exchange_model.LAYERS}
    shape = MODELS[model]
    return known.get(model) or Layer(model, shape.num_experts, shape.top_k, shape.hidden_size)


def sent(layer: Layer, tokens: int, n: int, form: str, precision: str, sum_dtype: str) -> exchange_model.Sent:
    """Bytes of a form: w4a4 gathers what it multiplies."""
    sums = _WIDTHS[sum_dtype]
    if form not in _SPREAD:
        return exchange_model.replicated(layer, tokens, n, sums)
    x = exchange_model.NVFP4 if precision == "w4a4" else exchange_model.BF16
    return exchange_model.spread(layer, tokens, n, x, sums)


def collectives_of(form: str, sum_dtype: str) -> tuple[str | None, str]:
    """What gathers before the local op, if anything does, and what sums behind it."""
    if form not in _SPREAD:
        return None, f"all_reduce {sum_dtype}"
    return "all_gather", "reduce_scatter" if sum_dtype == "float32" else "all_to_all"


def exchange(links: Links, layer: Layer, tokens: int, n: int, form: str, precision: str, sum_dtype: str) -> float:
    """Latencies and bytes; what the gathers of the routing take beside that of x is fitted, in :class:`Local`."""
    if form == LOCAL:
        return 0.0
    given = sent(layer, tokens, n, form, precision, sum_dtype)
    before, after = collectives_of(form, sum_dtype)
    time = nearest(links[after], n).time(given.after)
    return time + (nearest(links[before], n).time(given.before) if before else 0)


@dataclasses.dataclass(frozen=True)
class Fitted:
    """t(1, T) by T, and the three constants of the module's text."""

    alone: dict[int, float]
    start: float
    per_byte: float
    routing: float

    def one(self, tokens: int) -> float:
        """t(1, T)."""
        known = sorted(self.alone)
        if tokens > known[-1]:
            return self.alone[known[-1]] * tokens / known[-1]
        return float(np.interp(tokens, known, [self.alone[count] for count in known]))

    def time(self, layer: Layer, tokens: int, n: int, form: str, sum_dtype: str) -> float:
        """What a call takes beside its exchange of x and sums."""
        return self.one(tokens) / n + float(
            np.dot(_factors(layer, tokens, n, form, sum_dtype), (self.start, self.per_byte, self.routing))
        )


def _factors(layer: Layer, tokens: int, n: int, form: str, sum_dtype: str) -> tuple[float, float, float]:
    """What the three constants are multiplied by."""
    each = 1 - 1 / n
    passed = tokens * layer.hidden_size * (exchange_model.BF16 + _WIDTHS[sum_dtype])
    return each, each * passed, float(form in _SPREAD)


def fit(rows: list[dict], alone: dict[int, float], links: Links, layer: Layer) -> Fitted:
    """The constants under which the rows come out best."""
    left, right = [], []
    for row in rows:
        n, tokens, measured = row["devices"], row["tokens"], row["seconds"] * 1e6
        left.append(np.array(_factors(layer, tokens, n, row["form"], row["sum_dtype"])) / measured)
        right.append((measured - _exchange_of(row, links, layer) - alone[tokens] / n) / measured)
    sizes = np.maximum(np.abs(left).max(0), 1e-30)  # bytes and ones: of one size, for the solver
    found, _ = scipy.optimize.nnls(np.array(left) / sizes, np.array(right))
    return Fitted(alone, *map(float, found / sizes))


def _exchange_of(row: dict, links: Links, layer: Layer) -> float:
    return exchange(links, layer, row["tokens"], row["devices"], row["form"], row["precision"], row["sum_dtype"])


def axis_of(form: str) -> str:
    return "tensor" if form.startswith("tensor") else "expert"


def predict(document: dict, fit_on: set[int] | None = None) -> tuple[list[dict], dict[tuple, Fitted]]:
    """The rows of several devices with "predicted" and "off", its relative error; and what was fitted.

    Args:
      document: of gpu_scaling.py.
      fit_on: numbers of devices whose rows are fitted to; None: all.
    """
    links, found, locals_ = links_of(document), [], {}
    alone: dict[tuple, dict[int, float]] = {}
    for row in document["results"]:
        if row["form"] == ONE:
            alone.setdefault((row["model"], row["precision"]), {})[row["tokens"]] = row["seconds"] * 1e6
    several = [row for row in document["results"] if row["form"] != ONE]
    for key in dict.fromkeys((row["model"], row["precision"], axis_of(row["form"])) for row in several):
        mine = [
            row
            for row in several
            if (row["model"], row["precision"], axis_of(row["form"])) == key and row["tokens"] in alone[key[:2]]
        ]
        fitted = [row for row in mine if fit_on is None or row["devices"] in fit_on]
        if not fitted:
            continue
        layer = layer_of(key[0])
        local = locals_[key] = fit(fitted, alone[key[:2]], links, layer)
        for row in mine:
            time = local.time(layer, row["tokens"], row["devices"], row["form"], row["sum_dtype"])
            time += _exchange_of(row, links, layer)
            found.append(row | {"predicted": time * 1e-6, "off": time * 1e-6 / row["seconds"] - 1})
    return found, locals_


# --- Beyond what was measured -----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Place:
    """Where n GPUs are.

    Attributes:
      name: for the table.
      sizes: numbers of GPUs.
      per_host: how many share NVLink.
      card: the target whose first card it is; None: that of the file.
      link: NVLink's; None: the constants of the file.
      between: a GPU's network card.
    """

    name: str
    sizes: tuple[int, ...]
    per_host: int
    card: str | None = None
    link: Link | None = None
    between: Link | None = None


PLACES = (
    Place("this host", (2, 4, 8), 8),
    Place("hosts of 8, a network card of 400 Gb/s a GPU", (16, 32), 8, between=Link(30, 40)),
    Place("NVL72", (8, 16, 32, 64), 64, card="sm_100f", link=exchange_model.LINKS["NVL72"][0]),
)
"""Hosts: 30 us and 80% of nominal are assumed, and that every row crosses once between two hosts and goes on over
NVLink. NVL72: links as in exchange_model.py; a B200's op is assumed to be as many times its floor as this card's is,
and what each device does alone to be as fast as here. Nobody has run it."""


def expected(place: Place, n: int, tokens: int, form: str, precision: str, sum_dtype: str, model: str,
             local: Fitted, links: Links) -> tuple[float, float]:  # fmt: skip
    """t(n, T) at a place, and t(1, T) there."""
    layer = layer_of(model)
    if place.link:
        links = {name: {n: place.link} for name in links}
    time = exchange(links, layer, tokens, n, form, precision, sum_dtype)
    if place.between:
        hosts = n // place.per_host
        given = sent(layer, tokens, n, form, precision, sum_dtype)
        # Of the (n - 1) parts that a ring sends on, each GPU's network card has those of the other hosts' peers.
        crossing = (hosts - 1) / (n - 1)
        time += exchange_model.Sent(given.before * crossing, given.after * crossing).time(place.between)
    one, local_time = local.one(tokens), local.time(layer, tokens, n, form, sum_dtype)
    if place.card:
        floors = [_floor(MODELS[model], tokens, precision, card) for card in (place.card, "sm_90a")]
        faster = one * (1 - floors[0] / floors[1])
        one, local_time = one - faster, local_time - faster / n
    return local_time + time, one


def _floor(shape: shapes.LayerShape, tokens: int, precision: str, card: str) -> float:
    ceilings = targets.TARGETS[card].cards[0].ceilings
    assert ceilings is not None
    return floor.layer_seconds(shape, tokens, shape.touched_experts(tokens), ceilings, precision)


def expectations(document: dict, tokens_per_gpu: tuple[int, ...] = (1, 16, 128, 1024)) -> Iterator[str]:
    """For each model and precision a table of the best form, by place, GPUs and tokens a GPU."""
    _, locals_ = predict(document)
    links = links_of(document)
    forms = dict.fromkeys(
        (row["form"], row["sum_dtype"]) for row in document["results"] if row["form"] not in (ONE, LOCAL)
    )
    for model, precision in dict.fromkeys(key[:2] for key in locals_):
        lines = []
        for place in PLACES:
            for n in place.sizes:
                if MODELS[model].num_experts % n:
                    continue
                cells = [place.name, str(n)]
                for each in tokens_per_gpu:
                    best = min(
                        (*expected(place, n, n * each, form, precision, sums, model, local, links), form, sums)
                        for form, sums in forms
                        if (local := locals_.get((model, precision, axis_of(form))))
                    )
                    cells.append(f"{best[0]:.0f} ({best[1] / n / best[0]:.2f}) {best[2]}, {best[3]}")
                lines.append(cells)
        head = [f"{model}, {precision}: expected us (efficiency), form, sums", "n"]
        yield table([*head, *(f"{each} tokens a GPU" for each in tokens_per_gpu)], *lines)


# --- Tables and the picture -------------------------------------------------------------------------------------------


def errors(document: dict, fit_on: set[int] | None = None) -> Iterator[str]:
    """Measured, predicted and the error, and what was fitted, as Markdown."""
    rows, locals_ = predict(document, fit_on)
    for (model, precision, axis), local in locals_.items():
        passing = f"{1e-6 / local.per_byte:.2f} TB/s" if local.per_byte else "no time"
        routing = f", routing = {local.routing:.1f} us" if local.routing else ""
        yield (
            f"{model}, {precision}, {axis} axis: start = {local.start:.1f} us, {passing} for what each device passes "
            f"over alone{routing}."
        )
    for model, precision in dict.fromkeys((row["model"], row["precision"]) for row in rows):
        mine = [row for row in rows if (row["model"], row["precision"]) == (model, precision)]
        columns = dict.fromkeys((row["devices"], row["form"], row["sum_dtype"]) for row in mine)
        lines = []
        for n, form, sums in columns:
            cells = {
                row["tokens"]: f"{row['seconds'] * 1e6:.0f} / {row['predicted'] * 1e6:.0f} ({row['off']:+.0%})"
                for row in mine
                if (row["devices"], row["form"], row["sum_dtype"]) == (n, form, sums)
            }
            lines.append((f"{n} {form}, {sums}", cells))
        counts = sorted({row["tokens"] for row in mine})
        head = [f"{model}, {precision}: measured / predicted us (error)", *(f"T = {count}" for count in counts)]
        yield table(head, *([name, *(cells.get(count, "") for count in counts)] for name, cells in lines))
    off = [abs(row["off"]) for row in rows]
    if off:
        most, within = max(off), sum(error <= 0.15 for error in off)
        yield f"{within} of {len(off)} rows within 15%; mean error {np.mean(off):.1%}, largest {most:.1%}."


def markdown(document: dict) -> Iterator[str]:
    """What docs/scaling.md has of a run: a table for each model and precision, and one of the collectives."""
    rows = document["results"]
    given = document["environment"]
    versions = f"jax {given.get('jax')}, commit {given.get('commit', '')[:7]}, {given.get('time', '')[:10]}"
    yield f"{', '.join(f'{count} x {kind}' for kind, count in given['cards'].items())}; {versions}."
    for model, precision in dict.fromkeys((row["model"], row["precision"]) for row in rows):
        mine = [row for row in rows if (row["model"], row["precision"]) == (model, precision)]
        columns = list(dict.fromkeys((row["devices"], row["form"], row["sum_dtype"]) for row in mine))
        head = [f"{model}, {precision}: us (efficiency)"]
        head += ["1" if form == ONE else f"{n} {form} {sums}" for n, form, sums in columns]
        lines = []
        for count in sorted({row["tokens"] for row in mine}):
            cells = {
                (row["devices"], row["form"], row["sum_dtype"]): _cell(row) for row in mine if row["tokens"] == count
            }
            lines.append([f"T = {count}", *(cells.get(column, "") for column in columns)])
        yield table(head, *lines)
        errors = [(row["error"], row["bound"], row["equal"]) for row in mine if "error" in row]
        if errors:
            right = sum(equal for *_, equal in errors)
            yield (
                f"{right} of {len(errors)} rows equal one GPU's output; the largest relative difference is "
                f"{max(errors)[0]:.1e}, bounds are {min(b for _, b, _ in errors):.1e} to "
                f"{max(b for _, b, _ in errors):.1e}."
            )
        weak = [row for row in mine if "weak_efficiency" in row]
        if weak:
            best: dict[tuple, dict] = {}
            for row in sorted(weak, key=lambda row: row["weak_efficiency"]):
                best[row["devices"], row["tokens"]] = row
            texts = [
                f"t(1, {count // n}) / t({n}, {count}) = {row['weak_efficiency']:.0%} "
                f"({row['form']}, {row['sum_dtype']})"
                for (n, count), row in sorted(best.items())
            ]
            yield f"Weak scaling, the best form: {'; '.join(texts)}."
    if document["constants"]:
        measured = document["collectives"]
        sizes = {one["name"]: [row for row in measured if row["name"] == one["name"]] for one in document["constants"]}
        lines = []
        for one in document["constants"]:
            times = [row for row in sizes[one["name"]] if row["devices"] == one["devices"]]
            seen = ", ".join(f"{row['bytes'] / 2**20:g}: {row['seconds'] * 1e6:.0f}" for row in times)
            fit = f"{one['microseconds']:.1f}", f"{one['gigabytes_per_second']:.0f}"
            lines.append([one["name"], str(one["devices"]), *fit, seen])
        yield table(["collective", "n", "us", "GB/s sent by a rank", "MiB in all: us"], *lines)


def _cell(row: dict) -> str:
    text = f"{row['seconds'] * 1e6:.{0 if row['seconds'] > 1e-4 else 1}f}"
    return text + (f" ({row['efficiency']:.2f})" if "efficiency" in row else "")


def plot(document: dict, picture: pathlib.Path) -> None:
    """Efficiency over the number of tokens."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    rows = [row for row in document["results"] if "efficiency" in row]
    groups = list(dict.fromkeys((row["model"], row["precision"], row["devices"]) for row in rows))
    figure, axes = plt.subplots(1, len(groups), figsize=(5 * len(groups), 4.5), squeeze=False, sharey=True)
    for axis, group in zip(axes[0], groups, strict=True):
        mine = [row for row in rows if (row["model"], row["precision"], row["devices"]) == group]
        for place, form in enumerate(dict.fromkeys(row["form"] for row in mine)):
            for sums, style in (("float32", "--"), ("bfloat16", "-")):
                line = sorted(
                    (row["tokens"], row["efficiency"])
                    for row in mine
                    if (row["form"], row["sum_dtype"]) == (form, sums)
                )
                if line:
                    axis.plot(*zip(*line, strict=True), style, color=f"C{place}", marker="o", label=f"{form}, {sums}")
        counts = sorted({row["tokens"] for row in mine})
        axis.set(title=f"{group[0]}, {group[1]}, {group[2]} GPUs", xlabel="tokens in all", xscale="log", ylim=(0, 1.05))
        axis.set_xticks(counts, map(str, counts))
        axis.set_xticks([], minor=True)
        axis.axhline(1, color="black", linewidth=0.8)
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    axes[0][0].set_ylabel("efficiency t(1) / (n t(n))")
    cards = ", ".join(f"{count} x {kind}" for kind, count in document["environment"]["cards"].items())
    figure.suptitle(f"{cards}, {document['environment']['time'][:10]}")
    figure.tight_layout()
    figure.savefig(picture, dpi=120)


def main(
    results: Annotated[pathlib.Path, typer.Argument(help="A file of gpu_scaling.py.")],
    fit_on: Annotated[str, typer.Option(help="Numbers of devices whose rows are fitted to, as 2,4; else all.")] = "",
) -> None:
    """Compare the model with what was measured, and print what to expect elsewhere."""
    document = json.loads(results.read_text())
    chosen = {int(n) for n in fit_on.split(",")} if fit_on else None
    print(*markdown(document), *errors(document, chosen), *expectations(document), sep="\n\n")


if __name__ == "__main__":
    typer.run(main)
