"""Made the files of this folder: run with jax 0.10.2, with commit 9c126a9 and its ``tests`` on PYTHONPATH.

``<name>.exported`` is a serialised program of ``fused_moe``; ``<name>.npz`` has the bytes of its operands and of its
result on a CPU. ``cuda.exported`` was compiled by a stand-in for the compiler: its kernels are made up.
"""

import functools
import pathlib

import cuda_call
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

import jax_moe

TOKENS, EXPERTS, HIDDEN, INTERMEDIATE, TOP_K = 5, 4, 64, 48, 2
OPTIONS = {
    "w4a16-atomic": {},
    "w4a4-ordered": {"precision": "w4a4", "combine": "ordered", "activation": jax_moe.SwiGLU(1.702, 1.0, 7.0)},
    "relu2-on-input": {
        "activation": jax_moe.ReLU2(),
        "weight_on": "input",
        "expert_offset": 1,
        "out_dtype": np.float32,
    },
}
FOLDER = pathlib.Path(__file__).parent


def operands(gated=True):
    rng = np.random.default_rng(0)

    def projection(lead, rows, columns, input_shape):
        return jax_moe.Projection(
            payload=jnp.asarray(rng.integers(0, 256, (*lead, rows, columns // 2), np.uint8)),
            block_scale=jnp.asarray(rng.uniform(0.5, 2, (*lead, rows, columns // 16)), jnp.float8_e4m3fn),
            global_scale=jnp.asarray(rng.uniform(0.02, 0.05, lead), jnp.float32),
            input_scale=jnp.asarray(rng.uniform(0.001, 0.002, input_shape), jnp.float32),
            bias=jnp.asarray(rng.standard_normal((*lead, rows)), jnp.float32),
        )

    parts = 2 if gated else 1
    experts = jax_moe.Experts(
        gate_up=projection((EXPERTS, parts), INTERMEDIATE, HIDDEN, ()),
        down=projection((EXPERTS,), HIDDEN, INTERMEDIATE, (EXPERTS,)),
    )
    x = jnp.asarray(rng.standard_normal((TOKENS, HIDDEN)), jnp.bfloat16)
    ids = np.stack([rng.permutation(EXPERTS)[:TOP_K] for _ in range(TOKENS)])
    weights = rng.uniform(0.1, 0.9, (TOKENS, TOP_K))
    return x, experts, jax_moe.Routing(jnp.asarray(ids, jnp.int32), jnp.asarray(weights, jnp.float32))


def export(platform, given, **options) -> bytes:
    op = jax.jit(functools.partial(jax_moe.fused_moe, **options))
    return jax.export.export(op, platforms=[platform], disabled_checks=jax_moe.export_checks())(*given).serialize()


def as_bytes(array) -> np.ndarray:
    return np.frombuffer(np.asarray(array).tobytes(), np.uint8)


if __name__ == "__main__":
    for name, options in OPTIONS.items():
        given = operands(gated=name != "relu2-on-input")
        (FOLDER / f"{name}.exported").write_bytes(export("cpu", given, **options))
        leaves = {f"operand{number}": as_bytes(leaf) for number, leaf in enumerate(jax.tree.leaves(given))}
        np.savez_compressed(FOLDER / f"{name}.npz", result=as_bytes(jax_moe.fused_moe(*given, **options)), **leaves)
    with pytest.MonkeyPatch.context() as patch:
        cuda_call.stand_in_compiler(patch)
        x, experts, routing = operands()
        prepared = jax_moe.prepare(experts, "sm_90a", progress=False)
        (FOLDER / "cuda.exported").write_bytes(export("cuda", (x, prepared, routing)))
