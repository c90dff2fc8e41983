"""Kernels that issue a block's products by CuTe DSL's atoms and by ``sm100/device/tcgen05.py``; needs the DSL.

They are never run as they are: ``test_tcgen05_descriptors.py`` puts stores of the operands in the place of each copy of
scales and of each product. So they allocate nothing, fill nothing, wait for nothing.
"""

import dataclasses

from cutlass import BFloat16, Float4E2M1FN, Float8E4M3FN, Float32, Int32, Uint8, Uint32
import cutlass.cute as cute
from cutlass.cute.nvgpu import tcgen05 as dsl
from cutlass.memory import SmemAllocator
import cutlass.utils.blackwell_helpers as blackwell
import cutlass.utils.blockscaled_layout as blockscaled
import dsl_layouts

from jax_moe.kernels.device import entry
from jax_moe.kernels.device.entry import named
from jax_moe.kernels.sm100.device import tcgen05
from jax_moe.kernels.sm100.device.weight_block import ATOM_BYTES, BLOCK_BYTES, SCALE_BYTES

STEPS = 4
A_COLUMNS, A_SCALES, B_SCALES = 256, 320, 336
"""Columns of tensor memory behind the sums: w4a16's weights; scales of weights and of tokens."""


@dataclasses.dataclass(frozen=True)
class Spec:
    """Products of ``widths`` (ours: of a width of run time up to the last), of one CTA or of a pair."""

    issue: str
    fp4: bool
    group: int
    widths: tuple[int, ...]

    threads, cluster, overlap, tensor_core_ptx = 32, 1, False, "tcgen05.mma"

    @property
    def name(self) -> str:
        return f"{self.issue}_{'fp4' if self.fp4 else 'bf16'}_{self.group}_{'_'.join(map(str, self.widths))}"

    @property
    def implementation(self) -> str:
        return f"dsl_atoms:{self.issue}"

    @property
    def parameters(self) -> dict[str, str]:
        return {"log": "u8*", "base": "i32", "width": "i32"}


class _Issue(entry.Kernel):
    @cute.kernel
    def kernel(self, given):
        smem = SmemAllocator()
        smem.allocate_array(Uint8, 1 << 17)  # so that every bit of an address counts
        blocks = named(
            base=given.base,
            a=smem.allocate_array(Uint8, BLOCK_BYTES, byte_alignment=1024),
            b=smem.allocate_array(Uint8, 256 * 128, byte_alignment=1024),
            b_scales=smem.allocate_array(Uint8, 2 * SCALE_BYTES, byte_alignment=1024),
        )
        self._issue(blocks, given.width)


@dataclasses.dataclass(frozen=True)
class AccessSpec:
    """A warp's loads of sums and its store of weights; ``width`` is which warp of a warpgroup."""

    issue: str
    blocks: int

    threads, cluster, overlap, tensor_core_ptx = 32, 1, False, None
    parameters = {"log": "u8*", "base": "i32", "width": "i32"}  # noqa: RUF012

    @property
    def name(self) -> str:
        return f"{self.issue}_{self.blocks}"

    @property
    def implementation(self) -> str:
        return f"dsl_atoms:{self.issue}"


class DslAccess(entry.Kernel):
    """By the DSL's copies; the loads are of both halves of the warp's lanes."""

    @cute.kernel
    def kernel(self, given):
        tid, _, _ = cute.arch.thread_idx()
        blocks = self.spec.blocks
        repetition = getattr(dsl.Repetition, f"x{blocks}")
        self._copy(given, tid, dsl.Ld16x256bOp(repetition), 8 * blocks, True)
        self._copy(given, tid, dsl.St32x32bOp(dsl.Repetition.x32), 32, False)

    def _copy(self, given, tid, operation, columns, is_load):
        base = cute.make_ptr(Float32, given.base, cute.AddressSpace.tmem, assumed_align=16)
        memory = cute.make_tensor(base, cute.make_layout((128, columns), stride=(1 << 16, 1)))
        copy = dsl.make_tmem_copy(cute.make_copy_atom(operation, Float32), memory)
        mine = copy.get_slice(given.width * 32 + tid)
        if is_load:
            source, places = mine.partition_S(memory), mine.partition_D(cute.make_identity_tensor((128, columns)))
            values = cute.make_rmem_tensor(places.shape, Float32)
            cute.copy(copy, source, values)
        else:
            target, places = mine.partition_D(memory), mine.partition_S(cute.make_identity_tensor((128, columns)))
            values = cute.make_rmem_tensor(places.shape, Float32)
            values.fill(0.0)
            cute.copy(copy, values, target)


class OursAccess(entry.Kernel):
    """As the epilogues and the dequantising warps do."""

    @cute.kernel
    def kernel(self, given):
        lanes = given.base + (given.width << 21)
        for half in range(2):
            tcgen05.load_fragments(lanes + (half * 16 << 16), self.spec.blocks)
        tcgen05.store_columns(lanes, [Uint32(0)] * 32)


class Dsl(_Issue):
    """By the DSL's atoms, which elect a thread themselves."""

    def _issue(self, blocks, _):
        for width in self.spec.widths:
            (self._fp4 if self.spec.fp4 else self._bf16)(blocks, width)

    def _operand(self, pointer, layout, kind):
        return cute.make_tensor(cute.recast_ptr(pointer, layout.inner, dtype=kind), layout.outer)

    def _sums(self, mma, tile, base):
        layout = mma.make_fragment_C(mma.partition_shape_C(tile[:2])).layout
        return cute.make_tensor(cute.make_ptr(Float32, base, cute.AddressSpace.tmem, assumed_align=16), layout)

    def _fp4(self, blocks, width):
        mma = cute.make_tiled_mma(dsl_layouts.fp4_operation(width, self.spec.group))
        tile = (128 * self.spec.group, width, 256)
        a_layout = blackwell.make_smem_layout_a(mma, tile, Float4E2M1FN, 1)
        b_layout = blackwell.make_smem_layout_b(mma, tile, Float4E2M1FN, 1)
        a = mma.make_fragment_A(self._operand(blocks.a, a_layout, Float4E2M1FN))
        b = mma.make_fragment_B(self._operand(blocks.b, b_layout, Float4E2M1FN))
        a_scales = self._scales(
            mma, tile, blocks.a + 128 * 128, blocks.base + A_SCALES, blockscaled.make_smem_layout_sfa,
            blockscaled.make_tmem_layout_sfa,
        )  # fmt: skip
        b_scales = self._scales(
            mma, tile, blocks.b_scales, blocks.base + B_SCALES, blockscaled.make_smem_layout_sfb,
            blockscaled.make_tmem_layout_sfb,
        )  # fmt: skip
        sums = self._sums(mma, tile, blocks.base)
        for step in range(STEPS):
            mma.set(dsl.Field.ACCUMULATE, step > 0)
            mma.set(dsl.Field.SFA, a_scales[None, None, step].iterator)
            mma.set(dsl.Field.SFB, b_scales[None, None, step].iterator)
            cute.gemm(mma, sums, a[None, None, step, 0], b[None, None, step, 0], sums)

    def _scales(self, mma, tile, pointer, columns, in_shared, in_tensor):
        """Copies a block's scales; where they are then."""
        layout = in_shared(mma, tile, 16, 1)
        source = cute.make_tensor(cute.recast_ptr(pointer, dtype=Float8E4M3FN), layout)
        place = cute.make_ptr(Float8E4M3FN, columns, cute.AddressSpace.tmem, assumed_align=16)
        target = cute.make_tensor(place, in_tensor(mma, tile, 16, cute.slice_(layout, (None, None, None, 0))))
        group = dsl.CtaGroup.TWO if self.spec.group == 2 else dsl.CtaGroup.ONE
        atom = cute.make_copy_atom(dsl.Cp4x32x128bOp(group), Float8E4M3FN)
        compact = cute.filter_zeros(target)
        copy = dsl.make_s2t_copy(atom, compact)
        mine = copy.get_slice(0)
        descriptors = dsl.get_s2t_smem_desc_tensor(copy, mine.partition_S(cute.filter_zeros(source)))
        cute.copy(copy, descriptors[None, None, None, None, 0], mine.partition_D(compact))
        return target

    def _bf16(self, blocks, width):
        mma = cute.make_tiled_mma(dsl_layouts.bf16_operation(width, self.spec.group))
        tile = (128 * self.spec.group, width, 64)
        b_layout = blackwell.make_smem_layout_b(mma, tile, BFloat16, 1)
        b = mma.make_fragment_B(self._operand(blocks.b, b_layout, BFloat16))
        a_layout = mma.make_fragment_A(mma.partition_shape_A((tile[0], tile[2]))).layout
        columns = blocks.base + A_COLUMNS
        a = cute.make_tensor(cute.make_ptr(BFloat16, columns, cute.AddressSpace.tmem, assumed_align=16), a_layout)
        sums = self._sums(mma, tile, blocks.base)
        for step in range(STEPS):
            mma.set(dsl.Field.ACCUMULATE, step > 0)
            cute.gemm(mma, sums, a[None, None, step], b[None, None, step, 0], sums)


class Ours(_Issue):
    """As the main loop does."""

    def _issue(self, blocks, width):
        group, atoms = self.spec.group, -(-self.spec.widths[-1] // 128)
        a, b, b_scales = (Int32(array.toint()) for array in (blocks.a, blocks.b, blocks.b_scales))
        with cute.arch.elect_one():
            instruction = tcgen05.instruction_descriptor(self.spec.fp4, group, width)
            for step in range(STEPS if self.spec.fp4 else 0):
                atom = tcgen05.scale_descriptor(a + 128 * 128 + step * ATOM_BYTES)
                tcgen05.copy_scales(group, blocks.base + A_SCALES + 4 * step, atom)
                for i in range(atoms):
                    atom = tcgen05.scale_descriptor(b_scales + i * SCALE_BYTES + step * ATOM_BYTES)
                    tcgen05.copy_scales(group, blocks.base + B_SCALES + 4 * (step * atoms + i), atom)
            for step in range(STEPS):
                b_step = tcgen05.operand_descriptor(b + 32 * step)
                if self.spec.fp4:
                    tcgen05.multiply_fp4(
                        group, blocks.base, tcgen05.operand_descriptor(a + 32 * step), b_step, instruction,
                        blocks.base + A_SCALES + 4 * step, blocks.base + B_SCALES + 4 * step * atoms, Int32(step),
                    )  # fmt: skip
                else:
                    columns = blocks.base + A_COLUMNS + 8 * step
                    tcgen05.multiply_bf16(group, blocks.base, columns, b_step, instruction, Int32(step))
