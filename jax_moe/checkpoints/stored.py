"""How published checkpoints spell and store one projection of all experts: names, orientation, 4-bit format.

Two things vary. *Where*: a tensor for each part of each expert, or one tensor for all of them. *What*: NVFP4 with
a global scale that is multiplied (ModelOpt) or divided by (compressed-tensors), or MXFP4. :func:`find` recognises a
combination by its tensor names and checks every header against it, so that whatever is read later has the right type
and shape. ``docs/checkpoint-formats.md`` has the tables.
"""

from collections.abc import Iterator, Set
import dataclasses
import math
import re

import ml_dtypes
import numpy as np

from jax_moe import nvfp4
from jax_moe.checkpoints.families import Family
from jax_moe.checkpoints.files import CheckpointError, Files, FLOATS, read_floats, read_rows, TensorInfo

_MX_BLOCK_SIZE = 32


class OtherFormatError(CheckpointError):
    """Experts of which no matrix has 4 bits: their layer is whole, in another format."""


@dataclasses.dataclass(frozen=True)
class Format:
    """The tensors of a 4-bit matrix, by suffix, and what its scales mean.

    Attributes:
      name: for messages and tables.
      payload, block_scale, global_scale, input_scale: the suffixes; no global scale is MXFP4.
      divides: scales of whole tensors are divided by.
      telling: the suffixes that tell this format from those after it; where there are none, all weight tensors do.
    """

    name: str
    payload: str
    block_scale: str
    global_scale: str | None = None
    input_scale: str | None = None
    divides: bool = False
    telling: tuple[str, ...] = ()

    @property
    def is_mx(self) -> bool:
        return self.global_scale is None


# Quark's NVFP4 has ModelOpt's weights; an activation scale of another name (seen in amd/GLM-5.1-NVFP4).
QUARK = Format("Quark NVFP4", "weight", "weight_scale", "weight_scale_2", "input_scale_2", telling=("input_scale_2",))
MODELOPT = Format("ModelOpt NVFP4", "weight", "weight_scale", "weight_scale_2", "input_scale")
COMPRESSED_TENSORS = Format(
    "compressed-tensors NVFP4",
    "weight_packed",
    "weight_scale",
    "weight_global_scale",
    "input_global_scale",
    divides=True,
)
COMPRESSED_TENSORS_MX = Format("compressed-tensors MXFP4", "weight_packed", "weight_scale")
MODELOPT_MX = Format("ModelOpt MXFP4", "weight", "weight_scale")
# As DeepSeek-V4 is published: two codes in an I8, scales F8_E8M0.
DEEPSEEK_MX = Format("DeepSeek MXFP4", "weight", "scale")
FUSED_MODELOPT = Format("ModelOpt NVFP4, fused", "", "_weight_scale", "_weight_scale_2", "_input_scale")
FUSED_MX = Format("MXFP4, fused", "_blocks", "_scales")

# Formats that extend others come first: they are told apart by the tensors that only they have.
_PER_EXPERT = (QUARK, MODELOPT, COMPRESSED_TENSORS, COMPRESSED_TENSORS_MX, MODELOPT_MX, DEEPSEEK_MX)
_FUSED = (FUSED_MODELOPT, FUSED_MX)
_FUSED_LINEARS = ("gate_up_proj", "down_proj")


@dataclasses.dataclass(frozen=True)
class Stored:
    """One projection of every expert, as the files have it: ``E`` experts, ``P`` parts, each ``[N, C]``.

    Attributes:
      files: the checkpoint.
      format: of its tensors.
      module: the module that holds the linear layers, where ``{}`` stands for the expert.
      parts: the name of the linear layer of each part, or the one of a fused tensor.
      num_experts, num_parts, num_rows, contraction: E, P, N and C.
      fused: one tensor holds all experts, on its first axis, and all parts.
      interleaved: in a fused tensor, parts alternate row by row instead of following each other.
      has_bias: whether there are biases.
    """

    files: Files
    format: Format
    module: str
    parts: tuple[str, ...]
    num_experts: int
    num_parts: int
    num_rows: int
    contraction: int
    fused: bool
    interleaved: bool
    has_bias: bool

    @property
    def format_name(self) -> str:
        return self.format.name

    @property
    def has_input_scale(self) -> bool:
        return self.format.input_scale is not None and any(
            self._name(self.format.input_scale, expert, part) in self.files.names() for expert, part in self._pairs()
        )

    def payload(self, expert: int, part: int, rows: slice = slice(None)) -> np.ndarray:
        """uint8 ``[N, C/2]``, or ``rows`` of it: a view of the file where possible."""
        return self._matrix(self.format.payload, expert, part, rows).view(np.uint8)

    def block_scale(self, expert: int, part: int, rows: slice = slice(None)) -> np.ndarray:
        """float8_e4m3fn ``[N, C/16]``, or ``rows`` of it.

        Raises:
          CheckpointError: one is NaN or negative, or MXFP4 scales that NVFP4 cannot represent.
        """
        if not self.format.is_mx:
            scale = self._matrix(self.format.block_scale, expert, part, rows)
            check_block_scale(scale, f"{self._info(self.format.block_scale, expert, part)}: expert {expert}")
            return scale
        exponent, base = self._mx_exponents(expert, part)
        scale = np.ldexp(np.float32(1), exponent[rows] - base).astype(ml_dtypes.float8_e4m3fn)
        return np.repeat(scale, _MX_BLOCK_SIZE // nvfp4.BLOCK_SIZE, axis=1)

    def global_scale(self, expert: int, part: int) -> np.float32:
        """The scale that is multiplied.

        Raises:
          CheckpointError: it is negative or not finite, or see :meth:`block_scale`.
        """
        if self.format.global_scale is None:
            _, base = self._mx_exponents(expert, part)
            return np.ldexp(np.float32(1), base)
        scale, multiplied = self._scalar(self.format.global_scale, expert, part)
        if not (np.isfinite(multiplied) and scale >= 0):
            info = self._info(self.format.global_scale, expert, part)
            convention = "its reciprocal is multiplied" if self.format.divides else "it is multiplied"
            raise CheckpointError(
                f"{info}: expert {expert}: found a scale of {scale} ({convention}), expected it finite and not negative"
            )
        return multiplied

    def input_scale(self, expert: int, part: int) -> np.float32 | None:
        """The activation scale that is multiplied; None if absent or of an expert that was never calibrated."""
        suffix = self.format.input_scale
        if suffix is None or self._name(suffix, expert, part) not in self.files.names():
            return None
        _, multiplied = self._scalar(suffix, expert, part)
        return multiplied if np.isfinite(multiplied) and multiplied > 0 else None

    def bias(self, expert: int, part: int) -> np.ndarray:
        """float32 ``[N]``.

        Raises:
          CheckpointError: one is not finite.
        """
        info = self._info(self._bias_suffix, expert, part)
        if not self.fused:
            return read_floats(info)
        return self._split(read_floats(info, expert, expert + 1)[0], part)

    def check(self) -> None:
        """Checks the dtype and shape of every tensor, from the headers only.

        Raises:
          CheckpointError: a tensor is missing or has another dtype or shape.
        """
        rows, contraction = self.num_rows, self.contraction
        block = _MX_BLOCK_SIZE if self.format.is_mx else nvfp4.BLOCK_SIZE
        scale_dtypes = ("U8", "F8_E8M0") if self.format.is_mx else ("F8_E4M3",)
        if self.format == FUSED_MX:
            payload_shape = (rows, contraction // block, block // 2)
        else:
            payload_shape = (rows, contraction // 2)
        self._check(self.format.payload, ("U8", "I8") if self.format == DEEPSEEK_MX else ("U8",), payload_shape)
        self._check(self.format.block_scale, scale_dtypes, (rows, contraction // block))
        if self.has_bias:
            self._check(self._bias_suffix, FLOATS, (rows,))
        for suffix in (self.format.global_scale, self.format.input_scale):
            if suffix is not None:
                self._check_scalar(suffix, required=suffix == self.format.global_scale)

    def expected_names(self) -> Set[str]:
        """Every tensor name that belongs to this projection, the optional ones too."""
        suffixes = {self.format.payload, self.format.block_scale, self.format.global_scale, self.format.input_scale}
        suffixes.add(self._bias_suffix if self.has_bias else None)
        return {
            self._name(suffix, expert, part)
            for suffix in suffixes
            if suffix is not None
            for expert, part in self._pairs()
        }

    def shards(self) -> Set[str]:
        return {str(self.files.names()[name]) for name in self.expected_names() if name in self.files.names()}

    @property
    def _bias_suffix(self) -> str:
        return "_bias" if self.fused else "bias"

    def _pairs(self) -> Iterator[tuple[int, int]]:
        """The experts and parts that have tensors of their own; a fused tensor goes by the first."""
        if self.fused:
            return iter([(0, 0)])
        return ((expert, part) for expert in range(self.num_experts) for part in range(self.num_parts))

    def _name(self, suffix: str, expert: int, part: int) -> str:
        if self.fused:
            return f"{self.module}{self.parts[0]}{suffix}"
        return f"{self.module.replace('{}', str(expert))}{self.parts[part]}.{suffix}"

    def _info(self, suffix: str, expert: int, part: int) -> TensorInfo:
        return self.files.info(self._name(suffix, expert, part))

    def _matrix(self, suffix: str, expert: int, part: int, rows: slice = slice(None)) -> np.ndarray:
        info = self._info(suffix, expert, part)
        if not self.fused:
            return read_rows(info, *rows.indices(self.num_rows)[:2])
        # Only this expert's rows: mapping all experts would keep the whole layer in memory a second time.
        matrix = read_rows(info, expert, expert + 1)[0]
        matrix = matrix.reshape(matrix.shape[0], -1) if self.format == FUSED_MX else matrix.T
        return self._split(matrix, part)[rows]

    def _split(self, array: np.ndarray, part: int) -> np.ndarray:
        if self.interleaved:
            return array[part :: self.num_parts]
        return array[part * self.num_rows : (part + 1) * self.num_rows]

    def _scalar(self, suffix: str, expert: int, part: int) -> tuple[np.float32, np.float32]:
        """A scale of a whole tensor as it is stored, and as it is multiplied; that is NaN for what is not finite."""
        values = read_rows(self._info(suffix, expert, part)).astype(np.float32).reshape(-1)
        if values.size > 1:
            # Fused: a scale for each expert, or for each expert and part.
            values = values.reshape(self.num_experts, -1)[expert]
            values = values[part : part + 1] if values.size > 1 else values
        scale = values[0]
        if not np.isfinite(scale):  # else the reciprocal of infinity were a zero like any other
            return scale, np.float32(np.nan)
        with np.errstate(divide="ignore", over="ignore"):
            return scale, np.float32(1) / scale if self.format.divides else scale

    def _check(self, suffix: str, dtypes: tuple[str, ...], shape: tuple[int, ...]) -> None:
        if self.fused:
            rows, *rest = shape
            all_rows = rows * self.num_parts
            # ModelOpt keeps the fused tensors of these families as [E, in, out]; MXFP4 ones are [E, out, in].
            is_transposed = self.format == FUSED_MODELOPT and len(shape) == 2
            shape = (self.num_experts, *((rest[0], all_rows) if is_transposed else (all_rows, *rest)))
        for expert, part in self._pairs():
            info = self._info(suffix, expert, part)
            if info.dtype not in dtypes or info.shape != shape:
                another = suffix == self.format.payload and info.dtype not in dtypes
                hint = "this layer is not in NVFP4 or MXFP4" if another else self.format.name
                raise CheckpointError(
                    f"{info}: found {info.summary}, expected {' or '.join(dtypes)} {list(shape)} ({hint})"
                )

    def _check_scalar(self, suffix: str, *, required: bool) -> None:
        sizes = {1, self.num_experts, self.num_experts * self.num_parts} if self.fused else {1}
        for expert, part in self._pairs():
            if not required and self._name(suffix, expert, part) not in self.files.names():
                continue
            info = self._info(suffix, expert, part)
            if info.dtype not in FLOATS or math.prod(info.shape) not in sizes:
                count = " or ".join(map(str, sorted(sizes)))
                raise CheckpointError(f"{info}: found {info.summary}, expected {'/'.join(FLOATS)} of {count} value(s)")

    def _mx_exponents(self, expert: int, part: int) -> tuple[np.ndarray, int]:
        """Exponents of 2 ``[N, C/32]`` and the base to take from them, so that e4m3 has the difference exactly.

        e4m3 represents the powers of two from 2^-9 to 2^8, so blocks may differ by up to 2^17. A block of zeros has
        no say: its exponent is moved into the range.
        """
        stored = self._matrix(self.format.block_scale, expert, part).view(np.uint8)
        info = self._info(self.format.block_scale, expert, part)
        if (stored == 255).any():
            raise CheckpointError(f"{info}: expert {expert}: found an e8m0 scale of NaN (255), expected numbers")
        exponent = stored.astype(np.int32) - 127
        used = exponent
        if exponent.size and np.ptp(exponent) > 17:
            codes = self.payload(expert, part).reshape(*exponent.shape, -1) & 0x77
            used = exponent[codes.any(-1)]
        low, high = (int(used.min()), int(used.max())) if used.size else (0, 0)
        if high - low > 17:
            raise CheckpointError(
                f"{info}: expert {expert}: found MXFP4 block scales from 2^{low} to 2^{high}, expected them within a "
                "factor of 2^17: NVFP4 block scales (e4m3) cannot represent this matrix without loss"
            )
        base = max(high - 8, -126)  # the global scale stays a normal float32: XLA flushes subnormal ones to zero
        return np.clip(exponent, base - 9, base + 8), base


def check_block_scale(scale: np.ndarray, where: str) -> None:
    """Refuses e4m3 block scales that are NaN or negative.

    NVFP4's scales are unsigned: arithmetic that multiplies them sees a sign, tensor cores that take NVFP4 do not.
    """
    codes = scale.view(np.uint8)
    bad = (codes > 0x7E) & (codes != 0x80)  # of the codes with a sign, only -0 is a number that both read alike
    if bad.any():
        raise CheckpointError(
            f"{where}: found a block scale of {scale[bad][0]}, expected numbers that are not negative"
        )


def find(
    files: Files, module: str, family: Family, num_experts: int, hidden: int, intermediate: int
) -> tuple[Stored, Stored]:
    """Finds gate_up and down of the experts of ``module`` ("model.layers.3.mlp") and checks their headers.

    Raises:
      OtherFormatError: the experts are not in a 4-bit format.
      CheckpointError: they are not in a known one, or a tensor is missing, has another dtype or
        shape, or has a name that the format does not explain.
    """
    prefix = f"{module}.experts."
    present = files.under(prefix)
    _check_four_bits(files, module, present)

    def stored(format: Format, linears: tuple[str, ...], num_rows: int, contraction: int) -> Stored:
        fused = format in _FUSED
        return Stored(
            files=files,
            format=format,
            module=prefix if fused else prefix + "{}.",
            parts=linears,
            num_experts=num_experts,
            num_parts=2 if linears == _FUSED_LINEARS[:1] else len(linears),
            num_rows=num_rows,
            contraction=contraction,
            fused=fused,
            interleaved=family.interleaved,
            has_bias=any(name.endswith("_bias" if fused else ".bias") for name in present),
        )

    candidates = [(format, linears) for linears in family.projections for format in _PER_EXPERT]
    candidates += [(format, _FUSED_LINEARS) for format in _FUSED]
    for format, linears in candidates:
        if not _is_recognised(format, linears, prefix, present):
            continue
        if format in _PER_EXPERT and num_experts > len(present):
            raise CheckpointError(
                f"{files.directory}: {module}: found {len(present)} tensors, expected {num_experts} experts"
            )
        gate_up = stored(format, linears[:-1], intermediate, hidden)
        down = stored(format, linears[-1:], hidden, intermediate)
        gate_up.check()
        down.check()
        _check_explained(files, present - gate_up.expected_names() - down.expected_names(), format)
        return gate_up, down
    example = files.info(min(present))
    raise CheckpointError(f"{example}: found {example.summary}, expected the experts of {module} in NVFP4 or MXFP4")


def _check_four_bits(files: Files, module: str, present: Set[str]) -> None:
    infos = [files.info(name) for name in sorted(present)]
    if any(info.dtype in ("U8", "I8") and "scale" not in info.name.rpartition(".")[2] for info in infos):
        return
    example = max(infos, key=lambda info: info.nbytes)
    raise OtherFormatError(
        f"{example}: found {example.summary}, but the experts of {module} are not in NVFP4 or MXFP4; "
        "load_experts(..., quantize=True) can quantise what is in bfloat16 or FP8"
    )


def find_linear(files: Files, name: str) -> Stored:
    """A single 4-bit linear layer outside the experts, of whatever shape it has.

    Raises:
      CheckpointError: it is not in a known 4-bit format, or its tensors do not have the format's dtypes and shapes.
    """
    present = files.under(f"{name}.")
    parent, _, linear = name.rpartition(".")
    module = f"{parent}." if parent else ""
    for format in _PER_EXPERT:
        if _is_recognised(format, (linear,), module, present, expert=""):
            payload = files.info(f"{name}.{format.payload}")
            num_rows, half = payload.shape if len(payload.shape) == 2 else (0, 0)
            linear = Stored(
                files=files,
                format=format,
                module=module,
                parts=(linear,),
                num_experts=1,
                num_parts=1,
                num_rows=num_rows,
                contraction=2 * half,
                fused=False,
                interleaved=False,
                has_bias=False,
            )
            linear.check()
            return linear
    if not present:
        raise CheckpointError(f"{files.directory}: {name}.weight: found no such tensor, expected a linear layer")
    example = files.info(min(present))
    raise CheckpointError(f"{example}: found {example.summary}, expected {name} in bfloat16, FP8, NVFP4 or MXFP4")


def _check_explained(files: Files, unexplained: Set[str], format: Format) -> None:
    if unexplained:
        raise CheckpointError(
            f"{files.info(min(unexplained))}: found a tensor that {format.name} does not have here; leaving it out "
            "could change the result"
        )


def _is_recognised(
    format: Format, linears: tuple[str, ...], prefix: str, present: Set[str], expert: str = r"\d+\."
) -> bool:
    """Whether any expert has, for any of ``linears``, each of the tensors that tell this format from the others."""
    telling = format.telling or (format.payload, format.block_scale, format.global_scale)
    expert, separator = ("", "") if format in _FUSED else (expert, r"\.")
    names = "|".join(map(re.escape, linears))
    return all(
        any(
            re.fullmatch(f"{re.escape(prefix)}{expert}({names}){separator}{re.escape(suffix)}", name)
            for name in present
        )
        for suffix in telling
        if suffix is not None
    )
