"""Two processes over gloo are one program: ``tests/processes`` has what they run, and starts them by hand on GPUs."""

import collections
from concurrent import futures
import os
import pathlib
import signal
import sys

import checkpoint_writer as writer
import cuda_call
import jax
import numpy as np
from processes import checks, launch, world
import pytest

import jax_moe
from jax_moe.checkpoints import leaves

DEATHS = {"process 1": ["--die=1"], "process 0": ["--die=0"], "process 1, the other idle": ["--die=1", "--idle"]}


@pytest.fixture(scope="module")
def launched():
    """All at once: those in which one is killed mostly wait."""
    with futures.ThreadPoolExecutor(1 + len(DEATHS)) as pool:
        running = {name: pool.submit(launch.launch, 2, *options, timeout=140) for name, options in DEATHS.items()}
        yield running | {"nobody dies": pool.submit(launch.launch, 2, timeout=280)}


def test_two_processes_do_what_one_does(launched):
    """Loading, each its part, and every verb, call, module and checkpoint: see ``checks.py``."""
    results = launched["nobody dies"].result()
    assert not (shown := launch.failures(results)), shown
    for result in results:
        for check in checks.CHECKS:
            assert f"ok: {check.__name__}, " in result.output, result.output
        print("\n".join(line for line in result.output.splitlines() if line.startswith(("loading", "NOT", "ok"))))


@pytest.mark.parametrize("name", DEATHS)
def test_when_a_process_is_killed_the_others_end_with_an_error(launched, name):
    """Within JAX's time-out, which is 10 s here: a call that waits for the dead one, and one that waits for nobody."""
    results = launched[name].result()
    killed, other = results if name == "process 0" else reversed(results)
    shown = launch.failures(results)
    assert killed.code == -signal.SIGKILL, shown
    assert not killed.by_launcher, shown
    assert "step 4" in killed.output, shown  # they had come as far as that together
    assert "step 4" in other.output, shown
    assert not other.by_launcher, shown
    assert other.code != 0, shown
    assert "nobody was missed" not in other.output, shown
    assert other.ended_at - killed.ended_at < 60, shown


def test_what_they_run_on_gpus_is_lowered_without_one(monkeypatch, tmp_path):
    """So that ``launch.py`` on GPUs finds programs that still lower; its ``--compile`` does this with real kernels."""
    asked = cuda_call.stand_in_compiler(monkeypatch)
    here = world.World(jax.devices()[:4], tmp_path, compiles="sm_90a")
    for check in checks.CHECKS:
        check(here)
    assert asked


# --- Parts of a layer, in one process -----------------------------------------------------------------------------


def _write(folder: pathlib.Path, form: str) -> None:
    rng = np.random.default_rng(0)
    sizes = {"experts": 4, "hidden": 64, "intermediate": 128}
    if form in ("modelopt", "compressed-tensors", "converted"):
        tool = "modelopt" if form == "converted" else form
        sizes["intermediate"] = 256  # a converted layer is cut where its blocks end
        writer.checkpoint(folder / "source" if form == "converted" else folder, "qwen3_moe", tool, **sizes)
    elif form == "fused":
        writer.checkpoint(folder, "llama4_text", "fused", **sizes)
    else:
        tensors = {}
        for name, (rows, columns) in {"gate_proj": (128, 64), "up_proj": (128, 64), "down_proj": (64, 128)}.items():
            for expert in range(4):
                prefix = f"model.layers.0.mlp.experts.{expert}.{name}.weight"
                if form == "dense":
                    tensors[prefix] = rng.normal(size=(rows, columns)).astype(writer.BF16)
                else:
                    tensors[f"{prefix}_packed"] = rng.integers(0, 256, (rows, columns // 2), dtype=np.uint8)
                    tensors[f"{prefix}_scale"] = rng.integers(120, 130, (rows, columns // 32), dtype=np.uint8)
        writer.write(folder, writer.config_of("qwen3_moe", *sizes.values()), tensors)
    if form == "converted":
        jax_moe.checkpoints.convert(folder / "source", folder, layout="sm_90a", progress_bar=False)


@pytest.mark.parametrize("form", ["modelopt", "compressed-tensors", "fused", "mxfp4", "dense", "converted"])
def test_slices_of_experts_are_those_of_the_whole(tmp_path, form):
    _write(tmp_path, form)
    mesh = jax.make_mesh((2, 2), ("expert", "tensor"), devices=jax.devices()[:4])
    whole = jax_moe.load_experts(tmp_path, 0, quantize=True)
    world.assert_same(jax_moe.load_experts(tmp_path, 0, mesh=mesh, quantize=True), whole)


def test_devices_that_hold_the_same_part_read_it_once(tmp_path, monkeypatch):
    _write(tmp_path, "modelopt")
    whole = jax_moe.load_experts(tmp_path, 0)
    names, read = [], leaves.Leaf.read
    monkeypatch.setattr(leaves.Leaf, "read", lambda leaf, *a, **kw: names.append(leaf.name) or read(leaf, *a, **kw))
    experts = jax_moe.load_experts(tmp_path, 0, mesh=jax.make_mesh((4, 2), ("data", "expert")))
    assert sorted(collections.Counter(names).values()) == [1] + [2] * 7  # two parts, but of a scalar
    world.assert_same(experts, whole)


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
