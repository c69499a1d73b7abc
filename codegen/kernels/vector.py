"""Short vector idioms that kernels share: contiguous lanes, splats, and loads and stores of a row's last
lanes.

Masked accesses touch no memory for lanes that are off, so that a row may end at the end of a page. A mask
must be written where it is used: TVM cannot bind a vector of booleans to a name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm.script import tirx as T
from tvm.script.ir_builder import tirx as B

from qgraph.codegen.kernels.vmath import lanes_of, let, named


def lanes_at(start: Any, lanes: int) -> Any:
    """Index of `lanes` consecutive elements from `start`."""
    return T.ramp(start, 1, lanes)


def splat(value: Any, lanes: int) -> Any:
    """`value` in every lane."""
    return T.broadcast(value, lanes)


def f32(value: float, lanes: int) -> Any:
    """A float32 constant in every lane."""
    return T.broadcast(T.float32(value), lanes)


def first(count: Any, lanes: int) -> Any:
    """Mask of the first `count` (any int64, also negative) of `lanes` lanes."""
    bound = T.cast(T.max(T.min(count, lanes), 0), "int32")
    return T.ramp(T.int32(0), 1, lanes) < T.broadcast(bound, lanes)


def load_first(buffer: Any, start: Any, count: Any, lanes: int) -> Any:
    """float32 lanes of a flat buffer from `start`; lanes from `count` on are 0 and not read."""
    # A masked load leaves lanes that are off undefined. It is named before the selection: within an arm of
    # that, TVM's simplifier takes the condition for true, and would load without the mask.
    loaded = T.masked_load(f"float32x{lanes}", buffer, T.ramp(start, 1, lanes), first(count, lanes))
    return T.Select(first(count, lanes), named(loaded), f32(0, lanes))


def store_first(buffer: Any, value: Any, start: Any, count: Any, lanes: int) -> Any:
    """Statement: store the first `count` lanes of `value` to a flat buffer from `start`."""
    return T.evaluate(T.masked_store(buffer, value, T.ramp(start, 1, lanes), first(count, lanes)))


def prefetch(buffer: Any, at: Any, level: int = 1) -> None:
    """Emits a hint that an element is wanted soon, in the cache of a level. It may lie beyond the buffer:
    nothing is read."""
    B.evaluate(T.call_intrin("void", "tirx.prefetch", T.address_of(buffer[at]), 0, 4 - level, 1))


def reduce_lanes(op: Callable[[Any, Any], Any], value: Any) -> Any:
    """One scalar from the lanes of `value` (a power of two of them), by halves: op(low half, high half),
    ..."""
    lanes = lanes_of(value)
    if lanes == 1:
        return value
    low, high = list(range(lanes // 2)), list(range(lanes // 2, lanes))
    return let(value, lambda v: reduce_lanes(op, op(T.Shuffle([v], low), T.Shuffle([v], high))))
