"""sm_90a's form of a config for few units of work: which calls have it, and that it is right on the emulator."""

import importlib.util
import itertools
import shutil

import cuda_call
import emulated_call
import emulator
from helpers import assert_bit_equal, make_exact_case
import jax.numpy as jnp
import product_cases
import pytest

from jax_moe import activations, shapes
from jax_moe.kernels.sm90 import program
from jax_moe.kernels.sm90.target import SM90

needs_dsl = pytest.mark.skipif(
    importlib.util.find_spec("cutlass") is None, reason="nvidia-cutlass-dsl is not installed"
)
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator is compiled with g++")
USUAL, ALONE = program.CONFIGS[0], program.FEW_UNITS
H200 = SM90.cards[0]


# --- On the emulator ----------------------------------------------------------------------------------------------


@needs_dsl
@needs_compiler
@pytest.mark.parametrize("tokens", [3, 40])
def test_exact_calls_have_the_bits_of_the_cpu(monkeypatch, tokens):
    """With a tile map of the CTAs' own and of the sort; four warpgroups share 9 and 7 blocks."""
    monkeypatch.setattr(program, "best_config", lambda *_: ALONE)
    for seed, (precision, combine) in enumerate((("w4a16", "atomic"), ("w4a4", "ordered"))):
        case = make_exact_case(
            seed, tokens=tokens, num_experts=4, top_k=2, hidden=576, intermediate=448, gated=False,
            precision=precision, combine=combine, out_dtype=jnp.float32,
        )  # fmt: skip
        expected = case.run()
        for order in emulator.ORDERS[1 + seed :]:
            call = emulated_call.prepare(case, "sm_90a")
            gemms = [launch for launch in call.program.launches if launch.name.startswith("gemm")]
            assert [launch.spec.config for launch in gemms] == [ALONE, ALONE]
            assert_bit_equal(call.run(order=order, seed=seed), expected)


@needs_dsl
@needs_compiler
def test_gemms_of_a_call_may_differ(monkeypatch):
    """They share tiles, and these are the same."""
    chosen = {9: ALONE, 7: USUAL}  # by the blocks of the contraction
    monkeypatch.setattr(program, "fitted", lambda config, card, units, k_blocks: chosen[k_blocks])
    case = make_exact_case(7, tokens=5, num_experts=4, top_k=2, hidden=576, intermediate=448, gated=False,
                           precision="w4a16", combine="ordered", out_dtype=jnp.float32)  # fmt: skip
    call = emulated_call.prepare(case, "sm_90a")
    assert [each.spec.config for each in call.program.launches if each.name.startswith("gemm")] == [ALONE, USUAL]
    assert_bit_equal(call.run(seed=1), case.run())


@needs_dsl
@needs_compiler
def test_exact_products_have_the_bits_of_their_definition(monkeypatch):
    monkeypatch.setattr(program, "best_config", lambda *_: ALONE)
    case = product_cases.make_case(1, [3, 0, 5, 2], 12, in_features=320)
    call = emulated_call.prepare_product(case)
    assert call.program.launches[-1].spec.config == ALONE
    assert_bit_equal(call.run(seed=1), product_cases.expected(case))


# --- Which calls have it ------------------------------------------------------------------------------------------


def forms_of(model: str, tokens: int) -> tuple:
    layer = shapes.MODELS[model]
    call = cuda_call.problem(
        num_tokens=tokens, local_experts=layer.num_experts, top_k=layer.top_k, hidden_size=layer.hidden_size,
        intermediate_size=layer.intermediate_size, activation=activations.SwiGLU(),
    )  # fmt: skip
    return tuple(each.spec.config for each in cuda_call.program(call).launches if each.name.startswith("gemm"))


@pytest.mark.parametrize(
    ("model", "tokens", "forms"),
    [
        ("mixtral-8x7b", 1, (USUAL, ALONE)),  # us of a call on an H200, both usual and so: 100, 74
        ("mixtral-8x7b", 2, (USUAL, ALONE)),  # 117, 97
        ("qwen3-235b-a22b", 1, (USUAL, USUAL)),  # any other pair is slower
        ("qwen3-235b-a22b", 2, (ALONE, USUAL)),  # 58, 54
        ("qwen3-30b-a3b", 1, (ALONE, ALONE)),  # 20.1, 16.8
        ("gpt-oss-120b", 1, (USUAL, ALONE)),  # 33.7, 29.4
        ("gpt-oss-120b", 4, (USUAL, ALONE)),  # 71.6, 69.7
        ("deepseek-r1-ep8", 1, (USUAL, USUAL)),
    ],
)
def test_the_forms_that_are_chosen_are_those_that_were_fastest(model, tokens, forms):
    assert forms_of(model, tokens) == forms


def test_with_more_tokens_there_are_too_many_units():
    for model, tokens in itertools.product(shapes.MODELS, shapes.TOKENS[1:]):
        (form,) = set(forms_of(model, tokens))
        assert form != ALONE


def test_one_matrix_and_few_rows_have_it():
    """``linear`` with 4096 features: 32 units."""
    call = cuda_call.product(num_rows=1, num_groups=1, local_groups=1, in_features=4096, out_features=4096)
    assert cuda_call.program(call).launches[-1].spec.config == ALONE


def test_only_the_first_config_is_exchanged():
    assert all(program.fitted(config, H200, 1, 300) == config for config in program.CONFIGS[1:])
    assert program.fitted(USUAL, H200, 1, 300) == ALONE
    assert program.fitted(USUAL, H200, 1, 1) == USUAL  # what a CTA takes besides is all that counts
    assert program.fitted(USUAL, H200, 397, 300) == USUAL
