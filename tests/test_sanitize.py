"""What ``tests/gpu/sanitize.py`` makes of what compute-sanitizer prints, and which calls it runs."""

import importlib.util
import pathlib
import sys
import time

import cuda_call
import pytest

_FILE = pathlib.Path(__file__).parent / "gpu" / "sanitize.py"
_spec = importlib.util.spec_from_file_location("sanitize", _FILE)
assert _spec is not None
assert _spec.loader is not None
sanitize = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(sanitize)

_PRINTED = """\
========= COMPUTE-SANITIZER
CASE small w4a16 atomic
captured: right
========= Uninitialized __global__ memory read of size 4 bytes
=========     at jax_moe_gemm2_n8+0x1f0
=========     by thread (3,0,0) in block (0,0,0)
=========     Address 0x7f3e
=========
========= Uninitialized __global__ memory read of size 4 bytes
=========     at jax_moe_gemm2_n8+0x1f0
=========     by thread (4,0,0) in block (0,0,0)
=========
eager: right
CASE ragged w4a16 atomic
captured: WRONG: relative Frobenius error 1
eager: right
CASE end
========= ERROR SUMMARY: 2 errors
"""


def _program(folder, text, code=0, before=""):
    """A compute-sanitizer that does what is in ``before`` and prints ``text``."""
    path = folder / "compute-sanitizer"
    path.write_text(f"#!{sys.executable}\nimport sys\n{before}\nsys.stdout.write({text!r})\nsys.exit({code})\n")
    path.chmod(0o755)


def test_reports_belong_to_the_case_that_runs():
    found = sanitize.by_case(_PRINTED)
    lines, reports = found["small w4a16 atomic"]
    assert lines == ["captured: right", "eager: right"]
    assert len(reports) == 2
    assert {sanitize._kind(report) for report in reports} == {
        "Uninitialized __global__ memory read of size 4 bytes at jax_moe_gemm2_n8+0x1f0"
    }
    assert found["ragged w4a16 atomic"][1] == []
    assert found["end"] == ([], [])


def test_a_race_is_told_by_both_accesses():
    name = "kernel_cutlass_kernel_jax_moekernelssm90devicegemm1Gemm1_object_at__ptrbf16_gmem_align16_0"
    report = (
        f"Error: Race reported between Write access at {name}+0x4d90\nand Read access at {name}+0x4ea0 [16 hazards]"
    )
    told = "Race reported between Write access at gemm1Gemm1+0x4d90 and Read access at gemm1Gemm1+0x4ea0"
    assert sanitize._kind(report) == f"Error: {told} [16 hazards]"


@pytest.mark.parametrize(
    ("change", "is_clean", "said"),
    [
        (lambda text: text, True, "0 reports, results right"),
        (lambda text: text.replace("eager: right", "eager: WRONG: much"), False, "eager: WRONG: much"),
        (lambda text: text.replace("captured: right\n", ""), False, "0 reports, eager: right"),
        (lambda text: text.replace("CASE small w4a16 atomic", ""), False, "did not run"),
        (lambda text: text.replace("=\neager", "=\n========= Invalid read\n=========\neager"), False, "1 reports"),
        (lambda text: text.replace("ERROR SUMMARY", "Error: no device"), False, "printed no summary"),
    ],
)
def test_only_a_whole_run_without_reports_is_clean(tmp_path, monkeypatch, capsys, change, is_clean, said):
    text = "=========\ncaptured: right\n=========\neager: right\n"
    _program(tmp_path, change(f"CASE small w4a16 atomic\n{text}CASE end\n========= ERROR SUMMARY: 0 errors\n"))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert sanitize.under_tools(["memcheck"], ["small w4a16 atomic"], 60, False) is is_clean
    assert said in capsys.readouterr().out


def test_a_tool_that_prints_much_waits_for_no_other(tmp_path, monkeypatch, capsys):
    """The first tool ends only after the second, which prints more than a pipe holds."""
    done, text = tmp_path / "done", "CASE small w4a16 atomic\ncaptured: right\neager: right\nCASE end\n"
    _program(
        tmp_path,
        text + "========= ERROR SUMMARY: 0 errors\n",
        before=f"""
import pathlib, time
if "memcheck" in sys.argv:
    while not pathlib.Path({str(done)!r}).exists(): time.sleep(0.01)
else:
    sys.stdout.write("much\\n" * 100_000)
    sys.stdout.flush()
    pathlib.Path({str(done)!r}).touch()
""",
    )
    monkeypatch.setenv("PATH", str(tmp_path))
    assert sanitize.under_tools(["memcheck", "racecheck"], ["small w4a16 atomic"], 20, False)
    assert "not done" not in capsys.readouterr().out


def test_a_tool_that_does_not_end_is_ended(tmp_path, monkeypatch, capsys):
    """With the program that it runs, which writes to the same pipe."""
    started = time.monotonic()
    _program(
        tmp_path,
        "",
        before="""
import subprocess, time
sys.stdout.write("CASE some\\n")
sys.stdout.flush()
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
time.sleep(60)
""",
    )
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not sanitize.under_tools(["memcheck"], ["some"], 1, False)
    said = capsys.readouterr().out
    assert "memcheck: not done after 1 seconds" in said
    assert "CASE some" in said  # what it had printed is told
    assert time.monotonic() - started < 30


def test_a_failed_run_is_not_clean(tmp_path, monkeypatch, capsys):
    _program(tmp_path, "CASE small w4a16 atomic\ncaptured: right\neager: right\n========= ERROR SUMMARY: 0 errors\n", 1)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not sanitize.under_tools(["memcheck"], ["small w4a16 atomic"], 60, False)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(sanitize.os.path, "exists", lambda _: False)
    assert not sanitize.under_tools(["memcheck"], ["small w4a16 atomic"], 60, False)
    assert "no compute-sanitizer" in capsys.readouterr().out


def test_every_precision_and_combine_is_there():
    kinds = {(o["precision"], o["combine"], o.get("weight_on")) for _, o in sanitize.CASES.values() if "combine" in o}
    assert {(p, c, None) for p in ("w4a16", "w4a4") for c in ("atomic", "ordered")} <= kinds
    assert {o["precision"] for s, o in sanitize.CASES.values() if "rows" in s} == {"w4a16", "w4a4", "w4a4_dynamic"}


def test_the_cases_have_every_form_of_a_gemm_on_hopper():
    """With and without a sort, and with one, two or four warpgroups that share a contraction."""
    forms = set()
    for sizes, options in sanitize.CASES.values():
        if "rows" in sizes:
            continue
        call = cuda_call.problem(
            num_tokens=sizes["tokens"], top_k=sizes["top_k"], local_experts=sizes["num_experts"],
            num_experts=sizes["num_experts"], hidden_size=sizes["hidden"], intermediate_size=sizes["intermediate"],
            **options,
        )  # fmt: skip
        gemms = [launch.spec for launch in cuda_call.program(call).launches if launch.name.startswith("gemm")]
        forms |= {(gemm.maps_routes, gemm.config.k_warpgroups) for gemm in gemms}
    assert forms >= {(False, 1), (False, 2), (True, 1), (True, 2), (True, 4)}
