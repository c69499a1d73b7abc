"""Attention of one query a head, as in every step of generation: `attention_decode` and `attention_merge`.

As on the CPU the past is cut into chunks that are blocks of their own, and the heads that share keys are done
together. Eight threads share a key: they read it side by side.
"""

from __future__ import annotations

import math

from tvm.script import tirx as T
from tvm.script.ir_builder import tirx as B
from tvm.tirx import EQ

from qgraph.codegen.cuda.kernels import CudaKernel, kernel
from qgraph.codegen.cuda.kernels.attention import MASKS, softcapped, with_mask
from qgraph.codegen.cuda.kernels.frame import call, device_function, strided, sync
from qgraph.codegen.kernels.attention_decode import STATS, finite, inverse
from qgraph.codegen.kernels.loops import index
from qgraph.codegen.kernels.vmath import Expr, convert, named, vexp_nonpositive
from qgraph.codegen.spec import KernelSpec
from qgraph.errors import QGraphError

_THREADS = 128
_SHARERS = 8  # threads of a key
_HEADS = 8  # done together, at most: what shared memory holds


@kernel("attention_decode")
def attention_decode(spec: KernelSpec, symbol: str) -> CudaKernel:
    D, Dv, G, mask, cache = (spec[n] for n in ("head_dim", "value_dim", "group", "mask", "cache"))
    chunk = spec["chunk"]
    if not (0 < D <= 256 and 0 < Dv <= 256 and G > 0 and 0 < chunk <= 256) or mask not in ("none", *MASKS):
        raise QGraphError(f"{spec.op}: cannot build {dict(spec.params)}")
    coded = cache == "i8"
    stored = "int8" if coded else "float32"
    pointers = [("y", "float32"), ("part", "float32"), ("q", "float32"), ("k", stored), ("v", stored)]
    scalars = ["Sk", "C", "Hkv", "qs_b", "qs_h", "ks_b", "ks_h", "vs_b", "vs_h"]
    if coded:
        pointers += [("k_scale", "float32"), ("v_scale", "float32")]
        scalars += ["ss_b", "ss_h"]
    if mask != "none":
        pointers.append(("mask", MASKS[mask]))
        scalars += ["ms_b", "ms_h", "ms_k"]
    scalars += ["ys_b", "ys_h"]
    low = T.float32(-math.inf)
    together = min(G, _HEADS)
    with device_function(symbol, pointers, scalars, _THREADS) as f:
        n, p = f.scalars, f.buffers
        Qs = B.alloc_buffer((together * D,), "float32", scope="shared")
        S = B.alloc_buffer((together * chunk,), "float32", scope="shared")
        stats = B.alloc_buffer((together * STATS,), "float32", scope="shared")

        i_c, rest = B.bind(T.truncmod(f.block, n["C"])), B.bind(T.truncdiv(f.block, n["C"]))
        i_b, i_h = B.bind(T.truncdiv(rest, n["Hkv"])), B.bind(T.truncmod(rest, n["Hkv"]))
        j0 = B.bind(i_c * chunk)
        keys = B.bind(T.Cast("int32", T.min(n["Sk"] - j0, index(chunk))))
        k0 = B.bind(i_b * n["ks_b"] + i_h * n["ks_h"] + j0 * D)
        v0 = B.bind(i_b * n["vs_b"] + i_h * n["vs_h"] + j0 * Dv)
        s0 = B.bind(i_b * n["ss_b"] + i_h * n["ss_h"] + j0) if coded else None
        warp, place = B.bind(T.truncdiv(f.thread, 32)), B.bind(T.truncmod(f.thread, 32))

        def heads(g0: int, R: int) -> None:
            """Heads g0 .. g0 + R - 1 of the group."""

            def query(flat: Expr) -> None:
                r, d = T.truncdiv(flat, index(D)), T.truncmod(flat, index(D))
                at = i_b * n["qs_b"] + (i_h * G + g0 + r) * n["qs_h"] + d
                B.buffer_store(Qs, p["q"][at] * T.float32(spec["scale"]), [flat])

            sync()
            strided(f, index(R * D), query)
            sync()
            dots = B.alloc_buffer((R,), "float32", scope="local")
            own, sub = B.bind(T.truncdiv(f.thread, _SHARERS)), B.bind(T.truncmod(f.thread, _SHARERS))
            at_once = _THREADS // _SHARERS
            with B.serial(T.truncdiv(keys + (at_once - 1), at_once)) as turn:
                j = B.bind(turn * at_once + own)
                held = B.bind(T.Cast("int64", T.min(j, keys - 1)))
                for r in range(R):
                    B.buffer_store(dots, T.float32(0), [r])
                with B.serial(-(-D // _SHARERS)) as i:
                    d = B.bind(i * _SHARERS + sub)
                    with B.If(d < D), B.Then():
                        key = named(convert(p["k"][k0 + held * D + T.Cast("int64", d)], "float32"))
                        for r in range(R):
                            B.buffer_store(dots, T.fma(Qs[r * D + d], key, dots[r]), [r])
                for r in range(R):
                    score = call("float32", "qg_lanes_sum", dots[r], T.int32(_SHARERS - 1))
                    if coded:
                        score = named(score * p["k_scale"][s0 + held])
                    score = named(softcapped(score, spec["softcap"]))
                    if mask != "none":
                        at = i_b * n["ms_b"] + (i_h * G + g0 + r) * n["ms_h"] + (j0 + held) * n["ms_k"]
                        score = named(with_mask(score, p["mask"][at], mask))
                    with B.If(T.And(EQ(sub, 0), j < keys)), B.Then():
                        B.buffer_store(S, score, [r * chunk + j])
            sync()

            # A warp does a head: its scores to weights.
            best = B.alloc_buffer((2,), "float32", scope="local")
            with B.serial(-(-R // (_THREADS // 32))) as turn:
                r = B.bind(turn * (_THREADS // 32) + warp)
                with B.If(r < R), B.Then():
                    B.buffer_store(best, low, [0])
                    B.buffer_store(best, T.float32(0), [1])
                    with B.serial(T.truncdiv(keys + 31 - place, 32)) as i:
                        B.buffer_store(best, T.max(S[r * chunk + i * 32 + place], best[0]), [0])
                    top = call("float32", "qg_warp_max", best[0])
                    held_top = named(finite(top))
                    with B.serial(T.truncdiv(keys + 31 - place, 32)) as i:
                        j = B.bind(i * 32 + place)
                        weight = named(vexp_nonpositive(named(S[r * chunk + j] - held_top)))
                        B.buffer_store(best, best[1] + weight, [1])
                        if coded:
                            weight = weight * p["v_scale"][s0 + T.Cast("int64", j)]
                        B.buffer_store(S, weight, [r * chunk + j])
                    total = call("float32", "qg_warp_sum", best[1])
                    with B.If(EQ(place, 0)), B.Then():
                        B.buffer_store(stats, top, [r * STATS])
                        B.buffer_store(stats, total, [r * STATS + 1])
            sync()

            out = B.alloc_buffer((1,), "float32", scope="local")

            def output(flat: Expr) -> None:
                r, d = B.bind(T.truncdiv(flat, index(Dv))), B.bind(T.truncmod(flat, index(Dv)))
                B.buffer_store(out, T.float32(0), [0])
                with B.serial(keys) as j:
                    weight = named(S[T.Cast("int32", r) * chunk + j])
                    item = convert(p["v"][v0 + T.Cast("int64", j) * Dv + d], "float32")
                    # What weighs nothing is not looked at: it may be NaN.
                    B.buffer_store(
                        out, T.Select(EQ(weight, T.float32(0)), out[0], T.fma(weight, item, out[0])), [0]
                    )
                with B.If(EQ(n["C"], index(1))):
                    with B.Then():
                        share = named(inverse(named(stats[T.Cast("int32", r) * STATS + 1])))
                        at = i_b * n["ys_b"] + (i_h * G + g0 + r) * n["ys_h"] + d
                        B.buffer_store(p["y"], out[0] * share, [at])
                    with B.Else():
                        at = (f.block * G + g0 + r) * (Dv + STATS)
                        B.buffer_store(p["part"], out[0], [at + d])

            strided(f, index(R * Dv), output)
            with B.If(T.And(n["C"] > index(1), f.thread < R * STATS)), B.Then():
                r, which = T.truncdiv(f.thread, STATS), T.truncmod(f.thread, STATS)
                at = (f.block * G + g0 + T.Cast("int64", r)) * (Dv + STATS) + Dv + T.Cast("int64", which)
                B.buffer_store(p["part"], stats[f.thread], [at])

        for g0 in range(0, G, _HEADS):
            heads(g0, min(_HEADS, G - g0))
    return CudaKernel(f.result, _THREADS)


@kernel("attention_merge")
def attention_merge(spec: KernelSpec, symbol: str) -> CudaKernel:
    """Block: one head."""
    Dv, G = spec["value_dim"], spec["group"]
    with device_function(
        symbol, [("y", "float32"), ("part", "float32")], ["C", "Hkv", "ys_b", "ys_h"], _THREADS
    ) as f:
        n, y, part = f.scalars, f.buffers["y"], f.buffers["part"]
        g, group = B.bind(T.truncmod(f.block, index(G))), B.bind(T.truncdiv(f.block, index(G)))
        i_b, i_h = B.bind(T.truncdiv(group, n["Hkv"])), B.bind(T.truncmod(group, n["Hkv"]))
        first = B.bind((group * n["C"] * G + g) * (Dv + STATS))
        step = G * (Dv + STATS)
        best = B.alloc_buffer((3,), "float32", scope="local")  # maximum, sum of weights, an output
        B.buffer_store(best, T.float32(-math.inf), [0])
        with B.serial(n["C"]) as c:
            B.buffer_store(best, T.max(part[first + c * step + Dv], best[0]), [0])
        top = named(finite(named(best[0])))

        def output(d: Expr) -> None:
            B.buffer_store(best, T.float32(0), [1])
            B.buffer_store(best, T.float32(0), [2])
            with B.serial(n["C"]) as c:
                at = B.bind(first + c * step)
                share = named(vexp_nonpositive(named(part[at + Dv] - top)))
                B.buffer_store(best, T.fma(share, part[at + (Dv + 1)], best[1]), [1])
                B.buffer_store(best, T.fma(share, part[at + d], best[2]), [2])
            to = i_b * n["ys_b"] + (i_h * G + g) * n["ys_h"] + d
            B.buffer_store(y, best[2] * inverse(named(best[1])), [to])

        strided(f, index(Dv), output)
    return CudaKernel(f.result, _THREADS)
