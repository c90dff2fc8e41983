"""``convert``: the MoE layers of a checkpoint as one file each, with the experts in the layout that a target runs.

A converted directory is a checkpoint again: ``config.json``, and ``layer-NNNNN.safetensors`` with the layer's router
and shared expert as they were and, in place of the published experts, the leaves of :class:`jax_moe.Experts`
(``model.layers.3.mlp.experts.gate_up.payload``, ...), the expert axis first, so that a shard of them is one stretch
of the file. ``jax_moe.json`` and a digest in each file say what was converted: a second run continues only that.
"""

from collections.abc import Iterable, Iterator
import contextlib
import fcntl
import functools
import gc
import hashlib
import json
import os
from pathlib import Path
from typing import BinaryIO
import warnings

import numpy as np

from jax_moe import layouts, progress
from jax_moe.checkpoints import leaves
from jax_moe.checkpoints.converted import named_leaves, VERSION
from jax_moe.checkpoints.files import (
    brief,
    CheckpointError,
    expand_home,
    read_bytes,
    read_header,
    read_json,
    read_rows,
    TEMPORARY_SUFFIX,
    write_atomically,
    write_tensors,
)
from jax_moe.checkpoints.layer import open_experts
from jax_moe.checkpoints.model import Model, open_model
from jax_moe.checkpoints.quantization import CONFIG_FILES, refuse_online_transforms
from jax_moe.checkpoints.stored import OtherFormatError
from jax_moe.experts import CANONICAL
from jax_moe.kernels import targets
from jax_moe.preparation import prepare

MANIFEST = "jax_moe.json"
_MANIFEST_VERSION = "2"
"""Of the manifest: 1 had a digest of the headers, which two checkpoints of one model have in common."""


def convert(
    directory: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    layers: Iterable[int] | None = None,
    layout: str = CANONICAL,
    progress_bar: bool = True,
) -> list[int]:
    """Converts the MoE layers of a checkpoint, one at a time.

    A file appears under its final name only when it is complete and on disk, so a run that was killed loses the layer
    it was at, and the next run starts there. Two runs into one directory at once are refused.

    A directory holds the conversion of one checkpoint: before anything is written, the bytes of the checkpoint are
    compared with the digests of what is there already, wherever the checkpoint lies now. That reads them.

    Args:
      directory: the checkpoint, as for :func:`jax_moe.load_experts`; a converted one if its layout is canonical.
      output: the directory to write, made if needed.
      layers: only these; layers that ``output`` has already stay. Without it, every layer in NVFP4 or MXFP4; others are
        left out with a warning.
      layout: ``"canonical"``, another layout, or a target that has one for every precision.
      progress_bar: show a progress bar on a terminal.

    Returns:
      The layers that this call wrote; layers that were complete already are not in it.

    Raises:
      CheckpointError: the checkpoint is malformed, one of ``layers`` is not in NVFP4 or MXFP4, or ``output`` holds a
        conversion of something else. What the headers say of every layer is checked before anything is written.
      TypeError: one of ``layers`` is not an int.
      ValueError: unknown layout, no layers, or the checkpoint was itself converted to another target's.
    """
    layout = targets.layout_for(layout, None, "layout").name
    source, target = expand_home(directory), expand_home(output)
    model = open_model(source)
    numbers = _checked(model, layers, layout)
    target.mkdir(parents=True, exist_ok=True)
    if not (target / MANIFEST).exists() and any(target.glob("*.safetensors*")):
        raise CheckpointError(f"{target}: found a checkpoint, expected a new directory or the conversion to continue")
    configs = {name: (source / name).read_bytes() for name in CONFIG_FILES if (source / name).exists()}
    manifest = {
        "version": _MANIFEST_VERSION,
        "layout": layout,
        "config": {name: hashlib.sha256(content).hexdigest() for name, content in configs.items()},
        "source": str(source.resolve()),
    }
    written = []
    with _locked(target):
        _check_manifest(target / MANIFEST, manifest)
        complete = _complete(model, target, progress_bar)
        for leftover in target.glob(f"*{TEMPORARY_SUFFIX}"):
            leftover.unlink()
        write_atomically(target / MANIFEST, lambda file: file.write(json.dumps(manifest, indent=1).encode()))
        for name, content in configs.items():
            write_atomically(target / name, functools.partial(_write_bytes, content=content))
        for number in progress.track([n for n in numbers if n not in complete], "convert", enabled=progress_bar):
            _write_layer(model, number, _path(target, number), layout)
            written.append(number)
            gc.collect()  # until then jax keeps the host buffers that it took over, and the next layer comes on top
    return written


def _checked(model: Model, layers: Iterable[int] | None, layout: str) -> list[int]:
    """The layers to convert: nothing is written before each of them has passed."""
    numbers, skipped = [], {}
    if layers is not None:
        layers = list(layers)
        if not layers:
            raise ValueError("layers: got none, needs at least one, or None for every layer in NVFP4 or MXFP4")
    for number in model.modules if layers is None else dict.fromkeys(layers):  # each once
        try:
            found = open_experts(model, number).layout
        except OtherFormatError as error:
            if layers is not None:
                raise
            skipped[number] = error
            continue
        if found not in (CANONICAL, layout):
            raise ValueError(
                f"layout: got {layout!r}, but {model.files.directory} holds experts in layout {found!r}; "
                "convert the checkpoint that they came from"
            )
        beside = {name.rpartition(".")[0] for name in model.beside(number)}
        if beside:
            refuse_online_transforms(model.files, beside, [model.module(number)])
        numbers.append(int(number))
    if not numbers:
        raise next(iter(skipped.values()))
    if skipped:
        warnings.warn(f"layers left out: {', '.join(map(str, skipped))}; {next(iter(skipped.values()))}", stacklevel=3)
    return numbers


def _write_layer(model: Model, number: int, path: Path, layout: str) -> None:
    digest = _digest(model, number)
    source = open_experts(model, number)
    experts = leaves.to_jax(source.leaves(range(source.num_experts)), None, None, None, False)
    if layout != experts.layout:
        experts = prepare(experts, layout, progress=False)
    tensors = {f"{model.module(number)}.experts.{name}": np.asarray(leaf) for name, leaf in named_leaves(experts)}
    tensors |= {name: read_rows(model.files.info(name)) for name in model.beside(number)}
    metadata = {"format": "jax_moe", "version": VERSION, "layout": layout, "digest": digest}
    write_atomically(path, functools.partial(write_tensors, tensors=tensors, metadata=metadata))


def _write_bytes(file: BinaryIO, content: bytes) -> None:
    file.write(content)


def _path(target: Path, number: int) -> Path:
    return target / f"layer-{number:05d}.safetensors"


def _digest(model: Model, number: int) -> str:
    """Of all that a layer's file is made of, down to the last byte: another training run has the same headers."""
    digest = hashlib.sha256()
    for name in sorted({*model.beside(number), *model.files.under(f"{model.module(number)}.experts.")}):
        info = model.files.info(name)
        digest.update(repr((name, info.dtype, info.shape)).encode())
        for piece in read_bytes(info):
            digest.update(piece)
    return digest.hexdigest()


def _complete(model: Model, target: Path, progress_bar: bool) -> set[int]:
    """The layers that are there, whole, and of this checkpoint.

    Raises:
      CheckpointError: a layer is there of another one.
    """
    found = set()
    for path in progress.track(sorted(target.glob("layer-*.safetensors")), "compare", enabled=progress_bar):
        try:
            _, metadata = read_header(path)
        except CheckpointError:
            continue  # cut off, by a disk that failed: it is written again
        number = next((number for number in model.modules if path == _path(target, number)), None)
        if number is None or metadata.get("digest") != _digest(model, number):
            raise CheckpointError(
                f"{path}: found a layer that was not made from what {model.files.directory} holds now; convert into "
                "another directory, or remove this one"
            )
        found.add(number)
    return found


def _check_manifest(path: Path, manifest: dict) -> None:
    if not path.exists():
        return
    found = read_json(path)
    found["layout"] = layouts.current_name(found.get("layout"))
    for key in ("version", "layout", "config"):
        if found.get(key) != manifest[key]:
            raise CheckpointError(
                f"{path}: {key}: found {brief(found.get(key))}, expected {brief(manifest[key])}: this directory "
                f"holds the conversion of {brief(found.get('source'))}; convert into another one"
            )


@contextlib.contextmanager
def _locked(target: Path) -> Iterator[None]:
    with open(target / ".lock", "wb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel releases it however the process ends
        except BlockingIOError:
            raise CheckpointError(f"{target}: found another conversion at work in it, expected none") from None
        yield
