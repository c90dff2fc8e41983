"""The experts of one MoE layer, published or converted."""

from jax_moe.checkpoints import converted, published
from jax_moe.checkpoints.model import Model


def open_experts(
    model: Model, number: int, *, quantize: bool = False
) -> published.PublishedLayer | converted.ConvertedLayer:
    """Finds the experts of a layer and checks their headers; ``quantize``: also those that do not have 4 bits.

    Raises:
      TypeError, CheckpointError: see :func:`jax_moe.load_experts`.
    """
    if converted.holds(model, number):
        return converted.open_converted(model, number)
    return published.open_published(model, number, quantize=quantize)
