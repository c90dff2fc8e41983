"""What a fused_moe call launches on a CUDA device: kernels, their arguments, and the workspaces between them.

``ABI.md`` says what each kernel takes; ``ffi/cuda/program.h`` says how the attributes made here are read.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jax_moe import activations
from jax_moe.kernels import compile, specs
from jax_moe.kernels.common import plan as common_plan
from jax_moe.kernels.sm90 import layout, plan as sm90_plan
from jax_moe.plan import Problem

MULTIPROCESSORS = {"sm_90a": 132}
"""Of the largest GPU of a target; on a smaller one the surplus blocks run last (``common/schedule.py``)."""

_INT32_MAX = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class CudaCall:
    """Attributes of the custom call beside those that every platform has, and its further results, in order."""

    attributes: dict[str, object]
    workspaces: list[jax.ShapeDtypeStruct]


@dataclasses.dataclass(frozen=True)
class Launch:
    """One kernel of a call: ``arguments`` as ``ffi/cuda/program.h`` reads them, in the order of ``ABI.md``."""

    step: str
    spec: compile.Spec
    grid: int
    arguments: tuple[str, ...]


def cuda_call(problem: Problem, *, biases: tuple[bool, bool]) -> CudaCall:
    """The launches of ``problem``, compiled or taken from the cache.

    Args:
      problem: of the call; ``problem.layout`` names the target.
      biases: whether gate_up and down have one.

    Raises:
      ValueError: the experts are not prepared for a GPU, or a size is beyond what the kernels take.
      MissingKernelError: a kernel would have to be compiled, and the DSL is not installed.
    """
    if problem.layout not in compile.TARGETS:
        raise ValueError(
            f"experts.layout: got {problem.layout!r}, on a GPU fused_moe needs prepared weights: "
            f"jax_moe.prepare(experts, {compile.TARGETS[0]!r})"
        )
    if not isinstance(problem.num_tokens, int):
        raise ValueError(
            f"x: got T = {problem.num_tokens}, which is symbolic; GPU kernels are chosen for a number of tokens: "
            "export a program for each"
        )
    call = _Call(problem, biases)
    launches = call.launches()
    try:
        kernels: dict[str, object] = {launch.step: _kernel_attributes(launch, problem.layout) for launch in launches}
    except compile.MissingKernelError as error:
        command = " ".join(["python -m jax_moe compile --target", problem.layout, *command_arguments(problem, biases)])
        raise compile.MissingKernelError(
            f"{error} Either `pip install {compile.COMPILER}`, or run `{command}` on a machine that has it (no GPU "
            "needed) and copy its folder of kernels here (JAX_MOE_CACHE_DIR names another place)."
        ) from None
    kernels["launches"] = " ".join(launch.step for launch in launches)
    kernels["adds"] = "gemm2" if launches and problem.combine == "atomic" else ""
    kernels["sizes"] = {name: np.int64(size) for name, size in call.sizes().items()}
    kernels["weight_bytes"] = {name: np.int64(size) for name, size in call.weight_bytes().items()}
    kernels["workspace_bytes"] = np.array([w.size * w.dtype.itemsize for w in call.workspaces.values()], np.int64)
    return CudaCall({"kernels": kernels}, list(call.workspaces.values()))


def launches(problem: Problem, *, biases: tuple[bool, bool]) -> list[Launch]:
    """The kernels that :func:`cuda_call` would compile, in launch order."""
    return _Call(problem, biases).launches()


def command_arguments(problem: Problem, biases: tuple[bool, bool]) -> list[str]:
    """Arguments with which ``python -m jax_moe compile`` makes the kernels of ``problem``."""
    alpha, beta, limit = activations.parameters(problem.activation)
    arguments = [
        f"--layer {problem.num_experts},{problem.top_k},{problem.hidden_size},{problem.intermediate_size}",
        f"--tokens {problem.num_tokens}",
        f"--precision {problem.precision}",
        f"--combine {problem.combine}",
        f"--weight-on {problem.weight_on}",
        f"--out-dtype {jnp.dtype(problem.out_dtype).name}",
        f"--activation {type(problem.activation).__name__},{alpha!r},{beta!r},{limit!r}",
    ]
    if problem.total_experts is not None:
        arguments.append(f"--num-experts {problem.total_experts}")
    if biases[0]:
        arguments.append("--gate-up-bias")
    if biases[1]:
        arguments.append("--down-bias")
    return arguments


class _Call:
    """One call: its workspaces by name, and the launches over them."""

    def __init__(self, problem: Problem, biases: tuple[bool, bool]):
        self.problem = problem
        self.gate_up_bias, self.down_bias = biases
        self.parts = 2 if problem.activation.gated else 1
        # Blocks of the prepared weights (jax_moe/prepare.py): rows and contraction of gate_up and of down.
        rows, width = layout.BLOCK_ROWS, layout.BLOCK_K
        self.gate_up_rows = _blocks(self.parts * problem.intermediate_size, rows)
        self.gate_up_columns = _blocks(problem.hidden_size, width)
        self.down_rows = _blocks(problem.hidden_size, rows)
        self.down_columns = _blocks(problem.intermediate_size, width)
        self.h_blocks = self.gate_up_rows * rows // self.parts // width
        # Without tokens nothing is launched, and any plan will do.
        self.plan = sm90_plan.plan(dataclasses.replace(problem, num_tokens=max(1, problem.num_tokens)), biases=biases)
        self.sort = specs.sort_spec(
            problem.num_routes, problem.num_experts, self.plan.token_tile, weighted=problem.weight_on == "output"
        )
        self.rows = None
        if problem.precision == "w4a4" or problem.weight_on == "input":
            self.rows = specs.RowsSpec(quantise=problem.precision == "w4a4", per_route=problem.weight_on == "input")
        self.num_rows = problem.num_routes if problem.weight_on == "input" else problem.num_tokens
        self.max_tiles = common_plan.max_tiles(problem.num_routes, problem.num_experts, self.plan.token_tile)
        self.workspaces = self._workspaces()

    def sizes(self) -> dict[str, int]:
        """As ``ffi/problem.h`` names them; I with the padding that a bias has."""
        p = self.problem
        return {
            "num_tokens": p.num_tokens, "top_k": p.top_k, "local_experts": p.num_experts, "num_parts": self.parts,
            "hidden_size": p.hidden_size, "intermediate_size": self.h_blocks * layout.BLOCK_K,
            "out_bytes": jnp.dtype(p.out_dtype).itemsize,
        }  # fmt: skip

    def weight_bytes(self) -> dict[str, int]:
        """By operand: a prepared payload has the block scales inside."""
        block = self.problem.num_experts * layout.BLOCK_BYTES
        return {
            "gate_up.payload": block * self.gate_up_rows * self.gate_up_columns, "gate_up.block_scale": 0,
            "down.payload": block * self.down_rows * self.down_columns, "down.block_scale": 0,
        }  # fmt: skip

    def _workspaces(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Results 1, 2, ... of the call. The kernels write all that they read, so they may hold anything."""
        p, tile = self.problem, self.plan.token_tile
        sizes: dict[str, tuple[tuple[int, ...], object]] = {
            "expert_tiles": ((p.num_experts + 1 + specs.WORK_COUNTERS,), jnp.int32),
            "tile_expert": ((self.max_tiles,), jnp.int32),
            "row_route": ((self.max_tiles * tile,), jnp.int32),
            "row_weight": ((self.max_tiles * tile,), jnp.float32),
            "block_counts": ((self.sort.cluster, p.num_experts), jnp.int32),
            "h": ((self.max_tiles, self.h_blocks, tile, layout.BLOCK_K), jnp.bfloat16),
        }
        if self.rows is not None:
            sizes["x_rows"] = ((self.num_rows, p.hidden_size), jnp.bfloat16)
        if p.combine == "ordered":
            sizes["contributions"] = ((p.num_routes, p.hidden_size), jnp.float32)
        vectors = max(self.num_rows * p.hidden_size // 8, p.num_tokens * p.hidden_size // 4)  # of x and of the output
        if max(self.max_tiles * tile, vectors) > _INT32_MAX:
            raise ValueError(
                f"x: got T*K = {p.num_routes} routes of H = {p.hidden_size}, the GPU kernels count in int32; "
                "call fused_moe on parts of the tokens"
            )
        return {name: jax.ShapeDtypeStruct(*size) for name, size in sizes.items()}

    def launches(self) -> list[Launch]:
        if self.problem.num_tokens == 0:
            return []
        steps = [self._sort(), self._gemm1(), self._gemm2()]
        if self.rows is not None:
            steps.insert(1, self._x_rows(self.rows))
        if self.plan.combine is not None:
            steps.append(self._combine(self.plan.combine))
        return steps

    def _result(self, name: str) -> str:
        return f"result:{1 + list(self.workspaces).index(name)}"

    def _sort(self) -> Launch:
        tile_map = (self._result(name) for name in ("expert_tiles", "tile_expert", "row_route", "row_weight"))
        arguments = (
            "operand:1", "operand:2", "operand:3", *tile_map, self._result("block_counts"),
            f"i32:{self.problem.num_routes}",
        )  # fmt: skip
        return Launch("sort", self.sort, self.sort.grid, arguments)

    def _x_rows(self, spec: specs.RowsSpec) -> Launch:
        p = self.problem
        arguments = (
            "operand:0", "operand:2", "operand:7" if spec.quantise else "null", self._result("x_rows"),
            f"i32:{self.num_rows}", f"i32:{self.num_rows // p.num_tokens}", f"i32:{p.hidden_size // 16}",
        )  # fmt: skip
        return Launch("x_rows", spec, spec.grid(self.num_rows, p.hidden_size), arguments)

    def _gemm1(self) -> Launch:
        p = self.problem
        quantised = p.precision == "w4a4"
        arguments = (
            "operand:0" if self.rows is None else self._result("x_rows"),
            *(self._result(name) for name in ("row_route", "tile_expert", "expert_tiles")),
            "operand:4", "operand:6", "operand:7" if quantised else "null",
            "operand:8" if self.gate_up_bias else "null", "operand:12" if quantised else "null", self._result("h"),
            f"i32:{p.hidden_size}", f"i32:{1 if p.weight_on == 'input' else p.top_k}", f"i32:{p.num_experts}",
            f"i32:{self.gate_up_rows}", f"i32:{self.gate_up_columns}",
        )  # fmt: skip
        return Launch("gemm1", self.plan.gemm1, self._persistent(self.plan.gemm1.tile), arguments)

    def _gemm2(self) -> Launch:
        p = self.problem
        ordered = p.combine == "ordered"
        arguments = (
            *(self._result(name) for name in ("h", "row_route", "row_weight", "tile_expert", "expert_tiles")),
            "operand:9", "operand:11", "operand:12" if p.precision == "w4a4" else "null",
            "operand:13" if self.down_bias else "null", self._result("contributions") if ordered else "result:0",
            f"i32:{p.hidden_size}", f"i32:{1 if ordered else p.top_k}", f"i32:{p.num_experts}",
            f"i32:{self.down_rows}", f"i32:{self.down_columns}", f"i32:{self.h_blocks}",
        )  # fmt: skip
        return Launch("gemm2", self.plan.gemm2, self._persistent(self.plan.gemm2.tile), arguments)

    def _combine(self, spec: specs.CombineSpec) -> Launch:
        p = self.problem
        arguments = (
            self._result("contributions"), "operand:1", "operand:3", "result:0",
            f"i32:{p.num_tokens}", f"i32:{p.top_k}", f"i32:{p.hidden_size}", f"i32:{p.num_experts}",
        )  # fmt: skip
        return Launch("combine", spec, spec.grid(p.num_tokens, p.hidden_size), arguments)

    def _persistent(self, tile: common_plan.Tile) -> int:
        return MULTIPROCESSORS[self.problem.layout] * tile.ctas_per_sm


def _blocks(size: int, block: int) -> int:
    return -(-size // block)


_BYTES = {"operand": 8, "result": 8, "null": 8, "i32": 4}


def _kernel_attributes(launch: Launch, target: str) -> dict[str, object]:
    kernel = compile.compiled(launch.spec, target)
    wanted = tuple(_BYTES[argument.partition(":")[0]] for argument in launch.arguments)
    if wanted != kernel.parameter_bytes:
        raise RuntimeError(
            f"jax_moe: kernel {launch.spec.name} takes parameters of {kernel.parameter_bytes} bytes, "
            f"ABI.md passes {wanted}"
        )
    return {
        "image": kernel.image,
        "name": kernel.symbol,
        "grid": np.int64(launch.grid),
        "threads": np.int64(kernel.threads),
        "cluster": np.int64(getattr(launch.spec, "cluster", 1)),
        "shared": np.int64(kernel.shared_bytes),
        "overlap": np.int64(getattr(launch.spec, "pdl", False)),
        "arguments": " ".join(launch.arguments),
    }
