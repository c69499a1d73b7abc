"""AMX: eight tiles of up to 16 rows of 64 bytes, and products of two of them added to a third.

A product is C [rows, 16] += A [rows, depth] B [depth, 16], in 32 bits. A's rows are so many bytes; row j of B
holds, of each of 16 columns, the four bytes of A's bytes 4 j .. 4 j + 3: one vector of u32 lanes, which is
how kernels for VNNI unpack weights, too. Two times two tiles of C share what is loaded of A and B.

A kernel configures the tiles when it begins and releases them when it is done: a thread that keeps them has
8 KiB more to be saved whenever it is put aside.

The functions emit statements at the current place of the IR builder.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any

from tvm import tirx
from tvm.ir import Call, PointerType, PrimType
from tvm.script import tirx as T
from tvm.script.ir_builder import tirx as B

from qgraph.codegen.kernels.loops import index
from qgraph.codegen.kernels.vmath import Expr

ROWS = 16  # of a tile, at most
SIZE = 16 * 16  # words of a tile
ROW_BYTES = 64
_C, _A, _B = 0, 4, 6  # the first of four tiles of sums, two of the left and two of the right operand

At = tuple[Any, Expr, int]  # where a tile is: a buffer, its first element, bytes from one row to the next
INT8, BF16 = "tdpbsud", "tdpbf16ps"  # products: of signed with unsigned bytes, of bfloat16 in pairs


@contextmanager
def on_stack(dtype: str, *shape: int) -> Iterator[Any]:
    """A buffer of 32-bit elements on the stack, at a multiple of 64 bytes: TVM would give it 16, and a row of
    a tile that lies across two cache lines is loaded twice."""
    room = B.alloc_buffer((math.prod(shape) + ROW_BYTES // 4 - 1,), dtype)
    above = T.address_of(room[index(ROW_BYTES // 4 - 1)])
    mask = T.call_llvm_pure_intrin(
        T.llvm_lookup_intrinsic_id("llvm.ptrmask"), above, index(-ROW_BYTES), dtype="handle"
    )
    typed = PointerType(PrimType(dtype))
    aligned = tirx.Var("aligned", typed)
    B.bind(Call(mask.op, mask.args, ret_ty=typed), var=aligned)
    yield B.decl_buffer(shape, dtype, data=aligned)
    # To TVM this is the only use of the memory beside the address: until here it is nobody else's. LLVM drops
    # the store.
    B.buffer_store(room, tirx.IntImm(dtype, 0) if "int" in dtype else T.float32(0), [index(0)])


def _emit(name: str, *args: Any) -> None:
    identifier = T.llvm_lookup_intrinsic_id(f"llvm.x86.{name}")
    B.evaluate(T.call_llvm_intrin(identifier, *args, dtype="void"))


def _tile(number: int) -> Any:
    return tirx.IntImm("int8", number)


def configure(rows: Expr, depth: int) -> None:
    """Tiles of the left operand and of sums get so many rows (int64, 1 .. 16), those of the right operand one
    for each four of the left one's `depth` bytes."""
    config = B.alloc_buffer((ROW_BYTES,), "uint8")
    for i in range(ROW_BYTES):
        B.buffer_store(config, T.uint8(1 if i == 0 else 0), [index(i)])  # 1 is the palette
    for tile in range(8):
        left, right = tile in range(_A, _B), tile >= _B
        bytes_ = depth if left else ROW_BYTES
        B.buffer_store(config, T.uint8(bytes_), [index(16 + 2 * tile)])
        B.buffer_store(config, T.uint8(depth // 4) if right else T.cast(rows, "uint8"), [index(48 + tile)])
    _emit("ldtilecfg", T.address_of(config[index(0)]))


def release() -> None:
    _emit("tilerelease")


def _load(tile: int, at: At, passing: bool = False) -> None:
    """`passing`: it is not to push other data out of the first cache."""
    buffer, start, stride = at
    how = "tileloaddt164" if passing else "tileloadd64"
    _emit(how, _tile(tile), T.address_of(buffer[start]), index(stride))


def multiply(
    kind: str,
    sums: list[list[At]],
    steps: Callable[[Callable[[list[At], list[At]], None]], None],
    resume: Expr | None = None,
    passing: bool = False,
) -> None:
    """Emits sums[a][c] = sum over steps of left[a] right[c], for up to two of each.

    Args:
        kind: INT8 or BF16.
        sums: where the tiles of sums go.
        steps: calls what it is given, in loops that it emits, with the tiles of a step.
        resume: whether (bool) the sums go on from what is there; None is no.
        passing: whether what is on the left only passes through the first cache: it should lie in the second
            then, which it is not brought into.
    """
    here = [(_C + 2 * a + c, at) for a, row in enumerate(sums) for c, at in enumerate(row)]

    def clear() -> None:
        for tile, _ in here:
            _emit("tilezero", _tile(tile))

    if resume is None:
        clear()
    else:
        with B.If(resume), B.Then():
            for tile, at in here:
                _load(tile, at)
        with B.If(T.Not(resume)), B.Then():
            clear()

    def step(left: list[At], right: list[At]) -> None:
        for a, at in enumerate(left):
            _load(_A + a, at, passing)
        for c, at in enumerate(right):
            _load(_B + c, at)
        for a, c in product(range(len(left)), range(len(right))):
            _emit(kind, _tile(_C + 2 * a + c), _tile(_A + a), _tile(_B + c))

    steps(step)
    for tile, (buffer, start, stride) in here:
        _emit("tilestored64", _tile(tile), T.address_of(buffer[start]), index(stride))


@dataclass(frozen=True)
class Rows:
    """The rows m0 .. m0 + count - 1 of M as tiles of `size` rows, min(16, M); M are those that may be read,
    which can be more than there are.

    A tile never goes beyond row M - 1: it begins earlier instead, and holds rows of others, too, whose sums
    are dropped. So tile t holds row m0 + 16 t + i at place i + shift(t).
    """

    m0: Expr
    count: Expr
    M: Expr
    size: Expr

    def start(self, t: Expr) -> Expr:
        """The first row of tile t."""
        return T.min(self.m0 + t * ROWS, self.M - self.size)

    def shift(self, t: Expr) -> Expr:
        return self.m0 + t * ROWS - self.start(t)

    def own(self, t: Expr) -> Expr:
        """How many rows of tile t count."""
        return T.min(self.count - t * ROWS, index(ROWS))

    def each_pair(self, body: Callable[[list[Expr]], None]) -> None:
        """body(tiles) for two tiles at a time, then for one if one is left."""
        tiles = B.bind(T.truncdiv(self.count + (ROWS - 1), index(ROWS)))
        with B.serial(T.truncdiv(tiles, index(2))) as pair:
            body([B.bind(pair * 2), B.bind(pair * 2 + 1)])
        with B.If(T.truncmod(tiles, index(2)) == 1), B.Then():
            body([B.bind(tiles - 1)])
