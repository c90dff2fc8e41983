"""The whole op on a GPU, sort to combine, beside what else one could call, as ratios to the physical floor.

    python benchmarks/gpu_op.py --model qwen3-235b-a22b --peer ragged_dot --peer torch --output results.json
    python benchmarks/gpu_op.py --plot results.json results.png

Method. A chain of calls in one jitted program, each call's output the next one's input and each with a random routing
of its own, recorded into a command buffer; the time of one call is the median time of the program over its length.
A chain, because independent calls might overlap; routings of their own, because one routing's weights might stay in
the L2 cache. torch runs the same chain as a CUDA graph. Weights, tokens and routings are random.

The floor is max(bytes of the touched experts' NVFP4 weights / 4.46 TB/s, FLOP / 791 TFLOP/s): what an H200 of this
project was measured to read and to multiply. A bf16 peer reads 3.56 times the bytes; its ratio is to the same floor.
"""

import datetime
import functools
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time
from typing import Annotated

import typer

READ_BYTES_PER_SECOND = 4.46e12
FLOP_PER_SECOND = 791e12
_CHAIN = 16


def main(
    model: Annotated[list[str] | None, typer.Option(help="Names of jax_moe.shapes.MODELS.")] = None,
    tokens: Annotated[str, typer.Option(help="Numbers of tokens, separated by commas.")] = "1,8,32,128,512,2048,8192",
    variant: Annotated[list[str] | None, typer.Option(help="precision/combine of ours.")] = None,
    peer: Annotated[list[str] | None, typer.Option(help="ragged_dot (bf16, JAX) or torch (bf16 grouped_mm).")] = None,
    repeats: Annotated[int, typer.Option(help="Timed runs of a chain; the median counts.")] = 15,
    output: Annotated[pathlib.Path | None, typer.Option(help="JSON file for the results.")] = None,
    plot: Annotated[tuple[pathlib.Path, pathlib.Path] | None, typer.Option(help="Only plot: results, picture.")] = None,
) -> None:
    """Time the op and its peers; see the module's text."""
    if plot:
        _plot(json.loads(plot[0].read_text()), plot[1])
        return
    counts = [int(count) for count in tokens.split(",")]
    methods = [f"jax_moe {v}" for v in variant or ["w4a16/atomic"]] + (peer or [])
    rows = []
    for name in model or ["qwen3-235b-a22b"]:
        for method in methods:
            rows += _in_own_process(name, method, counts, repeats)
    _print(rows)
    if output:
        output.write_text(json.dumps({"environment": _environment(), "results": rows}, indent=1) + "\n")


def _in_own_process(model: str, method: str, counts: list[int], repeats: int) -> list[dict]:
    """Rows of one method; in a process of its own, because each framework keeps the memory it has had."""
    request = json.dumps([model, method, counts, repeats])
    ran = subprocess.run([sys.executable, __file__, "measure", request], stdout=subprocess.PIPE, text=True)
    rows = [json.loads(line.removeprefix("ROW ")) for line in ran.stdout.splitlines() if line.startswith("ROW ")]
    if ran.returncode:
        print(f"{method} on {model}: failed with exit code {ran.returncode} after {len(rows)} rows", file=sys.stderr)
    return rows


def measure(request: str) -> None:
    """Time one method and print its rows; called by main."""
    model, method, counts, repeats = json.loads(request)
    from jax_moe import shapes

    shape = shapes.MODELS[model]
    if method.startswith("jax_moe "):
        make = _ours(shape, *method.split()[1].split("/"))
    else:
        make = {"ragged_dot": _ragged_dot, "torch": _torch}[method](shape)
    for count in counts:
        # The dense lowering of ragged_dot takes half a second a call for many tokens.
        length = 2 if method == "ragged_dot" else _CHAIN
        run, touched, start_eagerly = make(count, length)
        run(4)  # compiled, run eagerly, captured, replayed
        # As many programs in a row as hide what starting and awaiting one costs the host.
        programs = max(1, min(50, round(0.05 / _timed(run, 1))))
        run(programs)
        seconds = statistics.median(_timed(run, programs) for _ in range(repeats)) / (programs * length)
        weights = touched * shape.weight_bytes_per_expert
        flop = shape.flops(count)
        floor = max(weights / READ_BYTES_PER_SECOND, flop / FLOP_PER_SECOND)
        row = {
            "model": model, "method": method, "tokens": count, "seconds": seconds, "touched_experts": touched,
            "floor_seconds": floor, "ratio": seconds / floor, "weight_bytes_per_second": weights / seconds,
            "flop_per_second": flop / seconds,
        }  # fmt: skip
        if start_eagerly is not None and count <= 8:  # with more tokens the GPU's queue fills up, and the host waits
            start_eagerly(1)
            row["eager_host_seconds"] = statistics.median(start_eagerly(2) for _ in range(repeats)) / (2 * length)
        print("ROW", json.dumps(row), flush=True)


def _timed(run, programs: int) -> float:
    start = time.perf_counter()
    run(programs)
    return time.perf_counter() - start


def _run_jax(function, arguments, programs: int) -> None:
    for _ in range(programs):
        out = function(*arguments)
    out.block_until_ready()


def _routings(shape, count: int, length: int):
    """Random distinct experts per token, as NumPy, and the mean number of experts that have a token."""
    import numpy as np

    rng = np.random.default_rng(count)
    ids = np.argpartition(rng.random((length, count, shape.num_experts)), shape.top_k, axis=-1)[..., : shape.top_k]
    touched = statistics.mean(len(np.unique(call)) for call in ids)
    return ids.astype(np.int32), np.full(ids.shape, 1 / shape.top_k, np.float32), touched


def _ours(shape, precision, combine):
    import jax
    import jax.numpy as jnp

    import jax_moe

    experts, hidden = shape.num_experts, shape.hidden_size
    keys = iter(jax.random.split(jax.random.key(0), 8))

    def projection(lead, rows, columns, input_scale):
        # Block scales of 0.5 to 2 and a global scale that keeps the size of what is multiplied.
        payload = jax.random.bits(next(keys), (*lead, rows, columns // 2), jnp.uint8)
        scale = jax.random.randint(next(keys), (*lead, rows, columns // 16), 0x30, 0x40).astype(jnp.uint8)
        return jax_moe.Projection(
            payload,
            jax.lax.bitcast_convert_type(scale, jnp.float8_e4m3fn),
            jnp.full(lead, 1 / (3.5 * columns**0.5), jnp.float32),
            input_scale,
        )

    canonical = jax_moe.Experts(
        projection((experts, 2), shape.intermediate_size, hidden, jnp.float32(1 / 448)),
        projection((experts,), hidden, shape.intermediate_size, jnp.full(experts, 1 / 448, jnp.float32)),
    )
    weights = jax_moe.prepare(canonical, "sm_90a", progress=False)
    del canonical
    op = functools.partial(jax_moe.fused_moe, precision=precision, combine=combine)

    def make(count, length):
        ids, routing_weights, touched = _routings(shape, count, length)
        x = jax.random.normal(jax.random.key(count), (count, hidden), jnp.bfloat16)

        def chain(x, weights, ids, routing_weights):
            for i in range(length):
                x = op(x, weights, jax_moe.Routing(ids[i], routing_weights[i]))
            return x

        compiled = jax.jit(chain, compiler_options={"xla_gpu_graph_min_graph_size": 1})
        arguments = [jnp.asarray(ids[i]) for i in range(length)], [jnp.asarray(w) for w in routing_weights]
        eager = jax.jit(chain, compiler_options={"xla_gpu_enable_command_buffer": ""})

        def start_eagerly(programs) -> float:
            """Seconds of the host to start so many programs; awaits the GPU outside of that."""
            start = time.perf_counter()
            outs = [eager(x, weights, *arguments) for _ in range(programs)]
            elapsed = time.perf_counter() - start
            jax.block_until_ready(outs)
            return elapsed

        return functools.partial(_run_jax, compiled, (x, weights, *arguments)), touched, start_eagerly

    return make


def _ragged_dot(shape):
    import jax
    import jax.numpy as jnp

    keys = jax.random.split(jax.random.key(0), 2)
    experts, hidden, intermediate = shape.num_experts, shape.hidden_size, shape.intermediate_size
    gate_up = jax.random.normal(keys[0], (experts, hidden, 2 * intermediate), jnp.bfloat16) * hidden**-0.5
    down = jax.random.normal(keys[1], (experts, intermediate, hidden), jnp.bfloat16) * intermediate**-0.5

    def op(x, gate_up, down, ids, weights):
        order = jnp.argsort(ids.reshape(-1), stable=True)
        sizes = jnp.bincount(ids.reshape(-1), length=experts).astype(jnp.int32)
        both = jax.lax.ragged_dot(x[order // shape.top_k], gate_up, sizes)
        h = jax.nn.silu(both[:, :intermediate].astype(jnp.float32)) * both[:, intermediate:]
        rows = jax.lax.ragged_dot(h.astype(jnp.bfloat16), down, sizes, preferred_element_type=jnp.float32)
        out = jnp.zeros(x.shape, jnp.float32).at[order // shape.top_k].add(rows * weights.reshape(-1)[order][:, None])
        return out.astype(x.dtype)

    def make(count, length):
        ids, routing_weights, touched = _routings(shape, count, length)
        x = jax.random.normal(jax.random.key(count), (count, hidden), jnp.bfloat16)

        def chain(x, gate_up, down, ids, weights):
            for i in range(length):
                x = op(x, gate_up, down, ids[i], weights[i])
            return x

        compiled, arguments = jax.jit(chain), (jnp.asarray(ids), jnp.asarray(routing_weights))
        return functools.partial(_run_jax, compiled, (x, gate_up, down, *arguments)), touched, None

    return make


def _torch(shape):
    import torch

    experts, hidden, intermediate = shape.num_experts, shape.hidden_size, shape.intermediate_size
    torch.manual_seed(0)
    gate_up = torch.randn(experts, 2 * intermediate, hidden, dtype=torch.bfloat16, device="cuda") * hidden**-0.5
    down = torch.randn(experts, hidden, intermediate, dtype=torch.bfloat16, device="cuda") * intermediate**-0.5

    def op(x, ids, weights):
        flat = ids.reshape(-1)
        order = torch.argsort(flat, stable=True)
        ends = torch.searchsorted(flat[order], torch.arange(1, experts + 1, device="cuda")).to(torch.int32)
        both = torch._grouped_mm(x[order // shape.top_k], gate_up.transpose(1, 2), offs=ends)
        h = torch.nn.functional.silu(both[:, :intermediate]) * both[:, intermediate:]
        rows = torch._grouped_mm(h, down.transpose(1, 2), offs=ends)
        out = torch.zeros(x.shape, dtype=torch.float32, device="cuda")
        out.index_add_(0, order // shape.top_k, rows.float() * weights.reshape(-1)[order][:, None])
        return out.to(x.dtype)

    def make(count, length):
        ids, routing_weights, touched = _routings(shape, count, length)
        ids, weights = torch.tensor(ids, dtype=torch.int64, device="cuda"), torch.tensor(routing_weights, device="cuda")
        first = torch.randn(count, hidden, dtype=torch.bfloat16, device="cuda")

        def chain():
            x = first
            for i in range(length):
                x = op(x, ids[i], weights[i])
            return x

        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            chain()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            chain()

        def run(programs):
            for _ in range(programs):
                graph.replay()
            torch.cuda.synchronize()

        return run, touched, None

    return make


def _environment() -> dict:
    import importlib.metadata
    import platform

    versions = {}
    for package in ("jax", "jaxlib", "jax-cuda13-plugin", "torch", "numpy"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    # A checkout without its history (a copy on a lent machine) is told its commit.
    revision = ["git", "-C", str(pathlib.Path(__file__).parent), "rev-parse", "HEAD"]
    return {
        "gpu": _first_line(query),
        "commit": os.environ.get("JAX_MOE_COMMIT") or _first_line(revision),
        "python": platform.python_version(),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **versions,
    }


def _first_line(command) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.partition("\n")[0]
    except (OSError, subprocess.CalledProcessError):
        return ""


def _print(rows) -> None:
    print(f"{'model':18}{'method':22}{'T':>6}{'us':>11}{'x floor':>9}{'TB/s':>7}{'TFLOP/s':>9}")
    for r in rows:
        rates = r["weight_bytes_per_second"] / 1e12, r["flop_per_second"] / 1e12
        host = f"   {r['eager_host_seconds'] * 1e6:.1f} us of the host, eager" if "eager_host_seconds" in r else ""
        print(
            f"{r['model']:18}{r['method']:22}{r['tokens']:6}{r['seconds'] * 1e6:11.1f}{r['ratio']:9.2f}"
            f"{rates[0]:7.2f}{rates[1]:9.1f}{host}"
        )


def _plot(document, picture: pathlib.Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    rows = document["results"]
    models = list(dict.fromkeys(row["model"] for row in rows))
    figure, axes = plt.subplots(1, len(models), figsize=(6 * len(models), 4.5), squeeze=False, sharey=True)
    for axis, model in zip(axes[0], models, strict=True):
        for method in dict.fromkeys(row["method"] for row in rows if row["model"] == model):
            mine = [row for row in rows if row["model"] == model and row["method"] == method]
            axis.plot([row["tokens"] for row in mine], [row["ratio"] for row in mine], marker="o", label=method)
        axis.set(title=model, xlabel="tokens", xscale="log", yscale="log")
        axis.axhline(1, color="black", linewidth=0.8)
        axis.grid(which="both", alpha=0.3)
        axis.legend()
    axes[0][0].set_ylabel("time / floor")
    figure.suptitle(f"{document['environment']['gpu']}, {document['environment']['time'][:10]}")
    figure.tight_layout()
    figure.savefig(picture, dpi=120)


if __name__ == "__main__":
    # One command for people; `measure` is for main itself.
    if sys.argv[1:2] == ["measure"]:
        measure(sys.argv[2])
    else:
        typer.run(main)
