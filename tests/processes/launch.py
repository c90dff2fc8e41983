"""Starts processes that are one program with ``jax.distributed``, and ends them all, whatever happens.

By hand, one process for each GPU, or for a CPU device where there is no GPU:

    python tests/processes/launch.py --processes 2                            every check
    python tests/processes/launch.py --processes 2 --only calls               one of them
    python tests/processes/launch.py --processes 2 --die 1                    process 1 is killed: the others must end
    python tests/processes/launch.py --processes 2 --compile sm_90a           only fills JAX_MOE_CACHE_DIR; needs no GPU

Nothing but the standard library is used here.
"""

import argparse
from collections.abc import Sequence
import contextlib
import dataclasses
import importlib.util
import os
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile
import time

TESTS = pathlib.Path(__file__).resolve().parents[1]
_CHEAP_COMPILES = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"  # as in conftest.py


@dataclasses.dataclass(frozen=True)
class Result:
    """How a process ended.

    Attributes:
      code: its exit status; negative: the signal that ended it.
      ended_at: in seconds after the start of all.
      by_launcher: it would not end by itself.
      output: all that it wrote.
    """

    code: int
    ended_at: float
    by_launcher: bool
    output: str


def launch(processes: int, *arguments: str, timeout: float = 300, grace: float = 60, on_gpus: bool = False,
           devices: int = 1) -> list[Result]:  # fmt: skip
    """Runs ``worker.py`` in each of ``processes`` and waits until all have ended.

    Args:
      processes: how many.
      arguments: for the worker.
      timeout, grace: as for :func:`run_together`.
      on_gpus: one GPU for each process, else CPUs.
      devices: CPU devices of each process.
    """
    with tempfile.TemporaryDirectory() as folder:
        given = {"address": f"127.0.0.1:{_free_port()}", "processes": processes, "timeout": timeout, "folder": folder}
        # What the packages of CUDA warn of when they are imported is not ours.
        strict = [] if on_gpus else ["-W", "error"]
        command = [sys.executable, *strict, "-m", "processes.worker", *arguments]
        command += [f"--{name}={value}" for name, value in given.items()]
        commands = [[*command, "--process", str(process)] for process in range(processes)]
        return run_together(commands, timeout, grace, _environment(on_gpus, devices))


def run_together(commands: Sequence[list[str]], timeout: float, grace: float, env: dict[str, str]) -> list[Result]:
    """Runs commands side by side and waits until all have ended.

    Args:
      commands: of the processes.
      timeout: seconds for all of it; then those that run are killed.
      grace: seconds that the others have to end by themselves after one has failed; then they are killed.
      env: their environment.
    """
    started: list[subprocess.Popen] = []
    with contextlib.ExitStack() as stack:
        # Files, because a pipe that nobody reads makes its writer wait.
        logs = [stack.enter_context(tempfile.TemporaryFile("w+", errors="replace")) for _ in commands]
        try:
            begin = time.monotonic()
            for command, log in zip(commands, logs, strict=True):
                started.append(
                    subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=env)
                )
            ended, killed = _wait(started, begin, timeout, grace)
        finally:
            for process in started:
                process.kill()
                process.wait()
        results = []
        for i, (process, log) in enumerate(zip(started, logs, strict=True)):
            log.seek(0)
            results.append(Result(process.returncode, ended[i], i in killed, log.read()))
        return results


def _wait(started: Sequence[subprocess.Popen], begin: float, timeout: float, grace: float) -> tuple[dict, set]:
    """When each process ended, and which of them had to be killed."""
    ended: dict[int, float] = {}
    killed: set[int] = set()
    deadline = timeout
    while len(ended) < len(started):
        now = time.monotonic() - begin
        for i, process in enumerate(started):
            if i not in ended and process.poll() is not None:
                ended[i] = now
                if process.returncode:
                    deadline = min(deadline, now + grace)
        if now > deadline and not killed:
            killed = set(range(len(started))) - set(ended)
            for i in killed:
                started[i].kill()
        time.sleep(0.05)
    return ended, killed


def failures(results: Sequence[Result]) -> str:
    """What to show of processes that should all have succeeded; empty if they have."""
    if not any(result.code for result in results):
        return ""
    return "\n".join(f"--- process {i} {_ending(result)}\n{result.output}" for i, result in enumerate(results))


def _ending(result: Result) -> str:
    how = f"exit status {result.code}" if result.code >= 0 else signal.Signals(-result.code).name
    return f"ended after {result.ended_at:.1f} s: {how}" + (", killed by the launcher" if result.by_launcher else "")


def have_gpus() -> bool:
    """Whether processes get GPUs: there are some, and JAX_PLATFORMS does not ask for something else."""
    return pathlib.Path("/dev/nvidiactl").exists() and os.environ.get("JAX_PLATFORMS") != "cpu"


def _environment(on_gpus: bool, devices: int) -> dict[str, str]:
    found = importlib.util.find_spec("jax_moe")  # the package that is tested: the installed one, usually
    package = pathlib.Path(found.origin).parents[1] if found and found.origin else TESTS.parent
    folders = [package, TESTS, TESTS / "checkpoints", os.environ.get("PYTHONPATH", "")]
    path = os.pathsep.join(map(str, folders))
    environment = os.environ | {"PYTHONPATH": path, "JAX_NUM_CPU_DEVICES": str(devices)}
    if not on_gpus:
        environment |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": os.environ.get("XLA_FLAGS") or _CHEAP_COMPILES}
    return environment


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--devices", type=int, default=1, help="CPU devices of each process")
    parser.add_argument("--only", metavar="CHECK", help="of checks.py")
    parser.add_argument("--die", type=int, metavar="PROCESS", help="which is killed in the middle")
    parser.add_argument("--idle", action="store_true", help="with --die: the others are not in a collective then")
    parser.add_argument("--compile", metavar="TARGET", help="compile the kernels of all checks instead")
    parser.add_argument("--timeout", type=float, default=400)
    options = parser.parse_args()
    arguments = [f"--{name}={value}" for name in ("only", "die") if (value := getattr(options, name)) is not None]
    arguments += ["--idle"] if options.idle else []
    if options.compile:
        arguments += [f"--compile={options.compile}"]
        results = launch(1, *arguments, timeout=options.timeout, devices=options.processes)
    else:
        on_gpus = have_gpus()
        print(f"{options.processes} processes on {'GPUs, NCCL' if on_gpus else 'CPUs, gloo'}", flush=True)
        results = launch(
            options.processes, *arguments, timeout=options.timeout, on_gpus=on_gpus, devices=options.devices
        )
    for i, result in enumerate(results):
        print(f"--- process {i} {_ending(result)}\n{result.output}")
    if options.die is None:
        return int(any(result.code for result in results))
    # The others ended by themselves, and said that something is wrong.
    others = [result for i, result in enumerate(results) if i != options.die]
    died = results[options.die].code == -signal.SIGKILL and not results[options.die].by_launcher
    return int(not died or any(result.by_launcher or not result.code for result in others))


if __name__ == "__main__":
    sys.exit(main())
