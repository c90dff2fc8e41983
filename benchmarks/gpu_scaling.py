"""Strong and weak scaling of ``jax_moe.sharded_moe`` on the GPUs of one host, and what its collectives cost there.

    python benchmarks/gpu_scaling.py --output results.json                     # qwen3-235b-a22b, w4a16, all GPUs
    python benchmarks/gpu_scaling.py --table results.json                      # the Markdown of docs/scaling.md
    python benchmarks/gpu_scaling.py --plot results.json picture.png
    JAX_MOE_CACHE_DIR=kernels python benchmarks/gpu_scaling.py --compile-for sm_90a     # fills the cache, without a GPU

Method. One process has all GPUs. t(1) is ``fused_moe`` on the first of them with all experts, t(n) ``sharded_moe`` on
n, both of this run. Both are chains of calls in one captured program, as in jax_moe/cli/timing.py: up to
``timing.CHAINED_TOKENS`` tokens each call reads the last one's output; beyond, all have the same x, and each device's
expert ids wait for that device's part of the last output (a kernel of some 2 us, no collective). Tokens and routing
that are gathered always wait: XLA would gather for all calls at once. "operations" in the file counts the collectives
of a program's 8 calls and 7 waits. Medians.

Forms, on a mesh of one axis:

    replicated      experts are spread over the axis, all devices have all tokens; sums by all-reduce
    spread          tokens are spread over the experts' axis: gathered before, sums scattered behind
    tensor          every expert's I is cut into n slices, all devices have all tokens
    tensor-spread   I is cut, tokens are spread
    local           replicated without its exchange: no result, only what the op itself takes on 1/n of the experts

Efficiency is t(1, T) / (n t(n, T)), and weak efficiency t(1, T/n) / t(n, T). The more tokens fit, the more the power
limit of a card decides (docs/hopper.md), so the time of a row is long enough to be at it.

Every program returns its first call's output too. After the timing the devices' free memory is filled with NaN, the
captured program runs once more, and that output is compared with one GPU's. The bound of the relative Frobenius norm is

    u sqrt((2 K + n) / 3) with bfloat16 sums, u sqrt((K + 1) / 3) with float32 ones,    u = 2**-8

One GPU adds K contributions to a token's bfloat16 output and rounds each time; so do n GPUs together with bfloat16
parts, which are then added with at most n roundings; with float32 parts the sum is rounded once. A rounding to nearest
is off by at most u of its result, so by u / sqrt(3) in the mean square; contributions of random experts are
uncorrelated, so no partial sum is longer than the whole; and roundings are independent, so their squares add up. The
intermediate's roundings flip where the order of float32 sums differs: in fewer than 1 of 1000 values, which adds less
than a hundredth to the square. One row is short for such a mean: the worst may have twice the bound.

Collectives: chains of 8, each waiting for the last by one element written into its operand (2 us, part of the
latency). Bytes are those that a rank sends in a ring (benchmarks/exchange_model.py), and constants the line through
the times that is nearest in relative squares. benchmarks/scaling_model.py goes on from there.
"""

from collections.abc import Callable, Iterator
import concurrent.futures
import dataclasses
import functools
import itertools
import json
import pathlib
import sys
import time
from typing import Annotated, Any

import gpu_op
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np
import scaling_model
from scaling_model import LOCAL, MODELS, ONE
import scaling_programs as programs
from scaling_programs import Case
import typer

import jax_moe
from jax_moe import shapes
from jax_moe.cli import timing
from jax_moe.kernels import targets
from jax_moe.kernels.cache import MissingKernelError

_ROW_SECONDS = 0.5
"""About so long the repeats of a row may take; never fewer than three."""

_POISON_BYTES = 2**30
"""The largest block of a device's memory that is filled with NaN; there is one of each power of two below."""

ROWS = (8, 128, 1024, 8192)
"""Of the arrays that collectives are timed with, as many tokens: with their columns what ``sharded_moe`` sends."""


@dataclasses.dataclass
class Results(gpu_op.Results):
    """And what the collectives took."""

    collectives: list[dict] = dataclasses.field(default_factory=list)

    def document(self) -> dict:
        return {
            "environment": _environment() | {"cards": cards()},
            "results": self.rows,
            "collectives": self.collectives,
            "constants": scaling_model.constants(self.collectives),
            "failures": self.failures,
        }


_environment = functools.cache(gpu_op.environment)  # asking nvidia-smi takes longer than some rows


def cards() -> dict[str, int]:
    """How many devices of each kind this process has."""
    kinds = [device.device_kind for device in jax.local_devices()]
    return {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}


def bound(top_k: int, sum_dtype: str, n: int) -> float:
    """Of the relative Frobenius norm of the difference to one GPU; the module's text derives it."""
    roundings = 2 * top_k + n if sum_dtype == "bfloat16" else top_k + 1
    return 2**-8 * (roundings / 3) ** 0.5


def difference(got: np.ndarray, expected: np.ndarray) -> tuple[float, float]:
    """Relative norms of the difference: Frobenius, and of the worst row. Infinite if a value is not finite."""
    got, expected = got.astype(np.float32), expected.astype(np.float32)
    if got.shape != expected.shape or not np.isfinite(got).all():
        return np.inf, np.inf
    errors, sizes = np.linalg.norm(got - expected, axis=1), np.linalg.norm(expected, axis=1)
    rows = np.where(errors > 0, errors / np.maximum(sizes, np.finfo(np.float32).tiny), 0)
    return float(np.linalg.norm(errors) / np.linalg.norm(sizes)), float(rows.max())


@functools.lru_cache(maxsize=8)
def _poison(mesh: Mesh, largest: int) -> Callable[[], list[jax.Array]]:
    sizes = [2**power for power in range(14, largest.bit_length() - 2)]  # of float32: 64 KiB and up
    sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names[0]))
    return jax.jit(lambda: [jnp.full((mesh.size, size), jnp.nan) for size in sizes], out_shardings=sharding)


def poison(mesh: Mesh) -> None:
    """Fills memory of the devices that nobody has with NaN: a block of each size, so that every gap gets some."""
    jax.block_until_ready(_poison(mesh, _POISON_BYTES)())


# --- Measuring --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Job:
    """What is to be measured of one model, and what is known of one GPU.

    Attributes:
      model, shape: which layer.
      repeats: timed runs; the median counts.
      deadline: of ``time.monotonic``; no row begins later.
      results: where rows go.
      seconds, outputs: of one GPU, by precision and T.
    """

    model: str
    shape: shapes.LayerShape
    repeats: int
    deadline: float
    results: Results
    seconds: dict[tuple, float] = dataclasses.field(default_factory=dict)
    outputs: dict[tuple, np.ndarray] = dataclasses.field(default_factory=dict)

    def fail(self, case: Case, n: int, error: str) -> None:
        failure = {"model": self.model, **dataclasses.asdict(case), "devices": n, "error": error}
        print("FAILED", json.dumps(failure), file=sys.stderr, flush=True)
        self.results.failures.append(failure)
        self.results.write()


def measure(job: Job, canonical: jax_moe.Experts, cases: list[Case], mesh: Mesh) -> None:
    """Rows of cases on the same mesh: weights are placed once for each layout, programs compiled side by side."""
    layouts: dict[str, list[Case]] = {}
    for case in cases:
        layouts.setdefault(targets.layout_for(None, case.precision).name, []).append(case)
    for layout, same in layouts.items():
        try:
            weights = jax_moe.prepare(
                jax.device_put(canonical, jax_moe.expert_shardings(canonical, mesh)), layout, progress=False
            )
        except ValueError as error:  # the mesh does not divide E or I
            for case in same:
                job.fail(case, mesh.size, f"{type(error).__name__}: {error}")
            continue
        with concurrent.futures.ThreadPoolExecutor() as pool:
            compiled: list[tuple[Case, Any, concurrent.futures.Future]] = []
            for case in same:
                if time.monotonic() > job.deadline:
                    job.fail(case, mesh.size, "not measured: the time was up")
                    continue
                given = programs.arguments(job.shape, case, mesh, weights)
                try:
                    lowered = programs.program(case, mesh).lower(*given)
                except (ValueError, MissingKernelError) as error:
                    job.fail(case, mesh.size, f"{type(error).__name__}: {error}")
                    continue
                compiled.append((case, given, pool.submit(lowered.compile)))
            concurrent.futures.wait([future for *_, future in compiled])  # nothing compiles beside what is timed
            for case, given, future in compiled:
                if time.monotonic() > job.deadline:
                    job.fail(case, mesh.size, "not measured: the time was up")
                    continue
                row = measure_case(job, case, mesh, future.result(), given)
                job.results.rows.append(row)
                print("ROW", json.dumps(row), file=sys.stderr, flush=True)
                job.results.write()


def measure_case(job: Job, case: Case, mesh: Mesh, compiled: jax.stages.Compiled, given: timing.Arguments) -> dict:
    """Times a case's program, and compares its output with one GPU's, which it keeps if it is that."""
    run = functools.partial(timing.run, lambda *values: compiled(*values)[1], given)
    seconds = timing.seconds_per_call(run, programs.LENGTH, job.repeats, limit=_ROW_SECONDS)
    poison(mesh)
    output = np.asarray(compiled(*given)[0])
    key, n = (case.precision, case.tokens), mesh.size
    row = {"model": job.model, **dataclasses.asdict(case), "devices": n, "seconds": seconds}
    row["operations"] = programs.operations(compiled)
    if case.form == ONE:
        job.seconds[key], job.outputs[key] = seconds, output
    if case.form in (ONE, LOCAL):  # there is nothing to compare these with
        row["finite"] = bool(np.isfinite(output.astype(np.float32)).all())
    elif key in job.outputs:
        frobenius, worst_row = difference(output, job.outputs[key])
        limit = bound(job.shape.top_k, case.sum_dtype, n)
        row |= {"error": frobenius, "bound": limit, "worst_row": worst_row, "worst_row_bound": 2 * limit}
        row["equal"] = frobenius <= limit and worst_row <= 2 * limit
    part = (case.precision, case.tokens / n)
    if n > 1 and key in job.seconds:
        row["efficiency"] = job.seconds[key] / (n * seconds)
    if n > 1 and part in job.seconds and case.form != LOCAL:
        row["weak_efficiency"] = job.seconds[part] / seconds
    return row


def cases_of(
    n: int, axis: str, precisions: list, tokens: list[int], forms: list[str], sum_dtypes: list[str]
) -> list[Case]:
    """Those of n devices whose mesh has this axis."""
    chosen = [form for form in forms if programs.FORMS[form].axis == axis]
    return [
        Case(precision, count, form, sum_dtype)
        for precision, count, form, sum_dtype in itertools.product(precisions, tokens, chosen, sum_dtypes)
        if not (programs.FORMS[form].is_spread and count % n)
    ]


def axes_of(forms: list[str]) -> list[str]:
    return list(dict.fromkeys(programs.FORMS[form].axis for form in forms))


# --- Collectives ------------------------------------------------------------------------------------------------------


def measure_collectives(results: Results, mesh: Mesh, repeats: int) -> None:
    seed = jax.device_put(np.arange(1, mesh.size + 1, dtype=np.float32), NamedSharding(mesh, PartitionSpec("expert")))
    sizes = [(name, count) for name in programs.COLLECTIVES for count in ROWS]
    with concurrent.futures.ThreadPoolExecutor() as pool:
        lowered = [programs.collective_chain(name, count, mesh).lower(seed) for name, count in sizes]
        for (name, count), compiled in zip(sizes, pool.map(lambda one: one.compile(), lowered), strict=True):
            run = functools.partial(timing.run, compiled, (seed,))
            seconds = timing.seconds_per_call(run, programs.LENGTH, repeats, limit=_ROW_SECONDS / 5)
            whole = count * programs.COLUMNS * jnp.dtype(programs.COLLECTIVES[name][0]).itemsize
            sent = programs.sent_bytes(name, whole, mesh.size)
            results.collectives.append(
                {"name": name, "devices": mesh.size, "bytes": whole, "sent_bytes": sent, "seconds": seconds}
                | {"operations": programs.operations(compiled)}
            )
        results.write()


# --- The kernels of all this, without a GPU ---------------------------------------------------------------------------


def compile_for(target: str, placements: Iterator[tuple[str, list[Case], Mesh]]) -> None:
    for model, cases, mesh in placements:
        start = time.monotonic()
        types: dict[Any, jax_moe.Experts] = {}
        try:
            for case in cases:
                if case.precision not in types:
                    types[case.precision] = programs.prepared_types(MODELS[model], target, case.precision, mesh)
                programs.lower_for(MODELS[model], case, mesh, types[case.precision])
        except ValueError as error:  # the mesh does not divide E or I
            print(f"{model} on {dict(mesh.shape)}: {error}")
            continue
        print(f"{model} on {dict(mesh.shape)}: {len(cases)} programs in {time.monotonic() - start:.0f} s", flush=True)


# --- The command ------------------------------------------------------------------------------------------------------


def main(
    model: Annotated[list[str] | None, typer.Option(help=f"Any of {', '.join(MODELS)}.")] = None,
    tokens: Annotated[str, typer.Option(help="Numbers of tokens in all, separated by commas.")] = "8,128,1024,8192",
    devices: Annotated[str, typer.Option(help="Numbers of GPUs beside 1; else 2, 4, ... of those there.")] = "",
    form: Annotated[
        list[str] | None, typer.Option(help=f"Any of {', '.join(programs.FORMS)}; else the first three.")
    ] = None,
    precision: Annotated[list[str] | None, typer.Option(help="w4a16 (if none is given) or w4a4.")] = None,
    sum_dtype: Annotated[list[str] | None, typer.Option(help="float32 or bfloat16; else both.")] = None,
    weak: Annotated[str, typer.Option(help="T of weak scaling: one GPU is timed with T/n, too. Else the most.")] = "",
    collectives: Annotated[bool, typer.Option(help="Time the collectives, too.")] = True,
    repeats: Annotated[int, typer.Option(help="Timed runs of a chain; the median counts.")] = 15,
    seconds: Annotated[float, typer.Option(help="No row begins later; those left out are named.")] = 300,
    output: Annotated[pathlib.Path | None, typer.Option(help="JSON file for the results.")] = None,
    plot: Annotated[tuple[pathlib.Path, pathlib.Path] | None, typer.Option(help="Only plot: results, picture.")] = None,
    table: Annotated[pathlib.Path | None, typer.Option(help="Only print this file's results as Markdown.")] = None,
    target: Annotated[str | None, typer.Option("--compile-for", help="Only compile the kernels for this.")] = None,
) -> None:
    """Time one GPU, several, and their collectives; see the module's text."""
    if plot:
        scaling_model.plot(json.loads(plot[0].read_text()), plot[1])
        return
    if table:
        print(*scaling_model.markdown(json.loads(table.read_text())), sep="\n\n")
        return
    deadline = time.monotonic() + seconds
    if target:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", 8)
    models, forms = model or ["qwen3-235b-a22b"], form or list(programs.FORMS)[:3]
    precisions, sum_dtypes = precision or ["w4a16"], sum_dtype or list(programs.SUM_DTYPES)
    for given, known in (
        (models, MODELS), (forms, programs.FORMS), (precisions, ("w4a16", "w4a4")), (sum_dtypes, programs.SUM_DTYPES),
    ):  # fmt: skip
        if unknown := [name for name in given if name not in known]:
            raise typer.BadParameter(f"got {', '.join(unknown)}, needs any of {', '.join(known)}")
    there = jax.local_devices()
    sizes = [int(n) for n in devices.split(",")] if devices else [n for n in (2, 4, 8) if n <= len(there)]
    if wrong := [n for n in sizes if not 1 < n <= len(there)]:
        raise typer.BadParameter(f"--devices: got {wrong}, needs 2 to {len(there)}")
    counts = [int(count) for count in tokens.split(",")]
    weak_counts = [int(count) for count in weak.split(",")] if weak else [max(counts)]
    alone = sorted({*counts, *(count // n for count in weak_counts for n in sizes if count % n == 0)} - {0})
    one = [Case(p, count) for p in precisions for count in alone]

    def placements(model: str) -> Iterator[tuple[str, list[Case], Mesh]]:
        yield model, one, programs.make_mesh(there[:1], "expert")
        for n, axis in itertools.product(sizes, axes_of(forms)):
            yield model, cases_of(n, axis, precisions, counts, forms, sum_dtypes), programs.make_mesh(there[:n], axis)

    if target:
        compile_for(target, itertools.chain.from_iterable(map(placements, models)))
        return
    results = Results(output)
    print(f"{cards()}", file=sys.stderr, flush=True)
    for name in models:
        job = Job(name, MODELS[name], repeats, deadline, results)
        canonical = timing.random_experts(MODELS[name], 0)
        for _, cases, mesh in placements(name):
            measure(job, canonical, cases, mesh)
    for n in sizes if collectives else []:
        if time.monotonic() > deadline:
            results.failures.append({"devices": n, "error": "collectives not measured: the time was up"})
            continue
        measure_collectives(results, programs.make_mesh(there[:n], "expert"), repeats)
    results.write()
    print(*scaling_model.markdown(results.document()), sep="\n\n")
    wrong = [row for row in results.rows if not row.get("equal", row.get("finite"))]
    for row in wrong:
        print(f"WRONG: {json.dumps(row)}")
    for failure in results.failures:
        print(f"FAILED: {json.dumps(failure)}")
    if wrong:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
