"""A checkpoint's model: its files, its family, where its MoE modules are and of what sizes."""

import dataclasses
import itertools
import os
import re

from jax_moe import arguments, nvfp4
from jax_moe.checkpoints import quantization
from jax_moe.checkpoints.families import Config, Family, family_of, NUM_EXPERTS
from jax_moe.checkpoints.family import full_name
from jax_moe.checkpoints.files import CheckpointError, Files, read_json
from jax_moe.checkpoints.settings import Settings


@dataclasses.dataclass(frozen=True)
class Model:
    """An open checkpoint: its files, its config and its family. The loaders take it in place of the directory.

    A caller may use :meth:`settings`; the rest is for the loaders.

    Attributes:
      files: the tensors.
      family: the table entry.
      config: the text model's part of ``config.json``.
      modules: the MoE module of each layer that has one ("model.layers.3.mlp"), by layer number.
    """

    files: Files
    family: Family
    config: Config
    modules: dict[int, str]

    @property
    def config_file(self) -> str:
        return str(self.files.directory / "config.json")

    def module(self, layer: int) -> str:
        """The MoE module of a layer.

        Raises:
          TypeError: ``layer`` is not an int.
          CheckpointError: the layer has no experts.
        """
        layer = arguments.integer("layer", layer)
        if layer not in self.modules:
            layers = ", ".join(map(str, self.modules))
            raise CheckpointError(
                f"{self.files.directory}: found no experts in layer {layer}, expected one of the MoE layers ({layers})"
            )
        return self.modules[layer]

    def settings(self, layer: int | None = None) -> Settings:
        """The configuration, whose values are checked when they are read, as a layer sees it.

        Without a layer, settings that depend on it are errors.
        """
        return Settings(self.config, self.config_file, layer)

    def beside(self, layer: int) -> list[str]:
        """The tensors of a layer's MoE module that are not of its experts."""
        module, family = self.module(layer), self.family
        parts = [full_name(module, name) for name in (*family.router, *family.shared_expert)]
        # A module that is the layer itself has the layer's attention and norms in it.
        own = [] if module.rpartition(".")[2].isdigit() else [module]
        prefixes = tuple(f"{name}." for name in (*own, *parts))
        experts = f"{module}.experts."
        return sorted(name for name in self.files.names() if name.startswith(prefixes) and not name.startswith(experts))


def open_model(directory: str | os.PathLike[str]) -> Model:
    """Reads the config and finds the MoE layers; what the files' headers say is read once, when it is first needed.

    For a program that loads a whole model: a checkpoint of 75,000 tensors takes seconds to open, and every loader that
    gets a directory opens it. The files must stay as they are until the last one has been loaded.

    Args:
      directory: of the checkpoint; "~" is the home directory.

    Raises:
      CheckpointError: there is no usable config or index, the model family is unknown, or there are no experts.
    """
    files = Files(directory)
    config_path = files.directory / "config.json"
    whole = read_json(config_path)
    family, config = family_of(whole, str(config_path))
    modules = _find_modules(files, family, config)
    if not modules:
        raise CheckpointError(f"{files.directory}: {_nothing(files, family)}")
    return Model(files, family, config, modules)


def _find_modules(files: Files, family: Family, config: Config) -> dict[int, str]:
    """The modules with experts, under any root. Layers of multi-token prediction follow those of the model."""
    names = "|".join(re.escape(f".{name}" if name else "") for name in family.blocks)
    pattern = re.compile(rf"(((?:[^.]+\.)*?)(layers|mtp)\.(\d{{1,6}})(?:{names}))\.experts\.")
    found = {}
    for match in filter(None, map(pattern.match, files.names())):
        module, root, container, number = match.groups()
        found[module] = root, container == "mtp" or "mtp" in root.split("."), int(number)
    if any(root in family.roots for root, *_ in found.values()):
        found = {module: place for module, place in found.items() if place[0] in family.roots or place[1]}
    modules: dict[int, str] = {}
    for module, (_, predicts, number) in found.items():
        layer = number + _num_layers(files, config) if predicts else number
        if modules.setdefault(layer, module) != module:
            raise CheckpointError(
                f"{files.directory}: layer {layer}: found experts in {modules[layer]} and in {module}, expected them "
                "once"
            )
    return dict(sorted(modules.items()))


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
    module = model.module(layer)
    experts = [f"{module}.experts.{expert}" for expert in range(sizes(model, layer).num_experts)]
    # By every name that the family's experts have anywhere: converted files no longer show which ones were stored.
    names = {"gate_up_proj", "down_proj", *itertools.chain.from_iterable(model.family.projections)}
    linears = [f"{parent}.{name}" for parent in (f"{module}.experts", *experts) for name in sorted(names)]
    quantization.refuse_online_transforms(model.files, linears, (module, f"{module}.experts", *experts))
