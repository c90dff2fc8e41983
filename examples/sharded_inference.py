"""The language model on a mesh of eight devices: experts, slices of each expert, and sequences, spread over three axes.

Run it:  python examples/language_model.py --short --save model.npz
         python examples/sharded_inference.py --load model.npz           (about 10 s; without --load it trains a bit)

Eight devices need no eight GPUs: XLA splits this machine's CPU into as many virtual devices as it is asked for, and
partitions programs for them as it would for real ones. The mesh here has the axes

    data    2   sequences; so tokens, after [B, S] became [T]
    expert  2   experts: each half of the devices holds E/2 of them
    tensor  2   the intermediate size: each device holds I/2 of its experts' rows

and the one change to the model is the MoE layer that :func:`moe_transformer.forward` is given: ``jax_moe.sharded_moe``
in place of ``jax_moe.fused_moe``. The program checks that the result is the same as on one device, and reads the
compiled program to see that no weight ever moves. With the model of the full run it printed:

    mesh: {'data': 2, 'expert': 2, 'tensor': 2}; expert weights: 332040 bytes, 83080 on each device
    logits [8, 256, 256]: max |one device - eight devices| = 1.0e-02, where max |logit| = 18.7;
        best byte equal at 100.00% of positions
    compiled HLO: 1 x all-gather of f32[2048,8]{1,0}
    compiled HLO: 1 x all-reduce of f32[1024,128]{1,0}
    collectives that move weights (u8, f8e4m3fn): 0
    greedy decoding, 8 prompts x 64 bytes: equal, 2044 bytes/s
    the first goes on: b's are and the string the string the string the string the string'

The logits differ because float32 sums in another order now and then round to the next bfloat16. The all-reduce, inside
the scan over layers, is the sum of the experts' partial outputs: one for each layer. The all-gather is the router's:
``lax.top_k`` of the sharded logits [T, E], which XLA does not partition.
"""

import collections
import functools
import pathlib
import re
from typing import Annotated

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from language_model import spread_windows, standard_library, train
from moe_transformer import Config, forward, generate, init, load, MoE, Params, quantize, quantized_moe, with_experts
import numpy as np
import typer

import jax_moe


def sharded_moe(mesh: Mesh) -> MoE:
    """The MoE layer on a mesh; tokens, experts and output stay where they are."""

    def moe(x, experts, routing):
        return jax_moe.sharded_moe(x.astype(jnp.bfloat16), experts, routing, mesh=mesh, out_dtype=jnp.float32)

    return moe


def place(params: Params, mesh: Mesh) -> Params:
    """Puts the experts' slices on their devices, and everything else, which is small, on all of them."""
    stacked = params["layers"]["experts"]
    shardings = jax_moe.expert_shardings(stacked, mesh)
    everywhere = jax.device_put(with_experts(params, None), NamedSharding(mesh, PartitionSpec()))
    return with_experts(everywhere, jax.device_put(stacked, shardings))


def collectives(hlo: str) -> list[tuple[str, str]]:
    """The collective operations of a compiled program: (name, type of what it yields)."""
    names = "all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute"
    return [(name, kind) for kind, name in re.findall(rf"= (.*?) ({names})(?:-start)?\(", hlo)]


def main(
    load_from: Annotated[
        pathlib.Path | None, typer.Option("--load", help="A model saved by language_model.py.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Training steps, where there is no model to load.")] = 50,
    new_bytes: Annotated[int, typer.Option(min=1, help="How far to continue each prompt.")] = 64,
) -> None:
    """Run the language model on eight virtual devices and compare with one."""
    jax.config.update("jax_platforms", "cpu")  # these two before anything uses a device
    jax.config.update("jax_num_cpu_devices", 8)
    text, held_out = standard_library()
    if load_from:
        params, config = load(load_from)
    else:
        config = Config()
        params = train(init(jax.random.key(0), config), text, config, steps=steps)
    params = quantize(params, spread_windows(text, 16)[:, :-1], config)

    mesh = Mesh(np.array(jax.devices()).reshape(2, 2, 2), ("data", "expert", "tensor"))
    placed = place(params, mesh)
    leaves = jax.tree.leaves(placed["layers"]["experts"])
    whole = sum(leaf.nbytes for leaf in leaves)
    part = sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves)
    print(f"mesh: {dict(mesh.shape)}; expert weights: {whole} bytes, {part} on each device")

    # 1. The logits of eight held-out windows at once, and what the program that computes them says to other devices.
    tokens = spread_windows(held_out, 8)[:, :-1]
    placed_tokens = jax.device_put(tokens, NamedSharding(mesh, PartitionSpec("data")))
    one_device = jax.jit(functools.partial(forward, moe=quantized_moe("w4a16"), config=config))
    eight_devices = jax.jit(functools.partial(forward, moe=sharded_moe(mesh), config=config))
    compiled = eight_devices.lower(placed, placed_tokens).compile()
    expected, got = np.asarray(one_device(params, tokens)[0]), np.asarray(compiled(placed, placed_tokens)[0])
    print(
        f"logits {list(got.shape)}: max |one device - eight devices| = {np.abs(got - expected).max():.1e}, "
        f"where max |logit| = {np.abs(expected).max():.1f}; "
        f"best byte equal at {np.mean(got.argmax(-1) == expected.argmax(-1)):.2%} of positions"
    )
    spoken = collectives(compiled.as_text() or "")
    for (name, kind), count in collections.Counter(spoken).items():
        print(f"compiled HLO: {count} x {name} of {kind}")
    moved = [name for name, kind in spoken if re.search(r"\b(u8|f8e4m3fn)\[", kind)]
    print(f"collectives that move weights (u8, f8e4m3fn): {len(moved)}")

    # 2. Greedy decoding of eight prompts. One different byte would change all that follow it.
    prompts, placed_prompts = (array[:, :64] for array in (tokens, placed_tokens))
    once, _ = generate(params, prompts, quantized_moe("w4a16"), config, new=new_bytes)
    again, speed = generate(placed, placed_prompts, sharded_moe(mesh), config, new=new_bytes)
    equal = "equal" if np.array_equal(once, again) else "DIFFERENT"
    print(f"greedy decoding, {once.shape[0]} prompts x {new_bytes} bytes: {equal}, {speed:.0f} bytes/s")
    print("the first goes on:", bytes(again[0].astype(np.uint8)))
    if moved or equal != "equal":
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
