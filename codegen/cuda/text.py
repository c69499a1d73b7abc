"""TIR functions -> CUDA C++, through TVM's CUDA back end.

Kernels are device functions from the start (they name their block and thread themselves), so nothing of TVM's
host side is run: no packed calls, no launch code, and parameters stay in the order that they are written in.
"""

from __future__ import annotations

import re
from functools import cache
from importlib import resources
from typing import Any

from qgraph.codegen.tvm_backend import load_tvm
from qgraph.errors import QGraphError

_DEVICE_KERNEL = 2  # TVM's calling convention of a __global__ function


def prelude() -> str:
    """The device functions that kernels call, in CUDA C++: what TIR has no word for."""
    return resources.files("qgraph.codegen.cuda").joinpath("prelude.cuh").read_text()


@cache
def _teach_tvm() -> None:
    """Give TVM's CUDA back end what the expressions of vmath.py and ops.py are made of, which were written
    for LLVM."""
    tvm = load_tvm()
    from tvm import tirx

    lookup = tvm.get_global_func("target.llvm_lookup_intrinsic_id")
    # `vmath.named` hides a value from TVM's simplifier behind an operation that leaves it as it is.
    identities = {int(lookup(name)) for name in ("llvm.fma", "llvm.umax", "llvm.smax")}
    to_integer = int(lookup("llvm.fptosi.sat"))

    def lower(call: Any) -> Any:
        number, *args = call.args
        dtype = call.ty.dtype
        if int(number) in identities:
            return tirx.call_extern(dtype, "qg_keep", args[0])
        if int(number) == to_integer:
            return tirx.call_pure_extern(dtype, f"qg_to_{dtype}", args[0])
        raise QGraphError(f"LLVM intrinsic {int(number)} has no form in CUDA")

    for op in ("tirx.call_llvm_intrin", "tirx.call_llvm_pure_intrin"):
        tirx.register_intrin_lowering(op, target="cuda", f=lower, level=99)

    def function(name: str) -> Any:
        def lower(call: Any) -> Any:
            suffix = {"float32": "f", "float64": ""}[str(call.ty.dtype)]
            return tirx.call_pure_extern(call.ty.dtype, name + suffix, *call.args)

        return lower

    for op, name in (("tirx.fma", "fma"), ("tirx.nearbyint", "rint")):
        tirx.register_intrin_lowering(op, target="cuda", f=function(name), level=99)


def cuda_text(functions: dict[str, Any]) -> str:
    """CUDA C++ of device functions (symbol -> PrimFunc), without anything it includes but our own prelude."""
    tvm = load_tvm()
    _teach_tvm()
    from tvm.ir.transform import Sequential
    from tvm.s_tir import transform as s_tir
    from tvm.tirx import transform as tirx

    target = tvm.target.Target({"kind": "cuda", "arch": "sm_80"})
    lowered = Sequential(
        [
            tirx.BindTarget(target),
            s_tir.LowerInitBlock(),
            s_tir.PlanAndUpdateBufferAllocationLocation(),
            s_tir.ConvertBlocksToOpaque(),
            s_tir.StmtSimplify(),
            s_tir.LowerOpaqueBlock(),
            tirx.FlattenBuffer(),
            tirx.NarrowDataType(64),
            tirx.VectorizeLoop(True),
            tirx.StorageRewrite(),
            tirx.UnrollLoop(),
            tirx.StmtSimplify(),
            tirx.RemoveNoOp(),
            tirx.CommonSubexprElim(),
            tirx.LowerIntrin(),
        ]
    )(tvm.IRModule(functions))
    device = {
        name.name_hint: function.with_attr("calling_conv", _DEVICE_KERNEL).with_attr("target", target)
        for name, function in lowered.functions.items()
    }
    module = tvm.get_global_func("target.build.cuda")(tvm.IRModule(device), target)
    text = str(module.inspect_source("cuda"))
    # What TVM puts before the kernels are headers and helpers for types that ours do not use.
    start = text.index('extern "C" __global__')
    # One block of threads a multiprocessor is enough: else the compiler may spill to make room for a second.
    return prelude() + re.sub(r"__launch_bounds__\((\d+)\)", r"__launch_bounds__(\1, 1)", text[start:])
