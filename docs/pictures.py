"""The pictures of ``pictures.md``: outputs of a layer, computed here, and speed, read from ``benchmarks/results``.

    python docs/pictures.py      # writes docs/pictures/*.png and the table of errors into the page; needs matplotlib

A test computes the table again.
"""

import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np

import jax_moe

DOCS = pathlib.Path(__file__).resolve().parent
RESULTS = DOCS.parent / "benchmarks" / "results"
PAGE = DOCS / "pictures.md"
TOKENS, HIDDEN, INTERMEDIATE, EXPERTS, TOP_K = 128, 256, 128, 8, 2


def layer() -> dict[str, np.ndarray]:
    """A layer with random weights: its outputs before and after quantisation, an expert's weights, tokens an expert."""
    keys = jax.random.split(jax.random.key(0), 5)
    gate, up = (jax.random.normal(key, (EXPERTS, INTERMEDIATE, HIDDEN)) / HIDDEN**0.5 for key in keys[:2])
    down = jax.random.normal(keys[2], (EXPERTS, HIDDEN, INTERMEDIATE)) / INTERMEDIATE**0.5
    x = jax.random.normal(keys[3], (TOKENS, HIDDEN), jnp.bfloat16)
    routing = jax_moe.route(jax.random.normal(keys[4], (TOKENS, EXPERTS)), TOP_K)
    experts = jax_moe.calibrate(jax_moe.quantize_experts(gate, up, down), x, routing)
    ready = jax_moe.prepare(experts)

    slots = (jax.nn.one_hot(routing.expert_ids, EXPERTS) * routing.weights[..., None]).sum(1)  # [T, E]
    wide = x.astype(jnp.float32)
    h = jax.nn.silu(jnp.einsum("th,eih->tei", wide, gate)) * jnp.einsum("th,eih->tei", wide, up)
    arrays = {"dense": jnp.einsum("tei,ehi,te->th", h, down, slots)}
    for precision in ("w4a16", "w4a4"):
        arrays[precision] = jax_moe.fused_moe(
            x, ready, routing, precision=precision, combine="ordered", out_dtype=jnp.float32
        )
    arrays["weights"] = gate[0]
    arrays["dequantised"] = jax_moe.nvfp4.dequantize(*(leaf[0, 0] for leaf in jax.tree.leaves(experts.gate_up)[:3]))
    arrays["tokens"] = jnp.bincount(routing.expert_ids.reshape(-1), length=EXPERTS)
    return {name: np.asarray(array, np.float32) for name, array in arrays.items()}


def errors(arrays: dict[str, np.ndarray]) -> str:
    """The table of the page: how far quantised results are from the ones before."""

    def row(name: str, got: np.ndarray, want: np.ndarray) -> str:
        relative = np.linalg.norm(got - want) / np.linalg.norm(want)
        return f"| {name} | {relative:.1%} | {np.corrcoef(got.ravel(), want.ravel())[0, 1]:.3f} |"

    rows = [
        row("the gate of one expert", arrays["dequantised"], arrays["weights"]),
        row("output, w4a16", arrays["w4a16"], arrays["dense"]),
        row("output, w4a4", arrays["w4a4"], arrays["dense"]),
    ]
    return "\n".join(["| | relative error | correlation |", "|---|---|---|", *rows]) + "\n"


def with_table(page: str, table: str) -> str:
    """The page with ``table`` between its marks."""
    return re.sub(r"(<!-- errors -->\n).*?(<!-- end -->)", lambda m: m[1] + table + m[2], page, flags=re.DOTALL)


def _draw_outputs(plt, arrays) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(9, 4.2), sharex=True, sharey=True)
    for axis, precision in zip(axes, ("w4a16", "w4a4"), strict=True):
        axis.scatter(arrays["dense"].ravel()[::8], arrays[precision].ravel()[::8], s=3, alpha=0.4)
        axis.axline((0, 0), slope=1, color="black", linewidth=0.8)
        axis.set(title=precision, xlabel="output before quantisation")
    axes[0].set_ylabel("output of fused_moe")
    _save(figure, "outputs")

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6))
    axes[0].scatter(arrays["weights"].ravel()[::16], arrays["dequantised"].ravel()[::16], s=3, alpha=0.4)
    axes[0].axline((0, 0), slope=1, color="black", linewidth=0.8)
    axes[0].set(title="weights of one expert's gate", xlabel="before", ylabel="in NVFP4")
    axes[1].bar(np.arange(EXPERTS), arrays["tokens"])
    axes[1].axhline(TOKENS * TOP_K / EXPERTS, color="black", linewidth=0.8)
    axes[1].set(title="routes of each expert, and their mean", xlabel="expert")
    _save(figure, "weights-and-routes")


def _draw_speed(plt) -> None:
    files = [RESULTS / f"h200-{name}.json" for name in ("qwen3-235b-a22b", "bf16-peers")]
    rows = [row for file in files for row in json.loads(file.read_text())["results"]]
    figure, axis = plt.subplots(figsize=(7, 4.5))
    for method in dict.fromkeys(row["method"] for row in rows):
        mine = [row for row in rows if row["method"] == method]
        axis.plot([row["tokens"] for row in mine], [1e6 * row["seconds"] for row in mine], marker="o", label=method)
    floors = {row["tokens"]: 1e6 * row["floor_seconds"] for row in rows}
    axis.plot(list(floors), list(floors.values()), color="black", linewidth=0.8, label="floor of this card")
    axis.set(title="qwen3-235b-a22b on an H200", xlabel="tokens", ylabel="us a call", xscale="log", yscale="log")
    axis.set_xticks(list(floors), map(str, floors))
    axis.set_xticks([], minor=True)
    axis.grid(which="both", alpha=0.3)
    axis.legend()
    _save(figure, "time-h200")

    results = json.loads((RESULTS / "cpu_vs_jax.json").read_text())["results"]
    best = {"fused_moe": [], "best pure JAX, same weights": []}
    for result in results:
        narrow = [row for row in result["rows"] if row["weights"] == "NVFP4 weights"]
        times = {row["way"]: row["median_ms"] for row in narrow if row["dtype"] == "w4a16" or row["way"] != "fused_moe"}
        best["fused_moe"].append(times.pop("fused_moe"))
        best["best pure JAX, same weights"].append(min(times.values()))
    figure, axis = plt.subplots(figsize=(7, 3.6))
    for place, (name, milliseconds) in enumerate(best.items()):
        bars = axis.bar(np.arange(len(results)) + 0.4 * place, milliseconds, 0.38, label=name)
        axis.bar_label(bars, fmt="%.1f")
    axis.set_xticks(np.arange(len(results)) + 0.2, [str(result["tokens"]) for result in results])
    axis.set(title="two cores of a Xeon with AVX-512", xlabel="tokens", ylabel="ms a call")
    axis.legend()
    _save(figure, "time-cpu")


def _save(figure, name: str) -> None:
    figure.tight_layout()
    (DOCS / "pictures").mkdir(exist_ok=True)
    figure.savefig(DOCS / "pictures" / f"{name}.png", dpi=90)


def main() -> None:
    """Draws everything."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    arrays = layer()
    PAGE.write_text(with_table(PAGE.read_text(), errors(arrays)))
    _draw_outputs(plt, arrays)
    _draw_speed(plt)


if __name__ == "__main__":
    main()
