"""Cards: which row of the table a GPU has, what is chosen for it, how many multiprocessors count, and its floor."""

import dataclasses
import shlex

import cuda_call
import emulator
import jax
import numpy as np
import pytest
from typer.testing import CliRunner

from jax_moe import shapes
from jax_moe.__main__ import app
from jax_moe.cli import floor
from jax_moe.kernels import cache, lowering, targets
from jax_moe.kernels.sm90 import program
from jax_moe.kernels.sm90.target import derived, SM90
from jax_moe.kernels.target import Ceilings

H200, *OTHERS = SM90.cards


@dataclasses.dataclass(frozen=True)
class Gpu:
    device_kind: str
    core_count: int
    compute_capability: str = "9.0"
    platform: str = "gpu"


@pytest.fixture
def gpu(monkeypatch):
    """Makes a GPU the one at hand."""

    def put(device_kind, multiprocessors, **facts):
        device = Gpu(device_kind, multiprocessors, **facts)
        monkeypatch.setattr(targets, "_gpus", lambda: [device])
        monkeypatch.setattr(jax, "devices", lambda *_: [device])
        floor.at_hand.cache_clear()
        return device

    yield put
    floor.at_hand.cache_clear()


@pytest.mark.parametrize(
    ("device_kind", "multiprocessors", "row"),
    [
        ("NVIDIA H200", 132, "H200"),
        ("NVIDIA H200 NVL", 132, "H200"),
        ("NVIDIA H100 80GB HBM3", 132, "H100 80GB HBM3"),
        ("NVIDIA H100 PCIe", 114, "H100 PCIe"),
        ("NVIDIA H100 NVL", 132, "H100 NVL"),
        ("NVIDIA GH200 480GB", 132, "GH200 480GB"),
        ("NVIDIA GH200 144G HBM3e", 132, "GH200 144G"),
        ("NVIDIA H20", 78, "H20"),
        ("NVIDIA H100 80GB HBM3 MIG 3g.40gb", 60, "H100 80GB HBM3"),
        ("NVIDIA H800", 132, None),
    ],
    ids=lambda value: str(value),
)
def test_a_gpu_has_its_row_and_its_own_multiprocessors(gpu, device_kind, multiprocessors, row):
    device = gpu(device_kind, multiprocessors)
    found = targets.row_of(SM90, device)
    assert (found and found.name) == row
    target, card = targets.for_call("wgmma_v1", "w4a16")
    assert target is SM90
    assert (card.name, card.multiprocessors) == (row or "H200", multiprocessors)
    if found is not None and "MIG" not in device_kind:
        assert found.multiprocessors == multiprocessors  # as the table has it


@pytest.mark.parametrize("product", [False, True], ids=["layer", "product"])
def test_the_grid_is_what_is_there(gpu, product):
    problem = cuda_call.product(num_rows=300) if product else cuda_call.problem(num_tokens=300)
    gemms = ("gemm1", "gemm2", "product")

    def grids():
        return [launch.grid for launch in lowering.launches(problem) if launch.name in gemms]

    without = grids()  # on a machine without a GPU: an H200's
    gpu("NVIDIA H200 MIG 1g.18gb", 16)
    slice_ = grids()
    per_multiprocessor = [grid // 132 for grid in without]
    assert without == [132 * each for each in per_multiprocessor]
    assert slice_ == [16 * each for each in per_multiprocessor]


def _tiles(card):
    shape = shapes.MODELS["qwen3-235b-a22b"]
    counts = (8, 32, 128, 512, 1024, 2048, 8192)
    return [program.best_config(card, tokens, shape.top_k, shape.num_experts).token_tile for tokens in counts]


def test_costs_are_those_of_the_slowest_of_three():
    """Instructions as on an H200, the card's own memory, the card's own tensor cores."""
    measured = H200.costs.nanoseconds
    assert H200.costs.memory == 0
    plenty = derived(132, 1e6, 1e6)
    assert plenty.nanoseconds == measured
    slow_memory, (n16, *_) = derived(100, 1.0, 1e6), [c for c in program.CONFIGS if c.token_tile == 16]
    assert slow_memory.memory == pytest.approx(4608 * 100 / 0.84e3)
    # One read, however many tiles; the shorter of the two is seen by a tenth.
    assert program._cost(slow_memory, 16, n16) == pytest.approx(slow_memory.memory + measured[1][16] / 10)
    assert program._cost(slow_memory, 17, n16) == pytest.approx(slow_memory.memory + 2 * measured[1][16] / 10)
    assert program._cost(H200.costs, 17, n16) == 2 * measured[1][16]
    slow_products = derived(132, 1e6, 132 * 2 * 128 * 64 / 1e3 / 10)  # 10 ns a row
    assert slow_products.nanoseconds[2][144] == pytest.approx(1440)
    assert slow_products.nanoseconds[1][8] == measured[1][8]


def test_a_card_gets_kernels_of_its_own():
    """Where tensor cores are slow, tiles that multiply no padding; where memory is, here and there wider ones."""
    chosen = {card.name: _tiles(card) for card in SM90.cards}
    assert chosen["H20"] != chosen["H200"]
    assert max(chosen["H20"]) < max(chosen["H200"])
    assert chosen["H100 PCIe"] != chosen["H200"]


def _layer(model: str, tokens: int):
    shape = shapes.MODELS[model]
    return cuda_call.problem(
        num_tokens=tokens, top_k=shape.top_k, local_experts=shape.num_experts, hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
    )  # fmt: skip


def _command_for(problem) -> str:
    """What the error of a missing kernel says to run, behind ``python -m jax_moe``."""
    with pytest.raises(cache.MissingKernelError) as error:
        lowering.cuda_call(problem)
    return str(error.value).partition("`python -m jax_moe ")[2].partition("`")[0]


def test_a_missing_kernel_names_the_card(gpu, no_compiler, compiled_specs):
    """And the command makes, on a machine without that GPU, what the program with it wants."""
    problem = _layer("qwen3-235b-a22b", 2048)
    elsewhere = {launch.spec for launch in lowering.launches(problem)}
    gpu("NVIDIA H20", 78)
    wanted = {launch.spec for launch in lowering.launches(problem)}
    assert wanted != elsewhere
    command = _command_for(problem)
    assert "--card H20" in command
    gpu("NVIDIA H200", 132)
    made = compiled_specs(shlex.split(command))
    assert made == wanted


@pytest.fixture
def no_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("JAX_MOE_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(cache, "_compiler_version", lambda: None)


@pytest.fixture
def compiled_specs(monkeypatch):
    """What a command would compile."""

    def run(arguments):
        asked = cuda_call.stand_in_compiler(monkeypatch)
        done = CliRunner(env={"COLUMNS": "300"}).invoke(app, arguments)
        assert done.exit_code == 0, done.output
        return set(asked)

    return run


def test_a_missing_kernel_of_a_slice_names_its_multiprocessors(gpu, no_compiler, compiled_specs):
    """The form for few units is chosen by them."""
    problem = _layer("qwen3-30b-a3b", 1)
    whole = {launch.spec for launch in lowering.launches(problem)}
    gpu("NVIDIA H200 MIG 1g.18gb", 16)
    wanted = {launch.spec for launch in lowering.launches(problem)}
    assert wanted != whole
    command = _command_for(problem)
    assert "--card H200 --multiprocessors 16" in command
    gpu("NVIDIA H200", 132)
    assert compiled_specs(shlex.split(command)) == wanted


def test_multiprocessors_are_those_of_a_card():
    command = ["compile", "--multiprocessors", "16", "--model", "8,2,64,64"]
    done = CliRunner(env={"COLUMNS": "300"}).invoke(app, command)
    assert done.exit_code == 2
    assert "It needs --card" in done.output


def test_a_card_that_is_not_there_is_an_error():
    done = CliRunner(env={"COLUMNS": "300"}).invoke(app, ["compile", "--card", "H42", "--model", "8,2,64,64"])
    assert done.exit_code == 2
    assert "got 'H42', sm_90a has 'H200', 'H100 80GB HBM3'" in done.output


# --- The floor ------------------------------------------------------------------------------------------------------


def test_the_floor_is_the_longer_time():
    ceilings = Ceilings(2e12, {"w4a16": 1e15, "w4a4": 4e15}, "made up")
    assert floor.seconds(4e9, 1e12, ceilings, "w4a16") == 2e-3
    assert floor.seconds(4e9, 4e12, ceilings, "w4a16") == 4e-3
    assert floor.seconds(4e9, 4e12, ceilings, "w4a4") == 2e-3
    shape = shapes.LayerShape(8, 2, 64, 32)
    assert floor.layer_seconds(shape, 1, 2.0, ceilings, "w4a16") == pytest.approx(2 * 3 * 64 * 32 * 4.5 / 8 / 2e12)


@pytest.mark.parametrize(
    ("device_kind", "multiprocessors", "is_measured"),
    [("NVIDIA H200", 132, False), ("NVIDIA H100 PCIe", 114, True), ("NVIDIA H200 MIG 1g.18gb", 16, True),
     ("NVIDIA H800", 132, True)],
    ids=["row", "row without ceilings", "slice", "no row"],
)  # fmt: skip
def test_a_card_without_ceilings_is_measured(gpu, monkeypatch, device_kind, multiprocessors, is_measured):
    here = Ceilings(1e12, {"w4a16": 5e14, "w4a4": 5e14}, "now")
    monkeypatch.setattr(floor, "measured", lambda device: here)
    gpu(device_kind, multiprocessors)
    assert (floor.at_hand() is here) is is_measured
    assert floor.at_hand() is (here if is_measured else H200.ceilings)


def test_without_a_gpu_of_ours_there_is_no_floor(gpu):
    gpu("NVIDIA A100", 108, compute_capability="8.0")
    assert floor.at_hand() is None
    gpu("cpu", 0, platform="cpu")
    assert floor.at_hand() is None


def test_bench_prints_the_ratio_to_the_floor(monkeypatch):
    ceilings = Ceilings(1e9, {"w4a16": 1e12, "w4a4": 1e12}, "made up")
    monkeypatch.setattr(floor, "at_hand", lambda: ceilings)
    from jax_moe.cli import bench

    bytes_of_one = shapes.LayerShape(3, 2, 48, 32).weight_bytes_per_expert
    monkeypatch.setattr(bench, "time_op", lambda *_: (3 * 2.0 * bytes_of_one / 1e9, 2.0))
    command = ["bench", "--model", "3,2,48,32", "--tokens", "1", "--precision", "w4a16"]
    done = CliRunner(env={"COLUMNS": "200"}).invoke(app, command)
    assert done.exit_code == 0, done.output
    assert "x floor" in done.output
    assert "3.00" in done.output
    assert "floor: 0.00 TB/s" in done.output
    assert "made up" in done.output


@pytest.mark.parametrize("place", [0, 1, 37, 4095, 8191])
def test_the_stream_reads_every_word(place):
    """On the emulator: its one store says that one thread has seen the word."""
    kernel = emulator.Kernel(floor.READ_ALL, "read_all")
    words = np.zeros(8192, np.uint32)
    words[place] = floor.NEVER
    for given in (words, np.zeros_like(words)):
        memory = emulator.Memory()
        source, out = memory.array(given), memory.poisoned((4,), np.uint32, "out")
        threads, ctas = 64, 4
        steps = given.nbytes // (threads * ctas * 4 * 16)
        emulator.run([emulator.Launch(kernel, ctas, [source, steps, out], threads=threads)], memory)
        assert out.written[0] == (given is words)
