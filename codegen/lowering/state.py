"""The caches of a decoder as state: memory of the session that attention reads in place, and that new keys
and values are written into.

A state has room for `cache_capacity` tokens, [rows, heads, capacity, size of a head]. The tokens of a run lie
behind those that the session holds, from `total - sequence` on. What computes them writes there itself where
it can take strides, else they are copied; either way nothing that is already there moves.

Keys and values that come through a DynamicQDQInt8 are stored as its codes and scales.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import onnx_ir as ir
import sympy

from qgraph.codegen.dims import Dim, equal, grain_of, product, size, static, symbol
from qgraph.codegen.memory import Buffer, View
from qgraph.codegen.spec import KernelSpec
from qgraph.errors import UnsupportedError
from qgraph.passes.cache import Cache, CachePair, find_cache

if TYPE_CHECKING:
    from qgraph.codegen.lowering.context import Lowering, Step

CAPACITY = symbol("cache_capacity")


@dataclass(frozen=True, eq=False)
class State:
    """One half of an attention's cache.

    Attributes:
        buffer: f32 [rows, heads, capacity, size of a head], or i8 with a `scale`.
        scale: f32 [rows, heads, capacity, 1].
        total: tokens held once the run is through.
        past: tokens held before.
    """

    buffer: Buffer
    scale: Buffer | None
    total: Dim
    past: Dim

    def window(self, buffer: Buffer) -> View:
        """Where the tokens of this run go: [rows, heads, new, ..]."""
        return View.of(buffer).slice(2, self.past, self.total - self.past)

    def held(self, buffer: Buffer) -> View:
        """All tokens, with those of this run."""
        return View.of(buffer).slice(2, 0, self.total)

    def store(self, low: Lowering, new: View, name: str) -> Step | None:
        """Put [rows, heads, new, size of a head] into the window; no step where it was computed there."""
        if self.scale is None:
            if new.buffer is not self.buffer:
                low.copy(new, name, self.window(self.buffer))
            return None
        if static(new.strides[-1]) != 1 and new.shape[-1] != 1:
            new = low.copy(new, f"{name}/copy")
        codes, scale = self.window(self.buffer), self.window(self.scale)
        rows, heads, count, width = new.shape
        args = [
            codes,
            scale,
            new,
            width,
            heads,
            count,
            *new.strides[:3],
            *codes.strides[:2],
            *scale.strides[:2],
        ]
        grain = grain_of(width)
        return low.emit(name, KernelSpec.make("store_int8"), args, product((rows, heads, count)), grain)


def find_states(graph: ir.Graph) -> tuple[Cache | None, dict[ir.Value, State]]:
    """The cache of `graph`, and its states by the graph input that each takes the place of.

    Raises UnsupportedError for a cache that has no form as state: which, and why.
    """
    cache = find_cache(graph)
    if cache is None:
        return None, {}
    names = {s.name for v in graph.inputs for d in v.shape or () for s in size(d).free_symbols}
    if str(CAPACITY) in names:
        raise UnsupportedError(
            f"a dimension of the inputs is called '{CAPACITY}', as the room of the cache is"
        )
    return cache, {pair.past: _state(cache, pair) for pair in cache.pairs}


def find_places(low: Lowering) -> dict[ir.Value, State]:
    """Where new keys and values are to be computed: those that only their attention reads, in its state."""
    places = {}
    for pair in low.cache.pairs if low.cache else ():
        new, state = _new(pair), low.states[pair.past]
        if low.uses[new] == 1 and low.same_shape(low.shape(new), state.window(state.buffer).shape):
            places[new] = state
    return places


def _new(pair: CachePair) -> ir.Value:
    """What is put behind the past."""
    value = pair.node.inputs[1 if pair.past is pair.node.inputs[4] else 2]
    assert value is not None, "find_cache refuses it"
    return value


def _state(cache: Cache, pair: CachePair) -> State:
    past, total = pair.past, symbol(cache.total)
    if past.dtype != ir.DataType.FLOAT:
        raise UnsupportedError(f"cache '{past.name}' has data type {past.dtype}; supported is FLOAT")
    assert past.shape is not None, "find_cache refuses it"
    rows, heads, held, width = (size(d) for d in past.shape)
    assert equal(held, total - size(cache.sequence)), "find_cache refuses it"
    if heads.free_symbols or width.free_symbols:
        raise UnsupportedError(f"cache '{past.name}': heads {heads} and their size {width} must be constant")
    shape, name = (rows, heads, CAPACITY, width), past.name or ""
    new = _new(pair)
    source = new.producer()
    if source is None or source.op_type != "DynamicQDQInt8":
        return State(Buffer("state", "f32", shape, name=name), None, total, held)
    if len(new.uses()) > 1 or new.is_graph_output() or len(new.shape or ()) != 4:
        raise UnsupportedError(
            f"cache '{past.name}' in int8: '{new.name}' must have 4 dimensions, and nobody else may read it"
        )
    scale = Buffer("state", "f32", (rows, heads, CAPACITY, sympy.Integer(1)), name=f"{name}/scale")
    return State(Buffer("state", "i8", shape, name=name), scale, total, held)
