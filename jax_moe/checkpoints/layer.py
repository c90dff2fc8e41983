"""One MoE layer of a published checkpoint: what it is, and its weights, read on demand."""

from collections.abc import Callable
import dataclasses
from pathlib import Path
import re
from typing import Any
import warnings

import ml_dtypes
import numpy as np

from jax_moe import nvfp4
from jax_moe.checkpoints import dense, quantization, stored
from jax_moe.checkpoints.dense import Dense
from jax_moe.checkpoints.families import Config, Family, family_of, NUM_EXPERTS
from jax_moe.checkpoints.family import module
from jax_moe.checkpoints.files import CheckpointError, Files, read_json
from jax_moe.checkpoints.leaves import Leaf
from jax_moe.checkpoints.settings import Settings
from jax_moe.checkpoints.stored import Stored
from jax_moe.experts import CANONICAL, Experts, Projection

_FLOAT32 = np.dtype(np.float32)
_E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
_UINT8 = np.dtype(np.uint8)


@dataclasses.dataclass(frozen=True)
class Model:
    """A checkpoint directory, its config and its family.

    Attributes:
      files: the tensors.
      family, config: the table entry, and the text model's part of ``config.json``.
      blocks: the module of each MoE layer ("model.layers.3.mlp"), by layer number.
    """

    files: Files
    family: Family
    config: Config
    blocks: dict[int, str]

    @property
    def config_file(self) -> str:
        return str(self.files.directory / "config.json")

    def block(self, layer: int) -> str:
        """The MoE module of a layer.

        Raises:
          TypeError: ``layer`` is not an int.
          CheckpointError: the layer has no experts.
        """
        if not isinstance(layer, int | np.integer):
            raise TypeError(f"layer: got {type(layer).__name__}, needs an int")
        if layer not in self.blocks:
            layers = ", ".join(map(str, self.blocks))
            raise CheckpointError(
                f"{self.files.directory}: found no experts in layer {layer}, expected one of the MoE layers ({layers})"
            )
        return self.blocks[layer]

    def settings(self, layer: int | None = None) -> Settings:
        """The configuration as a layer sees it; without one, settings that depend on the layer are errors."""
        return Settings(self.config, self.config_file, layer)

    def beside(self, layer: int) -> list[str]:
        """The tensors of a layer's block that are not of its experts."""
        block, family = self.block(layer), self.family
        modules = [module(block, name) for name in (*family.router, *family.shared_expert)]
        # A block that is the layer itself has the layer's attention and norms in it.
        own = [] if block.rpartition(".")[2].isdigit() else [block]
        prefixes = tuple(f"{name}." for name in (*own, *modules))
        experts = f"{block}.experts."
        return sorted(name for name in self.files.names() if name.startswith(prefixes) and not name.startswith(experts))


def open_model(directory: Path) -> Model:
    """Reads the config and finds the MoE layers.

    Raises:
      CheckpointError: there is no usable config or index, the model family is unknown, or there are no experts.
    """
    files = Files(directory)
    config_path = directory / "config.json"
    whole = read_json(config_path)
    family, config = family_of(whole, str(config_path))
    blocks = _find_blocks(files, family, config)
    if not blocks:
        raise CheckpointError(f"{directory}: {_nothing(files, family)}")
    return Model(files, family, config, blocks)


def _find_blocks(files: Files, family: Family, config: Config) -> dict[int, str]:
    """The blocks with experts, under any root. Layers of multi-token prediction follow those of the model."""
    names = "|".join(re.escape(f".{name}" if name else "") for name in family.blocks)
    pattern = re.compile(rf"(((?:[^.]+\.)*?)(layers|mtp)\.(\d{{1,6}})(?:{names}))\.experts\.")
    found = {}
    for match in filter(None, map(pattern.match, files.names())):
        block, root, container, number = match.groups()
        found[block] = root, container == "mtp" or "mtp" in root.split("."), int(number)
    if any(root in family.roots for root, *_ in found.values()):
        found = {block: place for block, place in found.items() if place[0] in family.roots or place[1]}
    blocks: dict[int, str] = {}
    for block, (_, predicts, number) in found.items():
        layer = number + _num_layers(files, config) if predicts else number
        if blocks.setdefault(layer, block) != block:
            raise CheckpointError(
                f"{files.directory}: layer {layer}: found experts in {blocks[layer]} and in {block}, expected them once"
            )
    return dict(sorted(blocks.items()))


def _num_layers(files: Files, config: Config) -> int:
    """Of the model itself: by its configuration, or else by its files."""
    if type(config.get("num_hidden_layers")) is int:
        return config["num_hidden_layers"]
    numbers = (re.match(r"(?!mtp\.)(?:[^.]+\.)*?layers\.(\d{1,6})\.", name) for name in files.names())
    return 1 + max((int(match[1]) for match in numbers if match), default=-1)


def _nothing(files: Files, family: Family) -> str:
    """What was found instead of any experts."""
    known = " or ".join(f"layers.N.{name}.experts" if name else "layers.N.experts" for name in family.blocks)
    alike = next((name for name in files.names() if re.search("expert|moe", name)), None)
    found = "nothing like an expert" if alike is None else f"{alike} and the like"
    return f"found {found}, expected the experts of {family.name} in {known}, under any root"


@dataclasses.dataclass(frozen=True)
class Sizes:
    """E, H and I of a model's expert layers."""

    num_experts: int
    hidden: int
    intermediate: int


@dataclasses.dataclass(frozen=True)
class ExpertLayer:
    """The experts of one layer: checked headers, and nothing read yet."""

    layer: int
    sizes: Sizes
    gate_up: Stored | Dense
    down: Stored | Dense
    uses_input_scales: bool

    @property
    def num_experts(self) -> int:
        return self.sizes.num_experts

    @property
    def format(self) -> str:
        return self.gate_up.format_name

    @property
    def layout(self) -> str:
        return CANONICAL

    def leaves(self, experts: range) -> Experts:
        """The arrays of ``experts``, as an ``Experts`` of :class:`~jax_moe.checkpoints.leaves.Leaf`."""
        gate_up, down = self.gate_up, self.down
        gate_up_input, down_input = self._input_scales()
        return Experts(
            gate_up=_projection(
                gate_up, experts, f"layer {self.layer} gate_up", stacked=True, input_scale=gate_up_input
            ),
            down=_projection(down, experts, f"layer {self.layer} down", stacked=False, input_scale=down_input),
        )

    def _input_scales(self) -> tuple[np.ndarray | None, np.ndarray | None]:
        """Of gate_up: the maximum over all experts, not the local ones; of down: ``[E]``. None where absent."""
        if not (self.uses_input_scales and self.gate_up.has_input_scale and self.down.has_input_scale):
            return None, None
        gate_up, down = (
            [stored.input_scale(expert, part) for expert in range(self.num_experts) for part in range(stored.num_parts)]
            for stored in (self.gate_up, self.down)
        )
        missing = gate_up.count(None) + down.count(None)
        known_gate_up = [scale for scale in gate_up if scale is not None]
        known_down = [scale for scale in down if scale is not None]
        if missing:
            # An expert that saw no calibration token. It is rarely chosen, and a scale that is too large costs
            # little precision, while one that is too small saturates.
            warnings.warn(
                f"{self.gate_up.files.directory}: layer {self.layer}: {missing} input scales are missing, zero or not "
                "finite; the largest of the layer stands in for them (w4a4 only)",
                stacklevel=3,
            )
        if not known_gate_up or not known_down:
            return None, None
        filled = [max(known_down) if scale is None else scale for scale in down]
        return np.asarray(max(known_gate_up)), np.asarray(filled, np.float32)


def open_experts(model: Model, layer: int, *, quantize: bool = False) -> ExpertLayer:
    """Finds the experts of a layer and checks their headers; ``quantize``: also those that do not have 4 bits.

    Raises:
      CheckpointError: see :func:`jax_moe.load_experts`.
    """
    block, shape = model.block(layer), sizes(model, layer)
    where = (model.files, block, model.family, shape.num_experts, shape.hidden, shape.intermediate)
    try:
        gate_up, down = stored.find(*where)
    except stored.OtherFormatError:
        if not quantize:
            raise
        gate_up, down = dense.find(*where)
    refuse_online_transforms(model, layer)
    # W4A8: the weights are NVFP4 but the input scales are those of FP8 activations.
    uses_input_scales = not any("FP8" in name for name in quantization.algorithms(model.files, f"{block}.experts"))
    return ExpertLayer(layer, shape, gate_up, down, uses_input_scales)


def sizes(model: Model, layer: int) -> Sizes:
    """E, H and I of a layer, from the config.

    Raises:
      CheckpointError: one is missing or not a multiple of 16.
    """
    settings = model.settings(layer)
    latent = settings.value("moe_latent_size") is not None
    found = []
    for key in ("moe_latent_size" if latent else "hidden_size", model.family.intermediate_size):
        found.append(settings.integer(key))
        if found[-1] % nvfp4.BLOCK_SIZE:
            raise settings.error(key, found[-1], f"a multiple of {nvfp4.BLOCK_SIZE}")
    return Sizes(settings.integer(*NUM_EXPERTS), *found)


def refuse_online_transforms(model: Model, layer: int) -> None:
    """Refuses experts whose activations would have to be transformed at run time.

    Raises:
      CheckpointError: see :func:`quantization.refuse_online_transforms`.
    """
    block = model.block(layer)
    experts = [f"{block}.experts.{expert}" for expert in range(sizes(model, layer).num_experts)]
    # By every name that the family's experts have anywhere: converted files no longer show which ones were stored.
    projections = {"gate_up_proj", "down_proj", *(name for names in model.family.projections for name in names)}
    linears = [f"{module}.{name}" for module in (f"{block}.experts", *experts) for name in sorted(projections)]
    quantization.refuse_online_transforms(model.files, linears, (block, f"{block}.experts", *experts))


def _projection(
    stored: Stored | Dense, experts: range, name: str, *, stacked: bool, input_scale: np.ndarray | None
) -> Projection:
    """Leaves of a projection; ``stacked``: with an axis for the parts (gate_up)."""
    rows, contraction = stored.num_rows, stored.contraction
    lead = (len(experts), stored.num_parts) if stacked else (len(experts),)

    def leaf(kind: str, read: Callable[[int, int], Any], shape: tuple[int, ...], dtype: np.dtype) -> Leaf:
        def row(index: int, inner: tuple[slice, ...]) -> np.ndarray:
            if not stacked:
                return np.asarray(read(experts[index], 0))[inner]
            parts = range(stored.num_parts)[inner[0]]
            return np.stack([np.asarray(read(experts[index], part))[inner[1:]] for part in parts])

        return Leaf((*lead, *shape), dtype, row, f"{name}.{kind}")

    input_leaf = None
    if input_scale is not None and input_scale.ndim == 0:
        input_leaf = Leaf((), _FLOAT32, lambda index, inner: input_scale, f"{name}.input_scale")
    elif input_scale is not None:
        input_leaf = Leaf(lead, _FLOAT32, lambda index, inner: input_scale[experts[index]], f"{name}.input_scale")
    return Projection(
        payload=leaf("payload", stored.payload, (rows, contraction // 2), _UINT8),
        block_scale=leaf("block_scale", stored.block_scale, (rows, contraction // nvfp4.BLOCK_SIZE), _E4M3),
        global_scale=leaf("global_scale", stored.global_scale, (), _FLOAT32),
        input_scale=input_leaf,
        bias=leaf("bias", stored.bias, (rows,), _FLOAT32) if stored.has_bias else None,
    )
