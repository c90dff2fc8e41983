"""``examples/generate.py`` and ``qwen3_moe.py``: a whole model computes what transformers computes.

Two chains, each with a bound of its own. ``checkpoints/qwen3_reference.py``, float64 NumPy, is compared with logits
that transformers computed in float32 (``checkpoints/generate_models.py`` stored them): only float32 sums lie between.
The example is compared with that reference, rounding where the example says that it rounds; and with transformers.
"""

import dataclasses
import functools
import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import checkpoint_writer as writer
import cuda_call
import generate_models
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import qwen3_mistakes as mistakes
import qwen3_reference
from typer.testing import CliRunner

import jax_moe
from jax_moe import checkpoints, ffi, nvfp4
from jax_moe.checkpoints import files

ROOT = pathlib.Path(__file__).parents[1]
MODELS = pathlib.Path(__file__).parent / "checkpoints" / "models"
CASES = sorted(generate_models.CASES)
BF16_EXPERTS = "modelopt-qwen3_moe-experts"
LAYERS = generate_models.SIZES["num_hidden_layers"]
PROMPT = generate_models.PROMPT

ALIKE = 2**-16
"""Relative: float32 sums of up to 128 products, in two layers, are units of 2^-24, a few hundred of them at most."""
SITES = {jnp.float32: 2, jnp.bfloat16: 8}
"""Roundings in a layer: x of the experts and their intermediate; also x, query, key, value, probability and output of
the attention. Each is of 2^-8 at most and of either sign, so together they are 2^-8 times the root of their number."""


def example(name: str, folder: str = "examples"):
    """A module of ``examples``, under a name of its own: ``checkpoints/generate.py`` is another one."""
    if (known := sys.modules.get(f"examples_{name}")) is not None:
        return known
    spec = importlib.util.spec_from_file_location(f"examples_{name}", ROOT / folder / f"{name}.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "examples")
        spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def generate():
    return example("generate")


@pytest.fixture(scope="module")
def qwen3(generate):
    return sys.modules["qwen3_moe"]  # that generate.py imported


@pytest.fixture(scope="module")
def loaded(qwen3):
    """Parameters in float32, in a list of layers, and the config."""
    return qwen3.load(MODELS / BF16_EXPERTS, dtype=jnp.float32)


@pytest.fixture(scope="module")
def actual(qwen3, loaded):
    """The example's logits for the stored tokens, in float32."""
    return compute(qwen3, *loaded, expected(BF16_EXPERTS)["tokens"])


def expected(case):
    return dict(np.load(MODELS / case / "expected.npz"))


@functools.cache
def stored(case, rounding=qwen3_reference.exact) -> np.ndarray:
    """The reference's logits ``[B, S, V]`` for the stored tokens of a case."""
    model = reference(MODELS / case)
    return np.stack([model.logits(tokens, rounding) for tokens in expected(case)["tokens"]])


def reference(directory, renormalize=True, tied=False, widened=True) -> qwen3_reference.Model:
    """Weights by the public loaders, which tests of their own compare with the tools' decompression."""
    checkpoint = checkpoints.open_model(directory)

    def attention(name):
        if widened:
            return matrix(name)
        p = checkpoints.load_projection(checkpoint, name)
        return np.asarray(nvfp4.dequantize(p.payload, p.block_scale, p.global_scale), np.float64)

    def matrix(name):
        return np.asarray(checkpoints.load_linear(checkpoint, name), np.float64)

    def norm(name):
        return np.asarray(checkpoints.load_tensor(checkpoint, f"{name}.weight"), np.float64)

    def experts(projection):
        scale = projection.global_scale[..., None]
        return np.asarray(nvfp4.dequantize(projection.payload, projection.block_scale, scale), np.float64)

    layers = []
    for number in range(LAYERS):
        prefix = f"model.layers.{number}"
        loaded = checkpoints.load_experts(checkpoint, number)
        layers.append({
            "attention_norm": norm(f"{prefix}.input_layernorm"),
            "moe_norm": norm(f"{prefix}.post_attention_layernorm"),
            "query": attention(f"{prefix}.self_attn.q_proj"),
            "key": attention(f"{prefix}.self_attn.k_proj"),
            "value": attention(f"{prefix}.self_attn.v_proj"),
            "output": attention(f"{prefix}.self_attn.o_proj"),
            "query_norm": norm(f"{prefix}.self_attn.q_norm"),
            "key_norm": norm(f"{prefix}.self_attn.k_norm"),
            "router": matrix(f"{prefix}.mlp.gate"),
            "gate_up": experts(loaded.gate_up),
            "down": experts(loaded.down),
        })  # fmt: skip
    embed = matrix("model.embed_tokens")
    sizes = generate_models.SIZES
    return qwen3_reference.Model(
        embed,
        embed if tied else matrix("lm_head"),
        norm("model.norm"),
        layers,
        sizes["num_attention_heads"],
        sizes["num_key_value_heads"],
        sizes["num_experts_per_tok"],
        renormalize,
        sizes["rope_parameters"]["rope_theta"],
        1e-6,
    )


def to_bfloat16(place, values):
    return values.astype(np.float32).astype(ml_dtypes.bfloat16).astype(np.float64)


def experts_to_bfloat16(place, values):
    return to_bfloat16(place, values) if place in ("moe_x", "intermediate") else values


def compute(qwen3, params, config, tokens):
    """Logits ``[B, S, V]`` of the example."""
    moe = qwen3.moe_layer()
    x, _ = jax.jit(lambda params, tokens: qwen3.forward(params, tokens, moe, config))(params, tokens)
    return np.asarray(qwen3.logits(params, x))


def position_errors(actual, wanted) -> np.ndarray:
    """Relative, of each position, in ascending order."""
    actual, wanted = np.asarray(actual, np.float64), np.asarray(wanted, np.float64)
    return np.sort((np.linalg.norm(actual - wanted, axis=-1) / np.linalg.norm(wanted, axis=-1)).ravel())


def total_error(actual, wanted) -> float:
    return float(np.linalg.norm(np.asarray(actual) - wanted) / np.linalg.norm(wanted))


def agree(actual, rounded) -> bool:
    """Whether logits are those of a reference that rounds at the same places, in float64 between them.

    Where a value lies in the middle between two bfloat16 numbers, a float32 sum decides which; that moves the logits of
    its position, and a little those behind it, by some 2^-8. It is rare: a quarter of the positions at least have none.
    """
    errors = position_errors(actual, rounded)
    return errors[len(errors) // 4] < ALIKE and total_error(actual, rounded) < 2**-8


# --- Logits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_the_reference_is_transformers(case):
    assert position_errors(stored(case), expected(case)["logits"])[-1] < ALIKE


def test_logits_in_float32(actual):
    assert agree(actual, stored(BF16_EXPERTS, experts_to_bfloat16))
    rounded = 2**-8 * (LAYERS * SITES[jnp.float32]) ** 0.5
    assert total_error(actual, expected(BF16_EXPERTS)["logits"]) < rounded


@pytest.mark.parametrize("case", CASES)
def test_logits_in_bfloat16_of_stacked_layers(qwen3, case):
    wanted = expected(case)
    params, config = qwen3.load(MODELS / case, stack=True)
    actual = compute(qwen3, params, config, wanted["tokens"])
    assert agree(actual, stored(case, to_bfloat16))
    rounded = LAYERS * SITES[jnp.bfloat16] + 1  # one for what the last product reads
    assert total_error(actual, wanted["logits"]) < 2**-8 * rounded**0.5


def test_the_attentions_4_bit_weights_as_they_are(qwen3):
    """Not rounded to bfloat16 on the way: ``jax_moe.linear`` multiplies them."""
    directory = MODELS / "llmcompressor-qwen3_moe"
    params, config = qwen3.load(directory, widen=False, stack=True)
    assert isinstance(params["layers"]["query"], jax_moe.Projection)
    tokens = expected(directory.name)["tokens"][:1]
    model = reference(directory, widened=False)
    assert agree(compute(qwen3, params, config, tokens), model.logits(tokens[0], to_bfloat16)[None])
    bf16, _ = qwen3.load(MODELS / BF16_EXPERTS, widen=False)
    assert isinstance(bf16["layers"][0]["query"], jax.Array)  # what is not in 4 bits is as ever


MISTAKES = [*mistakes.CLASSES, *mistakes.VALUES, *mistakes.LEAVES]


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda m: m if isinstance(m, str) else m.__name__)
def test_a_model_with_a_mistake_is_another(actual, mistake):
    """The comparison tells the example from models with a wrong rope, mask, norm, router or order of anything.

    The mistakes are the reference's: it takes no compiling. They were also made in the example, and seen.
    """
    model = reference(MODELS / BF16_EXPERTS)
    if mistake in mistakes.VALUES:
        model = dataclasses.replace(model, **{mistake: mistakes.VALUES[mistake]})
    elif mistake in mistakes.LEAVES:  # of the second layer alone
        model.layers[1][mistake] = mistakes.LEAVES[mistake](model.layers[1][mistake])
    else:
        model = mistake(**vars(model))
    wrong = model.logits(expected(BF16_EXPERTS)["tokens"][0], experts_to_bfloat16)
    assert not agree(actual[:1], wrong[None])


# --- The cache, and text ----------------------------------------------------------------------------------------------


def test_decoding_with_a_cache_is_the_whole_forward_pass(qwen3, loaded):
    """One token after another behind a prompt, in a cache with room behind its end that holds nonsense."""
    params, config = loaded
    tokens, moe = expected(BF16_EXPERTS)["tokens"], qwen3.moe_layer()
    x, cache = jax.jit(lambda params, tokens: qwen3.forward(params, tokens, moe, config))(params, tokens[:, :PROMPT])
    room = qwen3.with_room(cache, tokens.shape[1] + 5)
    cache = jax.tree.map(lambda array: array.at[:, PROMPT:].set(1e3), room)
    step = jax.jit(lambda params, token, cache, at: qwen3.forward(params, token, moe, config, cache, at))
    rows = [qwen3.logits(params, x)]
    for position in range(PROMPT, tokens.shape[1]):
        x, cache = step(params, tokens[:, position : position + 1], cache, position)
        rows.append(qwen3.logits(params, x))
    assert agree(np.concatenate(rows, axis=1), stored(BF16_EXPERTS, experts_to_bfloat16))


def run(*arguments, fails=False):
    """Standard output of the command, or its error's one line."""
    command = CliRunner(env={"COLUMNS": "300"}).invoke(example("generate").app, [str(a) for a in arguments])
    assert (command.exit_code != 0) == fails, command.output
    assert command.exception is None or isinstance(command.exception, SystemExit), command.exception
    return command.stderr if fails else command.stdout


def numbers(output: str) -> list[list[int]]:
    return [[int(number) for number in row.split(",") if number] for row in output.strip().split("\n---\n")]


def ids(row) -> str:
    return ",".join(map(str, row))


@pytest.mark.parametrize(("case", "options"), [
    (BF16_EXPERTS, []),
    ("llmcompressor-qwen3_moe", ["--mesh", "expert=2,tensor=2", "--scan"]),
], ids=["list", "mesh and scan"])  # fmt: skip
def test_greedy_text_is_that_of_transformers(generate, case, options, monkeypatch):
    monkeypatch.setattr(generate, "CHUNK", 5)  # so that it does not divide how far
    wanted = expected(case)
    prompt = ids(wanted["tokens"][0, :PROMPT])
    output = run(MODELS / case, prompt, "--ids", "--max-tokens", generate_models.NEW, "--samples", 2, *options)
    assert numbers(output) == [wanted["generated"][0].tolist()] * 2


def test_decoding_is_one_program_that_updates_the_cache_in_place(generate, qwen3, loaded):
    params, config = loaded
    run = generate.Generator(config, qwen3.moe_layer(), generate.Sampling(), 80)
    state = run.prefill(params, np.zeros((2, 64), np.int32), 3, jax.random.key(0))
    text = run.decode.lower(run, params, state, 3, jax.random.key(0)).as_text()
    assert text.count(f"@{ffi.TARGET}(") == LAYERS
    assert text.count("stablehlo.while") == 1
    run.decode(params, state, 3, jax.random.key(0))
    assert all(array.is_deleted() for array in jax.tree.leaves(state))


# --- Sampling ---------------------------------------------------------------------------------------------------------

PROBABILITIES = np.array([0.1, 0.4, 0.0, 0.25, 0.2, 0.05])


@pytest.mark.parametrize(("options", "kept"), [
    ({"temperature": 1.0}, [0, 1, 3, 4, 5]),
    ({"temperature": 0.0}, [1]),
    ({"temperature": 2.0, "top_k": 3}, [1, 3, 4]),
    ({"temperature": 1.0, "top_p": 0.66}, [1, 3, 4]),
    ({"temperature": 1.0, "top_k": 2, "top_p": 0.5}, [1]),
], ids=str)  # fmt: skip
def test_tokens_are_drawn_with_their_probabilities(generate, options, kept):
    """``top_k`` and then ``top_p`` of what is left: 0.4 / (0.4 + 0.25) is above 0.5."""
    draws = 4000
    logits = jnp.broadcast_to(jnp.log(PROBABILITIES), (draws, 6))
    drawn = np.bincount(generate.Sampling(**options)(logits, jax.random.key(0)), minlength=6) / draws
    wanted = np.zeros(6)
    wanted[kept] = PROBABILITIES[kept] ** (1 / (options["temperature"] or 1))
    wanted /= wanted.sum()
    # Five standard deviations of a share.
    assert (np.abs(drawn - wanted) <= 5 * np.sqrt(wanted * (1 - wanted) / draws)).all(), drawn


def test_options_go_before_what_the_checkpoint_says(generate, tmp_path):
    assert generate.sampling_of(tmp_path, None, None, None) == generate.Sampling(0.0, 0, 1.0)
    said = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "eos_token_id": [7, 9]}
    (tmp_path / "generation_config.json").write_text(json.dumps(said))
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 3}))
    assert generate.sampling_of(tmp_path, None, None, 0.5) == generate.Sampling(0.6, 20, 0.5)
    assert generate.sampling_of(tmp_path, 0.0, None, None).temperature == 0
    assert generate.end_tokens(tmp_path) == {7, 9}
    (tmp_path / "generation_config.json").write_text(json.dumps(said | {"do_sample": False, "eos_token_id": None}))
    assert generate.sampling_of(tmp_path, None, None, None) == generate.Sampling(0.0, 0, 1.0)
    assert generate.end_tokens(tmp_path) == {3}


def test_text_ends_at_the_end_token(generate, capsys):
    chunks = [np.array([[1, 2, 3], [4, 5, 6]]), np.array([[4, 9, 5], [9, 1, 1]]), np.array([[1, 1, 1], [2, 2, 2]])]
    asked = iter(chunks)
    assert generate.stream(asked, generate.Ids(), {9}, samples=2)[0] == 6
    assert numbers(capsys.readouterr().out) == [[1, 2, 3, 4], [4, 5, 6]]
    assert next(asked) is chunks[2]  # it was not asked for


class Bytes:
    """A tokenizer of bytes, of which half a character is none."""

    def decode(self, ids):
        return bytes(ids).decode(errors="replace")


def test_half_a_character_waits_for_its_other_half(generate, capsys):
    text = "a\N{SNOWMAN}b".encode()
    generate.stream((np.array([[byte]]) for byte in text), Bytes(), set(), samples=1)
    assert capsys.readouterr().out == "a\N{SNOWMAN}b\n"


def test_text_through_the_tokenizer(generate):
    pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    wanted = expected(BF16_EXPERTS)
    prompt = " ".join(f"t{number}" for number in wanted["tokens"][0, :PROMPT])
    output = run(MODELS / BF16_EXPERTS, prompt, "--max-tokens", 3)
    assert output == "".join(f"t{number}" for number in wanted["generated"][0, :3]) + "\n"


def test_chat_is_what_the_template_says(generate, tmp_path):
    pytest.importorskip("jinja2", reason="jinja2 is not installed")
    template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<me>{% endif %}"
    )
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    assert generate.as_chat(tmp_path, "why?") == "<user>why?<me>"


# --- What the checkpoint may be, and what is refused ------------------------------------------------------------------


def changed(directory, case=BF16_EXPERTS, remove=(), **settings) -> pathlib.Path:
    """A checkpoint with other settings; without some tensors."""
    config = json.loads((MODELS / case / "config.json").read_text()) | settings
    names = [name for name in checkpoints.open_model(MODELS / case).files.names() if name not in remove]
    read = files.Files(MODELS / case)
    return writer.write(directory, config, {name: files.read_rows(read.info(name)) for name in names})


def test_tied_embeddings_an_old_rope_and_probabilities_as_they_are(qwen3, tmp_path):
    settings = {"rope_parameters": None, "rope_theta": 1000.0, "rope_scaling": None, "norm_topk_prob": False}
    directory = changed(tmp_path, remove=["lm_head.weight"], tie_word_embeddings=True, **settings)
    tokens = expected(BF16_EXPERTS)["tokens"][:1]
    actual = compute(qwen3, *qwen3.load(directory, dtype=jnp.float32), tokens)
    model = reference(directory, renormalize=False, tied=True)
    assert agree(actual, model.logits(tokens[0], experts_to_bfloat16)[None])


@pytest.mark.parametrize(("settings", "message"), [
    ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0}}, "rope_type: found 'yarn'"),
    ({"rope_parameters": None, "rope_theta": 1e6, "rope_scaling": {"type": "linear", "factor": 2.0}}, "type: found"),
    ({"rope_parameters": None}, "rope_theta: found None"),
    ({"attention_bias": True}, "attention_bias: found True"),
    ({"use_sliding_window": True}, "use_sliding_window: found True"),
    ({"num_hidden_layers": 3}, "num_hidden_layers: found 3"),
    ({"model_type": "qwen2_moe"}, "model_type: found 'qwen2_moe'"),
    ({"num_key_value_heads": None}, "num_key_value_heads: found None"),
], ids=lambda value: next(iter(value)) if isinstance(value, dict) else "")  # fmt: skip
def test_what_the_model_does_not_compute_is_refused(generate, tmp_path, settings, message):
    error = run(changed(tmp_path, **settings), "1,2", "--ids", fails=True)
    assert error.startswith("error: ")
    assert message in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(("arguments", "message"), [
    (["~/nowhere-at-all", "1", "--ids"], "hf download OWNER/MODEL --local-dir"),
    ([MODELS, "1", "--ids"], "found no *.safetensors file"),
    ([MODELS / BF16_EXPERTS, "1,x", "--ids"], "--ids: got the prompt '1,x', needs numbers of tokens"),
    ([MODELS / BF16_EXPERTS, "64", "--ids"], "each from 0 to 63"),
    ([MODELS / BF16_EXPERTS, "1", "--ids", "--mesh", "experts=2"], "--mesh: got 'experts=2', needs expert=N"),
    ([MODELS / BF16_EXPERTS, "1", "--ids", "--mesh", "expert=0"], "--mesh: got 'expert=0', needs expert=N"),
    ([MODELS / BF16_EXPERTS, "1", "--ids", "--mesh", "expert=16"], "at most the 8 devices"),
    ([MODELS / BF16_EXPERTS, "1", "--ids", "--mesh", "expert=3"], "does not divide E = 8"),
    ([MODELS / BF16_EXPERTS, "1", "--ids", "--precision", "fp8"], "--precision: got 'fp8', needs w4a16 or w4a4"),
    ([MODELS / BF16_EXPERTS, "1", "--ids", "--mesh", "expert=2", "--attention-4bit"], "needs one device"),
    ([MODELS / BF16_EXPERTS, "1", "--ids", "--chat"], "found no chat template"),
    ([MODELS / BF16_EXPERTS, "1", "--ids", "--top-p", "1.5"], "--top-p"),
], ids=lambda value: " ".join(map(str, value[1:])) if isinstance(value, list) else "")  # fmt: skip
def test_a_mistake_is_one_line_that_says_what_is_needed(generate, arguments, message):
    if "--chat" in arguments:
        pytest.importorskip("jinja2", reason="jinja2 is not installed")
    assert message in " ".join(run(*arguments, fails=True).split())


# --- The benchmark, and transformers today ----------------------------------------------------------------------------


def test_the_benchmark_runs_on_any_machine(generate, monkeypatch):
    monkeypatch.setitem(sys.modules, "generate", generate)
    monkeypatch.setattr(generate, "CHUNK", 2)
    benchmark = example("whole_model", "benchmarks")
    rows, request = [], benchmark.Request("tiny", 2, (1,), context=5, prefill=64, repeats=1)
    benchmark.ours(request, "w4a16", "scan", rows.append)
    assert [(row["what"], row["batch"], row["tokens"]) for row in rows] == [("prefill", 1, 64), ("decode", 1, 2)]
    assert all(row["seconds"] > 0 for row in rows)
    benchmark.show([{"method": "ours", **row} for row in rows], "tiny")


def test_the_benchmark_names_the_kernels_of_a_gpu(generate, monkeypatch):
    """What ``--compile-for`` does, without the compiler."""
    asked = cuda_call.stand_in_compiler(monkeypatch)
    monkeypatch.setitem(sys.modules, "generate", generate)
    benchmark = example("whole_model", "benchmarks")
    request = benchmark.Request("tiny", 2, (1, 64), context=5, prefill=128, repeats=1)
    benchmark.compile_for(request, "w4a16", "loop", "sm_90a")
    assert len(asked) >= 3  # at least a sort and two GEMMs


MODULES = ("torch", "transformers", "compressed_tensors", "llmcompressor", "modelopt")
MISSING = [module for module in MODULES if importlib.util.find_spec(module) is None]


@pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")
@pytest.mark.parametrize("case", CASES)
def test_what_the_tools_and_transformers_make_now(tmp_path, monkeypatch, qwen3, case):
    command = [sys.executable, str(pathlib.Path(generate_models.__file__)), str(tmp_path), case]
    ran = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    assert ran.returncode == 0, ran.stderr[-3000:]
    wanted = dict(np.load(tmp_path / case / "expected.npz"))
    model = reference(tmp_path / case)
    exact, rounded = (
        [model.logits(tokens, rounding) for tokens in wanted["tokens"]]
        for rounding in (qwen3_reference.exact, experts_to_bfloat16)
    )
    assert position_errors(exact, wanted["logits"])[-1] < ALIKE
    assert agree(compute(qwen3, *qwen3.load(tmp_path / case, dtype=jnp.float32), wanted["tokens"]), rounded)
