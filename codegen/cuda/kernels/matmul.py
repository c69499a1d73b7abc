"""x @ W for a constant weight W. The spec's `rows` says for how many rows a kernel is; a step of each is in
the plan, and all but one of them have no blocks in a run.

`one` and `few` (up to FEW_ROWS) read every weight once and are bound by that (matmul_few.py, of float weights
matmul_few_float.py); `many` multiplies decoded tiles on tensor cores (matmul_many.py), or float weights
without (matmul_dynamic.py)."""

from __future__ import annotations

from functools import partial

from qgraph.codegen.cuda.kernels import CudaKernel, kernel
from qgraph.codegen.cuda.kernels.matmul_dynamic import many_float_rows
from qgraph.codegen.cuda.kernels.matmul_few import few_rows
from qgraph.codegen.cuda.kernels.matmul_few_float import few_float_rows
from qgraph.codegen.cuda.kernels.matmul_fp4 import fp4_rows
from qgraph.codegen.cuda.kernels.matmul_many import many_rows
from qgraph.codegen.digits import FEW_ROWS
from qgraph.codegen.spec import KernelSpec
from qgraph.errors import QGraphError
from qgraph.formats.group import GROUP_FORMATS
from qgraph.formats.nvfp4 import NVFP4


def _matmul(weight: str, spec: KernelSpec, symbol: str) -> CudaKernel:
    """y = epilogue(x @ W).

    Spec: k, n, rows (`one` | `few` | `many`), epilogue as of the CPU's kernels; of a group format block, of
    ternary packing; of `many` with activations as NVFP4 `activations`, and arguments as of `fp4_rows`; else
    parts: how many bfloat16 numbers an activation is the sum of, 1 or 2. Arguments: y f32 [M, n], x f32 [M,
    k], the weight's, the epilogue's, M."""
    if dict(spec.params).get("activations") == NVFP4.name:
        return fp4_rows(spec, symbol)
    if spec["rows"] == "many":
        return many_float_rows(spec, symbol) if weight == "f32" else many_rows(weight, spec, symbol)
    rows = {"one": 1, "few": FEW_ROWS}.get(spec["rows"])
    if rows is not None:
        return few_float_rows(spec, symbol, rows) if weight == "f32" else few_rows(weight, spec, symbol, rows)
    raise QGraphError(f"{spec.op}: cannot build {dict(spec.params)}")


kernel("matmul_f32")(partial(_matmul, "f32"))
for _format in (NVFP4, *GROUP_FORMATS):
    kernel(_format.kernel)(partial(_matmul, _format.name))
