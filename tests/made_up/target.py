"""One kernel does it all; it is a string, because no GPU will run it."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from jax_moe.kernels import steps
from jax_moe.kernels.target import Card, Launch, Program, Target


@dataclasses.dataclass(frozen=True)
class EverythingSpec:
    precision: str
    rows: int

    implementation = "made_up.device.everything:Everything"
    parameters: ClassVar[dict[str, str]] = {
        "x": "bf16*",
        "payload": "u8*",
        "sums": "f32*",
        "out": "bf16*",
        "rows": "i32",
    }
    threads = 64
    cluster = 2
    overlap = False
    tensor_core_ptx = "made.up"

    @property
    def name(self):
        return f"made_up_{self.precision}_{self.rows}"


def build(p, card):
    spec = EverythingSpec(p.precision, card.costs)
    arguments = {**steps.same("x", "sums", "out"), "payload": "gate_up.payload", "rows": p.num_routes}
    bytes_of = p.local_experts * p.intermediate_size * p.hidden_size // 2
    return Program(
        launches=(Launch("everything", spec, card.multiprocessors * 2, arguments),),
        adds="everything" if p.combine == "atomic" else None,
        workspaces={"sums": jax.ShapeDtypeStruct((p.num_routes,), jnp.float32)},
        weight_bytes={
            "gate_up.payload": 2 * bytes_of, "gate_up.block_scale": bytes_of // 4,
            "down.payload": bytes_of, "down.block_scale": bytes_of // 8,
        },
        sizes=steps.sizes(p, p.intermediate_size),
    )  # fmt: skip


MADE_UP = Target(
    name="sm_77x",
    generation="Noether",
    compute_capabilities=("7.7",),
    layouts={"w4a16": "made_up_v1", "w4a4": "made_up_fp4_v1"},
    cards=(Card("N100", 10, 1.0, 7), Card("N7", 3, 0.1, 9)),
    program=build,
)
