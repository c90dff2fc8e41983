"""The language model on a mesh: experts, slices of each expert, and sequences, spread over three axes.

Run it:  python examples/language_model.py --short --save model.npz
         python examples/sharded_inference.py --load model.npz           (40 s on two busy cores)

Without --load it trains a bit. Where JAX finds two GPUs or more, the mesh is made of them. Elsewhere XLA splits this
machine's CPU into eight virtual devices, and partitions programs for them as it would for real ones. The mesh has three
axes, by default of the sizes

    devices         2  4  8
    data            1  1  2   sequences; so tokens, after [B, S] became [T]
    expert          2  2  2   experts: each device holds E/2 of them
    tensor          1  2  2   the intermediate size: each device holds I/2 of its experts' rows

and the one change to the model is the MoE layer that :func:`moe_transformer.forward` is given: ``jax_moe.sharded_moe``
in place of ``jax_moe.fused_moe``. The experts are quantised in the host's memory; each device of the mesh then gets its
part of them and repacks it for its kernels (``jax_moe.prepare``). The program checks that one device writes the same
text, and reads two compiled programs, of a window and of a step of decoding, to see that no weight ever moves. With the
model of the short run it printed on a CPU:

    8 x cpu, {'data': 2, 'expert': 2, 'tensor': 2}; expert weights: 332040 bytes, 83080 on each
    compiled HLO of a window: 1 x all-gather of f32[2048,8]{1,0}
    compiled HLO of a window: 1 x all-reduce of f32[1024,128]{1,0}
    compiled HLO of a step: 1 x all-gather of f32[8,8]{1,0}
    compiled HLO of a step: 1 x all-reduce of f32[4,128]{1,0}
    collectives that move weights (8 bits or fewer): 0
    logits [8, 256, 256]: max |one device - 8 devices| = 8.1e-03, where max |logit| = 11.1;
        best byte equal at 100.00% of positions
    greedy decoding, 8 prompts x 64 bytes: equal, 872 bytes/s
    the first goes on: b' in the conter and a self.______________________________________'

The all-reduce, inside the scan over layers, is the sum of the experts' partial outputs: one for each layer. The
all-gather is the router's: ``lax.top_k`` of the logits [T, E], sharded over data, which XLA does not partition.

With a model of ``--short``, on two H200s, where its kernels came from a cache that ``--compile-for`` had filled:

    2 x NVIDIA H200, {'data': 1, 'expert': 2, 'tensor': 1}; expert weights: 442632 bytes, 221320 on each
    compiled HLO of a window: 1 x all-reduce of f32[262144]{0}
    compiled HLO of a step: 1 x all-reduce of f32[8,128]{1,0}
    collectives that move weights (8 bits or fewer): 0
    logits [8, 256, 256]: max |one device - 2 devices| = 0.0e+00, where max |logit| = 11.0;
        best byte equal at 100.00% of positions
    greedy decoding, 8 prompts x 64 bytes: equal, 25179 bytes/s

How equal the text must be: a token's output is a sum of K contributions, each of them a sum over I. Here K = 2, and
float32 a + b is b + a: with an expert axis alone the MoE layer gives the very bits of one device, and ``--mesh 1,2,1``
prints a difference of 0 on a CPU. With more experts per token, or a tensor axis, which splits the sum over I, sums are
made in another order; with a data axis XLA may compute the other layers' products in another order too. Roundings then
differ, and now and then one moves what the experts read to the next bfloat16. ``combine="ordered"`` does not change
that: it makes a device's own sum the same from run to run. The text is equal all the same, unless two bytes were so
nearly equally good that roundings chose. So the program asks for equal text, up to such a byte: one where one device's
logits of the two choices are no further apart than roundings make them, which is bounded for all logits too.

A machine with GPUs needs no compiler if the kernels are in its cache. Where the compiler is (no GPU needed, and no
trained model),

    JAX_MOE_CACHE_DIR=kernels python examples/sharded_inference.py --compile-for sm_90a --mesh 1,2,1

fills the folder with all that this program launches on one GPU and on that mesh: 11 kernels, the same ones for 1,2,2.
"""

import collections
import functools
import pathlib
import re
from typing import Annotated

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from language_model import LENGTH, spread_windows, standard_library, train
from moe_transformer import Config, empty_cache, forward, generate, init, load, MoE, Params, quantize, with_experts
import numpy as np
import typer

import jax_moe

AXES = ("data", "expert", "tensor")
MESHES = {2: (1, 2, 1), 4: (1, 2, 2), 8: (2, 2, 2)}
BATCH, PROMPT = 8, 64  # sequences, and bytes of each that are given
ROUNDING = 1e-3  # by which roundings make two programs' logits differ, of the largest; ten times that is a mistake


def one_device_moe(x, experts, routing):
    """The MoE layer on one device."""
    x = x.astype(jnp.bfloat16)
    return jax_moe.fused_moe(x, experts, routing, combine="ordered", out_dtype=jnp.float32)


def sharded_moe(mesh: Mesh) -> MoE:
    """The MoE layer on a mesh; tokens, experts and output stay where they are."""

    def moe(x, experts, routing):
        x = x.astype(jnp.bfloat16)
        return jax_moe.sharded_moe(x, experts, routing, mesh=mesh, combine="ordered", out_dtype=jnp.float32)

    return moe


def place(params: Params, mesh: Mesh, target: str | None = None) -> Params:
    """Puts the experts' slices on their devices, which repack them, and everything else, which is small, on all.

    Args:
      params: with canonical experts, stacked over layers.
      mesh: where to; one device is a mesh too.
      target: what the devices are, as for ``jax_moe.prepare``.
    """
    stacked = jax.device_get(params["layers"]["experts"])  # from the host each device is sent its own part
    layers = []
    for n in range(stacked.down.global_scale.shape[0]):
        layer = jax.tree.map(lambda leaf, n=n: leaf[n], stacked)
        layers.append(jax_moe.prepare(jax.device_put(layer, jax_moe.expert_shardings(layer, mesh)), target))
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    everywhere = jax.device_put(with_experts(params, None), NamedSharding(mesh, PartitionSpec()))
    return with_experts(everywhere, jax.device_put(stacked, jax_moe.expert_shardings(stacked, mesh)))


def programs(params: Params, tokens: jax.Array, mesh: Mesh, moe: MoE, config: Config) -> dict[str, jax.stages.Traced]:
    """The model at each number of bytes that it is given at once in this program, by name.

    ``generate`` makes programs of its own for prompts and steps; but a MoE layer sees no more of a program than how
    many tokens it has, so these have the kernels and the collectives of those.
    """
    run = jax.jit(functools.partial(forward, moe=moe, config=config))
    cache = empty_cache(tokens.shape[0], LENGTH, config)
    cache = jax.device_put(cache, NamedSharding(mesh, PartitionSpec(None, "data")))
    return {
        "window": run.trace(params, tokens),
        "prompt": run.trace(params, tokens[:, :PROMPT]),
        "step": run.trace(params, tokens[:, :1], cache=cache, position=PROMPT),
    }


def spread(tokens: np.ndarray, mesh: Mesh) -> jax.Array:
    """``tokens [B, S]``, their sequences over the data axis."""
    return jax.device_put(tokens, NamedSharding(mesh, PartitionSpec("data")))


# --- What a compiled program sends to other devices -------------------------------------------------------------------

_OPERATIONS = (
    "all-gather|all-reduce|ragged-all-to-all|all-to-all|reduce-scatter|collective-permute|collective-broadcast|"
    "send|recv|copy"
)
_INSTRUCTION = re.compile(rf"^\s*(?:ROOT )?[%\w.-]+ = ([^=\n]+?) ((?:{_OPERATIONS})(?:-start)?)\(", re.MULTILINE)
_WEIGHTS = re.compile(r"\b([su][248]|f[48]\w+)\[")


def collectives(hlo: str) -> list[tuple[str, str]]:
    """The operations of a compiled program that move arrays between memories: (name, type of what it yields).

    An asynchronous one has two halves, of which the first is counted: ``all-gather-start``, or ``async-start`` of a
    computation with a ``reduce-scatter`` in it, which is found there. A plain ``copy`` stays within its device.
    """
    without_comments = re.sub(r"/\*.*?\*/", "", hlo)  # as in (f32[8], /*index=5*/f32[8])
    return [(name, kind) for kind, name in _INSTRUCTION.findall(without_comments) if name != "copy"]


def of_weights(spoken: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Those that move arrays of 8 bits an element or fewer: in a w4a16 model nothing but weights is that narrow."""
    return [(name, kind) for name, kind in spoken if _WEIGHTS.search(kind)]


# --- The text ---------------------------------------------------------------------------------------------------------


def partings(once: np.ndarray, again: np.ndarray, logits: np.ndarray) -> list[tuple[int, int, float]]:
    """Where texts ``[B, new]`` part: (row, first byte that differs, by how much ``once``'s choice was the better one).

    ``logits``: of the choice of each byte, ``[B, new, V]``, in the text ``once``.
    """
    found = []
    for row in np.flatnonzero((once != again).any(axis=1)):
        at = int(np.argmax(once[row] != again[row]))
        choice = logits[row, at]
        found.append((int(row), at, abs(float(choice[once[row, at]] - choice[again[row, at]]))))
    return found


def main(
    load_from: Annotated[
        pathlib.Path | None, typer.Option("--load", help="A model saved by language_model.py.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Training steps, where there is no model to load.")] = 50,
    new_bytes: Annotated[int, typer.Option(min=1, max=LENGTH - PROMPT, help="How far to continue each prompt.")] = 64,
    mesh_sizes: Annotated[str | None, typer.Option("--mesh", help="data,expert,tensor, as 1,2,2.")] = None,
    compile_for: Annotated[str | None, typer.Option(help="Compile the kernels for this target, and no more.")] = None,
) -> None:
    """Run the language model on several GPUs, or on virtual devices of the CPU, and compare with one."""
    # These before anything uses a device. Without the second, a GPU's float32 products have mantissas of 10 bits.
    jax.config.update("jax_num_cpu_devices", 8)
    jax.config.update("jax_default_matmul_precision", "highest")
    host = jax.local_devices(backend="cpu")  # so JAX_PLATFORMS, if it is set, must name the CPU too
    gpus = [device for device in jax.local_devices() if device.platform == "gpu"]
    there = gpus if len(gpus) >= 2 and not compile_for else host
    jax.config.update("jax_default_device", there[0])
    sizes = MESHES[max(count for count in MESHES if count <= len(there))]
    if mesh_sizes:
        sizes = tuple(map(int, mesh_sizes.split(",")))
        if len(sizes) != len(AXES) or not 1 < np.prod(sizes) <= len(there):
            raise typer.BadParameter(f"--mesh: got {mesh_sizes!r}, needs three sizes for 2 to {len(there)} devices")

    with jax.default_device(host[0]):
        text, held_out = standard_library()
        if load_from:
            params, config = load(load_from)
        else:
            config = Config()
            params = init(jax.random.key(0), config)
            if not compile_for:
                params = train(params, text, config, steps=steps)
        params = quantize(params, spread_windows(text, 16)[:, :-1], config)
    windows = spread_windows(held_out, BATCH)[:, :-1]
    alone, mesh = (Mesh(np.array(there[: np.prod(s)]).reshape(s), AXES) for s in ((1, 1, 1), sizes))
    one, many = place(params, alone, compile_for), place(params, mesh, compile_for)
    one_tokens, many_tokens = spread(windows, alone), spread(windows, mesh)
    one_programs = programs(one, one_tokens, alone, one_device_moe, config)
    many_programs = programs(many, many_tokens, mesh, sharded_moe(mesh), config)
    if compile_for:
        for program in (*one_programs.values(), *many_programs.values()):
            program.lower(lowering_platforms=("cuda",))  # this compiles the kernels that the cache lacks
        print(f"compiled for {compile_for}: the kernels of one GPU and of {dict(mesh.shape)}")
        return

    leaves = jax.tree.leaves(many["layers"]["experts"])
    whole = sum(leaf.nbytes for leaf in leaves)
    part = sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves)
    print(f"{mesh.size} x {there[0].device_kind}, {dict(mesh.shape)}; expert weights: {whole} bytes, {part} on each")

    # 1. What the programs on the mesh say to other devices.
    compiled = {name: many_programs[name].lower().compile() for name in ("window", "step")}
    moved = 0
    for name, program in compiled.items():
        spoken = collectives(program.as_text() or "")
        for (operation, kind), count in collections.Counter(spoken).items():
            print(f"compiled HLO of a {name}: {count} x {operation} of {kind}")
        moved += len(of_weights(spoken))
    print(f"collectives that move weights (8 bits or fewer): {moved}")

    # 2. The logits of eight held-out windows at once.
    one_window, many_window = one_programs["window"].lower().compile(), compiled["window"]
    expected, got = np.asarray(one_window(one, one_tokens)[0]), np.asarray(many_window(many, many_tokens)[0])
    difference, largest = np.abs(got - expected).max(), np.abs(expected).max()
    print(
        f"logits {list(got.shape)}: max |one device - {mesh.size} devices| = {difference:.1e}, "
        f"where max |logit| = {largest:.1f}; "
        f"best byte equal at {np.mean(got.argmax(-1) == expected.argmax(-1)):.2%} of positions"
    )

    # 3. Greedy decoding of eight prompts. One different byte would change all that follow it.
    once, _ = generate(one, one_tokens[:, :PROMPT], one_device_moe, config, new=new_bytes)
    again, speed = generate(many, many_tokens[:, :PROMPT], sharded_moe(mesh), config, new=new_bytes)
    equal = "equal" if np.array_equal(once, again) else "DIFFERENT"
    print(f"greedy decoding, {BATCH} prompts x {new_bytes} bytes: {equal}, {speed:.0f} bytes/s")
    print("the first goes on:", bytes(again[0].astype(np.uint8)))
    fine = moved == 0
    if difference > 10 * ROUNDING * largest:
        print("the logits are further apart than roundings make them")
        fine = False
    if equal != "equal":
        windows[:, PROMPT : PROMPT + new_bytes] = once
        logits = np.asarray(one_window(one, spread(windows, alone))[0])[:, PROMPT - 1 : PROMPT - 1 + new_bytes]
        for row, at, gap in partings(once, again, logits):
            near = gap <= 2 * max(difference, ROUNDING * largest)
            why = "as near as roundings" if near else "further than roundings"
            print(f"prompt {row} parts at byte {at}: one device's logits of the two are {gap:.1e} apart, {why}")
            fine &= near
    if not fine:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
