"""The register-blocked inner loop that every matrix product here is made of."""

from __future__ import annotations

from tvm.script import tirx as T

from qgraph.codegen.kernels.vector import f32, lanes_at, splat

# Rows x vectors of the accumulator tile, by lanes of the ISA: as many as its registers hold beside one row of
# the right operand and one element of the left.
TILES = {16: (8, 2), 8: (6, 2), 4: (6, 4)}


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
