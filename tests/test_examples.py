"""The examples run as their docstrings say, and what they print is right; tiny versions of the two that train."""

import importlib
import os
import pathlib
import re
import shutil
import subprocess
import sys

import cuda_call
import helpers
import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
import numpy as np
import pytest

import jax_moe
from jax_moe import ffi

EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"


def run_example(name: str | os.PathLike, *args) -> str:
    path = os.pathsep.join(filter(None, [str(helpers.PACKAGE_FOLDER), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-W", "error", EXAMPLES / name, *map(str, args)]
    env = os.environ | {"PYTHONPATH": path, "COLUMNS": "100", "JAX_PLATFORMS": "cpu"}
    ran = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def table_rows(output: str) -> dict[str, list[str]]:
    """The cells of the rich table's rows, by the first; a row whose first is seen twice replaces the other."""
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in output.splitlines() if "│" in line]
    return {row[0]: row[1:] for row in rows}


def test_quickstart_table():
    output = run_example("quickstart.py")
    rows = re.findall(r"│ (w4a\d+) +│ (\w+) +│ +(\S+) │ +(\S+) │ +(\S+) ms │", output)
    assert {row[:2] for row in rows} == {(p, c) for p in ("w4a16", "w4a4") for c in ("atomic", "ordered")}
    for precision, _, to_oracle, to_dense, milliseconds in rows:
        # Sums in another order move a bfloat16 by one place in a few elements of the output at most; in w4a4 they may
        # also move the intermediate to the neighbouring 4-bit code.
        assert float(to_oracle) < (1e-3 if precision == "w4a16" else 1e-2)
        # A 4-bit code of 8 magnitudes carries random normal values to about 10%; three matrices, or also two inputs.
        assert 0.1 < float(to_dense) < (0.2 if precision == "w4a16" else 0.3)
        assert float(milliseconds) > 0


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[str, pathlib.Path]:
    """The output of a short training, and the model that it saved."""
    path = tmp_path_factory.mktemp("model") / "model.npz"
    return run_example("language_model.py", "--steps", 25, "--windows", 8, "--new-bytes", 64, "--save", path), path


def test_language_model_survives_quantisation(trained):
    output, _ = trained
    rows = table_rows(output)
    bits = {name: float(cells[0]) for name, cells in rows.items() if name.startswith(("counts", "MoE"))}
    megabytes = {name: float(cells[1].split()[0]) for name, cells in rows.items() if name.startswith("MoE")}
    bf16, w4a16, w4a4 = "MoE, bfloat16 experts", "MoE, NVFP4 experts, w4a16", "MoE, NVFP4 experts, w4a4"
    assert bits[bf16] < bits["counts of bytes"]
    # Measured: 0.002 and 0.001. One slot dropped of two gives 0.03, gate and up exchanged 0.06, in this young model.
    assert abs(bits[w4a16] - bits[bf16]) < 0.01
    assert abs(bits[w4a4] - bits[bf16]) < 0.015
    # 4 bits, 8/16 bits of block scale and a few fp32 scales a matrix, in place of 16 bits.
    assert megabytes[w4a16] / megabytes[bf16] == pytest.approx(4.5 / 16, rel=0.03)
    assert re.search(r"(\d+) bytes/s", output)[1] != "0"


def test_sharded_inference_says_the_same(trained):
    output = run_example("sharded_inference.py", "--load", trained[1], "--new-bytes", 32)
    assert "greedy decoding, 8 prompts x 32 bytes: equal" in output
    assert "collectives that move weights (8 bits or fewer): 0" in output
    for program, rows in (("window", 1024), ("step", 4)):  # the search did find the collectives of each program
        assert f"compiled HLO of a {program}: 1 x all-reduce of f32[{rows},128]" in output
    difference, magnitude = map(float, re.search(r"\| = (\S+), where max \|logit\| = (\S+);", output).groups())
    assert difference < 0.01 * magnitude  # a bfloat16 or two, rounded the other way
    whole, part = map(int, re.search(r"weights: (\d+) bytes, (\d+) on each", output).groups())
    assert part / whole == pytest.approx(1 / 4, rel=0.01)  # expert x tensor; copied over data


@pytest.fixture
def sharded_inference(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(EXAMPLES), *sys.path])
    return importlib.import_module("sharded_inference")


# Instructions as XLA prints them in optimised programs for GPUs: asynchronous ones have two halves, and those without a
# name of their own wrap a computation.
HLO = """
%wrapped.3 (p.3: u8[4,16]) -> u8[2,16] {
  %p.3 = u8[4,16]{1,0} parameter(0)
  ROOT %reduce-scatter.1 = u8[2,16]{1,0} reduce-scatter(%p.3), channel_id=4, dimensions={0}, to_apply=%add
}

ENTRY %main.9 (p.0: u8[4,16]) -> f32[8] {
  %p.0 = u8[4,16]{1,0} parameter(0), metadata={op_name="all-gather(u8[4,16])"}
  %all-gather-start.2 = (u8[4,16]{1,0}, u8[8,16]{1,0:S(1)}) all-gather-start(%p.0), channel_id=1, dimensions={0}
  %all-gather-done.2 = u8[8,16]{1,0:S(1)} all-gather-done(%all-gather-start.2)
  %ar = (f32[8]{0}, /*index=1*/f8e4m3fn[3]{0}) all-reduce(%a, %b), channel_id=2, to_apply=%add
  %collective-permute-start = (s8[4]{0}, s8[4]{0}) collective-permute-start(%p.1), source_target_pairs={{0,1}}
  %async-start = ((u8[4,16]{1,0}), u8[2,16]{1,0}) async-start(%p.0), calls=%wrapped.3
  %async-done = u8[2,16]{1,0} async-done(%async-start)
  %reduce-scatter-start = ((f32[4]{0}), f32[2]{0}) reduce-scatter-start(%p.2), dimensions={0}, to_apply=%add
  %ragged-all-to-all.1 = bf16[8,4]{1,0} ragged-all-to-all(%x, %y, %i, %s, %o, %r), channel_id=5
  %copy-start = (u8[4,16]{1,0:S(5)}, u8[4,16]{1,0}, u32[]) copy-start(%p.0)
  %copy.1 = u8[4,16]{0,1} copy(%p.0)
  %fusion = u8[4,16]{1,0} fusion(%p.0, %all-gather-done.2), kind=kLoop, calls=%fused
  ROOT %send = (f32[8]{0}, u32[], token[]) send(%ar, %token), channel_id=6
}
"""


def test_the_search_for_collectives(sharded_inference):
    spoken = sharded_inference.collectives(HLO)
    names = "reduce-scatter all-gather-start all-reduce collective-permute-start reduce-scatter-start"
    assert [name for name, _ in spoken] == [*names.split(), "ragged-all-to-all", "copy-start", "send"]
    weights = [name for name, _ in sharded_inference.of_weights(spoken)]
    assert weights == ["reduce-scatter", "all-gather-start", "all-reduce", "collective-permute-start", "copy-start"]


@pytest.mark.parametrize("placed", ["as they should be", "over the hidden size"])
def test_weights_that_move_are_seen(sharded_inference, placed):
    """Inside ``jax.jit`` nothing says where weights are, so a wrong placement makes XLA move them and say nothing."""
    mesh = Mesh(np.array(jax.devices()[:2]).reshape(1, 2, 1), sharded_inference.AXES)
    case = helpers.make_case(1, tokens=8, hidden=64, intermediate=32, num_experts=4)
    shardings = jax_moe.expert_shardings(case.experts, mesh)
    if placed == "over the hidden size":

        def wrong(leaf):
            return NamedSharding(mesh, P(*[None] * (leaf.ndim - 1), "expert") if leaf.ndim > 2 else P())

        shardings = jax.tree.map(wrong, case.experts)
    experts = jax.device_put(case.experts, shardings)
    run = jax.jit(sharded_inference.sharded_moe(mesh))
    hlo = run.lower(case.x, experts, case.routing).compile().as_text()
    spoken = sharded_inference.collectives(hlo)
    assert spoken
    assert bool(sharded_inference.of_weights(spoken)) == (placed != "as they should be")


def test_its_kernels_can_be_compiled_without_a_gpu(sharded_inference, monkeypatch):
    """What ``--compile-for`` does, on a smaller model and without the compiler."""
    asked = cuda_call.stand_in_compiler(monkeypatch)
    config = sharded_inference.Config(layers=2, hidden=64, heads=2, experts=4, intermediate=32)
    params = sharded_inference.init(jax.random.key(0), config)
    tokens = np.arange(8 * 256).reshape(8, 256) % 256
    params = sharded_inference.quantize(params, tokens[:, :8], config)
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(1, 2, 2), sharded_inference.AXES)
    placed = sharded_inference.place(params, mesh, "sm_90a")
    part = placed["layers"]["experts"].down.payload.addressable_shards[0].data
    assert part.shape[:2] == (2, 2)  # of both layers two experts of four
    moe, tokens = sharded_inference.sharded_moe(mesh), sharded_inference.spread(tokens, mesh)
    for name, program in sharded_inference.programs(placed, tokens, mesh, moe, config).items():
        asked.clear()
        assert program.lower(lowering_platforms=("cuda",)).as_text().count(f"@{ffi.TARGET}(") == 1, name
        assert len(asked) >= 3, name  # at least a sort and two GEMMs


def test_where_texts_part(sharded_inference):
    once, again = np.array([[1, 2, 3], [0, 1, 2], [3, 3, 3]]), np.array([[1, 2, 3], [0, 2, 1], [0, 3, 3]])
    logits = np.arange(36, dtype=np.float32).reshape(3, 3, 4) ** 2
    assert sharded_inference.partings(once, again, logits) == [(1, 1, 18.0**2 - 17.0**2), (2, 0, 27.0**2 - 24.0**2)]


@pytest.mark.skipif(shutil.which("g++") is None, reason="minimal_ffi builds its op with g++, which is not here")
def test_minimal_ffi(tmp_path):
    # A copy, because it builds its library beside itself, on the headers of the jax that runs it.
    shutil.copytree(EXAMPLES / "minimal_ffi", tmp_path / "minimal_ffi", ignore=shutil.ignore_patterns("*.so"))
    output = run_example(tmp_path / "minimal_ffi/minimal_ffi.py")
    differences = dict(re.findall(r"^(jit|vmap|grad) +max \|difference\| (\S+)$", output, re.MULTILINE))
    assert differences.keys() == {"jit", "vmap", "grad"}
    assert all(float(value) < 1e-4 for value in differences.values()), differences
    assert "custom_call @minimal_ffi_discounted_sum_v1" in output
    assert "INVALID_ARGUMENT: discounted_sum: start has 5 elements" in output
