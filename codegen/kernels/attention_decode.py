"""Attention of one query a head, as in every step of generation: `attention_decode` and `attention_merge`.

All keys are read once, and little is done with each: this is bound by the memory that the past lies in. So
the query heads that share keys and values (grouped-query attention) are done together, and the past is cut
into chunks that are blocks of their own, so that a single sequence, too, keeps all threads busy. How long a
chunk is does not depend on their number: neither does a result. The parts of a head are merged as its tiles
are, by the online softmax of Milakov and Gimelshein (arXiv:1805.02867), over chunks as in Flash-Decoding.

The past may be stored as int8 codes with a scale for every token and head; the scale of a key goes to its
score, that of a value to its weight. What a mask forbids, and queries without a key, are as in attention.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from tvm.script import tirx as T
from tvm.script.ir_builder import tirx as B

from qgraph.codegen.isa import Isa
from qgraph.codegen.kernels import kernel
from qgraph.codegen.kernels.function import function
from qgraph.codegen.kernels.loops import each_vector, index, load, store
from qgraph.codegen.kernels.vector import first, lanes_at, prefetch, reduce_lanes
from qgraph.codegen.kernels.vmath import (
    Expr,
    const_like,
    convert,
    element_of,
    lanes_of,
    named,
    splat,
    vexp_nonpositive,
    vtanh,
)
from qgraph.codegen.spec import KernelSpec
from qgraph.errors import QGraphError

_TILE = 64  # keys whose scores are on the stack at a time
_HEADS = {16: 4, 8: 2, 4: 4}  # done together, by lanes: as many as the registers take
_KEYS = 4  # whose scores are summed at a time
_VECTORS = 4  # of a value, summed at a time
_AHEAD = 4096  # bytes: what is prefetched of the keys; the hardware sees their pattern only in part
_LINE = 64
_MASK_DTYPE = {"bool": "uint8", "f32": "float32"}
STATS = 2  # of a part: its maximum score, and its sum of weights


@kernel("attention_decode")
def attention_decode(spec: KernelSpec, isa: Isa, symbol: str) -> Any:
    """One query of each head over the keys of one chunk.

    Spec: head_dim and value_dim <= 256, group: query heads of a key head, mask, scale, softcap as of
    `attention`, chunk: keys of a block, a multiple of 64, cache "f32" | "i8".
    Arguments: y, part f32 [batch, Hkv, C, group, value_dim + 2], q, k, v, [k_scale, v_scale], [mask], Sk,
    C = ceil(Sk/chunk), Hkv, strides qs_b, qs_h, ks_b, ks_h, vs_b, vs_h, [ss_b, ss_h of both scales],
    [ms_b, ms_h, ms_k], ys_b, ys_h. The tokens of a head lie one behind the other, without gaps.
    Blocks: batch * Hkv * C. Where C is 1, y is done and `part` not touched; else `attention_merge` makes y
    of it.
    """
    D, Dv, G, mask, cache = (spec[n] for n in ("head_dim", "value_dim", "group", "mask", "cache"))
    scale, softcap, chunk = spec["scale"], spec["softcap"], spec["chunk"]
    L = isa.lanes
    if (
        not (0 < D <= 256 and 0 < Dv <= 256 and G > 0 and chunk > 0)
        or chunk % _TILE
        or mask not in ("none", *_MASK_DTYPE)
        or cache not in ("f32", "i8")
    ):
        raise QGraphError(f"{spec.op}: cannot build {dict(spec.params)}")
    rounds = -(-G // _HEADS[L])
    R = -(-G // rounds)  # heads done together
    stored, item = ("int8", 1) if cache == "i8" else ("float32", 4)
    pointers = [("y", "float32"), ("part", "float32"), ("q", "float32"), ("k", stored), ("v", stored)]
    scalars = ["Sk", "C", "Hkv", "qs_b", "qs_h", "ks_b", "ks_h", "vs_b", "vs_h"]
    if cache == "i8":
        pointers += [("k_scale", "float32"), ("v_scale", "float32")]
        scalars += ["ss_b", "ss_h"]
    if mask != "none":
        pointers.append(("mask", _MASK_DTYPE[mask]))
        scalars += ["ms_b", "ms_h", "ms_k"]
    scalars += ["ys_b", "ys_h"]

    def vectors(n: int) -> list[tuple[int, int | None]]:
        """(start, how many if not all) of the vectors of a row of n."""
        return [(at, None if at + L <= n else n - at) for at in range(0, n, L)]

    def numbers(buffer: Any, at: Expr, count: int | None) -> Expr:
        """A vector of a stored key or value, as float32."""
        left = None if count is None else index(count)
        return named(convert(load(buffer, at, L, left), "float32"))

    with function(symbol, pointers, scalars) as f:
        n, p = f.scalars, f.buffers
        Q = B.alloc_buffer((R * len(vectors(D)) * L,), "float32")
        A = B.alloc_buffer((R * len(vectors(Dv)) * L,), "float32")
        S = B.alloc_buffer((R * _TILE,), "float32")
        stats = B.alloc_buffer((R * 3,), "float32", scope="local")  # of each head: maximum, sum, rescaling
        if mask != "none":
            bias = B.alloc_buffer((_TILE,), "float32")

        Dp, Dvp = len(vectors(D)) * L, len(vectors(Dv)) * L

        def some_scores(k0: Expr, j0: Expr, keys: Expr | None) -> None:
            """S[r, j] = q_r . k_j for L keys from j0; those beyond `keys`, if given, repeat the last."""
            part = B.alloc_buffer((R * (L // _KEYS) * L,), "float32", scope="local")
            with B.serial(index(L // _KEYS)) as quad:
                acc = B.alloc_buffer((R * _KEYS * L,), "float32", scope="local")
                for i in range(R * _KEYS):
                    B.buffer_store(acc, splat(0, "float32", L), [lanes_at(index(i * L), L)])

                def add(i: int, at: Expr, start: Expr, count: int | None) -> None:
                    key = numbers(p["k"], at + start, count)
                    for r in range(R):
                        to = [lanes_at(index((r * _KEYS + i) * L), L)]
                        q = Q[lanes_at(r * Dp + start, L)]
                        B.buffer_store(acc, acc[to] + q * key, to)

                for i in range(_KEYS):
                    j = B.bind(j0 + quad * _KEYS + i)
                    at = B.bind(k0 + (j if keys is None else T.min(j, keys - 1)) * D)
                    if keys is None:
                        for line in range(0, D, _LINE // item):
                            prefetch(p["k"], at + (_AHEAD // item + line))
                    if D // L:
                        with B.serial(index(D // L)) as c:
                            add(i, at, c * L, None)
                    if D % L:
                        add(i, at, index(D // L * L), D % L)
                for r in range(R):
                    own = [acc[lanes_at(index((r * _KEYS + i) * L), L)] for i in range(_KEYS)]
                    to = lanes_at((r * (L // _KEYS) + quad) * L, L)
                    B.buffer_store(part, _folded(own, L), [to])
            for r in range(R):
                own = [part[lanes_at(index((r * (L // _KEYS) + i) * L), L)] for i in range(L // _KEYS)]
                B.buffer_store(S, _folded(own, L // _KEYS), [lanes_at(index(r * _TILE) + j0, L)])

        def scores(k0: Expr, keys: Expr) -> None:
            """S[r, j] = q_r . k_j for j < keys."""
            with B.serial(T.truncdiv(keys, index(L))) as g:
                some_scores(k0, g * L, None)
            whole = B.bind(keys - T.truncmod(keys, index(L)))
            with B.If(whole < keys), B.Then():
                some_scores(k0, whole, keys)

        def weights(r: Expr, j0: Expr, keys: Expr, k_scale: Expr, v_scale: Expr, b0: Expr) -> None:
            """The scores of head r to weights, its statistics brought up to date."""
            if mask != "none":
                _stage_bias(bias, p["mask"], b0 + j0 * n["ms_k"], n["ms_k"], keys, L)
            top = B.alloc_buffer((L,), "float32", scope="local")
            total = B.alloc_buffer((L,), "float32", scope="local")
            whole = lanes_at(index(0), L)
            B.buffer_store(top, splat(-math.inf, "float32", L), [whole])
            B.buffer_store(total, splat(0, "float32", L), [whole])
            low = splat(-math.inf, "float32", L)
            with B.serial(index(_TILE // L)) as c:
                at = lanes_at(r * _TILE + c * L, L)
                count = B.bind(T.max(T.min(keys - c * L, index(L)), index(0)))
                s = named(S[at])
                if cache == "i8":
                    s = named(s * load(p["k_scale"], k_scale + j0 + c * L, L, count))
                if softcap:
                    s = named(vtanh(s * const_like(s, 1 / softcap)) * const_like(s, softcap))
                if mask != "none":
                    extra = named(bias[lanes_at(c * L, L)])
                    s = named(T.Select(extra == low, low, s + extra))
                s = named(T.Select(first(count, L), s, low))
                B.buffer_store(top, T.max(s, top[whole]), [whole])
                B.buffer_store(S, s, [at])
            old = named(stats[r * 3])
            new = named(T.max(reduce_lanes(T.max, named(top[whole])), old))
            held = named(finite(new))
            corr = named(vexp_nonpositive(old - held))
            B.buffer_store(stats, new, [r * 3])
            B.buffer_store(stats, corr, [r * 3 + 2])
            with B.serial(index(_TILE // L)) as c:
                at = lanes_at(r * _TILE + c * L, L)
                w = named(vexp_nonpositive(S[at] - T.broadcast(held, L)))
                B.buffer_store(total, total[whole] + w, [whole])
                if cache == "i8":
                    count = B.bind(T.max(T.min(keys - c * L, index(L)), index(0)))
                    w = named(w * load(p["v_scale"], v_scale + j0 + c * L, L, count))
                B.buffer_store(S, w, [at])
            sum_ = named(reduce_lanes(lambda a, b: a + b, named(total[whole])))
            B.buffer_store(stats, stats[r * 3 + 1] * corr + sum_, [r * 3 + 1])

        def values(v0: Expr, keys: Expr) -> None:
            """A[r] = A[r] * corr + sum over j of S[r, j] v_j."""

            def some(start: Expr, parts: Sequence[tuple[int, int | None]]) -> None:
                # One head alone sums even and odd keys apart: one chain of additions would wait for itself.
                chains = 2 if R == 1 else 1
                acc = B.alloc_buffer((chains * R * len(parts) * L,), "float32", scope="local")
                for i in range(chains * R * len(parts)):
                    B.buffer_store(acc, splat(0, "float32", L), [lanes_at(index(i * L), L)])

                def add(j: Expr, chain: int) -> None:
                    at = B.bind(v0 + j * Dv + start)
                    for u, (offset, count) in enumerate(parts):
                        value = numbers(p["v"], at + offset, count)
                        for r in range(R):
                            to = [lanes_at(index(((chain * R + r) * len(parts) + u) * L), L)]
                            w = T.broadcast(S[r * _TILE + j], L)
                            B.buffer_store(acc, acc[to] + w * value, to)

                with B.serial(T.truncdiv(keys, index(chains))) as i:
                    for chain in range(chains):
                        add(i * chains + chain, chain)
                if chains == 2:
                    with B.If(T.truncmod(keys, index(2)) == 1), B.Then():
                        add(keys - 1, 0)
                for r in range(R):
                    for u, (offset, _) in enumerate(parts):
                        sums = [
                            acc[lanes_at(index(((chain * R + r) * len(parts) + u) * L), L)]
                            for chain in range(chains)
                        ]
                        to = [lanes_at(r * Dvp + start + offset, L)]
                        corr = T.broadcast(stats[r * 3 + 2], L)
                        B.buffer_store(A, A[to] * corr + (sums[0] + sums[1] if chains == 2 else sums[0]), to)

            wide = _VECTORS * L
            whole = [(u * L, None) for u in range(_VECTORS)]
            if Dv // wide:
                with B.serial(index(Dv // wide)) as c:
                    some(c * wide, whole)
            if Dv % wide:
                some(index(Dv // wide * wide), vectors(Dv % wide))

        with B.serial(n["begin"], n["end"]) as block:
            c = B.bind(T.truncmod(block, n["C"]))
            rest = B.bind(T.truncdiv(block, n["C"]))
            i_b, i_h = B.bind(T.truncdiv(rest, n["Hkv"])), B.bind(T.truncmod(rest, n["Hkv"]))
            from_j = B.bind(c * chunk)
            keys = B.bind(T.min(n["Sk"] - from_j, index(chunk)))
            k0 = B.bind(i_b * n["ks_b"] + i_h * n["ks_h"] + from_j * D)
            v0 = B.bind(i_b * n["vs_b"] + i_h * n["vs_h"] + from_j * Dv)
            scales = B.bind(i_b * n["ss_b"] + i_h * n["ss_h"] + from_j) if cache == "i8" else index(0)
            with B.serial(index(rounds)) as turn:

                def head(r: Expr | int, turn: Expr = turn, i_h: Expr = i_h) -> Expr:
                    """The number of head r; beyond the group, its last, once more."""
                    return i_h * G + T.min(turn * R + r, index(G - 1))

                for r in range(R):
                    q0 = B.bind(i_b * n["qs_b"] + head(r) * n["qs_h"])
                    for start, count in vectors(D):
                        left = None if count is None else index(count)
                        q = load(p["q"], q0 + start, L, left) * splat(scale, "float32", L)
                        B.buffer_store(Q, q, [lanes_at(index(r * Dp + start), L)])
                    for start, _ in vectors(Dv):
                        B.buffer_store(A, splat(0, "float32", L), [lanes_at(index(r * Dvp + start), L)])
                    B.buffer_store(stats, splat(-math.inf, "float32", 1), [index(r * 3)])
                    B.buffer_store(stats, splat(0, "float32", 1), [index(r * 3 + 1)])
                with B.serial(T.truncdiv(keys + (_TILE - 1), index(_TILE))) as t:
                    j0 = B.bind(t * _TILE)
                    held = B.bind(T.min(keys - j0, index(_TILE)))
                    scores(B.bind(k0 + j0 * D), held)
                    with B.serial(index(R)) as r:
                        b0 = index(0)
                        if mask != "none":
                            b0 = B.bind(i_b * n["ms_b"] + head(r) * n["ms_h"] + from_j * n["ms_k"])
                        weights(r, j0, held, scales, scales, b0)
                    values(B.bind(v0 + j0 * Dv), held)
                with B.serial(index(R)) as r:
                    at = B.bind(i_b * n["ys_b"] + head(r) * n["ys_h"])
                    total = named(stats[r * 3 + 1])
                    with B.If(n["C"] == 1):
                        with B.Then():
                            _write(p["y"], at, A, r * Dvp, vectors(Dv), named(inverse(total)), L)
                        with B.Else():
                            own = B.bind((block * G + (head(r) - i_h * G)) * (Dv + STATS))
                            _write(p["part"], own, A, r * Dvp, vectors(Dv), splat(1, "float32", 1), L)
                            B.buffer_store(p["part"], stats[r * 3], [own + Dv])
                            B.buffer_store(p["part"], total, [own + (Dv + 1)])
    return f.result


@kernel("attention_merge")
def attention_merge(spec: KernelSpec, isa: Isa, symbol: str) -> Any:
    """y of the parts that `attention_decode` left.

    Spec: value_dim, group. Arguments: y, part f32 [batch, Hkv, C, group, value_dim + 2], C, Hkv, ys_b, ys_h.
    Blocks: batch * Hkv * group heads.
    """
    Dv, G, L = spec["value_dim"], spec["group"], isa.lanes
    starts = [(at, None if at + L <= Dv else Dv - at) for at in range(0, Dv, L)]
    with function(symbol, [("y", "float32"), ("part", "float32")], ["C", "Hkv", "ys_b", "ys_h"]) as f:
        n, y, part = f.scalars, f.buffers["y"], f.buffers["part"]
        A = B.alloc_buffer((len(starts) * L,), "float32")
        best = B.alloc_buffer((2,), "float32", scope="local")
        with B.serial(n["begin"], n["end"]) as block:
            g, group = B.bind(T.truncmod(block, index(G))), B.bind(T.truncdiv(block, index(G)))
            i_b, i_h = B.bind(T.truncdiv(group, n["Hkv"])), B.bind(T.truncmod(group, n["Hkv"]))
            first_part = B.bind((group * n["C"] * G + g) * (Dv + STATS))
            step = G * (Dv + STATS)
            B.buffer_store(best, splat(-math.inf, "float32", 1), [index(0)])
            B.buffer_store(best, splat(0, "float32", 1), [index(1)])
            for start, _ in starts:
                B.buffer_store(A, splat(0, "float32", L), [lanes_at(index(start), L)])
            with B.serial(n["C"]) as c:
                B.buffer_store(best, T.max(part[first_part + c * step + Dv], best[index(0)]), [index(0)])
            top = named(finite(best[index(0)]))
            with B.serial(n["C"]) as c:
                own = B.bind(first_part + c * step)
                share = named(vexp_nonpositive(part[own + Dv] - top))
                B.buffer_store(best, best[index(1)] + share * part[own + (Dv + 1)], [index(1)])
                for start, count in starts:
                    left = None if count is None else index(count)
                    to = [lanes_at(index(start), L)]
                    B.buffer_store(A, A[to] + T.broadcast(share, L) * load(part, own + start, L, left), to)
            at = B.bind(i_b * n["ys_b"] + (i_h * G + g) * n["ys_h"])
            _write(y, at, A, index(0), starts, named(inverse(best[index(1)])), L)
    return f.result


def _folded(vectors: list[Expr], width: int) -> Expr:
    """2^n vectors of terms of sums, a sum in every `width` lanes, as one vector of those sums in order, with
    width / 2^n terms of each left."""
    lanes = lanes_of(vectors[0])
    while len(vectors) > 1:
        half = width // 2
        low = [k * width + i for k in range(2 * lanes // width) for i in range(half)]
        pairs = [(named(a), named(b)) for a, b in zip(vectors[::2], vectors[1::2], strict=True)]
        vectors = [
            named(T.Shuffle([a, b], low) + T.Shuffle([a, b], [i + half for i in low])) for a, b in pairs
        ]
        width = half
    return vectors[0]


def _stage_bias(bias: Any, mask: Any, at: Expr, stride: Expr, keys: Expr, lanes: int) -> None:
    """bias[j] = what the mask adds to the score of key j, in vectors where its elements lie side by side."""

    def added(item: Expr) -> Expr:
        if element_of(item) == "float32":
            return item
        zero, low = (splat(value, "float32", lanes_of(item)) for value in (0, -math.inf))
        return T.Select(item != const_like(item, 0), zero, low)

    def some(start: Expr, count: Expr | None) -> None:
        item = named(load(mask, at + start, lanes, count))
        B.buffer_store(bias, added(item), [lanes_at(start, lanes)])

    with B.If(stride == 1):
        with B.Then():
            each_vector(keys, lanes, some)
        with B.Else(), B.serial(keys) as j:
            B.buffer_store(bias, added(mask[at + j * stride]), [j])


def _write(
    to: Any, at: Expr, A: Any, start: Expr, parts: list[tuple[int, int | None]], factor: Expr, lanes: int
) -> None:
    """to[at ..] = A[start ..] * factor."""
    for offset, count in parts:
        value = A[lanes_at(start + offset, lanes)] * T.broadcast(factor, lanes)
        store(to, value, at + offset, None if count is None else index(count))


def finite(m: Expr) -> Expr:
    """A maximum that exponents can be taken against: 0 where nothing was above -inf."""
    return T.Select(m == const_like(m, -math.inf), const_like(m, 0.0), m)


def inverse(total: Expr) -> Expr:
    """1 / sum of weights; of no weights, 1: the outputs are zeros already."""
    one = const_like(total, 1.0)
    return one / T.Select(total == const_like(total, 0.0), one, total)
