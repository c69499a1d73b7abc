"""x @ W for group-quantized weights: `matmul_ternary`, `matmul_int2` and so on, one kernel a format."""

from __future__ import annotations

from functools import partial

from tvm.tirx import PrimFunc

from qgraph.codegen.int8_input import int8_input
from qgraph.codegen.isa import Isa
from qgraph.codegen.kernels import kernel
from qgraph.codegen.kernels.matmul import matmul
from qgraph.codegen.kernels.weights_group import GroupReader, open_reader
from qgraph.codegen.spec import KernelSpec
from qgraph.formats.group import GROUP_FORMATS


def _matmul_group(weight_format: str, spec: KernelSpec, isa: Isa, symbol: str) -> PrimFunc:
    """y = epilogue(x @ dequantize(W)), W in the layouts of codegen/packing_group.py.

    Spec: as of matmul_nvfp4, and block (inputs that share a scale, a multiple of 32), for ternary packing:
    "2bit" | "base3".
    Arguments: y f32 [M, n], x f32 [M, k], codes u32 (base3: i8), block_scale f16, [zero_point u8 | mean f16,
    block_sums f32 [M, ceil(k/block)]], [bias f32 [n]], [residual f32 [M, n]], M, begin, end. Blocks: as of
    matmul_nvfp4.
    """
    return matmul(spec, isa, symbol, open_reader(weight_format, spec, isa))


for _format in GROUP_FORMATS:
    kernel(_format.kernel)(partial(_matmul_group, _format.name))


def _matmul_digits(weight_format: str, spec: KernelSpec, isa: Isa, symbol: str) -> PrimFunc:
    """As _matmul_group, from x and its digits (split_digits.py)."""
    reader = GroupReader(spec["k"], spec["n"], isa, weight_format, spec["block"], "2bit")
    return matmul(spec, isa, symbol, reader, weight_format)


for _format in GROUP_FORMATS:
    if int8_input(_format.name):
        kernel(f"{_format.kernel}_x24")(partial(_matmul_digits, _format.name))
