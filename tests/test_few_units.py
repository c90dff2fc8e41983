"""sm_90a's form of a config for few units of work: which calls have it, and that it is right on the emulator."""

import collections
import dataclasses
import importlib.util
import itertools
import pathlib
import re
import shutil

import cuda_call
import emulated_call
import emulator
from helpers import assert_bit_equal, make_exact_case
import jax.numpy as jnp
import product_cases
import pytest

from jax_moe import activations, shapes
from jax_moe.kernels import tiling
from jax_moe.kernels.sm90 import program
from jax_moe.kernels.sm90.target import SM90

needs_dsl = pytest.mark.skipif(
    importlib.util.find_spec("cutlass") is None, reason="nvidia-cutlass-dsl is not installed"
)
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator is compiled with g++")
USUAL, ALONE, SPLIT = program.CONFIGS[0], program.FEW_UNITS, program.SPLIT_UNITS
H200 = SM90.cards[0]


# --- On the emulator ----------------------------------------------------------------------------------------------


@needs_dsl
@needs_compiler
@pytest.mark.parametrize("tokens", [3, 40])
@pytest.mark.parametrize("form", [ALONE, SPLIT], ids=["alone", "split"])
def test_exact_calls_have_the_bits_of_the_cpu(monkeypatch, tokens, form):
    """With a tile map of the CTAs' own and of the sort; four warpgroups, or eight of two CTAs, share 9 and 7 blocks.

    Of seven clusters some have an odd number of units and others not, in both GEMMs.
    """
    monkeypatch.setattr(program, "best_config", lambda *_, **__: form)
    for seed, (precision, combine) in enumerate((("w4a16", "atomic"), ("w4a4", "ordered"))):
        case = make_exact_case(
            seed, tokens=tokens, num_experts=4, top_k=2, hidden=576, intermediate=448, gated=False,
            precision=precision, combine=combine, out_dtype=jnp.float32,
        )  # fmt: skip
        expected = case.run()
        for order in emulator.ORDERS[1 + seed :]:
            call = emulated_call.prepare(case, "sm_90a", multiprocessors=3 if form == ALONE else 14)
            gemms = [launch for launch in call.program.launches if launch.name.startswith("gemm")]
            assert [launch.spec.config for launch in gemms] == [form, form]
            assert_bit_equal(call.run(order=order, seed=seed), expected)


@needs_dsl
@needs_compiler
def test_gemms_of_a_call_may_differ(monkeypatch):
    """They share tiles, and these are the same."""
    chosen = {9: ALONE, 7: USUAL}  # by the blocks of the contraction
    monkeypatch.setattr(program, "fitted", lambda config, card, routes, row_blocks, k_blocks: chosen[k_blocks])
    case = make_exact_case(7, tokens=5, num_experts=4, top_k=2, hidden=576, intermediate=448, gated=False,
                           precision="w4a16", combine="ordered", out_dtype=jnp.float32)  # fmt: skip
    call = emulated_call.prepare(case, "sm_90a")
    assert [each.spec.config for each in call.program.launches if each.name.startswith("gemm")] == [ALONE, USUAL]
    assert_bit_equal(call.run(seed=1), case.run())


@needs_dsl
@needs_compiler
@pytest.mark.parametrize("form", [ALONE, SPLIT], ids=["alone", "split"])
def test_exact_products_have_the_bits_of_their_definition(monkeypatch, form):
    monkeypatch.setattr(program, "best_config", lambda *_, **__: form)
    case = product_cases.make_case(1, [3, 0, 5, 2], 12, in_features=320)
    call = emulated_call.prepare_product(case, multiprocessors=4)
    assert call.program.launches[-1].spec.config == form
    assert_bit_equal(call.run(seed=1), product_cases.expected(case))


# --- Which calls have it ------------------------------------------------------------------------------------------


def forms_of(model: str, tokens: int) -> tuple:
    layer = shapes.MODELS[model]
    call = cuda_call.problem(
        num_tokens=tokens, local_experts=layer.num_experts, top_k=layer.top_k, hidden_size=layer.hidden_size,
        intermediate_size=layer.intermediate_size, activation=activations.SwiGLU(),
    )  # fmt: skip
    return tuple(each.spec.config for each in cuda_call.program(call).launches if each.name.startswith("gemm"))


def _measured() -> list[tuple[str, int, list[str]]]:
    """Model, T, and the times of the four pairs of forms in the notes, a bold one among them."""
    notes = (pathlib.Path(__file__).parents[1] / "benchmarks" / "notes-h200.md").read_text()
    table = notes.partition("## Few units")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| ([\w-]+), (\d+) \|((?: \**[\d.]+\** \|){4})", table, re.MULTILINE)
    assert len(rows) == 13
    found = []
    for short, tokens, times in rows:
        (model,) = [name for name in shapes.MODELS if name.startswith(short)]
        found.append((model, int(tokens), times.replace(" ", "").split("|")[:4]))
    return found


@pytest.mark.parametrize(("model", "tokens", "times"), _measured(), ids=lambda value: str(value))
def test_the_forms_that_are_chosen_are_those_that_were_fastest(model, tokens, times):
    """Of the four pairs that an H200 was given, for each model and T; the page marks them."""
    pairs = [(USUAL, USUAL), (USUAL, ALONE), (ALONE, USUAL), (ALONE, ALONE)]
    fastest = min(range(4), key=lambda i: float(times[i].strip("*")))
    assert [i for i in range(4) if "*" in times[i]] == [fastest]
    chosen = tuple(ALONE if form == SPLIT else form for form in forms_of(model, tokens))  # that has a table of its own
    assert chosen == pairs[fastest]


def test_two_ctas_share_a_unit_of_one_token_where_each_two_have_one():
    """mixtral T = 1: 64 units of GEMM2 take a call from 73.7 to 63.2 us."""
    chosen = {(model, tokens) for model in shapes.MODELS for tokens in range(1, 9) if SPLIT in forms_of(model, tokens)}
    assert chosen == {("mixtral-8x7b", 1)}
    assert forms_of("mixtral-8x7b", 1) == (USUAL, SPLIT)


def test_one_more_expert_may_be_one_more_turn():
    """mixtral T = 3 took 114 us with GEMM2 alone and 131 without: of 3 to 6 experts, up to 4 fit at once.

    And gpt-oss T = 3 has some 12 units more than CTAs of GEMM2, which do not take another turn of two (56 and 60 us).
    """
    assert forms_of("gpt-oss-120b", 3) == (USUAL, USUAL)
    assert forms_of("mixtral-8x7b", 3) == (USUAL, ALONE)
    assert dict(tiling.touched(3, 2, 8, 8))[4] > 0.3


def test_with_more_tokens_there_are_too_many_units():
    for model, tokens in itertools.product(shapes.MODELS, shapes.TOKENS[1:]):
        (form,) = set(forms_of(model, tokens))
        assert form != ALONE


def test_only_the_first_config_is_exchanged():
    one = 1, 1, 1, 1
    assert all(program.fitted(config, H200, one, 100, 300) == config for config in program.CONFIGS[1:])
    assert program.fitted(USUAL, H200, one, 100, 300) == ALONE
    assert program.fitted(USUAL, H200, one, 66, 300) == SPLIT
    assert program.fitted(USUAL, H200, (2, 1, 1, 1), 66, 300) == ALONE  # bits would depend on the neighbour
    assert program.fitted(USUAL, H200, (2, 1, 1, 1), 1, 300) == USUAL  # a unit on its own has no CTA beside it
    assert program.fitted(USUAL, H200, one, 100, 1) == USUAL  # what a CTA takes besides is all that counts
    assert program.fitted(USUAL, H200, one, 397, 300) == USUAL


def test_the_card_decides():
    """A card on which a CTA on its own takes longer, or starts later, has none."""
    one, costs = (1, 1, 1, 1), H200.costs
    for changes in (dict(block=2.1), dict(alone=1e9), dict(turns=0)):
        few_units = dataclasses.replace(costs.few_units, **changes)
        card = dataclasses.replace(H200, costs=dataclasses.replace(costs, few_units=few_units))
        assert program.fitted(USUAL, card, one, 100, 300) == USUAL


# --- How many experts are touched ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "top_k", "experts", "local"),
    [(1, 2, 4, 4), (3, 2, 4, 4), (2, 3, 5, 2), (3, 1, 4, 3), (4, 1, 1, 1), (0, 2, 4, 4), (2, 1, 3, 5)],
)
def test_touched_experts_are_counted_exactly(tokens, top_k, experts, local):
    """As all routings one by one say; the first experts are those that are here."""
    choices = list(itertools.combinations(range(experts), top_k))
    counts = collections.Counter(
        len({expert for choice in routing for expert in choice if expert < local})
        for routing in itertools.product(choices, repeat=tokens)
    )
    wanted = {number: count / len(choices) ** tokens for number, count in counts.items()}
    assert dict(tiling.touched(tokens, top_k, experts, local)) == pytest.approx(wanted)


def test_touched_experts_of_large_models():
    for tokens, model in itertools.product((1, 4, 64, 8192), shapes.MODELS.values()):
        likely = tiling.touched(tokens, model.top_k, model.num_experts, model.num_experts)
        assert sum(value for _, value in likely) == pytest.approx(1, abs=1e-6)
        assert sum(number * value for number, value in likely) == pytest.approx(model.touched_experts(tokens), rel=1e-6)
    assert tiling.touched(8192, 8, 128, 128) == ((128, pytest.approx(1)),)
