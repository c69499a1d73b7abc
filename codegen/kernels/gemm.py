"""The register-blocked inner loop that every matrix product here is made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from tvm.script import tirx as T
from tvm.script.ir_builder import tirx as B

from qgraph.codegen.isa import Isa
from qgraph.codegen.kernels.loops import index
from qgraph.codegen.kernels.vector import f32, lanes_at, splat

# Rows x vectors of the accumulator tile, by lanes of the ISA and its registers: as many as these hold beside
# one row of the right operand and one element of the left; at least two rows of 16 columns.
_TILES = {(16, 32): (8, 2), (8, 16): (6, 2), (4, 32): (6, 4), (4, 16): (2, 4), (4, 8): (2, 4)}


def accumulator(isa: Isa) -> tuple[int, int]:
    """Rows and vectors of the accumulator tile."""
    return _TILES[isa.lanes, isa.registers]


def vectors(isa: Isa) -> Callable[[int], Any]:
    """The loop over vectors that are done one after another: unrolled, unless each is many instructions."""
    return T.unroll if isa.decode != "arithmetic" else lambda count: T.serial(T.int64(count))


def each_vector(isa: Isa, count: int) -> Iterator[Any]:
    """The same by the IR builder."""
    if isa.decode != "arithmetic":
        yield from map(index, range(count))
        return
    with B.serial(index(count)) as v:
        yield v


@T.inline
def accumulate(acc, left, right, depth, rows, vectors, lanes):
    """acc[r, v, :] = sum over k < depth of left(r, k) * right(k, v).

    `acc` is a local buffer [rows, vectors, lanes]; `left(r, k)` a float32 scalar, `right(k, v)` a vector of
    float32 lanes; both are functions of expressions.
    """
    for r in T.unroll(rows):
        for v in T.unroll(vectors):
            acc[r, v, lanes_at(0, lanes)] = f32(0, lanes)
    for k in T.serial(depth):
        for r in T.unroll(T.int64(rows)):
            for v in T.unroll(vectors):
                acc[r, v, lanes_at(0, lanes)] = acc[r, v, lanes_at(0, lanes)] + splat(
                    left(r, k), lanes
                ) * right(k, v)
