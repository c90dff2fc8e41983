"""Reads the expert that every token visits beside its routed experts from a checkpoint."""

import jax
import jax.numpy as jnp
import numpy as np

from jax_moe.checkpoints.family import full_name, GATED
from jax_moe.checkpoints.files import CheckpointError
from jax_moe.checkpoints.linear import Linear, read_linear
from jax_moe.checkpoints.model import Model
from jax_moe.layers import SharedExpert


def find_shared_expert(model: Model, layer: int) -> tuple[str, tuple[str, ...]] | None:
    """The module of a layer's shared expert, and the names of its linear layers, the last being down; None without one.

    Raises:
      CheckpointError: the configuration says that there is one, and the files have none.
    """
    module, family, settings = model.module(layer), model.family, model.settings(layer)
    names = model.files.names()
    candidates = [full_name(module, name) for name in family.shared_expert]
    expert = next((name for name in candidates if any(tensor.startswith(f"{name}.") for tensor in names)), None)
    if expert is None:
        key = settings.key("n_shared_experts", "num_shared_experts", "moe_num_shared_experts")
        if candidates and settings.value(key):
            raise settings.error(key, settings.value(key), f"none, because there is no {candidates[0]} in the files")
        return None

    linears = [each for each in (*family.projections, GATED) if len(each) == len(family.projections[0])]
    chosen = next(
        (each for each in linears if any(tensor.startswith(f"{expert}.{each[0]}.") for tensor in names)),
        linears[0],
    )
    return expert, chosen


def describe_shared_expert(model: Model, layer: int) -> str | None:
    """Its sizes, from the headers, as "2 x [I, H]"; None without one.

    Raises:
      CheckpointError: see :func:`find_shared_expert`, or it has no weights.
    """
    found = find_shared_expert(model, layer)
    if found is None:
        return None
    expert, linears = found
    first = f"{expert}.{linears[0]}"
    packed = f"{first}.weight_packed"
    weight = model.files.info(packed if packed in model.files.names() else f"{first}.weight")
    rows = weight.shape[0] if weight.shape else 0
    gated = "" if model.family.shared_expert_gate is None else ", behind a gate"
    return f"{len(linears) - 1} x [{rows}, {model.settings(layer).integer('hidden_size')}]{gated}"


def open_shared_expert(model: Model, layer: int) -> SharedExpert | None:
    """See :func:`jax_moe.checkpoints.load_shared_expert`."""
    module, family, settings = model.module(layer), model.family, model.settings(layer)
    names = model.files.names()
    found = find_shared_expert(model, layer)
    if found is None:
        return None
    expert, chosen = found
    *parts, down = (read_linear(model.files, f"{expert}.{name}") for name in chosen)
    hidden, intermediate = settings.integer("hidden_size"), parts[0].weight.shape[0]
    shapes = [(intermediate, hidden)] * len(parts) + [(hidden, intermediate)]
    for linear, shape, name in zip([*parts, down], shapes, chosen, strict=True):
        if linear.weight.shape != shape:
            raise CheckpointError(
                f"{model.files.directory}: {expert}.{name}: found {list(linear.weight.shape)}, expected {list(shape)}"
            )
    used = tuple(f"{expert}.{name}." for name in chosen)
    left = [name for name in names if name.startswith(f"{expert}.") and not name.startswith(used)]
    if left:
        raise CheckpointError(f"{model.files.info(min(left))}: found a tensor that a shared expert does not have")

    gate = None
    if family.shared_expert_gate is not None:
        name = full_name(module, family.shared_expert_gate)
        linear = read_linear(model.files, name)
        if linear.weight.shape != (1, hidden) or linear.bias is not None:
            raise CheckpointError(
                f"{model.files.directory}: {name}: found {list(linear.weight.shape)}, expected [1, {hidden}], no bias"
            )
        gate = jax.device_put(linear.weight.astype(np.float32))
    activation = None if family.shared_activation is None else family.shared_activation(settings)
    return SharedExpert(
        jnp.stack([jnp.asarray(part.weight) for part in parts]),
        jax.device_put(down.weight),
        _stack_biases(parts),
        None if down.bias is None else jax.device_put(down.bias),
        gate,
        activation=activation,
    )


def _stack_biases(parts: list[Linear]) -> jax.Array | None:
    if all(part.bias is None for part in parts):
        return None
    zeros = np.zeros(parts[0].weight.shape[0], np.float32)
    return jnp.stack([jnp.asarray(zeros if part.bias is None else part.bias) for part in parts])
