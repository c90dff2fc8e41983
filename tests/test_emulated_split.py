"""sm_90a's kernels with the contraction split over the CTAs of a cluster, on the emulator; and which calls split it."""

import dataclasses
import importlib.util
import re
import shutil

import cuda_call
import emulated_call
import emulator
from helpers import assert_bit_equal, make_case, make_exact_case
import jax.numpy as jnp
import product_cases
import pytest

from jax_moe import activations, shapes
from jax_moe.kernels.sm90 import program
from jax_moe.kernels.sm90.target import SM90

needs_emulator = [
    pytest.mark.skipif(importlib.util.find_spec("cutlass") is None, reason="nvidia-cutlass-dsl is not installed"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator is compiled with g++, which is not here"),
]
FLOAT32 = dict(out_dtype=jnp.float32)
SIZES = dict(tokens=3, num_experts=4, top_k=2, hidden=576, intermediate=448, gated=False)  # 9 and 7 blocks


def emulated(*marks):
    """Marks a test that runs kernels."""

    def mark(test):
        for each in (*needs_emulator, *marks):
            test = each(test)
        return test

    return mark


@pytest.fixture
def split_in(monkeypatch):
    """Makes calls split their contractions over so many CTAs, whatever would be chosen."""
    return lambda ways: monkeypatch.setattr(program, "split", lambda config, *_: program.with_cluster(config, ways))


@emulated(pytest.mark.parametrize("ways", [2, 4]))
def test_exact_calls_have_the_bits_of_the_cpu(split_in, ways):
    """Parts differ in length, down to one block; clusters take several units, so that sums are sent again and again."""
    split_in(ways)
    for seed, (precision, combine) in enumerate((("w4a16", "atomic"), ("w4a4", "ordered"))):
        case = make_exact_case(ways, precision=precision, combine=combine, **FLOAT32, **SIZES)
        expected = case.run()
        for order in emulator.ORDERS[seed:]:
            call = emulated_call.prepare(case, "sm_90a", multiprocessors=3)
            gemms = [launch for launch in call.program.launches if launch.name.startswith("gemm")]
            assert [(launch.spec.cluster, launch.grid) for launch in gemms] == [(ways, 6 // ways * ways)] * 2
            assert_bit_equal(call.run(order=order, seed=seed), expected)


@emulated()
def test_exact_products_have_the_bits_of_their_definition(split_in):
    split_in(2)
    case = product_cases.make_case(1, [3, 0, 5, 2], 12, in_features=320)
    call = emulated_call.prepare_product(case)
    assert call.program.launches[-1].spec.cluster == 2
    assert_bit_equal(call.run(seed=1), product_cases.expected(case))


@emulated()
def test_sums_are_added_in_the_order_of_ranks(split_in):
    """Sums that round: the same bits however late each rank is, and not those of one sum."""
    case = make_case(4, tokens=2, num_experts=2, hidden=576, intermediate=320, activation=activations.ReLU2(),
                     combine="ordered", **FLOAT32)  # fmt: skip
    whole = emulated_call.prepare(case, "sm_90a").run()
    split_in(4)
    results = [
        emulated_call.prepare(case, "sm_90a", multiprocessors=2).run(order=order, seed=seed)
        for seed, order in enumerate(("eager", "random", "starved"))
    ]
    for result in results[1:]:
        assert_bit_equal(result, results[0])
    assert (results[0] != whole).any()


WAIT = r"mbarrier\.try_wait\.parity\.acquire\.cluster\S* p, [^;]*;"
LAST_BARRIER = r"barrier\.cluster\.arrive;\s*barrier\.cluster\.wait;\s*(?=\S*\s*ret;)"
MUTANTS = {
    "nobody waits for another rank": (WAIT, "setp.eq.b32 p, 0, 0;"),
    "waits learn nothing of other CTAs": (r"\.acquire\.cluster\.", ".acquire.cta."),
    "arrivals tell other CTAs nothing": (r"arrive\.release\.cluster\.", "arrive.release.cta."),
    "a rank sends nothing": (r"st\.shared::cluster\.f32 [^;]*;", ""),
    "no barrier of the cluster": (r"barrier\.cluster\.(arrive|wait);", ""),
    "no barrier of the cluster at the end": (LAST_BARRIER, ""),
}


def without_wait(text: str, number: int) -> str:
    """The kernel without one of its waits for other CTAs, each of which is a loop and stands there twice."""
    found = list(re.finditer(WAIT, text))
    assert len(found) == 4, found
    for match in reversed(found[2 * number : 2 * number + 2]):
        text = text[: match.start()] + "setp.eq.b32 p, 0, 0;" + text[match.end() :]
    return text


@emulated()
def test_mutants(split_in):
    """Of GEMM2, whose first ranks wait for their sums to be taken (EMPTY) before rank 0 waits for them (FULL)."""
    split_in(2)
    case = make_exact_case(5, precision="w4a16", combine="ordered", **FLOAT32, **SIZES)
    expected = case.run()
    launches = emulated_call.prepare(case, "sm_90a").program.launches
    text, _ = emulated_call.ptx(next(each.spec for each in launches if each.name == "gemm2"), "sm_90a")
    kernels = {name: re.sub(pattern, new, text) for name, (pattern, new) in MUTANTS.items()}
    kernels |= {f"no wait for {what}": without_wait(text, number) for number, what in enumerate(("EMPTY", "FULL"))}
    assert text not in kernels.values()

    def passes(kernel: str) -> bool:
        for seed, order in enumerate(emulator.ORDERS):
            call = emulated_call.prepare(case, "sm_90a", multiprocessors=1)
            given = {"gemm2": emulator.Kernel(kernel)}
            try:
                assert_bit_equal(call.run(kernels=given, order=order, seed=seed, most_instructions=9_000_000), expected)
            except (emulator.EmulatorError, AssertionError):
                return False
        return True

    assert passes(text)
    assert [name for name, kernel in kernels.items() if passes(kernel)] == []


# --- Which calls split it -----------------------------------------------------------------------------------------


def ways_of(model: str, tokens: int) -> tuple[int, ...]:
    layer = shapes.MODELS[model]
    call = cuda_call.problem(
        num_tokens=tokens, local_experts=layer.num_experts, top_k=layer.top_k, hidden_size=layer.hidden_size,
        intermediate_size=layer.intermediate_size, activation=activations.SwiGLU(),
    )  # fmt: skip
    return tuple(launch.spec.cluster for launch in cuda_call.program(call).launches if launch.name.startswith("gemm"))


def test_only_few_tokens_split_the_contraction():
    assert all(ways_of(model, tokens) == (1, 1) for model in shapes.MODELS for tokens in shapes.TOKENS if tokens > 16)
    assert ways_of("mixtral-8x7b", 1)[1] > 1  # 64 units of 224 blocks on 132 multiprocessors


def test_every_cta_of_a_cluster_has_blocks():
    """The kernels rely on it."""
    config = program.CONFIGS[0]
    for k_blocks in range(1, 9):
        for units in (1, 8, 40, 64, 65, 67, 133, 1000):
            assert program.split(config, SM90.cards[0], units, k_blocks).cluster_k <= k_blocks


@pytest.mark.parametrize("multiprocessors", [1, 3, 114, 132])
@pytest.mark.parametrize("ways", [1, 2, 4])
def test_grids_are_whole_clusters(multiprocessors, ways):
    card = dataclasses.replace(SM90.cards[0], multiprocessors=multiprocessors)
    config = program.with_cluster(program.CONFIGS[0], ways)
    for most_units in (1, 5, 1000):
        grid = program._grid(card, config, most_units)
        assert grid % ways == 0
        assert grid > 0
        assert grid <= max(ways, multiprocessors * config.ctas_per_sm)
        assert ways == 1 or grid <= ways * most_units
