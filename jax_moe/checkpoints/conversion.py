"""``convert``: the MoE layers of a checkpoint as one file each, with the experts in the layout that a target runs.

A converted directory is a checkpoint again: ``config.json``, and ``layer-NNNNN.safetensors`` with the layer's router
and shared expert as they were and, in place of the published experts, the leaves of :class:`jax_moe.Experts`
(``model.layers.3.mlp.experts.gate_up.payload``, ...), the expert axis first, so that a shard of them is one stretch
of the file. ``jax_moe.json`` says what was converted, so that a second run continues only what it should.
"""

from collections.abc import Iterator
import contextlib
import dataclasses
import fcntl
import functools
import gc
import hashlib
import json
import os
from pathlib import Path

import jax
import numpy as np

from jax_moe import nvfp4, progress
from jax_moe.checkpoints import layer as published, leaves
from jax_moe.checkpoints.files import (
    brief,
    CheckpointError,
    Files,
    read_header,
    read_json,
    read_rows,
    TEMPORARY_SUFFIX,
    write_atomically,
    write_tensors,
)
from jax_moe.checkpoints.leaves import Leaf
from jax_moe.experts import CANONICAL, Experts, Projection, SM_90A
from jax_moe.prepare import prepare

MANIFEST = "jax_moe.json"
_VERSION = "1"


def convert(
    directory: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    layout: str = CANONICAL,
    progress_bar: bool = True,
) -> list[int]:
    """Converts every MoE layer of a checkpoint, one at a time.

    A file appears under its final name only when it is complete and on disk, so a run that was killed loses the layer
    it was at, and the next run starts there. Two runs into one directory at once are refused.

    Args:
      directory: the checkpoint, as for :func:`jax_moe.load_experts`; a converted one if its layout is canonical.
      output: the directory to write, made if needed.
      layout: ``"canonical"``, or a target of :func:`jax_moe.prepare`.
      progress_bar: show a progress bar on a terminal.

    Returns:
      The layers that this call wrote; layers that were complete already are not in it.

    Raises:
      CheckpointError: the checkpoint is malformed, or ``output`` holds a conversion of something else. What the
        headers say of every layer is checked before anything is written.
      ValueError: unknown layout, or the checkpoint was itself converted to another target's.
    """
    if layout not in (CANONICAL, SM_90A):
        raise ValueError(f"layout: got {layout!r}, needs {CANONICAL!r} or {SM_90A!r}")
    source, target = Path(directory), Path(output)
    model = published.open_model(source)
    if not model.blocks:
        raise CheckpointError(f"{source}: found no layer with experts, expected a mixture-of-experts checkpoint")
    for number in model.blocks:  # before anything is written
        found = open_experts(model, number).layout
        if found not in (CANONICAL, layout):
            raise ValueError(
                f"layout: got {layout!r}, but {source} holds experts in layout {found!r}; "
                "convert the checkpoint that they came from"
            )
    target.mkdir(parents=True, exist_ok=True)
    if not (target / MANIFEST).exists() and any(target.glob("*.safetensors*")):
        raise CheckpointError(f"{target}: found a checkpoint, expected a new directory or the conversion to continue")
    manifest = {
        "version": _VERSION,
        "layout": layout,
        "layers": list(model.blocks),
        "source": str(source.resolve()),
        "digest": _digest(model.files),
    }
    written = []
    with _locked(target):
        _check_manifest(target / MANIFEST, manifest)
        for leftover in target.glob(f"*{TEMPORARY_SUFFIX}"):
            leftover.unlink()
        config = (source / "config.json").read_bytes()
        write_atomically(target / MANIFEST, lambda file: file.write(json.dumps(manifest, indent=1).encode()))
        write_atomically(target / "config.json", lambda file: file.write(config))
        for number in progress.track(model.blocks, "convert", enabled=progress_bar):
            path = target / f"layer-{number:05d}.safetensors"
            if not _is_complete(path, manifest["digest"], layout):
                _write_layer(model, number, path, layout, manifest["digest"])
                written.append(number)
                gc.collect()  # until then jax keeps the host buffers that it took over, and the next layer comes on top
    return written


def _write_layer(model: published.Model, number: int, path: Path, layout: str, digest: str) -> None:
    source = open_experts(model, number)
    experts = leaves.to_jax(source.leaves(range(source.num_experts)), None, None, None, False)
    if layout != experts.layout:
        experts = prepare(experts, layout, progress=False)
    block = model.block(number)
    tensors = {f"{block}.experts.{name}": np.asarray(leaf) for name, leaf in _named(experts)}
    for name in model.files.names():
        if name.startswith(f"{block}.") and not name.startswith(f"{block}.experts."):
            tensors[name] = read_rows(model.files.info(name))
    metadata = {"format": "jax_moe", "version": _VERSION, "layout": layout, "digest": digest}
    write_atomically(path, functools.partial(write_tensors, tensors=tensors, metadata=metadata))


def _is_complete(path: Path, digest: str, layout: str) -> bool:
    try:
        _, metadata = read_header(path)
    except CheckpointError:
        return False
    return metadata.get("digest") == digest and metadata.get("layout") == layout


def _check_manifest(path: Path, manifest: dict) -> None:
    if not path.exists():
        return
    found = read_json(path)
    for key in ("version", "layout", "digest", "layers"):
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


def _digest(files: Files) -> str:
    """Of every tensor's place and type: enough to tell two checkpoints apart without reading them."""
    digest = hashlib.sha256()
    for name in sorted(files.names()):
        info = files.info(name)
        digest.update(repr((name, info.file.name, info.dtype, info.shape, info.offset)).encode())
    return digest.hexdigest()


def _named(experts: Experts) -> list[tuple[str, jax.Array]]:
    return [(jax.tree_util.keystr(path)[1:], leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(experts)]


@dataclasses.dataclass(frozen=True)
class ConvertedLayer:
    """The experts of a layer that ``convert`` wrote."""

    files: Files
    block: str
    expected: Experts
    sizes: published.Sizes

    @property
    def num_experts(self) -> int:
        return self.sizes.num_experts

    @property
    def format(self) -> str:
        return f"jax_moe, {self.layout}"

    @property
    def layout(self) -> str:
        return self.expected.layout

    def leaves(self, experts: range) -> Experts:
        """As :meth:`jax_moe.checkpoints.layer.ExpertLayer.leaves`."""

        def leaf(path, shape: jax.ShapeDtypeStruct) -> Leaf:
            info = self.files.info(f"{self.block}.experts.{jax.tree_util.keystr(path)[1:]}")

            def row(index: int, inner: tuple[slice, ...]) -> np.ndarray:
                if not info.shape:
                    return read_rows(info)
                return read_rows(info, experts[index], experts[index] + 1)[0][inner]

            lead = (len(experts),) if info.shape else ()
            return Leaf((*lead, *info.shape[1:]), np.dtype(shape.dtype), row, info.name)

        return jax.tree_util.tree_map_with_path(leaf, self.expected)


def open_experts(model: published.Model, number: int) -> "published.ExpertLayer | ConvertedLayer":
    """The experts of a layer, published or converted.

    Raises:
      CheckpointError: see :func:`jax_moe.load_experts`.
    """
    prefix = f"{model.block(number)}.experts."
    if f"{prefix}gate_up.payload" not in model.files.names():
        return published.open_experts(model, number)
    metadata = model.files.metadata(f"{prefix}gate_up.payload")
    if metadata.get("version") != _VERSION or metadata.get("layout") not in (CANONICAL, SM_90A):
        raise CheckpointError(
            f"{model.files.info(prefix + 'gate_up.payload')}: found version {metadata.get('version')!r} and layout "
            f"{metadata.get('layout')!r}, expected version {_VERSION} and a known layout"
        )
    expected = _expected(model, prefix, metadata["layout"])
    for name, leaf in _named(expected):
        info = model.files.info(prefix + name)
        if info.shape != leaf.shape or info.numpy_dtype != leaf.dtype:
            raise CheckpointError(f"{info}: found {info.summary}, expected {leaf.dtype} {list(leaf.shape)}")
    published.refuse_online_transforms(model, number)  # the configuration came along
    return ConvertedLayer(model.files, model.block(number), expected, published.sizes(model))


def _expected(model: published.Model, prefix: str, layout: str) -> Experts:
    """Shapes and dtypes of the leaves, from the config."""
    sizes = published.sizes(model)
    parts = 2 if model.family.activation(model.config).gated else 1

    def projection(
        name: str, rows: int, contraction: int, lead: tuple[int, ...], input_shape: tuple[int, ...]
    ) -> Projection:
        def shape(dtype, *axes: int, kind: str | None = None):
            present = kind is None or f"{prefix}{name}.{kind}" in model.files.names()
            return jax.ShapeDtypeStruct(axes, dtype) if present else None

        return Projection(
            payload=shape(np.uint8, *lead, rows, contraction // 2),
            block_scale=shape(jax.numpy.float8_e4m3fn, *lead, rows, contraction // nvfp4.BLOCK_SIZE),
            global_scale=shape(np.float32, *lead),
            input_scale=shape(np.float32, *input_shape, kind="input_scale"),
            bias=shape(np.float32, *lead, rows, kind="bias"),
        )

    experts = sizes.num_experts
    canonical = Experts(
        gate_up=projection("gate_up", sizes.intermediate, sizes.hidden, (experts, parts), ()),
        down=projection("down", sizes.hidden, sizes.intermediate, (experts,), (experts,)),
    )
    if layout == CANONICAL:
        return canonical
    return jax.eval_shape(functools.partial(prepare, target=layout, progress=False), canonical)
