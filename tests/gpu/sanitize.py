"""Our kernels under compute-sanitizer's tools, and beside another process on the same GPU.

    python tests/gpu/sanitize.py tools                # memcheck, racecheck, synccheck and initcheck, over all CASES
    python tests/gpu/sanitize.py stress               # a neighbour keeps the GPU busy; many calls are queued
    JAX_MOE_COMPILE_ONLY=1 python tests/gpu/sanitize.py cases       # fills the kernel cache, without a GPU

Every result is compared with the definition, and what each tool reports is told case by case, with its text. Buffers
are allocated one by one (no pool), so that memcheck knows where each ends, and initcheck what was written since.
Weights are prepared on the CPU: under a tool, XLA's kernels would take most of the time. The exit code is 0 only if
nothing was wrong and everything ran.
"""

import argparse
import collections
import concurrent.futures
import functools
import itertools
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

FOLDER = pathlib.Path(__file__).parent
sys.path[:0] = [str(FOLDER), str(FOLDER.parent), str(FOLDER.parents[1])]

TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
_SMALL = dict(tokens=1, hidden=64, intermediate=64, num_experts=4, top_k=2)
_FEW_UNITS = dict(tokens=1, hidden=1024, intermediate=512, num_experts=4, top_k=2)  # CTAs with four k warpgroups
_MANY_EXPERTS = dict(tokens=16, hidden=64, intermediate=64, num_experts=128, top_k=8)  # a sort, then two k warpgroups
_RAGGED = dict(tokens=37, hidden=112, intermediate=80, num_experts=5, top_k=3, bias=True)
_TILES = dict(tokens=300, hidden=272, intermediate=144, num_experts=8, top_k=4)  # wide tiles; a sort of many CTAs
CASES = {
    "small w4a16 atomic": (_SMALL, dict(precision="w4a16", combine="atomic")),
    "small w4a4 ordered": (_SMALL, dict(precision="w4a4", combine="ordered")),
    "few units w4a16 atomic": (_FEW_UNITS, dict(precision="w4a16", combine="atomic")),
    "batch invariant w4a16 ordered": (_FEW_UNITS, dict(precision="w4a16", combine="ordered", batch_invariant=True)),
    "many experts w4a4 atomic": (_MANY_EXPERTS, dict(precision="w4a4", combine="atomic")),
    "ragged w4a16 atomic": (_RAGGED, dict(precision="w4a16", combine="atomic")),
    "ragged w4a16 ordered": (_RAGGED, dict(precision="w4a16", combine="ordered")),
    "ragged w4a4 atomic": (_RAGGED, dict(precision="w4a4", combine="atomic")),
    "ragged w4a4 ordered": (_RAGGED, dict(precision="w4a4", combine="ordered")),
    "tiles w4a16 ordered": (_TILES, dict(precision="w4a16", combine="ordered")),
    "tiles w4a4 atomic": (_TILES, dict(precision="w4a4", combine="atomic")),
    "weighted input w4a4 atomic": (_RAGGED, dict(precision="w4a4", combine="atomic", weight_on="input")),
    "ragged w4a4_dynamic ordered": (_RAGGED, dict(precision="w4a4_dynamic", combine="ordered")),
    "tiles w4a4_dynamic atomic": (_TILES, dict(precision="w4a4_dynamic", combine="atomic")),
    "product w4a16": (dict(group_sizes=[9, 0, 14, 150, 3], rows=180), dict(precision="w4a16")),
    "linear w4a16": (dict(group_sizes=[5], rows=9, in_features=1088), dict(precision="w4a16")),  # CTAs that share
    "product w4a4": (dict(group_sizes=[4, 33, 0], rows=40), dict(precision="w4a4")),
    "product w4a4_dynamic": (dict(group_sizes=[4, 33, 0], rows=40), dict(precision="w4a4_dynamic")),
}
"""By name: sizes, and options. Outputs are float32: for random values the definition's bounds hold for any order.

There are no kernels for w4a4_dynamic on Blackwell: there, name the other cases.
"""

_OPTIONS = {"captured": {"xla_gpu_graph_min_graph_size": 1}, "eager": {"xla_gpu_enable_command_buffer": ""}}
_MARK = "CASE"
_QUEUED = 64
_PROCESSES = 3  # of each tool, which share its cases: most of the time is the CPU's


def main() -> None:
    arguments = argparse.ArgumentParser(description="compute-sanitizer, and a busy neighbour: see the module")
    arguments.add_argument("what", choices=["tools", "stress", "cases", "neighbour"])
    arguments.add_argument("--tool", action="append", choices=TOOLS, help="only these")
    arguments.add_argument("--case", action="append", choices=list(CASES), help="only these")
    arguments.add_argument("--seconds", type=float, default=600, help="limit of each process; all run side by side")
    arguments.add_argument("--pool", action="store_true", help="keep JAX's pool of memory: faster, and blunter")
    given = arguments.parse_args()
    names = given.case or list(CASES)
    if given.what == "tools":
        sys.exit(not under_tools(given.tool or TOOLS, names, given.seconds, given.pool))
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if given.what == "stress":
        sys.exit(not stress(names))
    if given.what == "neighbour":
        keep_busy()
    import calls

    with calls.planned():
        sys.exit(not run_cases(names))


# --- The cases ----------------------------------------------------------------------------------------------------


def run_cases(names) -> bool:
    """Each case eager, then recorded and replayed."""
    right = True
    for name in names:
        print(_MARK, name, flush=True)
        for how, options in _OPTIONS.items():
            run, check = prepared(name, exact=False, compiler_options=options)
            times = 1 if how == "eager" else 3  # the first is eager, then one is captured, then there is a replay
            outs = [run() for _ in range(times)]
            errors = [error for error in map(check, outs) if error]
            right &= not errors
            said = "right" if outs[0] is not None else "compiled, not run"
            print(f"{how}: {errors[0] if errors else said}", flush=True)
    print(_MARK, "end", flush=True)
    return right


def prepared(name: str, *, exact: bool, compiler_options):
    """A case as a function without arguments, and ``check(out)``: what is wrong with an output, or None."""
    import calls
    import helpers
    import jax
    import jax.numpy as jnp
    import numpy as np
    import product_cases
    import statement

    import jax_moe

    sizes, options = CASES[name]
    with jax.default_device(jax.devices("cpu")[0]):
        if "rows" in sizes:
            case = product_cases.make_case(1, **sizes, **options, exact=exact)
            function, weights = calls.product(case)
            values = (case.x, jnp.asarray(case.group_sizes, jnp.int32), jnp.int32(case.group_offset), weights)
            value, bound = product_cases.defined(case)
        else:
            make = functools.partial(helpers.make_exact_case, 1) if exact else functools.partial(helpers.make_case, 1)
            sizes = {key: size for key, size in sizes.items() if not (exact and key == "bias")}
            case = make(**sizes, **options, out_dtype=jnp.float32)
            function = functools.partial(jax_moe.fused_moe, **case.options)
            ready = calls.prepared(case)
            values = (ready.x, ready.experts, ready.routing)
            how = ("combine", "batch_invariant", "out_dtype")  # nothing to the definition
            rest = {key: each for key, each in case.options.items() if key not in how}
            value, bound = statement.moe(case.x, case.experts, case.routing, **{"activation": jax_moe.SwiGLU(), **rest})
    values = jax.device_put(values, jax.devices()[0])
    jitted = calls.jit(function, compiler_options)

    def run():
        import pytest

        try:
            return jitted(*values)
        except pytest.skip.Exception:  # compiled for a GPU that is not here
            return None

    def check(out) -> str | None:
        if out is None:
            return None
        result = helpers.compare(np.asarray(out), value, bound)
        return None if result.passes else f"WRONG: {result}"

    return run, check


# --- Under the tools ------------------------------------------------------------------------------------------------


def under_tools(tools, names, seconds: float, pool: bool) -> bool:
    """Runs the cases under each tool, all at once, and prints what was found; whether nothing was, and all ran."""
    program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not os.path.exists(program):
        print("no compute-sanitizer on the PATH or in /usr/local/cuda/bin (it comes with CUDA)")
        return False
    env = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    env |= {} if pool else {"XLA_PYTHON_CLIENT_ALLOCATOR": "platform"}

    def run(tool, some) -> tuple[str, int | None]:
        cases = [part for name in some for part in ("--case", name)]
        command = [program, "--tool", tool, "--print-limit", "1000", sys.executable, __file__, "cases", *cases]
        to_us = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
        with subprocess.Popen(command, env=env, start_new_session=True, **to_us) as process:
            try:
                return process.communicate(timeout=seconds)[0], process.returncode
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)  # the tool, and the program that it runs
                return process.communicate()[0], None

    parts = [names[i::_PROCESSES] for i in range(min(_PROCESSES, len(names)))]
    jobs = list(itertools.product(tools, parts))
    # A thread for each reads what it prints: a pipe that nobody reads would fill up and stop its tool.
    threads = concurrent.futures.ThreadPoolExecutor(len(jobs))
    running = [threads.submit(run, *job) for job in jobs]
    return all([_report(*job, seconds, *future.result()) for job, future in zip(jobs, running, strict=True)])


def _report(tool: str, names, seconds: float, output: str, code: int | None) -> bool:
    """Prints what a tool found in cases; whether that is nothing, and all ran."""
    clean = True
    if code is None:
        print(f"{tool}: not done after {seconds:g} seconds")
    found = by_case(output)
    for name in names:
        lines, reports = found.get(name, ([], []))
        results = [line for line in lines if re.match("(eager|captured): ", line)]
        is_right = len(results) == len(_OPTIONS) and all(line.endswith(": right") for line in results)
        clean &= is_right and not reports
        said = "results right" if is_right else "; ".join(results) or "did not run"
        print(f"{tool:10} {name:28} {len(reports)} reports, {said}")
        for text, times in collections.Counter(map(_kind, reports)).most_common(40):
            print(f"    {times} x {text}")
        for report in reports[:1]:
            print("      " + "\n      ".join(report.splitlines()[:12]))
    outside = found.get("", ([], []))[1] + found.get("end", ([], []))[1]
    for text, times in collections.Counter(map(_kind, outside)).most_common(8):
        print(f"{tool:10} outside of the cases: {times} x {text}")
    summary = re.findall(r"=+ ((?:ERROR|RACECHECK) SUMMARY: .*)", output)
    print(f"{tool:10} {summary[-1] if summary else 'printed no summary'}; exit code {code}", flush=True)
    if not summary:
        print("    " + "\n    ".join(output.splitlines()[-8:]))
    return clean and bool(summary) and code == 0


def by_case(output: str) -> dict[str, tuple[list[str], list[str]]]:
    """What was printed by case: the program's own lines, and the reports of the tool. "": before the first case."""
    found: dict[str, tuple[list[str], list[str]]] = {"": ([], [])}
    lines, reports = found[""]
    inside = False
    for line in output.splitlines():
        if line.startswith(_MARK + " "):
            lines, reports = found.setdefault(line[len(_MARK) + 1 :], ([], []))
        elif line.startswith("========="):
            text = line[9:].strip()
            if not text or re.match("(COMPUTE-SANITIZER|ERROR SUMMARY|RACECHECK SUMMARY|Internal Sanitizer)", text):
                inside = False
                if text.startswith("Internal"):
                    reports.append(text)
            elif inside:
                reports[-1] += "\n" + text
            else:
                reports.append(text)
                inside = True
        else:
            lines.append(line)
    return found


def _kind(report: str) -> str:
    """What and where, with places in the code but without threads and addresses; kernels by their class."""
    short = re.sub(r"kernel_cutlass_kernel_jax_moe\w*?device(\w+?)_object\w*", r"\1", report)
    lines = [line for line in short.splitlines()[1:] if re.search(r"\bat ", line)]
    text = " ".join([short.splitlines()[0], *lines[:1]])
    return re.sub(r"(?<!\+)0x[0-9a-f]+|\(\d+,\d+,\d+\)", "#", text)[:200]


# --- Beside a neighbour ---------------------------------------------------------------------------------------------


def stress(names) -> bool:
    """Queues calls of each case while another process keeps the GPU busy; whether each result has the same bits."""
    import jax
    import numpy as np

    ready = {
        (name, how): prepared(name, exact=True, compiler_options=options)
        for name in names
        for how, options in _OPTIONS.items()
    }
    alone = {}
    for key, (run, check) in ready.items():
        alone[key] = [run() for _ in range(3)][-1]
        if error := check(alone[key]):
            print(*key, error)
            return False
    if any(out is None for out in alone.values()):
        print("compiled, not run")
        return True
    env = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    neighbour = subprocess.Popen([sys.executable, __file__, "neighbour"], stdout=subprocess.PIPE, text=True, env=env)
    assert neighbour.stdout
    clean = True
    try:
        if not neighbour.stdout.readline().startswith("busy"):
            print("the neighbour did not start")
            return False
        for key, (run, _) in ready.items():
            started = time.perf_counter()
            outs = [run() for _ in range(_QUEUED)]
            queued = time.perf_counter() - started
            jax.block_until_ready(outs)
            wrong = sum(np.asarray(out).tobytes() != np.asarray(alone[key]).tobytes() for out in outs)
            clean &= wrong == 0
            took = time.perf_counter() - started
            print(f"stress {key[0]:28} {key[1]:9} {_QUEUED} calls queued in {queued * 1e3:.1f} ms, done in "
                  f"{took * 1e3:.1f} ms, {wrong} of other bits than alone", flush=True)  # fmt: skip
        if neighbour.poll() is not None:
            print("the neighbour has ended early")
            clean = False
    finally:
        neighbour.terminate()
        output = neighbour.communicate()[0].splitlines()
    print(f"the neighbour kept the GPU busy: {output[-1] if output else 'it said nothing'}")
    return clean and bool(output)


def keep_busy() -> None:
    """Multiplies and streams until it is ended."""
    import jax
    import jax.numpy as jnp

    matrix = jnp.ones((4096, 4096), jnp.bfloat16)
    step = jax.jit(lambda a: jnp.tanh(a @ a) + a[::-1])
    step(matrix).block_until_ready()
    print("busy", flush=True)
    count, started = 0, time.perf_counter()
    while True:
        for _ in range(50):
            matrix = step(matrix)
        matrix.block_until_ready()
        count += 50
        print(f"{count} steps in {time.perf_counter() - started:.1f} s", flush=True)


if __name__ == "__main__":
    main()
