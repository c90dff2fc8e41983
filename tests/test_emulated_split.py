"""The forms of sm_90a's kernels for few units, on the emulator; and which calls have them.

The contraction is split over the CTAs of a cluster, or over four warpgroups.
"""

import dataclasses
import importlib.util
import itertools
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
from jax_moe.kernels.sm90.specs import Config, with_most_stages
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


TWO, WARPGROUPS = program.FEW_UNITS
FORMS = {"two CTAs": TWO, "four CTAs": with_most_stages((8,), 1, 2, 4, 2, cluster_k=4), "four warpgroups": WARPGROUPS}


@pytest.fixture
def always(monkeypatch):
    """Makes calls have a config, whatever would be chosen."""
    return lambda config: monkeypatch.setattr(program, "best_config", lambda *_: config)


@emulated(pytest.mark.parametrize("form", FORMS))
def test_exact_calls_have_the_bits_of_the_cpu(always, form):
    """Parts differ in length, down to one block; clusters take several units, so that sums are sent again and again."""
    always(config := FORMS[form])
    ways, ctas = config.cluster_k, 3 * config.ctas_per_sm
    for seed, (precision, combine) in enumerate((("w4a16", "atomic"), ("w4a4", "ordered"))):
        case = make_exact_case(seed, precision=precision, combine=combine, **FLOAT32, **SIZES)
        expected = case.run()
        for order in emulator.ORDERS[seed:]:
            call = emulated_call.prepare(case, "sm_90a", multiprocessors=3)
            gemms = [launch for launch in call.program.launches if launch.name.startswith("gemm")]
            assert [(launch.spec.cluster, launch.grid) for launch in gemms] == [(ways, ctas // ways * ways)] * 2
            assert_bit_equal(call.run(order=order, seed=seed), expected)


@emulated()
def test_exact_products_have_the_bits_of_their_definition(always):
    always(TWO)
    case = product_cases.make_case(1, [3, 0, 5, 2], 12, in_features=320)
    call = emulated_call.prepare_product(case)
    assert call.program.launches[-1].spec.cluster == 2
    assert_bit_equal(call.run(seed=1), product_cases.expected(case))


@emulated()
def test_sums_are_added_in_the_order_of_ranks(always):
    """Sums that round: the same bits however late each rank is, and not those of one sum."""
    case = make_case(4, tokens=2, num_experts=2, hidden=576, intermediate=320, activation=activations.ReLU2(),
                     combine="ordered", **FLOAT32)  # fmt: skip
    whole = emulated_call.prepare(case, "sm_90a").run()
    always(FORMS["four CTAs"])
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
def test_mutants(always):
    """Of GEMM2, whose first ranks wait for their sums to be taken (EMPTY) before rank 0 waits for them (FULL)."""
    always(TWO)
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


# --- Which calls have them ----------------------------------------------------------------------------------------


def forms_of(model: str, tokens: int) -> tuple[Config, ...]:
    layer = shapes.MODELS[model]
    call = cuda_call.problem(
        num_tokens=tokens, local_experts=layer.num_experts, top_k=layer.top_k, hidden_size=layer.hidden_size,
        intermediate_size=layer.intermediate_size, activation=activations.SwiGLU(),
    )  # fmt: skip
    return tuple(each.spec.config for each in cuda_call.program(call).launches if each.name.startswith("gemm"))


def test_the_forms_that_are_chosen_are_those_that_were_measured():
    """And with more tokens there are too many units."""
    usual = program.CONFIGS[0]
    assert forms_of("mixtral-8x7b", 1) == (usual, TWO)  # 64 units of 224 blocks on 132 multiprocessors
    assert forms_of("qwen3-30b-a3b", 1) == (WARPGROUPS, WARPGROUPS)
    assert forms_of("qwen3-235b-a22b", 1) == (usual, usual)
    assert forms_of("qwen3-235b-a22b", 2) == (WARPGROUPS, usual)
    for model, tokens in itertools.product(shapes.MODELS, shapes.TOKENS[1:]):
        assert len(set(forms_of(model, tokens))) == 1
        assert not set(forms_of(model, tokens)) & set(program.FEW_UNITS)


def test_one_matrix_and_one_row_have_a_form_of_their_own():
    """``linear`` with 4096 features: 32 units."""
    call = cuda_call.product(num_rows=1, num_groups=1, local_groups=1, in_features=14336, out_features=4096)
    assert cuda_call.program(call).launches[-1].spec.config == TWO


@pytest.mark.parametrize("multiprocessors", [1, 3, 114, 132])
def test_every_cta_of_a_cluster_has_blocks_and_grids_are_whole_clusters(multiprocessors):
    """The kernels rely on both."""
    card = dataclasses.replace(SM90.cards[0], multiprocessors=multiprocessors)
    for units, k_blocks in itertools.product((1, 8, 40, 64, 65, 67, 133, 1000), (*range(1, 9), 300)):
        config = program.fitted(program.CONFIGS[0], card, units, k_blocks)
        assert config.cluster_k <= k_blocks
        grid = program._grid(card, config, units)
        assert grid > 0
        assert grid % config.cluster_k == 0
        assert grid <= max(config.cluster_k, multiprocessors * config.ctas_per_sm)


def test_other_configs_are_left_alone():
    assert all(program.fitted(config, SM90.cards[0], 1, 300) == config for config in program.CONFIGS[1:])
    assert program.fitted(program.CONFIGS[0], SM90.cards[0], 1, 300) == TWO
