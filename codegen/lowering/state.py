"""The caches of a decoder as state: memory of the session that attention reads in place, and that new keys
and values are written into.

A state has room for `cache_capacity` tokens, [rows, heads, capacity, size of a head]. The tokens of a run lie
behind those that the session holds, from `total - sequence` on. What computes them writes there itself where
it can take strides, else they are copied; either way nothing that is already there moves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import onnx_ir as ir

from qgraph.codegen.dims import Dim, equal, size, symbol
from qgraph.codegen.memory import Buffer, View
from qgraph.errors import UnsupportedError
from qgraph.passes.cache import Cache, CachePair, find_cache

if TYPE_CHECKING:
    from qgraph.codegen.lowering.context import Lowering

CAPACITY = symbol("cache_capacity")


@dataclass(frozen=True, eq=False)
class State:
    """One half of an attention's cache.

    Attributes:
        buffer: f32 [rows, heads, capacity, size of a head].
        total: tokens held once the run is through.
        past: tokens held before.
    """

    buffer: Buffer
    total: Dim
    past: Dim

    @property
    def window(self) -> View:
        """Where the tokens of this run go: [rows, heads, new, size of a head]."""
        return View.of(self.buffer).slice(2, self.past, self.total - self.past)

    @property
    def held(self) -> View:
        """All tokens, with those of this run."""
        return View.of(self.buffer).slice(2, 0, self.total)


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


def find_places(low: Lowering) -> dict[ir.Value, View]:
    """Where new keys and values are to be computed: those that only their attention reads, in its state."""
    places = {}
    for pair in low.cache.pairs if low.cache else ():
        new = pair.node.inputs[1 if pair.past is pair.node.inputs[4] else 2]
        window = low.states[pair.past].window
        if new is not None and low.uses[new] == 1 and low.same_shape(low.shape(new), window.shape):
            places[new] = window
    return places


def _state(cache: Cache, pair: CachePair) -> State:
    past, total = pair.past, symbol(cache.total)
    if past.dtype != ir.DataType.FLOAT:
        raise UnsupportedError(f"cache '{past.name}' has data type {past.dtype}; supported is FLOAT")
    assert past.shape is not None, "find_cache refuses it"
    rows, heads, held, width = (size(d) for d in past.shape)
    assert equal(held, total - size(cache.sequence)), "find_cache refuses it"
    if heads.free_symbols or width.free_symbols:
        raise UnsupportedError(f"cache '{past.name}': heads {heads} and their size {width} must be constant")
    return State(Buffer("state", "f32", (rows, heads, CAPACITY, width), name=past.name or ""), total, held)
