"""What the lowering does for the kernels of a CPU and of a GPU in different ways.

Both have the operations of KernelSpec with the same arguments; they differ in what a block is, and in how
products take their left operands."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import sympy

from qgraph.codegen.digits import FEW_ROWS
from qgraph.codegen.dims import Dim, ceildiv, grain_of, product
from qgraph.codegen.memory import ITEM_SIZE, View
from qgraph.codegen.spec import (
    CUDA_ELEMENTWISE_BLOCK,
    CUDA_FEW_COLUMNS,
    CUDA_MANY_COLUMNS,
    CUDA_MANY_ROWS,
    CUDA_TILE,
    ELEMENTWISE_BLOCK,
    KernelSpec,
)
from qgraph.formats.nvfp4 import NVFP4

if TYPE_CHECKING:
    from qgraph.codegen.lowering.context import Linear, Lowering, Step

_ROUNDINGS = ("DynamicQDQInt8", "DynamicQDQNVFP4")
_VECTOR = 16  # bytes that GPU kernels read at once


class Device(ABC):
    """The kernels that a graph is lowered for.

    Attributes:
        integers: whether products take activations as digits or int8 codes, where the format has such a
            kernel.
        scratch: whether kernels get scratch memory for each worker.
        has_rotary: whether there is a kernel `rotary`.
        tile: rows and columns of a block of `matmul_dynamic`.
    """

    name: str
    integers: bool
    scratch: bool
    has_rotary: bool
    tile: tuple[int, int]

    @abstractmethod
    def elementwise_blocks(self, sizes: Sequence[Dim]) -> tuple[Dim, int]:
        """Blocks and grain of an elementwise kernel over these dims."""

    @abstractmethod
    def queries(self, head_dim: int) -> int:
        """Queries of a block of `attention`."""

    @abstractmethod
    def emit_linear(
        self, low: Lowering, linear: Linear, name: str, args: list[Any], rows: Dim, params: dict[str, Any]
    ) -> Step:
        """The steps of a matrix product; the one that stands for them in reports."""

    def readable(self, low: Lowering, view: View, name: str) -> View:
        """A dense view that products can read: itself, or a copy."""
        return view


class Cpu(Device):
    """Kernels of `codegen/kernels`."""

    name = "cpu"
    integers = True
    scratch = True
    has_rotary = False
    tile = (64, 32)

    def elementwise_blocks(self, sizes: Sequence[Dim]) -> tuple[Dim, int]:
        if len(sizes) == 1:
            return ceildiv(sizes[0], ELEMENTWISE_BLOCK), 1
        return product(sizes[:-1]), grain_of(sizes[-1])

    def queries(self, head_dim: int) -> int:
        return 32

    def emit_linear(
        self, low: Lowering, linear: Linear, name: str, args: list[Any], rows: Dim, params: dict[str, Any]
    ) -> Step:
        # In integers as many columns are done side by side, where there are enough for all threads.
        n_block, m_block = 64 if len(linear.x) > 1 and linear.n >= 1024 else 32, 128
        spec = KernelSpec.make(linear.op, n_block=n_block, m_block=m_block, **params)
        blocks = ceildiv(rows, m_block) * ceildiv(linear.n, n_block)
        return low.emit(name, spec, args, blocks, weights=linear.weights)


class Cuda(Device):
    """Kernels of `codegen/cuda/kernels`. Which one does a product goes by its rows, known at run time: each
    is a step, and the others have no blocks."""

    name = "cuda"
    integers = False
    scratch = False
    has_rotary = True
    tile = (CUDA_TILE, CUDA_TILE)

    def elementwise_blocks(self, sizes: Sequence[Dim]) -> tuple[Dim, int]:
        return ceildiv(product(sizes), CUDA_ELEMENTWISE_BLOCK), 1

    def queries(self, head_dim: int) -> int:
        return 32 if head_dim <= 128 else 16  # what shared memory holds

    def emit_linear(
        self, low: Lowering, linear: Linear, name: str, args: list[Any], rows: Dim, params: dict[str, Any]
    ) -> Step:
        many = sympy.Min(1, sympy.Max(0, rows - FEW_ROWS))
        one = sympy.Max(0, 2 - rows)
        packed = linear.op != "matmul_f32"
        height, width = (CUDA_MANY_ROWS, CUDA_MANY_COLUMNS) if packed else self.tile
        tiles = ceildiv(rows, height) * ceildiv(linear.n, width)
        columns = ceildiv(linear.n, CUDA_FEW_COLUMNS if packed else 16)
        source = linear.node.inputs[0].producer() if linear.node.inputs[0] is not None else None
        # What a model rounds is not rounded once more.
        exact = low.compute != "bf16" or (source is not None and source.op_type in _ROUNDINGS)
        parts = {"parts": 2 if exact else 1} if packed else {}
        step: Step | None = None
        if many != 0:
            left = self._fp4_operand(low, linear, many)
            if left is not None:
                spec = KernelSpec.make(linear.op, rows="many", activations=NVFP4.name, **params)
                args_many = [args[0], *left, *args[2:]]
            else:
                spec, args_many = KernelSpec.make(linear.op, rows="many", **parts, **params), args
            step = low.emit(name, spec, args_many, tiles * many, weights=linear.weights)
        for kind, runs in (("few", 1 - many - one), ("one", one)):
            if runs != 0:
                spec = KernelSpec.make(linear.op, rows=kind, **params)
                step = low.emit(name, spec, args, columns * runs, weights=linear.weights)
        assert step is not None, "a product has rows"
        return step

    @staticmethod
    def _fp4_operand(low: Lowering, linear: Linear, runs: Dim) -> tuple[View, View, View] | None:
        """What the product of NVFP4 by NVFP4 takes for its left operand; None for another product, or weights
        with scales that tensor cores do not have."""
        x = linear.node.inputs[0]
        if linear.op != NVFP4.kernel or x not in low.rounded_to_nvfp4:
            return None
        if (linear.weights[1].data & 0x80).any():
            return None
        return low.nvfp4(x, linear.k, runs)

    def readable(self, low: Lowering, view: View, name: str) -> View:
        offset = sympy.expand(view.offset * ITEM_SIZE[view.dtype])
        aligned = all(term % _VECTOR == 0 for term in offset.as_coefficients_dict().values())
        return view if aligned else low.copy(view, name)


DEVICES: dict[str, Device] = {device.name: device for device in (Cpu(), Cuda())}
