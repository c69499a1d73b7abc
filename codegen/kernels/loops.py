"""Loops over a dense row in vectors: full ones, then one masked vector for what is left.

The functions emit statements at the current place of the IR builder. A masked access touches no memory of
lanes that are off, so a row may end at the end of a page.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx
from tvm.script import tirx as T
from tvm.script.ir_builder import tirx as B

from qgraph.codegen.kernels.vector import reduce_lanes
from qgraph.codegen.kernels.vmath import Expr, element_of, lanes_of, named, splat, typed

# Independent accumulators of a reduction, to cover the latency of an addition.
ACCUMULATORS = 4


def index(value: int) -> Expr:
    """An int64 constant."""
    return tirx.IntImm("int64", value)


def mask(count: Expr, lanes: int) -> Expr:
    """The first `count` (int64) of `lanes` lanes. Write it where it is used: TVM cannot bind it to a name."""
    return T.ramp(T.int32(0), 1, lanes) < T.broadcast(T.cast(count, "int32"), lanes)


def load(buffer: Any, start: Expr, lanes: int, count: Expr | None = None) -> Expr:
    """`lanes` elements of a flat buffer from `start`; with `count`, 0 in the lanes from there on."""
    at = T.ramp(start, 1, lanes)
    if count is None:
        return buffer[at]
    loaded = T.masked_load(typed(str(buffer.dtype), lanes), buffer, at, mask(count, lanes))
    # It leaves lanes that are off undefined, and even to divide by one of those would be undefined.
    return keep(loaded, count, splat(0, str(buffer.dtype), lanes))


def store(buffer: Any, value: Expr, start: Expr, count: Expr | None = None) -> None:
    """Store a vector to a flat buffer from `start`; with `count`, only its first lanes."""
    lanes = lanes_of(value)
    at = T.ramp(start, 1, lanes)
    if count is None:
        B.buffer_store(buffer, value, [at])
    else:
        B.evaluate(T.masked_store(buffer, value, at, mask(count, lanes)))


def keep(value: Expr, count: Expr | None, other: Expr) -> Expr:
    """`value`, with `count` replaced by `other` in the lanes from there on."""
    # Named first: within the arm of a selection TVM's simplifier takes its condition for true, and would load
    # without the mask.
    return value if count is None else T.Select(mask(count, lanes_of(value)), named(value), other)


def each_vector(size: Expr, lanes: int, body: Callable[[Expr, Expr | None], None]) -> None:
    """body(start, None) for every full vector of [0, size), then body(start, count) if count elements are
    left.
    """
    with B.serial(T.truncdiv(size, lanes)) as i:
        body(i * lanes, None)
    rest = B.bind(T.truncmod(size, index(lanes)))
    with B.If(rest > 0), B.Then():
        body(size - rest, rest)


def accumulate(
    size: Expr,
    init: Expr,
    combine: Callable[[Expr, Expr], Expr],
    term: Callable[[Expr, Expr | None], Expr],
) -> Expr:
    """The scalar combination of term(start, count) over the vectors of [0, size), in a fixed order.

    `init` is a vector of the neutral element; `term` must give the neutral element in lanes from `count` on.
    """
    lanes, element = lanes_of(init), element_of(init)
    acc = B.alloc_buffer((ACCUMULATORS * lanes,), element, scope="local")

    def at(u: int) -> Expr:
        return T.ramp(index(u * lanes), 1, lanes)

    def add(u: int, start: Expr, count: Expr | None) -> None:
        B.buffer_store(acc, combine(acc[at(u)], named(term(start, count))), [at(u)])

    for u in range(ACCUMULATORS):
        B.buffer_store(acc, init, [at(u)])
    stride = ACCUMULATORS * lanes
    with B.serial(T.truncdiv(size, index(stride))) as i:
        for u in range(ACCUMULATORS):
            add(u, i * stride + u * lanes, None)
    done = B.bind(size - T.truncmod(size, index(stride)))
    each_vector(size - done, lanes, lambda start, count: add(0, done + start, count))
    total = [named(acc[at(u)]) for u in range(ACCUMULATORS)]
    while len(total) > 1:
        total = [named(combine(a, b)) for a, b in zip(total[::2], total[1::2], strict=True)]
    return named(reduce_lanes(combine, total[0]))
