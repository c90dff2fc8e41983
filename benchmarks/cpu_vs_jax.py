"""fused_moe on the CPU beside the ways to compute the same layer in plain JAX, in one run, on the same NVFP4 weights.

    python benchmarks/cpu_vs_jax.py --json benchmarks/results/cpu_vs_jax.json

Every way is jitted and takes turns with the others, so that a disturbance hits all alike; the table has medians. "NVFP4
weights" is what an application holds in memory: a way that needs wider weights makes them in the timed region.
"weights widened before" leaves that out, and keeps 3.6x (bf16) or 7.1x (f32) the memory; it is a different trade, shown
for honesty.
"""

from collections.abc import Callable
import concurrent.futures
import ctypes
import dataclasses
import functools
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import statistics
import subprocess
import tempfile
import time
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table
import typer

import jax_moe
from jax_moe import nvfp4
from jax_moe.shapes import LayerShape

# --- The ways in plain JAX -------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Wide:
    """Dequantised weights: gate and up ``[E, I, H]``, down ``[E, H, I]``; without E, those of one expert."""

    gate: jax.Array
    up: jax.Array
    down: jax.Array


jax.tree_util.register_dataclass(Wide)


def widen(experts: jax_moe.Experts, dtype) -> Wide:
    """Dequantises by a view as float4: the fastest of several ways (tables, bit tricks through float16 or float32)."""

    def projection(p):
        codes = p.payload.view(jnp.float4_e2m1fn).astype(jnp.float32)
        scale = p.block_scale.astype(jnp.float32) * p.global_scale[..., None, None]
        blocks = codes.reshape(*scale.shape, nvfp4.BLOCK_SIZE) * scale[..., None]
        return blocks.reshape(codes.shape).astype(dtype)

    gate_up = projection(experts.gate_up)
    return Wide(gate_up[..., 0, :, :], gate_up[..., 1, :, :], projection(experts.down))


def mlp(x, weights: Wide, dot):
    h = jax.nn.silu(dot(x, weights.gate)) * dot(x, weights.up)
    return dot(h.astype(x.dtype), weights.down)


def ragged(x, weights: Wide, routing, dtype):
    """Routes sorted by expert, then ``lax.ragged_dot``."""
    top_k = routing.expert_ids.shape[1]
    order = jnp.argsort(routing.expert_ids.ravel(), stable=True)
    sizes = jnp.bincount(routing.expert_ids.ravel(), length=weights.down.shape[0]).astype(jnp.int32)

    def dot(a, w):
        return jax.lax.ragged_dot(a, w.swapaxes(1, 2), sizes, preferred_element_type=jnp.float32)

    y = mlp(x[order // top_k].astype(dtype), weights, dot) * routing.weights.ravel()[order, None]
    return jnp.zeros(x.shape, jnp.float32).at[order // top_k].add(y)


def combine_weights(routing, num_experts):
    chosen = routing.expert_ids[..., None] == jnp.arange(num_experts)
    return jnp.where(chosen, routing.weights[..., None], 0).sum(1)  # [T, E]


def one_dot(a, w):
    return jnp.einsum("tc,nc->tn", a, w, preferred_element_type=jnp.float32)


def all_experts(x, weights: Wide, routing, dtype):
    """Every token through every expert in batched dots, weighted by 0 where it was not sent."""

    def dot(a, w):
        return jnp.einsum("etc,enc->etn" if a.ndim == 3 else "tc,enc->etn", a, w, preferred_element_type=jnp.float32)

    y = mlp(x.astype(dtype), weights, dot)
    return jnp.einsum("eth,te->th", y, combine_weights(routing, weights.down.shape[0]))


def expert_by_expert(x, weights, routing, dtype):
    """A scan over experts, one dot each, skipping experts without tokens; widens only the expert at hand."""
    num_experts = weights.down.shape[0] if isinstance(weights, Wide) else weights.down.global_scale.shape[0]
    scale = combine_weights(routing, num_experts)

    def step(total, expert):
        def run():
            one = jax.tree.map(lambda leaf: leaf[expert], weights)
            wide = one if isinstance(one, Wide) else widen(one, dtype)
            return total + mlp(x.astype(dtype), wide, one_dot) * scale[:, expert, None]

        return jax.lax.cond((routing.expert_ids == expert).any(), run, lambda: total), None

    return jax.lax.scan(step, jnp.zeros(x.shape, jnp.float32), jnp.arange(num_experts))[0]


def gathered(x, weights, routing, dtype):
    """The weights of each route gathered, then one batched dot: only for a few routes."""
    top_k = routing.expert_ids.shape[1]
    ids = routing.expert_ids.ravel()
    chosen = jax.tree.map(lambda leaf: leaf[ids], weights)
    wide = chosen if isinstance(chosen, Wide) else widen(chosen, dtype)

    def dot(a, w):
        return jnp.einsum("rc,rnc->rn", a, w, preferred_element_type=jnp.float32)

    y = mlp(jnp.repeat(x, top_k, 0).astype(dtype), wide, dot) * routing.weights.ravel()[:, None]
    return y.reshape(*routing.expert_ids.shape, -1).sum(1)


MOST_GATHERED_ROUTES = 16
WAYS = {
    "dequantise, ragged_dot": ragged,
    "dequantise, all experts in batched dots": all_experts,
    "scan over experts, dequantise one, dot": expert_by_expert,
    "gather each route's weights, batched dot": gathered,
}


@functools.partial(jax.jit, static_argnames=("way", "dtype"))
def run_way(x, weights, routing, *, way, dtype):
    """One way; ``weights`` is Experts (widened inside) or Wide."""
    function = WAYS[way]
    if function in (ragged, all_experts) and not isinstance(weights, Wide):
        weights = widen(weights, dtype)
    return function(x, weights, routing, dtype).astype(jnp.bfloat16)


# --- Measuring -------------------------------------------------------------------------------------------------------


def make_layer(shape: LayerShape, seed: int = 0) -> jax_moe.Experts:
    rng = np.random.default_rng(seed)
    e, h, i = shape.num_experts, shape.hidden_size, shape.intermediate_size
    gate, up = (jnp.asarray(rng.normal(size=(e, i, h)) / h**0.5, jnp.float32) for _ in range(2))
    down = jnp.asarray(rng.normal(size=(e, h, i)) / i**0.5, jnp.float32)
    return jax_moe.quantize_experts(gate, up, down)


def make_tokens(shape: LayerShape, tokens: int, seed: int = 1):
    rng = np.random.default_rng(seed)
    ids = np.stack([rng.permutation(shape.num_experts)[: shape.top_k] for _ in range(tokens)])
    weights = rng.dirichlet(np.ones(shape.top_k), tokens)
    x = jnp.asarray(rng.normal(size=(tokens, shape.hidden_size)), jnp.bfloat16)
    return x, jax_moe.Routing(jnp.asarray(ids, jnp.int32), jnp.asarray(weights, jnp.float32))


Name = tuple[str, str, str]  # way, dtype, which weights
OURS: Name = ("fused_moe", "w4a16", "NVFP4 weights")
PEAK: Name = ("peak", "", "")


@dataclasses.dataclass
class Samples:
    """Seconds of each call: on the clock, and of CPU time on all threads, which other programs disturb less."""

    wall: list[float] = dataclasses.field(default_factory=list)
    cpu: list[float] = dataclasses.field(default_factory=list)


def interleaved_samples(functions: dict[Name, Callable], budget: float, most=300, least=3) -> dict[Name, Samples]:
    """Times each function, taking turns until the time is up.

    After ``least`` rounds the ways far behind the best plain JAX on the same weights stand aside, for more of the rest.
    """
    samples = {name: Samples() for name in functions}
    running = list(functions)
    end = time.perf_counter() + budget
    for round_number in range(most):
        if round_number >= least:
            if time.perf_counter() > end:
                break
            best: dict[str, float] = {}
            for name in functions:
                if name not in (OURS, PEAK):
                    best[name[2]] = min(best.get(name[2], math.inf), *samples[name].wall)
            running = [n for n in functions if n in (OURS, PEAK) or min(samples[n].wall) < 3 * best[n[2]]]
        for name in running:
            start, start_cpu = time.perf_counter(), time.process_time()
            functions[name]()
            samples[name].wall.append(time.perf_counter() - start)
            samples[name].cpu.append(time.process_time() - start_cpu)
    return samples


class FmaPeak:
    """fp32 FMA throughput of all cores at once, in flop/s (fma_peak.c)."""

    def __init__(self):
        source = pathlib.Path(__file__).with_name("fma_peak.c")
        with tempfile.TemporaryDirectory() as folder:
            library = pathlib.Path(folder) / "fma_peak.so"
            flags = ["-O3", "-march=native", "-ffp-contract=fast", "-shared", "-fPIC"]
            subprocess.run(["cc", *flags, source, "-o", library], check=True)
            self._function = ctypes.CDLL(str(library)).fma_peak
        self._function.restype = ctypes.c_double
        self._function.argtypes = [ctypes.c_long, ctypes.c_float, ctypes.POINTER(ctypes.c_float)]
        self._cores = len(os.sched_getaffinity(0))
        self._pool = concurrent.futures.ThreadPoolExecutor(self._cores)

    def __call__(self) -> float:
        def on_one_core(_):
            # About 10 ms, as long as a call of many tokens: whatever disturbs one disturbs the other.
            return self._function(4_000_000, 0.999, ctypes.c_float())

        return sum(self._pool.map(on_one_core, range(self._cores)))


def measure(shape: LayerShape, tokens: int, budget: float, peak: FmaPeak) -> dict:
    experts = make_layer(shape)
    x, routing = make_tokens(shape, tokens)
    ours = jax.jit(lambda x, experts, routing: jax_moe.fused_moe(x, experts, routing))
    functions: dict[Name, Callable] = {OURS: lambda: ours(x, experts, routing).block_until_ready()}
    expected = np.asarray(ours(x, experts, routing), np.float32)
    for name, dtype in (("bf16", jnp.bfloat16), ("f32", jnp.float32)):
        wide = jax.jit(widen, static_argnums=1)(experts, dtype)
        for weights, label in ((experts, "NVFP4 weights"), (wide, "weights widened before")):
            for way in WAYS:
                if WAYS[way] is gathered and tokens * shape.top_k > MOST_GATHERED_ROUTES:
                    continue
                call = functools.partial(run_way, x, weights, routing, way=way, dtype=dtype)
                error = np.linalg.norm(np.asarray(call(), np.float32) - expected) / np.linalg.norm(expected)
                if not error < 0.02:
                    raise RuntimeError(f"{way} with {name} disagrees with fused_moe: relative error {error:.3g}")
                functions[way, name, label] = lambda call=call: call().block_until_ready()
    peaks = []
    functions[PEAK] = lambda: peaks.append(peak())
    samples = interleaved_samples(functions, budget)
    del samples[PEAK]
    rows = [
        {
            "way": way,
            "dtype": dtype,
            "weights": label,
            "calls": len(s.wall),
            "median_ms": statistics.median(s.wall) * 1e3,
            "best_ms": min(s.wall) * 1e3,
            "median_cpu_ms": statistics.median(s.cpu) * 1e3,
        }
        for (way, dtype, label), s in samples.items()
    ]
    flops = shape.flops(tokens)
    best_jax = min((r for r in rows[1:] if r["weights"] == "NVFP4 weights"), key=lambda r: r["median_ms"])
    return {
        "tokens": tokens,
        "rows": rows,
        "gflops": flops / rows[0]["median_ms"] / 1e6,
        "peak_gflops": statistics.median(peaks) / 1e9,
        "fraction_of_peak": flops / rows[0]["median_ms"] / 1e6 / (statistics.median(peaks) / 1e9),
        "fraction_of_peak_at_best": flops / rows[0]["best_ms"] / 1e6 / (max(peaks) / 1e9),
        "best_plain_jax": best_jax,
        "speedup": best_jax["median_ms"] / rows[0]["median_ms"],
    }


def print_table(console: Console, result: dict) -> None:
    table = Table(title=f"T = {result['tokens']}: ms a call, median (best of n; median CPU time)")
    for header in ("way", "dtype", "NVFP4 weights", "weights widened before"):
        table.add_column(header, justify="left" if header in ("way", "dtype") else "right")
    cells: dict = {}
    for row in result["rows"]:
        text = f"{row['median_ms']:.2f} ({row['best_ms']:.2f} of {row['calls']}; {row['median_cpu_ms']:.2f})"
        cells.setdefault((row["way"], row["dtype"]), {})[row["weights"]] = text
    for (way, dtype), texts in cells.items():
        style = "bold" if way == "fused_moe" else None
        table.add_row(way, dtype, texts.get("NVFP4 weights", ""), texts.get("weights widened before", ""), style=style)
    console.print(table)
    console.print(
        f"fused_moe is {result['speedup']:.2f}x the best plain JAX on these weights; {result['gflops']:.0f} GFLOP/s, "
        f"{result['fraction_of_peak']:.0%} of the {result['peak_gflops']:.0f} GFLOP/s that this machine's FMA units "
        f"did meanwhile (median; {result['fraction_of_peak_at_best']:.0%} best against best)\n"
    )


def machine() -> dict:
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    models = [
        line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
    ]
    return {
        "cpu": models[0] if models else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "load_average": os.getloadavg(),
        "versions": {
            "jax": jax.__version__,
            "jaxlib": importlib.metadata.version("jaxlib"),
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
    }


def main(
    tokens: Annotated[list[int], typer.Option(help="T, repeatable")] = [1, 32, 256],  # noqa: B006 (typer copies it)
    experts: int = 16,
    top_k: int = 4,
    hidden: int = 1024,
    intermediate: int = 512,
    seconds: Annotated[float, typer.Option(help="time to spend on each T")] = 20.0,
    json_path: Annotated[pathlib.Path | None, typer.Option("--json", help="also write the results here")] = None,
) -> None:
    """Times fused_moe against plain JAX on the CPU."""
    jax.config.update("jax_platforms", "cpu")
    console = Console()
    shape = LayerShape(experts, top_k, hidden, intermediate)
    peak = FmaPeak()
    report = {"benchmark": "cpu_vs_jax", "shape": dataclasses.asdict(shape), **machine(), "results": []}
    for count in tokens:
        report["results"].append(measure(shape, count, seconds, peak))
        print_table(console, report["results"][-1])
    if json_path is not None:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(json.dumps(report, indent=1) + "\n")
        console.print(f"wrote {json_path}")


if __name__ == "__main__":
    typer.run(main)
