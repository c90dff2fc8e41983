"""Train a small mixture-of-experts language model on real text, quantise its experts to NVFP4, and let it write.

Run it:  python examples/language_model.py            (2.5 minutes on two free cores)
         python examples/language_model.py --short    (33 s on two nearly free cores)

The text is the source code of Python's standard library, which every machine has; every tenth file is held out. The
model (``moe_transformer.py``) reads bytes, and is trained with dense float32 experts. Then its experts are quantised,
and the same model is measured on the held-out files with bfloat16 experts and with ``jax_moe.fused_moe`` in both
precisions. In the end it continues a prompt, one byte after another, through ``fused_moe`` in a jitted loop.

The full run printed, on two cores of a Xeon with AVX-512:

    text: 4.04 MB to train on, 0.66 MB held out
      step   325: loss 2.669
      step   650: loss 2.228
      step   975: loss 2.103
      step  1300: loss 1.972
      step  1625: loss 1.913
      step  1950: loss 1.768
    trained 2000 steps in 133 s
                   Held-out text, 65536 bytes of it
    ┏━━━━━━━━━━━━━━━━━━━━━━━━━━━┳━━━━━━━━━━━━━━━┳━━━━━━━━━━━━━━━━┓
    ┃ model                     ┃ bits per byte ┃ expert weights ┃
    ┡━━━━━━━━━━━━━━━━━━━━━━━━━━━╇━━━━━━━━━━━━━━━╇━━━━━━━━━━━━━━━━┩
    │ counts of bytes           │         4.533 │                │
    │ counts of pairs of bytes  │         3.492 │                │
    ├───────────────────────────┼───────────────┼────────────────┤
    │ MoE, bfloat16 experts     │         1.898 │        1.18 MB │
    │ MoE, NVFP4 experts, w4a16 │         1.903 │        0.33 MB │
    │ MoE, NVFP4 experts, w4a4  │         1.908 │        0.33 MB │
    └───────────────────────────┴───────────────┴────────────────┘
    ────────────────────────── w4a16, one byte at a time ───────────────────────────
    def parse_header(self, line):
        # If the parts is the seturns the object to the object containing file, and
    reserved and that and to the package will be in the state in   (one line there)
    ───────────────────────────────── 2819 bytes/s ─────────────────────────────────

The short run reached 2.646, 2.649 and 2.654 bits per byte.
"""

import functools
import math
import pathlib
import sysconfig
import time
from typing import Annotated

import jax
import jax.numpy as jnp
from moe_transformer import (
    Config,
    dense_moe,
    forward,
    generate,
    init,
    load,
    MoE,
    Params,
    quantize,
    quantized_moe,
    save,
    with_experts,
)
import numpy as np
from rich.console import Console
from rich.table import Table
from tqdm import tqdm
import typer

from jax_moe.progress import track

LENGTH = 256  # bytes the model sees at once, in training and after
PROMPT = "def parse_header(self, line):\n    # If the "


# --- Text -------------------------------------------------------------------------------------------------------------


def standard_library() -> tuple[np.ndarray, np.ndarray]:
    """The standard library's top-level modules as bytes: (training text, held-out text: every tenth file)."""
    files = sorted(pathlib.Path(sysconfig.get_path("stdlib")).glob("*.py"))
    held_out = files[::10]
    training = [file for file in files if file not in held_out]
    texts = (b"".join(file.read_bytes() for file in part) for part in (training, held_out))
    train_text, held_out_text = (np.frombuffer(text, np.uint8) for text in texts)
    return train_text, held_out_text


def spread_windows(text: np.ndarray, count: int) -> np.ndarray:
    """``count`` windows ``[count, LENGTH + 1]``, evenly spread over ``text``."""
    starts = np.linspace(0, len(text) - LENGTH - 1, count).astype(int)
    return text[starts[:, None] + np.arange(LENGTH + 1)].astype(np.int32)


# --- Training ---------------------------------------------------------------------------------------------------------


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Mean negative log-likelihood of ``targets [B, S]`` in bits: they are bytes, so this is bits per byte."""
    log_probabilities = jax.nn.log_softmax(logits)
    return -jnp.mean(jnp.take_along_axis(log_probabilities, targets[..., None], axis=-1)) / math.log(2)


def loss(params: Params, window: jax.Array, config: Config) -> jax.Array:
    """Bits per byte of ``window [B, S + 1]``, plus the load-balance loss of Switch Transformers (arXiv:2101.03961)."""
    logits, _, (_, router_logits, routing) = forward(params, window[:, :-1], dense_moe, config)
    share_of_routes = jax.nn.one_hot(routing.expert_ids, config.experts).mean((1, 2))  # [N, E]
    mean_probability = jax.nn.softmax(router_logits).mean(1)  # [N, E]
    balance = config.experts * jnp.sum(share_of_routes * mean_probability, axis=-1).mean()  # 1 where all is even
    return cross_entropy(logits, window[:, 1:]) + 0.01 * balance


def orthogonalize(matrices: jax.Array) -> jax.Array:
    """Moves the singular values of ``[..., M, N]`` near 1: the quintic iteration of Muon (Jordan et al., 2024)."""
    wide = matrices if matrices.shape[-2] <= matrices.shape[-1] else matrices.mT
    wide = wide / (jnp.linalg.norm(wide, axis=(-2, -1), keepdims=True) + 1e-7)
    for _ in range(5):
        gram = wide @ wide.mT
        wide = 3.4445 * wide + (2.0315 * gram @ gram - 4.775 * gram) @ wide
    return wide if wide.shape == matrices.shape else wide.mT


def train(params: Params, text: np.ndarray, config: Config, *, steps: int, batch: int = 4, seed: int = 0) -> Params:
    """Trains ``params``, which are donated, on random windows of ``text``; the learning rate warms up and decays.

    Matrices learn by Muon, embeddings and the gains of norms by Adam. (With AdamW for all, 300 steps reached 2.91 bits
    per byte of held-out text; with this they reach 2.53.)
    """
    data = jnp.asarray(text)
    warmup = max(1, steps // 20)
    steps_per_call = math.gcd(steps, 25)  # a jitted call runs so many, then the progress bar moves

    def step(state, number):
        params, mean, square = state
        starts = jax.random.randint(jax.random.fold_in(jax.random.key(seed), number), (batch, 1), 0, len(text) - LENGTH)
        window = data[starts + jnp.arange(LENGTH + 1)].astype(jnp.int32)
        value, grads = jax.value_and_grad(loss)(params, window, config)
        mean = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, mean, grads)
        square = jax.tree.map(lambda s, g: 0.99 * s + 0.01 * g * g, square, grads)
        rate = jnp.minimum(number / warmup, 0.5 + 0.5 * jnp.cos(jnp.pi * number / steps))

        def update(p, m, s):
            if p.ndim >= 3:  # matrices, stacked over layers
                return p - 0.04 * rate * (orthogonalize(m) * max(1, p.shape[-2] / p.shape[-1]) ** 0.5 + 0.02 * p)
            return p - 0.01 * rate * (m / (1 - 0.9**number) / (jnp.sqrt(s / (1 - 0.99**number)) + 1e-8))

        return (jax.tree.map(update, params, mean, square), mean, square), value

    run = jax.jit(functools.partial(jax.lax.scan, step), donate_argnums=0)
    state = (params, jax.tree.map(jnp.zeros_like, params), jax.tree.map(jnp.zeros_like, params))
    calls = np.arange(1, steps + 1).reshape(-1, steps_per_call)
    for index, numbers in enumerate(track(calls, f"train, {steps_per_call} steps each")):
        state, values = run(state, numbers)
        if (index + 1) % max(1, len(calls) // 6) == 0:
            tqdm.write(f"  step {numbers[-1]:5d}: loss {values.mean():.3f}")
    return state[0]


# --- Measuring --------------------------------------------------------------------------------------------------------


def bits_per_byte(params: Params, windows: np.ndarray, moe: MoE, config: Config) -> float:
    """Of ``windows [count, S + 1]``; each byte but the first of a window is predicted from those before it."""

    @jax.jit
    def bits(params, batch):
        return cross_entropy(forward(params, batch[:, :-1], moe, config)[0], batch[:, 1:])

    size = math.gcd(len(windows), 8)
    batches = windows.reshape(-1, size, windows.shape[1])
    return float(np.mean([bits(params, batch) for batch in track(batches, f"measure, {size} windows each")]))


def counting_baselines(text: np.ndarray, windows: np.ndarray) -> tuple[float, float]:
    """Bits per byte of models that count: of single bytes, and of pairs of bytes."""
    pairs = np.bincount(256 * text[:-1].astype(int) + text[1:], minlength=256**2).reshape(256, 256)

    def bits(counts):
        smooth = counts + 0.1  # a pair that never occurred is unlikely, not impossible
        probability = smooth / smooth.sum(-1, keepdims=True)
        return float(-np.log2(probability[windows[:, :-1], windows[:, 1:]]).mean())

    return bits(np.broadcast_to(pairs.sum(0), (256, 256))), bits(pairs)


def megabytes(tree) -> float:
    """What the arrays of ``tree`` take, in 10^6 bytes."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree)) / 1e6


def main(
    short: Annotated[bool, typer.Option("--short", help="A quick look: 250 steps, 64 windows.")] = False,
    steps: Annotated[int | None, typer.Option(min=1, help="Training steps; 2000 unless --short.")] = None,
    seed: Annotated[int, typer.Option(help="Of the parameters, the batches and the sampling.")] = 0,
    windows: Annotated[int | None, typer.Option(min=1, help="Held-out windows; 256 unless --short.")] = None,
    save_to: Annotated[pathlib.Path | None, typer.Option("--save", help="Write the trained model (.npz).")] = None,
    load_from: Annotated[pathlib.Path | None, typer.Option("--load", help="Read a model instead of training.")] = None,
    prompt: Annotated[str, typer.Option(help="What the model continues.")] = PROMPT,
    new_bytes: Annotated[int, typer.Option(min=1, help="How far.")] = 128,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the best byte each time.")] = 0.5,
) -> None:
    """Train a small MoE language model on the standard library, quantise its experts to NVFP4, and let it write."""
    console = Console()
    steps = steps or (250 if short else 2000)
    windows = windows or (64 if short else 256)
    text, held_out_text = standard_library()
    held_out = spread_windows(held_out_text, windows)
    print(f"text: {len(text) / 1e6:.2f} MB to train on, {len(held_out_text) / 1e6:.2f} MB held out")

    if load_from:
        params, config = load(load_from)
    else:
        config = Config()
        params = init(jax.random.key(seed), config)
        start = time.perf_counter()
        params = train(params, text, config, steps=steps, seed=seed)
        print(f"trained {steps} steps in {time.perf_counter() - start:.0f} s")
    if save_to:
        save(save_to, params, config)

    dense = params["layers"]["experts"]
    bf16 = with_experts(params, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), dense))
    nvfp4 = quantize(params, spread_windows(text, 16)[:, :-1], config)
    unigram, bigram = counting_baselines(text, held_out)
    table = Table(title=f"Held-out text, {held_out[:, 1:].size} bytes of it")
    table.add_column("model")
    table.add_column("bits per byte", justify="right")
    table.add_column("expert weights", justify="right")
    table.add_row("counts of bytes", f"{unigram:.3f}")
    table.add_row("counts of pairs of bytes", f"{bigram:.3f}", end_section=True)
    for name, model, moe in (
        ("MoE, bfloat16 experts", bf16, dense_moe),
        ("MoE, NVFP4 experts, w4a16", nvfp4, quantized_moe("w4a16")),
        ("MoE, NVFP4 experts, w4a4", nvfp4, quantized_moe("w4a4")),
    ):
        bits = bits_per_byte(model, held_out, moe, config)
        table.add_row(name, f"{bits:.3f}", f"{megabytes(model['layers']['experts']):.2f} MB")
    console.print(table)

    bytes_in = np.frombuffer(prompt.encode(), np.uint8).astype(np.int32)[None]
    out, speed = generate(
        nvfp4, bytes_in, quantized_moe("w4a16"), config, new=new_bytes, temperature=temperature, seed=seed
    )
    console.rule("w4a16, one byte at a time")
    print(prompt + bytes(out[0].astype(np.uint8)).decode(errors="replace"))
    console.rule(f"{speed:.0f} bytes/s")


if __name__ == "__main__":
    typer.run(main)
