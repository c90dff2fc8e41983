"""Two processes over gloo are one program: ``tests/processes`` has what they run, and starts them by hand on GPUs."""

from concurrent import futures
import os
import pathlib
import signal
import sys

import cuda_call
import jax
from processes import checks, launch, world
import pytest

DEATHS = {"process 1": ["--die=1"], "process 0": ["--die=0"], "process 1, the other idle": ["--die=1", "--idle"]}


def test_two_processes_do_what_one_does():
    """Loading, each its part, and every verb, call, module and checkpoint: see ``checks.py``."""
    results = launch.launch(2, timeout=280)
    assert not (shown := launch.failures(results)), shown
    for result in results:
        for check in checks.CHECKS:
            assert f"ok: {check.__name__}, " in result.output, result.output
        print("\n".join(line for line in result.output.splitlines() if line.startswith(("loading", "NOT", "ok"))))


@pytest.fixture(scope="module")
def deaths():
    """All at once: mostly they wait."""
    with futures.ThreadPoolExecutor(len(DEATHS)) as pool:
        running = {name: pool.submit(launch.launch, 2, *arguments, timeout=110) for name, arguments in DEATHS.items()}
        return {name: one.result() for name, one in running.items()}


@pytest.mark.parametrize("name", DEATHS)
def test_when_a_process_is_killed_the_others_end_with_an_error(deaths, name):
    """Within JAX's time-out, which is 10 s here: a call that waits for the dead one, and one that waits for nobody."""
    killed, other = deaths[name] if name == "process 0" else reversed(deaths[name])
    shown = launch.failures(deaths[name])
    assert killed.code == -signal.SIGKILL and not killed.by_launcher, shown  # noqa: PT018
    assert "step 4" in killed.output, shown  # they had come as far as that together
    assert "step 4" in other.output, shown
    assert not other.by_launcher, shown
    assert other.code not in (0, None), shown
    assert "nobody was missed" not in other.output, shown
    assert other.ended_at - killed.ended_at < 60, shown


def test_what_they_run_on_gpus_is_lowered_without_one(monkeypatch, tmp_path):
    """So that ``launch.py`` on GPUs finds programs that still lower; its ``--compile`` does this with real kernels."""
    asked = cuda_call.stand_in_compiler(monkeypatch)
    here = world.World(jax.devices()[:4], tmp_path, compiles="sm_90a")
    for check in checks.CHECKS:
        check(here)
    assert asked


# --- The launcher -------------------------------------------------------------------------------------------------


def _together(*programs: str, timeout: float = 60, grace: float = 60):
    return launch.run_together(
        [[sys.executable, "-c", program] for program in programs], timeout, grace, dict(os.environ)
    )


def test_the_launcher_shows_what_failed():
    good, bad = _together("print('fine')", "import sys; print('no good'); sys.exit(3)")
    assert (good.code, good.output, bad.code, bad.output) == (0, "fine\n", 3, "no good\n")
    shown = launch.failures([good, bad])
    assert "fine" in shown
    assert "exit status 3\nno good" in shown
    assert not launch.failures([good, good])


@pytest.mark.parametrize(
    ("other", "times"), [("pass", {"timeout": 1.0}), ("raise SystemExit(1)", {"grace": 1.0})], ids=["time-out", "grace"]
)
def test_the_launcher_ends_what_hangs(tmp_path, other, times):
    """After its time, or some time after another has failed; nothing is left running."""
    note = f"pathlib.Path({str(tmp_path / 'id')!r}).write_text(str(os.getpid()))"
    program = f"import os, pathlib, time; {note}; time.sleep(600)"
    hanging, _ = _together(program, f"import time; time.sleep(0.5); {other}", **times)
    assert hanging.by_launcher
    assert hanging.code == -signal.SIGKILL
    assert hanging.ended_at < 30
    assert not pathlib.Path("/proc", (tmp_path / "id").read_text()).exists()
