"""x @ W for group-quantized weights: `matmul_ternary`, `matmul_int2` and so on, one kernel a format."""

from __future__ import annotations

from functools import partial

from tvm.tirx import PrimFunc

from qgraph.codegen.isa import Isa
from qgraph.codegen.kernels import kernel
from qgraph.codegen.kernels.matmul import matmul
from qgraph.codegen.spec import KernelSpec
from qgraph.formats.group import GROUP_FORMATS


def _matmul_group(weight_format: str, spec: KernelSpec, isa: Isa, symbol: str) -> PrimFunc:
    """y = epilogue(x @ dequantize(W)), W in the layouts of codegen/packing_group.py.

    Spec: as of matmul_nvfp4, and block (inputs that share a scale, a multiple of 32), for ternary packing:
    "2bit" | "base3".
    Arguments: y f32 [M, n], x f32 [M, k], [digits i32 [M, words] (codegen/digits.py), not of int3 and base3],
    codes u32 (base3: i8), block_scale f16, [zero_point u8 | mean f16], [block_sums f32 [M, ceil(k/block)], of
    int3 and base3], those of the epilogue (epilogue.py), M, begin, end. Blocks: as of matmul_nvfp4.
    """
    return matmul(spec, isa, symbol, weight_format)


for _format in GROUP_FORMATS:
    kernel(_format.kernel)(partial(_matmul_group, _format.name))
