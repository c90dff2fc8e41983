"""Reads the router of a MoE layer from a checkpoint."""

import dataclasses

import jax
import numpy as np

from jax_moe import routing
from jax_moe.checkpoints.family import full_name, NUM_EXPERTS, TOP_K
from jax_moe.checkpoints.files import CheckpointError, Files, FLOATS, read_floats, read_rows
from jax_moe.checkpoints.model import Model
from jax_moe.layers import HashRouter, Router


def open_router(model: Model, layer: int) -> Router | HashRouter:
    """See :func:`jax_moe.checkpoints.load_router`."""
    module, family, settings = model.module(layer), model.family, model.settings(layer)
    num_experts, hidden = settings.integer(*NUM_EXPERTS), settings.integer("hidden_size")
    k, method = settings.integer(*TOP_K, default=family.top_k), family.method(settings)
    candidates = num_experts
    if isinstance(method, routing.DeepSeekV2 | routing.DeepSeekV3):
        candidates = num_experts // method.num_groups * method.top_groups
    if k > candidates or (isinstance(method, routing.SparseMixer) and k != 2):
        expected = "2" if isinstance(method, routing.SparseMixer) else f"at most the {candidates} experts of {method}"
        raise settings.error(settings.key(*TOP_K), k, expected)
    tensors = _Tensors(model.files)
    name = router_module(model, layer)
    linear = f"{name}.proj" if family.normalized_router else name
    weight = tensors.floats(f"{linear}.weight", (num_experts, hidden))
    table = family.token_table(settings)
    if table is not None:
        if not isinstance(method, routing.DeepSeekV3):
            raise TypeError(f"{family.name}: got {method!r} beside a token table, needs DeepSeekV3")
        vocabulary = settings.integer("vocab_size") if "vocab_size" in settings.config else None
        ids = tensors.integers(full_name(module, table), vocabulary, k, num_experts)
        router = HashRouter(jax.device_put(weight), jax.device_put(ids), method=method)
    else:
        parts: dict[str, np.ndarray | float] = {}
        if family.router_bias:
            parts["bias"] = tensors.floats(f"{linear}.bias", (num_experts,))
        if family.selection_bias and isinstance(method, routing.DeepSeekV3):
            candidates = [full_name(module, bias) for bias in family.selection_bias]
            chosen = next((bias for bias in candidates if bias in model.files.names()), candidates[0])
            parts["selection_bias"] = tensors.floats(chosen, (num_experts,), (1, num_experts))
        if family.normalized_router:
            weight = weight * tensors.floats(f"{name}.scale", (hidden,)) / np.float32(np.sqrt(hidden))
            parts["expert_scale"] = tensors.floats(f"{name}.per_expert_scale", (num_experts,))
        leaves = {key: jax.device_put(value) for key, value in parts.items()}
        norm_eps = settings.number("rms_norm_eps", default=1e-6) if family.normalized_router else None
        router = Router(jax.device_put(weight), **leaves, k=k, method=method, norm_eps=norm_eps)
    _check_explained(model, layer, tensors.read)
    return router


def router_module(model: Model, layer: int) -> str:
    """The router's module in the files of a layer."""
    candidates = [full_name(model.module(layer), name) for name in model.family.router]
    present = (name for name in candidates if any(tensor.startswith(f"{name}.") for tensor in model.files.names()))
    return next(present, candidates[0])


def _check_explained(model: Model, layer: int, read: set[str]) -> None:
    """Refuses tensors of the MoE module that nothing reads: leaving one out could make another function of it."""
    module, family = model.module(layer), model.family
    known = [*family.shared_expert, *family.others, *filter(None, [family.shared_expert_gate])]
    others = tuple(f"{full_name(module, name)}." for name in known)
    left = [name for name in model.beside(layer) if name not in read and not name.startswith(others)]
    if left:
        raise CheckpointError(
            f"{model.files.info(left[0])}: found a tensor that the MoE module of {family.name} does not have, "
            "or has no use for with this configuration's routing; leaving it out could change the result"
        )


@dataclasses.dataclass(frozen=True)
class _Tensors:
    """Reads small tensors, checked, and knows which."""

    files: Files
    read: set[str] = dataclasses.field(default_factory=set)

    def floats(self, name: str, *shapes: tuple[int, ...]) -> np.ndarray:
        """float32, finite, of one of ``shapes``; the first is that of the result."""
        info = self.files.info(name)
        if info.dtype not in FLOATS or info.shape not in shapes:
            raise CheckpointError(f"{info}: found {info.summary}, expected {' or '.join(FLOATS)} {list(shapes[0])}")
        self.read.add(name)
        return read_floats(info).reshape(shapes[0])

    def integers(self, name: str, rows: int | None, columns: int, bound: int) -> np.ndarray:
        """int32 ``[rows, columns]`` (None: any number of rows), each in ``[0, bound)``."""
        info = self.files.info(name)
        if info.dtype not in ("I64", "I32") or len(info.shape) != 2 or info.shape != (rows or info.shape[0], columns):
            raise CheckpointError(f"{info}: found {info.summary}, expected I64 or I32 [{rows or 'V'}, {columns}]")
        values = read_rows(info)
        if ((values < 0) | (values >= bound)).any():
            raise CheckpointError(f"{info}: found experts outside [0, {bound}), expected their ids")
        self.read.add(name)
        return values.astype(np.int32)
