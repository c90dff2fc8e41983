"""What CuTe DSL's own layout functions say of ``tcgen05``'s operands, scales, sums and copies; needs the DSL, no GPU.

They are evaluated while the DSL traces a function that does nothing else. Layouts come back as plain ``(shape,
stride)`` of nested tuples.
"""

from typing import Any

from cutlass import BFloat16, Float4E2M1FN, Float8E4M3FN, Float32
import cutlass.cute as cute
from cutlass.cute.nvgpu import OperandMajorMode, tcgen05
import cutlass.utils.blackwell_helpers as blackwell
import cutlass.utils.blockscaled_layout as blockscaled

TARGET = "sm_100f"


def _group(group: int):
    return tcgen05.CtaGroup.TWO if group == 2 else tcgen05.CtaGroup.ONE


def fp4_operation(width: int, group: int = 1):
    shape = (128 * group, width, 64)
    return tcgen05.MmaMXF4NVF4Op(Float8E4M3FN, shape, _group(group), tcgen05.OperandSource.SMEM)


def bf16_operation(width: int, group: int = 1):
    shape = (128 * group, width, 16)
    return tcgen05.MmaF16BF16Op(
        BFloat16, Float32, shape, _group(group), tcgen05.OperandSource.TMEM, OperandMajorMode.K, OperandMajorMode.K
    )


def of_products(widths, group: int) -> dict[int, dict[str, Any]]:
    """By width and name; of operands in shared memory a triple, the swizzle's name first."""
    found = {}

    def evaluate():
        for width in widths:
            found[width] = _of_product(width, group)

    _trace(evaluate)
    return found


def _of_product(width: int, group: int) -> dict[str, Any]:
    mma, tile = cute.make_tiled_mma(fp4_operation(width, group)), (128 * group, width, 256)
    a_scales = blockscaled.make_smem_layout_sfa(mma, tile, 16, 1)
    b_scales = blockscaled.make_smem_layout_sfb(mma, tile, 16, 1)
    stage = (None, None, None, 0)
    bf16, bf16_tile = cute.make_tiled_mma(bf16_operation(width, group)), (128 * group, width, 64)
    return {
        "a": _swizzled(blackwell.make_smem_layout_a(mma, tile, Float4E2M1FN, 1)),
        "b": _swizzled(blackwell.make_smem_layout_b(mma, tile, Float4E2M1FN, 1)),
        "a_scales": _plain(a_scales),
        "b_scales": _plain(b_scales),
        "a_scale_columns": _plain(blockscaled.make_tmem_layout_sfa(mma, tile, 16, cute.slice_(a_scales, stage))),
        "b_scale_columns": _plain(blockscaled.make_tmem_layout_sfb(mma, tile, 16, cute.slice_(b_scales, stage))),
        "sums": _plain(mma.make_fragment_C(mma.partition_shape_C(tile[:2])).layout),
        "bf16_b": _swizzled(blackwell.make_smem_layout_b(bf16, bf16_tile, BFloat16, 1)),
        "bf16_a_columns": _plain(bf16.make_fragment_A(bf16.partition_shape_A((128 * group, 64))).layout),
        "firsts": [_firsts(product.get_slice(cta), tile) for product in (mma, bf16) for cta in range(group)],
        "bf16_sums": _plain(bf16.make_fragment_C(bf16.partition_shape_C(bf16_tile[:2])).layout),
    }


def _firsts(mine, tile) -> tuple[Any, ...]:
    """First (row, value) that a CTA of the pair has of A, of B and of the sums."""
    rows, columns, values = tile
    parts = (
        mine.partition_A(cute.make_identity_tensor((rows, values))),
        mine.partition_B(cute.make_identity_tensor((columns, values))),
        mine.partition_C(cute.make_identity_tensor((rows, columns))),
    )
    return tuple(part[0] for part in parts)


def of_load(blocks: int) -> list[list[tuple[int, int]]]:
    """``tcgen05.ld.16x256b.x<blocks>`` of 128 lanes: of each thread the (lane, column) of its values, in order."""
    repetition = getattr(tcgen05.Repetition, f"x{blocks}")
    return _coordinates(tcgen05.Ld16x256bOp(repetition), 8 * blocks, lambda copy: copy.partition_D)


def of_store(columns: int) -> list[list[tuple[int, int]]]:
    """``tcgen05.st.32x32b.x<columns>``, likewise."""
    repetition = getattr(tcgen05.Repetition, f"x{columns}")
    return _coordinates(tcgen05.St32x32bOp(repetition), columns, lambda copy: copy.partition_S)


def _coordinates(operation, columns, partition) -> list[list[tuple[int, int]]]:
    found = []

    def evaluate():
        base = cute.make_ptr(Float32, 0, cute.AddressSpace.tmem, assumed_align=16)
        sums = cute.make_tensor(base, cute.make_layout((128, columns), stride=(1 << 16, 1)))
        copy = tcgen05.make_tmem_copy(cute.make_copy_atom(operation, Float32), sums)
        for thread in range(128):
            places = partition(copy.get_slice(thread))(cute.make_identity_tensor((128, columns)))
            found.append([places[i] for i in range(cute.size(places))])

    _trace(evaluate)
    return found


def _trace(evaluate) -> None:
    @cute.jit
    def nothing_else():
        evaluate()

    cute.compile(nothing_else, options=f"--gpu-arch {TARGET}")


def _plain(layout):
    return layout.shape, layout.stride


def _swizzled(layout):
    return str(layout.inner), layout.outer.shape, layout.outer.stride
