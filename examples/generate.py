"""Continues a prompt with a published Qwen3-MoE checkpoint in NVFP4, on a GPU, on several, or on a CPU.

Run it:  pip install tokenizers huggingface_hub                 (beside jax_moe)
         hf download nvidia/Qwen3-30B-A3B-NVFP4 --local-dir ~/qwen3-30b
         python examples/generate.py ~/qwen3-30b "The three laws of thermodynamics are"
         python examples/generate.py ~/qwen3-30b "Why is the sky blue?" --chat --max-tokens 500
         python examples/generate.py ~/qwen3-30b "Once upon a time" --mesh expert=4

The model is in ``qwen3_moe.py``. Here it is put to work: the prompt is run once (prefill), then tokens are made one by
one in a ``jax.lax.scan`` inside one jitted call for 16 of them, in which nothing returns to Python; the cache of keys
and values is donated to each call, so it is updated in place. Each continuation ends at the model's own end token.

Without --temperature, --top-k and --top-p it samples as the checkpoint's ``generation_config.json`` says, and greedily
where there is none. --ids takes and prints numbers of tokens instead of text, for which no tokenizer is needed:

    python examples/generate.py tests/checkpoints/models/modelopt-qwen3_moe-experts --ids 1,2,3,4,5,6,7,8 --max-tokens 4
"""

from collections.abc import Iterator
import contextlib
import dataclasses
import functools
import json
from pathlib import Path
import sys
import time
from typing import Annotated

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np
from qwen3_moe import Cache, Config, forward, load, logits, MoE, moe_layer, Params, with_room
import typer

import jax_moe
from jax_moe import checkpoints

CHUNK = 16  # tokens that a jitted call makes
PROMPT_MULTIPLE = 64  # prompts are padded to a multiple, so that prompts of many lengths are few programs

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a token is chosen from logits.

    Attributes:
      temperature: divides the logits; 0 takes the best token.
      top_k: only the best so many; 0 is all.
      top_p: of those only the best ones that together have this probability; the best one always.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __call__(self, values: jax.Array, key: jax.Array) -> jax.Array:
        """Tokens ``[B]`` for logits ``[B, V]``."""
        if self.temperature == 0:
            return jnp.argmax(values, axis=-1).astype(jnp.int32)
        best, ids = jax.lax.top_k(values / self.temperature, min(self.top_k or values.shape[-1], values.shape[-1]))
        probability = jax.nn.softmax(best)
        before = jnp.cumsum(probability, axis=-1) - probability  # what the better ones have together
        chosen = jax.random.categorical(key, jnp.where(before < self.top_p, best, -jnp.inf))
        return jnp.take_along_axis(ids, chosen[:, None], axis=-1)[:, 0]


# --- Prefill and decode -----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Generator:
    """The two jitted programs of a model.

    ``prefill(params, tokens [B, S], length, key)`` reads prompts of ``length`` tokens, padded to S, and gives the state
    (next tokens ``[B]``, cache). ``decode(params, state, position, key)``, where ``position`` is that of the state's
    tokens, makes ``CHUNK`` tokens and gives the new state and ``[B, CHUNK]``: the state's tokens and what followed.
    """

    config: Config
    moe: MoE
    sampling: Sampling
    cache_length: int

    @functools.partial(jax.jit, static_argnums=0)
    def prefill(self, params: Params, tokens: jax.Array, length: jax.Array, key: jax.Array):
        x, cache = forward(params, tokens, self.moe, self.config)
        last = jax.lax.dynamic_index_in_dim(x, length - 1, axis=1, keepdims=False)  # of the padding nothing is used:
        token = self.sampling(logits(params, last), jax.random.fold_in(key, length))
        return token, with_room(cache, self.cache_length)  # decoding overwrites its keys before they are looked at

    @functools.partial(jax.jit, static_argnums=0, donate_argnames="state")
    def decode(self, params: Params, state: tuple[jax.Array, Cache], position: jax.Array, key: jax.Array):
        def step(state, position):
            token, cache = state
            x, cache = forward(params, token[:, None], self.moe, self.config, cache, position)
            following = self.sampling(logits(params, x[:, 0]), jax.random.fold_in(key, position + 1))
            return (following, cache), token

        state, tokens = jax.lax.scan(step, state, position + jnp.arange(CHUNK))
        return state, tokens.T

    def __call__(self, params: Params, prompt: np.ndarray, max_tokens: int, seed: int) -> Iterator[np.ndarray]:
        """Chunks ``[B, up to CHUNK]`` of what follows ``prompt [B, S]``."""
        length = prompt.shape[1]
        padded = np.pad(prompt, ((0, 0), (0, -length % PROMPT_MULTIPLE)))
        state = self.prefill(params, padded, length, jax.random.key(seed))
        for done in range(0, max_tokens, CHUNK):
            state, tokens = self.decode(params, state, length + done, jax.random.key(seed))
            yield np.asarray(tokens)[:, : max_tokens - done]


def cache_length(prompt: int, max_tokens: int) -> int:
    """Positions for a padded prompt, and for whole chunks behind the prompt itself."""
    return max(prompt + -prompt % PROMPT_MULTIPLE, prompt + max_tokens + -max_tokens % CHUNK)


# --- Text -------------------------------------------------------------------------------------------------------------


class Ids:
    """Takes the place of a tokenizer where text is numbers of tokens."""

    def encode(self, text: str) -> list[int]:
        try:
            return [int(part) for part in text.split(",")]
        except ValueError:
            raise typer.BadParameter(f"--ids: got the prompt {text!r}, needs numbers of tokens, as 1,2,3") from None

    def decode(self, ids: list[int]) -> str:
        return "".join(f"{number}," for number in ids)


class Text:
    """The checkpoint's tokenizer."""

    def __init__(self, directory: Path):
        try:
            import tokenizers
        except ImportError:
            raise ValueError("text needs the package tokenizers: pip install tokenizers; --ids does without") from None
        file = directory / "tokenizer.json"
        if not file.exists():
            raise ValueError(f"{file}: found no such file: download the checkpoint's tokenizer too; --ids does without")
        self.tokenizer = tokenizers.Tokenizer.from_file(str(file))

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text).ids

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids)


def read_json(file: Path) -> dict:
    """What a JSON file has, or nothing if there is no such file."""
    try:
        return json.loads(file.read_text()) if file.exists() else {}
    except ValueError as error:
        raise ValueError(f"{file}: found something that is not JSON ({error})") from None


def as_chat(directory: Path, prompt: str) -> str:
    """``prompt`` as a user's message, as the checkpoint's chat template writes it."""
    try:
        import jinja2.sandbox
    except ImportError:
        raise ValueError("--chat needs the package jinja2: pip install jinja2") from None
    file, settings = directory / "chat_template.jinja", read_json(directory / "tokenizer_config.json")
    template = file.read_text() if file.exists() else settings.get("chat_template")
    if not isinstance(template, str):
        raise ValueError(f"--chat: found no chat template in {directory}: leave --chat out")
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    messages = [{"role": "user", "content": prompt}]
    return environment.from_string(template).render(messages=messages, add_generation_prompt=True)


def end_tokens(directory: Path) -> set[int]:
    """The ids behind which a continuation ends."""
    for name in ("generation_config.json", "config.json"):
        ids = read_json(directory / name).get("eos_token_id")
        if ids is not None:
            return set(ids) if isinstance(ids, list) else {ids}
    return set()


def sampling_of(directory: Path, temperature: float | None, top_k: int | None, top_p: float | None) -> Sampling:
    """What the options say, and where they say nothing, what the checkpoint says."""
    said = read_json(directory / "generation_config.json")
    if not said.get("do_sample"):
        said = {}
    default = Sampling()
    return Sampling(
        float(said.get("temperature", default.temperature)) if temperature is None else temperature,
        int(said.get("top_k", default.top_k)) if top_k is None else top_k,
        float(said.get("top_p", default.top_p)) if top_p is None else top_p,
    )


# --- The command ------------------------------------------------------------------------------------------------------


def make_mesh(text: str | None) -> Mesh | None:
    """``expert=4`` or ``expert=2,tensor=2`` as a mesh of the first devices; on a CPU, of as many virtual ones."""
    if text is None:
        return None
    sizes = {name: size for name, _, size in (part.partition("=") for part in text.split(","))}
    if not set(sizes) <= {"expert", "tensor"} or not all(size.isdecimal() and int(size) for size in sizes.values()):
        raise typer.BadParameter(f"--mesh: got {text!r}, needs expert=N, tensor=N or both, as expert=4,tensor=2")
    shape = tuple(map(int, sizes.values()))
    count = int(np.prod(shape))
    with contextlib.suppress(RuntimeError):  # where something uses a device already: there are as many as there are
        jax.config.update("jax_num_cpu_devices", count)  # does nothing to GPUs
    if count > len(jax.devices()):
        raise typer.BadParameter(f"--mesh: got {text!r}, needs at most the {len(jax.devices())} devices that are here")
    return Mesh(np.array(jax.devices()[:count]).reshape(shape), tuple(sizes))


def report(message: str) -> None:
    """Prints on standard error: standard output has the text alone."""
    print(message, file=sys.stderr)


@app.command()
def main(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="The checkpoint: config.json, *.safetensors.")],
    prompt: Annotated[str, typer.Argument(help="What to continue.")],
    max_tokens: Annotated[int, typer.Option(min=1, help="How far at most.")] = 128,
    samples: Annotated[int, typer.Option(min=1, help="Continuations, made side by side.")] = 1,
    temperature: Annotated[float | None, typer.Option(min=0, help="0 takes the best token each time.")] = None,
    top_k: Annotated[int | None, typer.Option(min=0, help="Sample from the best so many; 0 is from all.")] = None,
    top_p: Annotated[float | None, typer.Option(min=0, max=1, help="Sample from the best of this probability.")] = None,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    precision: Annotated[str, typer.Option(help="Of the experts: w4a16 or w4a4.")] = "w4a16",
    mesh: Annotated[str | None, typer.Option(help="Spread the experts, as expert=4 or expert=2,tensor=2.")] = None,
    scan: Annotated[
        bool, typer.Option(help="Scan over stacked layers; the other way compiles slower, runs faster.")
    ] = False,
    attention_4bit: Annotated[
        bool,
        typer.Option("--attention-4bit", help="Multiply 4-bit weights of the attention as they are."),
    ] = False,
    chat: Annotated[bool, typer.Option("--chat", help="The prompt is a user's message.")] = False,
    ids: Annotated[bool, typer.Option("--ids", help="The prompt and the output are numbers of tokens.")] = False,
) -> None:
    """Continue a prompt with a Qwen3-MoE checkpoint in NVFP4."""
    if precision not in ("w4a16", "w4a4"):
        raise typer.BadParameter(f"--precision: got {precision!r}, needs w4a16 or w4a4")
    if mesh and attention_4bit:
        raise typer.BadParameter("--attention-4bit: got it with --mesh, needs one device")
    devices = make_mesh(mesh)
    try:
        directory = directory.expanduser()
        checkpoint = checkpoints.open_model(directory)
        tokenizer = Ids() if ids else Text(directory)
        prompt_ids = tokenizer.encode(as_chat(directory, prompt) if chat else prompt)
        ends = end_tokens(directory)
        sampling = sampling_of(directory, temperature, top_k, top_p)
        params, config = load(checkpoint, mesh=devices, precision=precision, stack=scan, widen=not attention_4bit)
        vocabulary = len(params["embed"])
        if not prompt_ids or not all(0 <= number < vocabulary for number in prompt_ids):
            raise ValueError(
                f"PROMPT: got {len(prompt_ids)} tokens, needs at least one, each from 0 to {vocabulary - 1}"
            )
        moe = moe_layer(devices, precision=precision, **checkpoints.moe_options(checkpoint))
        generator = Generator(config, moe, sampling, cache_length(len(prompt_ids), max_tokens))
        tokens = np.tile(np.array(prompt_ids, np.int32), (samples, 1))
        made, speed = stream(generator(params, tokens, max_tokens, seed), tokenizer, ends, samples)
    except (ValueError, TypeError, OSError) as error:
        report(f"error: {error}")
        raise typer.Exit(1) from None
    report(f"{made} tokens a sequence, {samples} sequences, {speed}; {jax_moe.ffi.counters()}")


def stream(chunks: Iterator[np.ndarray], tokenizer: Ids | Text, ends: set[int], samples: int) -> tuple[int, str]:
    """Prints the first continuation as it comes, then the others; (tokens of each, speed without the first chunk)."""
    pieces, rows, shown, start, before = [], [[]], "", 0.0, 0
    for chunk in chunks:
        pieces.append(chunk)
        rows = np.concatenate(pieces, axis=1).tolist()
        if not start:
            start, before = time.perf_counter(), len(rows[0])
        text = tokenizer.decode(until(rows[0], ends)).rstrip("\N{REPLACEMENT CHARACTER}")  # half a character waits
        print(text[len(shown) :], end="", flush=True)
        shown = text
        if all(ends & set(row) for row in rows):
            break
    print()
    for row in rows[1:]:
        print(f"---\n{tokenizer.decode(until(row, ends))}")
    count, seconds = len(rows[0]) - before, time.perf_counter() - start
    speed = f"{samples * count / seconds:.1f} tokens/s" if count else "too few to time"
    return len(rows[0]), speed


def until(ids: list[int], ends: set[int]) -> list[int]:
    """``ids`` up to the first end token, without it."""
    return ids[: next((place for place, number in enumerate(ids) if number in ends), len(ids))]


if __name__ == "__main__":
    app()
