"""TIR function -> relocatable object. The only module that drives TVM's compiler.

TVM 0.27 is used from TIR down: its own entry point wraps kernels in a packed-call ABI that needs TVM's
runtime, so this module runs a pass list of its own that leaves typed parameters alone and hands the result to
the LLVM backend: one plain C function, with no reference to TVM.
"""

from __future__ import annotations

import inspect
import json
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from types import FrameType

    from qgraph.codegen.isa import Isa


def _cheap_stack(context: int = 1) -> list[inspect.FrameInfo]:
    return _cheap_outer_frames(sys._getframe(1))


def _cheap_outer_frames(frame: FrameType | None, context: int = 1) -> list[inspect.FrameInfo]:
    out = []
    while frame is not None:
        code = frame.f_code
        out.append(inspect.FrameInfo(frame, code.co_filename, frame.f_lineno, code.co_name, None, None))
        frame = frame.f_back
    return out


@cache
def load_tvm() -> Any:
    """Import TVM (seconds) and return the module. Call this, rather than `import tvm`, before any
    TVMScript."""
    import tvm
    from tvm.script.parser import core

    # The script parser walks the stack for every function and every call of an inline; the standard functions
    # rescan sys.modules for each frame, which takes over 50 ms a call in a large process. Only frames and
    # names are read from the result.
    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").startswith("tvm.") and getattr(module, "inspect", None) is inspect:
            module.inspect = _InspectProxy()  # type: ignore[attr-defined]
    del core
    # TVM's own rule is llvm.fmuladd, which LLVM may take apart: on 32-bit ARM it does.
    tvm.tirx.register_intrin_lowering("tirx.fma", "llvm", f=_fused, level=99)
    return tvm


def _fused(call: Any) -> Any:
    from tvm.target import Target
    from tvm.tirx import call_llvm_pure_intrin

    # WebAssembly has none: there, it would be a call of the C library.
    apart = str(Target.current().attrs["mtriple"]).startswith("wasm")
    return call_llvm_pure_intrin(str(call.ty.dtype), "llvm.fmuladd" if apart else "llvm.fma", *call.args)


class _InspectProxy:
    """`inspect` with a cheap `stack` and `getouterframes`, given to TVM's modules only."""

    stack = staticmethod(_cheap_stack)
    getouterframes = staticmethod(_cheap_outer_frames)

    def __getattr__(self, name: str) -> Any:
        return getattr(inspect, name)


def _llvm_spec(isa: Isa) -> dict[str, Any]:
    spec: dict[str, Any] = {"kind": "llvm", "mtriple": isa.triple, "mcpu": isa.mcpu}
    if isa.arch == "wasm32":
        spec["vector-width"] = 128  # TVM does not know, and warns
    return spec | ({"mattr": list(isa.mattr)} if isa.mattr else {})


def llvm_target(isa: Isa) -> Any:
    """TVM's Target of `isa`, its own host."""
    target = load_tvm().target.Target(_llvm_spec(isa))
    return target.with_host(target)


def _lower(mod: Any, target: Any) -> Any:
    from tvm.ir.transform import Sequential
    from tvm.s_tir import transform as s_tir
    from tvm.tirx import transform as tirx

    return Sequential(
        [
            tirx.BindTarget(target),
            s_tir.LowerInitBlock(),
            s_tir.PlanAndUpdateBufferAllocationLocation(),
            s_tir.ConvertBlocksToOpaque(),
            s_tir.LowerMatchBuffer(),
            s_tir.StmtSimplify(),
            s_tir.LowerOpaqueBlock(),
            tirx.FlattenBuffer(),
            tirx.BF16ComputeLegalize(),
            tirx.NarrowDataType(64),
            tirx.VectorizeLoop(True),
            tirx.StorageRewrite(),
            tirx.UnrollLoop(),
            tirx.StmtSimplify(),
            tirx.RemoveNoOp(),
            tirx.CommonSubexprElim(),
            tirx.FP8ComputeLegalize(),
            tirx.LowerIntrin(),
        ]
    )(mod)


def _build(functions: dict[str, Any], isa: Isa) -> Any:
    tvm = load_tvm()
    target = llvm_target(isa)
    with target:  # `_fused` asks for it
        lowered = _lower(tvm.IRModule(functions), target)
    return tvm.get_global_func("target.build.llvm")(lowered, target)


def compile_object(functions: dict[str, Any], isa: Isa) -> bytes:
    """Compile TIR functions (symbol -> PrimFunc) for `isa` into one relocatable object."""
    with tempfile.TemporaryDirectory(prefix="qgraph-") as folder:
        path = Path(folder) / "kernels.o"
        _build(functions, isa).write_to_file(str(path), "o")
        return path.read_bytes()


def compile_text(functions: dict[str, Any], isa: Isa, kind: str = "asm") -> str:
    """The same as text: `asm` or `ll` (LLVM IR)."""
    return str(_build(functions, isa).inspect_source(kind))


def compile_ir(text: str, isa: Isa) -> bytes:
    """Compile the functions of LLVM's IR, as they are, for `isa` into one ELF relocatable object."""
    tvm = load_tvm()
    from tvm import tirx

    empty = tirx.PrimFunc([], tirx.Evaluate(0)).with_attr("global_symbol", "empty")
    # What TVM puts in front of a module says how the machine lays data out.
    head = [line for line in compile_text({"empty": empty}, isa, "ll").splitlines() if line[:7] == "target "]
    target = json.dumps(_llvm_spec(isa)).replace('"', "\\22")
    flags = ["!llvm.module.flags = !{!0}", f'!0 = !{{i32 2, !"tvm_target", !"{target}"}}']
    with tempfile.TemporaryDirectory(prefix="qgraph-") as folder:
        source, path = Path(folder) / "routines.ll", Path(folder) / "routines.o"
        source.write_text("\n".join([*head, text, *flags]) + "\n")
        tvm.runtime.load_module(str(source)).write_to_file(str(path), "o")
        return path.read_bytes()
