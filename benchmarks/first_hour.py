"""The first hour on a GPU: correctness, sanitizers and benchmarks by one command, all results in one file.

    pip install '.[cuda13,test]'                              # in a checkout
    python benchmarks/first_hour.py results.json              # or with --quick: some minutes, one sanitizer, few sizes

The GPU chooses the target. Each step runs in processes of its own, with a limit of time, and the file is written after
each: whatever stops this, what was found until then is in it. What cannot run here is in it too, as "skipped" and why.
Please send us the file, passed or not. It has versions, the names of the GPU and the driver, test names with their
errors, and times; no paths of yours but those in errors and in what doctor prints.

    python benchmarks/first_hour.py --accept results.json     # for maintainers: `doctor` then counts it as a run
"""

import dataclasses
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time
from typing import Annotated, Any
import xml.etree.ElementTree

from gpu_op import environment
import typer

ROOT = pathlib.Path(__file__).parents[1]
SANITIZERS = ("memcheck", "racecheck", "synccheck", "initcheck")
_SANITIZED = "test_shapes and ragged"
"""Tests of tests/gpu/test_op.py, small ones, that run under the sanitizers: some make them a thousand times slower."""
_KEPT = 4000  # characters of an error


@dataclasses.dataclass
class Step:
    """What became of a step: ``status`` is "passed", "failed" or "skipped", ``why`` says why not passed."""

    status: str
    why: str = ""
    seconds: float = 0.0
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)


def main(
    output: Annotated[pathlib.Path, typer.Argument(help="JSON file for all results.")],
    quick: Annotated[bool, typer.Option(help="One sanitizer, few sizes: some minutes.")] = False,
    model: Annotated[str, typer.Option(help="Of jax_moe.shapes.MODELS, for the benchmarks.")] = "qwen3-235b-a22b",
    minutes: Annotated[float, typer.Option(help="Limit of each step.")] = 20,
    accept: Annotated[
        bool, typer.Option("--accept", help="For maintainers: record a file that all passed in.")
    ] = False,
) -> None:
    """Run correctness, sanitizers and benchmarks; see the module's text."""
    if accept:
        typer.echo(accepted(json.loads(output.read_text())))
        return
    gpu, why_not = find_gpu()
    document: dict[str, Any] = {"first_hour": 1, "environment": environment(), **gpu, "steps": {}}
    steps = {
        "machine": lambda: _doctor(minutes),
        "correctness": lambda: pytest_step("tests/gpu", minutes=minutes),
        **{f"sanitizer {tool}": _sanitizer(tool, minutes) for tool in SANITIZERS[: 1 if quick else None]},
        "benchmark of the op": lambda: _benchmark(_gpu_op(model, quick), minutes),
        "benchmark of the kernels": lambda: _benchmark(_kernel_times(model, quick), minutes),
    }
    for name, step in steps.items():
        typer.echo(f"-- {name}")
        started = time.perf_counter()
        done = Step("skipped", why_not) if why_not and name != "machine" else step()
        done.seconds = round(time.perf_counter() - started, 1)
        document["steps"][name] = dataclasses.asdict(done)
        output.write_text(json.dumps(document, indent=1) + "\n")
        typer.echo(f"   {done.status}{': ' if done.why else ''}{done.why.strip().splitlines()[0] if done.why else ''}")
    statuses = [step["status"] for step in document["steps"].values()]
    counts = ", ".join(f"{statuses.count(each)} {each}" for each in ("passed", "failed", "skipped"))
    typer.echo(f"{output}: {counts}")
    raise typer.Exit(0 if statuses.count("passed") > 1 and "failed" not in statuses else 1)


def find_gpu() -> tuple[dict[str, Any], str]:
    """What the file says of the GPU, and why nothing can run, "" if it can. JAX keeps a GPU: another process asks."""
    program = (
        "import jax, json, sys\nfrom jax_moe.kernels import targets\n"
        "d = jax.devices()[0]\n"
        "if d.platform != 'gpu': sys.exit(f'JAX runs on {d.platform}: no NVIDIA GPU, or no CUDA plugin')\n"
        "facts = {'card': d.device_kind, 'compute_capability': d.compute_capability, 'devices': len(jax.devices())}\n"
        "print(json.dumps(facts | {'target': targets.for_device(d).name}))\n"
    )
    done = run([sys.executable, "-c", program], minutes=5)
    if done.returncode:
        return {"target": None}, done.output.strip().splitlines()[-1] if done.output.strip() else "JAX does not start"
    return json.loads(done.output.strip().splitlines()[-1]), ""


@dataclasses.dataclass
class Done:
    """A finished process; ``returncode`` is None when its time was up. ``output`` is both streams."""

    returncode: int | None
    output: str


def run(command: list[str], minutes: float, **environment_: str) -> Done:
    """Runs a command in the checkout, with what it prints kept."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"PYTHONPATH": path, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"} | environment_
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=env, timeout=60 * minutes, text=True, errors="replace", stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        output = error.output or b""
        return Done(None, output.decode(errors="replace") if isinstance(output, bytes) else output)
    except OSError as error:
        return Done(127, str(error))
    return Done(done.returncode, done.stdout)


def pytest_step(*arguments: str, minutes: float, under: tuple[str, ...] = ()) -> Step:
    """Runs pytest; counts and failures come from its report."""
    with tempfile.TemporaryDirectory() as folder:
        report = pathlib.Path(folder, "report.xml")
        command = [*under, sys.executable, "-m", "pytest", "-q", "-m", "gpu", f"--junitxml={report}", *arguments]
        done = run(command, minutes)
        facts = _report(report) if report.exists() else {}
    facts["returncode"] = done.returncode
    if done.returncode is None:
        return Step("failed", f"not done after {minutes:g} minutes\n{done.output[-_KEPT:]}", facts=facts)
    if done.returncode or not facts.get("passed"):
        return Step("failed", f"pytest returned {done.returncode}\n{done.output[-_KEPT:]}", facts=facts)
    facts["output"] = done.output[-_KEPT:]
    return Step("passed", facts=facts)


def _report(path: pathlib.Path) -> dict[str, Any]:
    cases = list(xml.etree.ElementTree.parse(path).getroot().iter("testcase"))
    failures = {
        f"{case.get('classname')}::{case.get('name')}": (bad.get("message") or "")[:_KEPT]
        for case in cases
        for bad in (*case.findall("failure"), *case.findall("error"))
    }
    skipped = [reason for case in cases for reason in case.findall("skipped")]
    reasons = sorted({reason.get("message") or "" for reason in skipped})
    passed = len(cases) - len(failures) - len(skipped)
    return {"passed": passed, "failures": failures, "skipped": len(skipped), "why_skipped": reasons}


def _sanitizer(tool: str, minutes: float):
    def step() -> Step:
        found = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
        if not pathlib.Path(found).exists():
            return Step("skipped", "no compute-sanitizer on the PATH or in /usr/local/cuda/bin (it comes with CUDA)")
        under = (found, "--tool", tool, "--error-exitcode", "86", "--target-processes", "all")
        done = pytest_step("tests/gpu/test_op.py", "-k", _SANITIZED, minutes=minutes, under=under)
        summary = re.findall(r"=+ (?:ERROR|RACECHECK) SUMMARY: .*", done.facts.get("output", "") + done.why)
        done.facts["summary"] = summary
        if done.status == "passed" and not summary:
            return Step("failed", f"{tool} printed no summary", facts=done.facts)
        return done

    return step


def _doctor(minutes: float) -> Step:
    done = run([sys.executable, "-m", "jax_moe", "doctor"], minutes, COLUMNS="160")
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,clocks.max.sm,power.limit", "--format=csv"]
    facts = {"doctor": done.output, "nvidia-smi": run(query, 1).output}
    return Step(
        "passed" if done.returncode == 0 else "failed", "" if done.returncode == 0 else done.output, facts=facts
    )


def _gpu_op(model: str, quick: bool) -> list[list[str]]:
    counts = "1,64,2048" if quick else "1,8,32,128,512,2048,8192,16384"
    variants = ["--variant", "w4a4/atomic", "--variant", "w4a16/atomic"]
    variants += [] if quick else ["--variant", "w4a4/ordered"]
    return [["benchmarks/gpu_op.py", "--model", model, "--tokens", counts, *variants]]


def _kernel_times(model: str, quick: bool) -> list[list[str]]:
    counts = "8,2048" if quick else "1,8,64,512,2048,8192"
    return [
        ["benchmarks/kernel_times.py", "--model", model, "--tokens", counts, "--precision", precision]
        for precision in ("w4a4", "w4a16")
    ]


def _benchmark(commands: list[list[str]], minutes: float) -> Step:
    """Runs benchmarks that write a JSON file each; what they had measured when they failed is kept."""
    facts: dict[str, Any] = {"results": []}
    why = ""
    for command in commands:
        with tempfile.TemporaryDirectory() as folder:
            file = pathlib.Path(folder, "results.json")
            done = run([sys.executable, *command, "--output", str(file)], minutes)
            document = json.loads(file.read_text()) if file.exists() else {}
        facts["results"].append({"command": " ".join(command), **document})
        if done.returncode != 0 or not document.get("results") or document.get("failures"):
            ended = f"not done after {minutes:g} minutes" if done.returncode is None else f"returned {done.returncode}"
            why += f"{command[0]} {ended}\n{done.output[-_KEPT:]}\n"
    return Step("failed" if why else "passed", why, facts=facts)


def accepted(document: dict[str, Any]) -> str:
    """Records the run of a results' file; what was done, in words.

    Raises:
      typer.BadParameter: the file is of something else, or not everything that counts passed.
    """
    from jax_moe.kernels import records

    steps = document.get("steps", {})
    wanted = ("correctness", "benchmark of the op", *(name for name in steps if name.startswith("sanitizer")))
    bad = [name for name in wanted if steps.get(name, {}).get("status") != "passed"]
    bad = [name for name in bad if not (name.startswith("sanitizer") and steps[name]["status"] == "skipped")]
    target, commit = document.get("target"), document.get("environment", {}).get("commit")
    if document.get("first_hour") != 1 or not target or not commit:
        raise typer.BadParameter("not a file of benchmarks/first_hour.py with a GPU and a commit")
    if bad:
        raise typer.BadParameter(f"not passed: {', '.join(bad)}")
    entry = {"card": document["card"], "commit": commit[:7], "date": document["environment"]["time"][:10]}
    all_runs = json.loads(records.FILE.read_text())
    if entry not in all_runs.setdefault(target, []):
        all_runs[target].append(entry)
    lines = [f' "{name}": {json.dumps(entries)}' for name, entries in all_runs.items()]
    records.FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    return f"{target}: {entry} is in {records.FILE}"


if __name__ == "__main__":
    typer.run(main)
