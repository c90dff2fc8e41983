"""The whole op on a GPU, sort to combine, beside what else one could call, as ratios to the physical floor.

    python benchmarks/gpu_op.py --model qwen3-235b-a22b --peer ragged_dot --peer torch --output results.json
    python benchmarks/gpu_op.py --plot results.json --plot peers.json --picture results.png

Method. A chain of calls in one jitted program, recorded into a command buffer (jax_moe/cli/timing.py says how and why);
the time of one call is the median time of the program over its length. torch and humming run the same chain as a CUDA
graph. Weights, tokens and routings are random.

The floor is max(bytes of the touched experts' NVFP4 weights / bytes a second, FLOP / FLOP a second), both of this card
(jax_moe/cli/floor.py): of an H200 4.46 TB/s and 791 TFLOP/s, as measured on one of this project; of a B200 on paper,
measured by others or not at all, 7.2 TB/s, and 5.7 PFLOP/s for w4a4, 2.25 for all else; of any other card
what it reads and multiplies in this run. A bf16 peer reads 3.56 times the bytes; its ratio is to
the same floor.

Peers: `torch` (bf16 `torch._grouped_mm` with sort, activation and combine), `ragged_dot` (the same in JAX),
`ragged_dot_cudnn` (with XLA's flag that hands it to cuDNN, which must be 9.22 or later) and `humming` (humming-kernels'
two NVFP4 GEMMs alone, without sort, activation and combine). Peers multiply without biases and with the usual SwiGLU,
whatever the model has. Each method runs in a process of its own; one that fails is listed under "failures" in the JSON,
and its rows until then, like everyone else's, are kept.
"""

import dataclasses
import datetime
import json
import os
import pathlib
import statistics
import subprocess
import sys
from typing import Annotated

import typer

PEERS = ("ragged_dot", "ragged_dot_cudnn", "torch", "humming")
CHAIN = {"ragged_dot": 2, "ragged_dot_cudnn": 2}  # its dense lowering takes half a second a call for many tokens
_DEFAULT_CHAIN = 16
_SECONDS = 3
"""About so long the repeats of one row may take; never fewer than three."""


@dataclasses.dataclass
class Results:
    """What is written to the JSON file, after every row: an interrupted run loses nothing."""

    output: pathlib.Path | None
    rows: list[dict] = dataclasses.field(default_factory=list)
    failures: list[dict] = dataclasses.field(default_factory=list)

    def document(self) -> dict:
        return {"environment": environment(), "results": self.rows, "failures": self.failures}

    def write(self) -> None:
        if self.output:
            self.output.write_text(json.dumps(self.document(), indent=1) + "\n")


def main(
    model: Annotated[list[str] | None, typer.Option(help="Names of jax_moe.shapes.MODELS.")] = None,
    tokens: Annotated[str, typer.Option(help="Numbers of tokens, separated by commas.")] = "1,8,32,128,512,2048,8192",
    variant: Annotated[list[str] | None, typer.Option(help="precision/combine[/batch_invariant] of ours.")] = None,
    peer: Annotated[list[str] | None, typer.Option(help=f"Any of {', '.join(PEERS)}.")] = None,
    repeats: Annotated[int, typer.Option(help="Timed runs of a chain; the median counts.")] = 15,
    output: Annotated[pathlib.Path | None, typer.Option(help="JSON file for the results.")] = None,
    plot: Annotated[list[pathlib.Path] | None, typer.Option(help="Only plot these results; may be repeated.")] = None,
    picture: Annotated[pathlib.Path, typer.Option(help="Where to, with --plot.")] = pathlib.Path("results.png"),
) -> None:
    """Time the op and its peers; see the module's text."""
    if plot:
        _plot([json.loads(path.read_text()) for path in plot], picture)
        return
    from jax_moe import shapes  # not needed for a plot, which is drawn where there may be no jax

    models = model or ["qwen3-235b-a22b"]
    for given, known in ((models, shapes.MODELS), (peer or [], PEERS)):
        if unknown := [name for name in given if name not in known]:
            raise typer.BadParameter(f"got {', '.join(unknown)}, needs any of {', '.join(known)}")
    counts = [int(count) for count in tokens.split(",")]
    methods = [f"jax_moe {v}" for v in variant or ["w4a16/atomic"]] + (peer or [])
    results = Results(output)
    for name in models:
        for method in methods:
            _in_own_process(results, name, method, counts, repeats)
    _print(results.rows)
    for failure in results.failures:
        print(f"FAILED {failure['method']} on {failure['model']}: {failure['error']}")


def _in_own_process(results: Results, model: str, method: str, counts: list[int], repeats: int) -> None:
    """Adds the rows of one method; in a process of its own, because each framework keeps the memory it has had."""
    request = json.dumps([model, method, counts, repeats])
    child = subprocess.Popen([sys.executable, __file__, "measure", request], stdout=subprocess.PIPE, text=True)
    assert child.stdout
    reported = False
    for line in child.stdout:
        kind, _, text = line.partition(" ")
        if kind == "ROW":
            results.rows.append(json.loads(text))
        elif kind == "FAILED":
            results.failures.append(json.loads(text))
            reported = True
        else:
            continue
        print(line, end="", file=sys.stderr, flush=True)
        results.write()
    if child.wait() and not reported:
        results.failures.append({"model": model, "method": method, "error": f"exit code {child.returncode}"})
        results.write()


def measure(request: str) -> None:
    """Time one method and print its rows; called by main."""
    model, method, counts, repeats = json.loads(request)
    count = None
    try:
        make = _method(model, method)
        for count in counts:
            print("ROW", json.dumps({"model": model, "method": method, **_row(make, model, method, count, repeats)}))
            sys.stdout.flush()
    except Exception as error:
        # After an error of CUDA nothing else runs in this process, so this is the method's end.
        text = f"{type(error).__name__}: {error}"
        print("FAILED", json.dumps({"model": model, "method": method, "tokens": count, "error": text}), flush=True)
        raise


def _method(model: str, method: str):
    import gpu_methods

    if method.startswith("jax_moe "):
        return gpu_methods.ours(model, *method.split()[1].split("/"))
    if method == "humming":
        import gpu_humming

        return gpu_humming.gemms(model)
    if method == "torch":
        return gpu_methods.torch_grouped_mm(model)
    fusion = {"xla_gpu_experimental_use_ragged_dot_fusion": True}
    return gpu_methods.ragged_dot(model, fusion if method == "ragged_dot_cudnn" else None)


def _row(make, model: str, method: str, count: int, repeats: int) -> dict:
    from jax_moe import shapes
    from jax_moe.cli import timing

    shape, length = shapes.MODELS[model], CHAIN.get(method, _DEFAULT_CHAIN)
    chain = make(count, length)
    seconds = timing.seconds_per_call(chain.run, length, repeats, limit=_SECONDS)
    weights, flop = chain.touched * shape.weight_bytes_per_expert, shape.flops(count)
    precision = method.split()[1].split("/")[0] if method.startswith("jax_moe ") else "w4a16"
    floor = floor_seconds(shape, count, chain.touched, precision)
    row = {
        "tokens": count, "seconds": seconds, "touched_experts": chain.touched, "floor_seconds": floor,
        "ratio": seconds / floor, "weight_bytes_per_second": weights / seconds, "flop_per_second": flop / seconds,
        "floor_source": ceilings().source,
    }  # fmt: skip
    if chain.start_eagerly is not None and count <= 8:  # with more tokens the GPU's queue fills up, and the host waits
        longer = make(count, 4 * length)
        row["eager_host_seconds"] = _eager_host_seconds(chain, longer, repeats) / (3 * length)
    return row


def _eager_host_seconds(chain, longer, repeats: int) -> float:
    """What the host takes for the calls that ``longer`` has more; starting a program takes some 70 us besides."""
    chains = (chain, longer)
    for one in chains:
        one.start_eagerly()  # compiled, kernels loaded
    seconds = [[one.start_eagerly() for one in chains] for _ in range(2 * repeats)]
    short, long = map(statistics.median, zip(*seconds, strict=True))
    return long - short


def floor_seconds(shape, count: int, touched: float, precision: str) -> float:
    """What the hardware takes at least for so many tokens that touch so many experts; see the module's text."""
    from jax_moe.cli import floor

    return floor.layer_seconds(shape, count, touched, ceilings(), precision)


def ceilings():
    """Of the default device; without a GPU those of an H200."""
    from jax_moe.cli import floor
    from jax_moe.kernels import targets

    found = floor.at_hand() or targets.TARGETS["sm_90a"].cards[0].ceilings
    assert found is not None
    return found


def environment() -> dict:
    """Versions, commit, GPU and time, for the results' file."""
    import importlib.metadata
    import platform

    versions = {}
    for package in (
        "jax", "jaxlib", "jax-cuda13-plugin", "nvidia-cutlass-dsl", "numpy", "torch", "triton", "humming-kernels",
    ):  # fmt: skip
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


def _plot(documents, picture: pathlib.Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    rows = [row for document in documents for row in document["results"]]
    models = list(dict.fromkeys(row["model"] for row in rows))
    figure, axes = plt.subplots(1, len(models), figsize=(6 * len(models), 4.5), squeeze=False, sharey=True)
    for axis, model in zip(axes[0], models, strict=True):
        for method in dict.fromkeys(row["method"] for row in rows if row["model"] == model):
            mine = [row for row in rows if row["model"] == model and row["method"] == method]
            axis.plot([row["tokens"] for row in mine], [row["ratio"] for row in mine], marker="o", label=method)
        counts = sorted({row["tokens"] for row in rows if row["model"] == model})
        axis.set(title=model, xlabel="tokens", xscale="log", yscale="log")
        axis.set_xticks(counts, map(str, counts))
        axis.set_xticks([], minor=True)
        axis.yaxis.set_major_formatter("{x:g}")
        axis.axhline(1, color="black", linewidth=0.8)
        axis.grid(which="both", alpha=0.3)
        axis.legend()
    axes[0][0].set_ylabel("time, in multiples of the physical floor")
    environments = [document["environment"] for document in documents]
    days = dict.fromkeys(each["time"][:10] for each in environments)
    figure.suptitle(f"{environments[0]['gpu']}, {' and '.join(days)}")
    figure.tight_layout()
    figure.savefig(picture, dpi=120)


if __name__ == "__main__":
    # One command for people; `measure` is for main itself.
    if sys.argv[1:2] == ["measure"]:
        measure(sys.argv[2])
    else:
        typer.run(main)
