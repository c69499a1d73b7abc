"""What LLVM calls instead of an instruction, for kernels: memset and memcpy, for loops of stores, and what a
processor has no instruction for. As LLVM IR: a routine may follow a calling convention that TIR has not."""

from __future__ import annotations

from functools import cache

from qgraph.codegen.isa import Isa
from qgraph.codegen.kernels.support_arm import ARM_ROUTINES
from qgraph.codegen.kernels.support_rounding import ROUNDING_ROUTINES
from qgraph.codegen.tvm_backend import compile_ir

# The barrier keeps LLVM from recognising these very loops as memset and memcpy, which would call themselves.
# They return nothing: compilers ignore what the calls they insert return.
_MEMORY = """
define void @{name}(ptr noalias %to, {argument}, {size} %count) {{
entry:
  {prepare}
  %whole = and {size} %count, -32
  br label %blocks
blocks:
  %i = phi {size} [ 0, %entry ], [ %i1, %block ]
  %left = icmp ult {size} %i, %whole
  br i1 %left, label %block, label %bytes
block:
  %to_block = getelementptr i8, ptr %to, {size} %i
  {load_block}
  store <32 x i8> %block_value, ptr %to_block, align 1
  call void asm sideeffect "", "~{{memory}}"()
  %i1 = add {size} %i, 32
  br label %blocks
bytes:
  %j = phi {size} [ %i, %blocks ], [ %j1, %byte ]
  %more = icmp ult {size} %j, %count
  br i1 %more, label %byte, label %done
byte:
  %to_byte = getelementptr i8, ptr %to, {size} %j
  {load_byte}
  store i8 %byte_value, ptr %to_byte, align 1
  call void asm sideeffect "", "~{{memory}}"()
  %j1 = add {size} %j, 1
  br label %bytes
done:
  ret void
}}
"""
_MEMSET = {
    "name": "memset",
    "argument": "i32 %value",
    "prepare": """%byte_value = trunc i32 %value to i8
  %first = insertelement <32 x i8> poison, i8 %byte_value, i32 0
  %block_value = shufflevector <32 x i8> %first, <32 x i8> poison, <32 x i32> zeroinitializer""",
    "load_block": "",
    "load_byte": "",
}
_MEMCPY = {
    "name": "memcpy",
    "argument": "ptr noalias %from",
    "prepare": "",
    "load_block": """%from_block = getelementptr i8, ptr %from, {size} %i
  %block_value = load <32 x i8>, ptr %from_block, align 1""",
    "load_byte": """%from_byte = getelementptr i8, ptr %from, {size} %j
  %byte_value = load i8, ptr %from_byte, align 1""",
}

# By architecture; x86-64 and aarch64 have instructions for all that kernels do.
_ROUTINES = {
    "armv7l": ARM_ROUTINES + ROUNDING_ROUTINES,
    "riscv64": ROUNDING_ROUTINES,
}


@cache
def support_object(isa: Isa) -> bytes:
    """The support routines of `isa` as an object."""
    size = f"i{isa.pointer_bits}"
    memory = "".join(
        _MEMORY.format(size=size, **{name: part.format(size=size) for name, part in parts.items()})
        for parts in (_MEMSET, _MEMCPY)
    )
    return compile_ir(memory + _ROUTINES.get(isa.arch, ""), isa)
