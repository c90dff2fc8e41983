"""What a checkpoint's configuration says of its quantisation: the activations' format, and transforms left to run time.

A tool can store rotated weights and leave it to the engine to rotate the activations too. No tensor need say so, the
configuration alone does; weights loaded without it compute another function. jax_moe rotates nothing, so whatever
would have to be done to the activations of a module that is loaded is an error. What a tool has fused into the
weights needs nothing.
"""

from collections.abc import Callable, Iterable, Iterator
import fnmatch
import functools
import re
from typing import Any

from jax_moe.checkpoints.families import Config
from jax_moe.checkpoints.files import brief, CheckpointError, Files

Keys = tuple[str, ...]

CONFIG_FILES = ("config.json", "hf_quant_config.json", "quantize_config.json", "quantization_config.json")
"""Where tools put it: transformers, ModelOpt, GPTQModel and AutoRound."""

_SECTIONS = ("quantization_config", "compression_config", "quantization")

_DEEPEST = 30  # levels of a configuration: a hostile one could be deeper than Python's stack

# A key of a tool that this module has not heard of. ("transformers_version" is not one of them.)
_SUSPICIOUS = re.compile(r"rotat|hadamard|transform(?!er)|spinquant|quarot|smooth", re.IGNORECASE)


def sections(files: Files) -> dict[str, Config]:
    """Every part of the configuration that is about quantisation, by the file and the keys that lead to it.

    Raises:
      CheckpointError: a file is not a JSON object.
    """
    found = {}
    for name in CONFIG_FILES:
        config = files.json(name)
        if config is not None:
            found |= _sections(config, f"{files.directory}/{name}", whole=name.startswith("quanti"))
    return found


def _sections(config: Config, where: str, *, whole: bool = False, depth: int = 0) -> dict[str, Config]:
    found = {where: config} if whole else {}
    if depth > _DEEPEST:
        raise CheckpointError(f"{where[:200]}: found objects nested deeper than any tool writes them")
    for key, value in config.items():
        if isinstance(value, dict):  # the text model's part of a configuration may have one of its own
            found |= _sections(value, f"{where}: {key}", whole=key in _SECTIONS, depth=depth + 1)
    return found


def algorithms(files: Files, module: str) -> set[str]:
    """ModelOpt's names of the formats below ``module``: one, or under MIXED_PRECISION any number."""
    whole, layers = set(), set()
    for section in sections(files).values():
        whole.add(str(section.get("quant_algo")))
        entries = section.get("quantized_layers")
        for name, entry in entries.items() if isinstance(entries, dict) else ():
            if name.startswith(module) and isinstance(entry, dict):
                layers.add(str(entry.get("quant_algo")))
    return layers or whole


def refuse_online_transforms(files: Files, linears: Iterable[str], containers: Iterable[str] = ()) -> None:
    """Refuses what the files of weights do not show: activations to transform at run time, or scales to read otherwise.

    Args:
      files: the checkpoint.
      linears: the linear layers that are loaded ("model.layers.0.mlp.experts.2.up_proj").
      containers: the modules around them. A pattern that matches a linear layer means those, as in compressed-tensors,
        which by itself rotates nothing else; one that matches only a container is taken at its word.

    Raises:
      CheckpointError: naming the file, the key and the value; also for settings that cannot be understood.
    """
    linears, containers = list(linears), list(containers)
    for where, section in sections(files).items():
        for path, key, value in _suspicious(section, linears, containers):
            reason = _UNDERSTOOD.get(key, _unknown)(value, linears, containers)
            if reason is not None:
                raise CheckpointError(
                    f"{where}: {'.'.join((*path, key))}: found {brief(value)}, {reason}; expected "
                    f"{containers[0] if containers else linears[0]} to be all in its weights and scales"
                )


def _suspicious(
    node: Any, linears: list[str], containers: list[str], path: Keys = ()
) -> Iterator[tuple[Keys, str, Any]]:
    """Settings that may be about a transform, with the keys that lead to them; what is off is not among them."""
    if len(path) > _DEEPEST:
        raise CheckpointError(f"{'.'.join(path[:4])}: found objects nested deeper than any tool writes them")
    for key, value in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        if isinstance(key, str) and re.fullmatch(r"\w+(\.\w+)+", key):
            around = any(f"{module}.".startswith(f"{key}.") for module in (*linears, *containers))
            if not around and not key.startswith(tuple(f"{module}." for module in linears)):
                continue  # settings of a module that is not loaded here
        if isinstance(key, str) and (key in _UNDERSTOOD or _SUSPICIOUS.search(key)):
            if value not in (None, False, 0, "", "none", [], {}):
                yield path, key, value
        else:
            yield from _suspicious(value, linears, containers, (*path, str(key)))


# What each tool's setting leaves to do: a reason to refuse, or None.


def _compressed_tensors(value: Any, linears: list[str], containers: list[str]) -> str | None:
    """``transform_config``: groups of applications, each with targets, a location and modules to ignore.

    Locations are those of compressed-tensors' TransformLocation: of the weights' two, nothing is left to do; two are
    about the attention's keys and queries.
    """
    groups = value.get("config_groups") if isinstance(value, dict) else None
    if not isinstance(groups, dict):
        return "which cannot be understood"
    for group in groups.values():
        applications = group.get("apply", []) if isinstance(group, dict) else None
        if not isinstance(applications, list) or not all(isinstance(entry, dict) for entry in applications):
            return "which cannot be understood"
        for entry in applications:
            location = entry.get("location")
            if location in ("weight_input", "weight_output", "k_cache", "q_attn"):
                continue
            for target in _strings(entry.get("targets")):
                hit = _targeted(target, _strings(entry.get("ignore")), linears, containers)
                if hit is not None:
                    return f"an online transform of the {brief(location)} of {brief(target)}, which {hit} is"
    return None


def _strings(value: Any) -> list[str]:
    return [str(entry) for entry in (value if isinstance(value, list) else [] if value is None else [value])]


def _targeted(target: str, ignore: list[str], linears: list[str], containers: list[str]) -> str | None:
    """The module that ``target`` means and ``ignore`` leaves, if any."""
    is_class = re.fullmatch(r"[A-Z]\w*", target) is not None
    every_linear = is_class and ("Linear" in target or target == "Module")
    matched = [name for name in linears if every_linear or _matches(target, name)]
    if not matched:
        # The classes of the containers are in no file; these are certainly not among them.
        another = is_class and not re.search("Attention|Norm|Embedding|Rotary|Vision|Conv", target)
        matched = [name for name in containers if another or _matches(target, name)]
    if "Linear" in ignore or "Module" in ignore:
        matched = [name for name in matched if name not in linears]
    return next((name for name in matched if not any(_matches(entry, name) for entry in ignore)), None)


def _matches(target: str, module: str) -> bool:
    """compressed-tensors' rule for names: the module's own, or a pattern that fits from its start."""
    if not target.startswith("re:"):
        return target in _names(module)
    try:
        pattern = re.compile(target[3:])
    except re.error:
        raise CheckpointError(f"transform_config: found {brief(target)}, expected a regular expression") from None
    return any(pattern.match(name) for name in _names(module))


@functools.lru_cache(maxsize=2**14)
def _names(module: str) -> frozenset[str]:
    """What a module in a file may have been called in memory, where the tool matched it.

    transformers renames on saving: roots, Mixtral's, Kimi Linear's and DeepSeek-V4's MoE modules and their linear
    layers, and Gemma 4's experts, which have no module around them there.
    """
    parts = re.fullmatch(r"(?:[\w.]+\.)?(layers\.\d+)((?:\.\w+)*)", module)
    if parts is None:
        return frozenset([module])
    inner = {parts[2], re.sub(r"^\.(block_sparse_moe|ffn|moe)\b", ".mlp", parts[2]), re.sub(r"^\.moe\b", "", parts[2])}
    for stored, in_memory in (("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj")):
        inner |= {re.sub(rf"\.{stored}$", f".{in_memory}", name) for name in inner}
    roots = ("model.", "model.language_model.", "language_model.model.", "")
    return frozenset([module, *(f"{root}{parts[1]}{name}" for root in roots for name in inner)])


def _autoround(value: Any, linears: list[str], containers: list[str]) -> str | None:
    """AutoRound's ``rotation_config`` of either algorithm, Hadamard or SpinQuant."""
    if not isinstance(value, dict):
        return "a rotation that may be online"
    if value.get("algorithm") == "spinquant" or "online_r1_rotation" in value or "r4" in value:
        return _spinquant(value, linears, containers)
    fused = value.get("fuse_online_to_weight") is True or value.get("allow_online_rotation") is False
    return None if fused else "a rotation that AutoRound applies to the input of every linear layer"


def _spinquant(value: Any, linears: list[str], containers: list[str]) -> str | None:
    """AutoRound's SpinQuant: R1 is online unless it says otherwise; R2 is fused, R3 is the attention's."""
    if not isinstance(value, dict):
        return "a rotation that may be online"
    online_r1 = value.get("r1", True) and value.get("online_r1_rotation", True)
    if online_r1 or value.get("r4", False) or value.get("trainable_smooth", False):
        return "a rotation (R1 or R4) that AutoRound applies to the input of the experts' linear layers"
    return None


def _quark(value: Any, linears: list[str], containers: list[str]) -> str | None:
    """Quark's ``algo_config``: a list of algorithms. Only its rotations leave something to do at run time."""
    for entry in value if isinstance(value, list) else [value]:
        name = entry.get("name") if isinstance(entry, dict) else entry
        if not isinstance(entry, dict) or not isinstance(name, str):
            return "which cannot be understood"
        if not re.search(r"rotat|quarot|hadamard|spinquant", name, re.IGNORECASE):
            continue  # GPTQ, AWQ, SmoothQuant: all is in the weights and norms
        if not ((entry.get("r1", True) and entry.get("online_r1_rotation")) or entry.get("r4")):
            continue
        online = entry.get("online_config")
        layers = online.get("online_rotation_layers") if isinstance(online, dict) else None
        patterns = _strings(layers)
        if not patterns:
            return "a rotation (R1 or R4) that Quark applies to the input of linear layers"
        hit = next((name for name in linears if any(fnmatch.fnmatchcase(name, entry) for entry in patterns)), None)
        if hit is not None:
            return f"a rotation that Quark applies to the input of {hit}"
    return None


def _scale_format(value: Any, linears: list[str], containers: list[str]) -> str | None:
    """Quark's AMD FP4: block scales in bytes of E5M3, which look like MXFP4's in a file."""
    return "scales that neither NVFP4 nor MXFP4 has" if "e5m3" in str(value).lower() else None


def _unknown(value: Any, linears: list[str], containers: list[str]) -> str | None:
    return "a setting that is not known here and may be about activations"


_UNDERSTOOD: dict[str, Callable[[Any, list[str], list[str]], str | None]] = {
    "transform_config": _compressed_tensors,
    "rotation_config": _autoround,
    "spinquant_config": _spinquant,
    "algo_config": _quark,
    "scale_format": _scale_format,
    "scale_type": _scale_format,
}
