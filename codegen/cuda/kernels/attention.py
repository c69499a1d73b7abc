"""softmax(q k^T * scale + mask) v without the score matrix, for many queries: `attention`.

The sums of codegen/kernels/attention.py, the online softmax over tiles of keys. A block of threads does
`q_block` queries of a head, four threads a query: they share its scores in a tile and its outputs."""

from __future__ import annotations

import math

from tvm.script import tirx as T
from tvm.script.ir_builder import tirx as B
from tvm.tirx import EQ, NE

from qgraph.codegen.cuda.kernels import CudaKernel, kernel
from qgraph.codegen.cuda.kernels.frame import call, device_function, sync, sync_warp
from qgraph.codegen.kernels.attention_decode import finite, inverse
from qgraph.codegen.kernels.loops import index
from qgraph.codegen.kernels.vmath import Expr, convert, named, vexp_nonpositive, vtanh
from qgraph.codegen.spec import KernelSpec
from qgraph.errors import QGraphError

_SHARERS = 4  # threads of a query
MASKS = {"bool": "uint8", "f32": "float32"}
_MAX_HEAD = 256


def softcapped(score: Expr, softcap: float) -> Expr:
    return vtanh(named(score * T.float32(1 / softcap))) * T.float32(softcap) if softcap else score


def with_mask(score: Expr, item: Expr, kind: str) -> Expr:
    """score + mask; -inf wherever the mask forbids, so that a NaN there does not count."""
    low = T.float32(-math.inf)
    if kind == "bool":
        return T.Select(NE(item, T.uint8(0)), score, low)
    bias = named(item)
    return T.Select(EQ(bias, low), low, score + bias)


@kernel("attention")
def attention(spec: KernelSpec, symbol: str) -> CudaKernel:
    """The CPU's arguments; with the parameter cache = "i8" there is no scratch memory among them."""
    coded = dict(spec.params).get("cache", "f32") == "i8"
    D, Dv, mask, causal = spec["head_dim"], spec["value_dim"], spec["mask"], spec["causal"]
    Q = spec["q_block"]
    if not (0 < max(D, Dv) <= _MAX_HEAD and Q % 8 == 0 and mask in ("none", *MASKS)):
        raise QGraphError(f"{spec.op}: cannot build {dict(spec.params)}")
    keys = 32 if max(D, Dv) <= 64 else 16 if max(D, Dv) <= 128 else 8  # of a tile: 48 KiB hold all of it
    threads, each = Q * _SHARERS, keys // _SHARERS
    stored = "int8" if coded else "float32"
    pointers = [("y", "float32"), ("q", "float32"), ("k", stored), ("v", stored)]
    scalars = ["H", "G", "Sq", "Sk", "P", "qs_b", "qs_h", "qs_s"]
    if coded:
        pointers += [("k_scale", "float32"), ("v_scale", "float32")]
        scalars += ["ks_b", "ks_h", "vs_b", "vs_h", "ss_b", "ss_h"]
    else:
        scalars += ["ks_b", "ks_h", "ks_s", "vs_b", "vs_h", "vs_s"]
    if mask != "none":
        pointers.append(("mask", MASKS[mask]))
        scalars += ["ms_b", "ms_h", "ms_q", "ms_k"]
    scalars += ["ys_b", "ys_h", "ys_s"]
    outs = -(-Dv // _SHARERS)  # of a thread
    low = T.float32(-math.inf)

    with device_function(symbol, pointers, scalars, threads) as f:
        n, p = f.scalars, f.buffers
        Qs = B.alloc_buffer((Q * (D + 1),), "float32", scope="shared")
        Ks = B.alloc_buffer((keys * (D + 1),), "float32", scope="shared")
        Vs = B.alloc_buffer((keys * Dv,), "float32", scope="shared")
        Ps = B.alloc_buffer((Q * (keys + 1),), "float32", scope="shared")
        O = B.alloc_buffer((outs,), "float32", scope="local")  # noqa: E741
        s = B.alloc_buffer((each,), "float32", scope="local")
        stats = B.alloc_buffer((2,), "float32", scope="local")  # maximum, sum of weights

        across = B.bind(T.truncdiv(n["Sq"] + index(Q - 1), index(Q)))
        i0 = B.bind(T.truncmod(f.block, across) * Q)
        head = B.bind(T.truncdiv(f.block, across))
        i_b, i_h = B.bind(T.truncdiv(head, n["H"])), B.bind(T.truncmod(head, n["H"]))
        i_k = B.bind(T.truncdiv(i_h, n["G"]))
        q0 = B.bind(i_b * n["qs_b"] + i_h * n["qs_h"])
        k0 = B.bind(i_b * n["ks_b"] + i_k * n["ks_h"])
        v0 = B.bind(i_b * n["vs_b"] + i_k * n["vs_h"])
        k_step, v_step = (index(D), index(Dv)) if coded else (n["ks_s"], n["vs_s"])
        s0 = B.bind(i_b * n["ss_b"] + i_k * n["ss_h"]) if coded else None

        mine, part = B.bind(T.truncdiv(f.thread, _SHARERS)), B.bind(T.truncmod(f.thread, _SHARERS))
        i = B.bind(T.min(i0 + T.Cast("int64", mine), n["Sq"] - 1))  # beyond the last query, the last

        def fill(to: object, pitch: int, rows: int, width: int, value: object) -> None:
            """to[row, d] = value(row, d), by all threads."""
            rounds = -(-rows * width // threads)
            with B.serial(rounds) as r:
                flat = B.bind(r * threads + f.thread)
                with B.If(flat < rows * width), B.Then():
                    row, d = B.bind(T.truncdiv(flat, width)), B.bind(T.truncmod(flat, width))
                    item = value(T.Cast("int64", row), T.Cast("int64", d))  # type: ignore[operator]
                    B.buffer_store(to, item, [row * pitch + d])

        def query(row: Expr, d: Expr) -> Expr:
            at = T.min(i0 + row, n["Sq"] - 1)
            return p["q"][q0 + at * n["qs_s"] + d] * T.float32(spec["scale"])

        fill(Qs, D + 1, Q, D, query)
        for c in range(outs):
            B.buffer_store(O, T.float32(0), [c])
        B.buffer_store(stats, low, [0])
        B.buffer_store(stats, T.float32(0), [1])
        # How many keys any query here may attend.
        reach = n["Sk"]
        if causal:
            reach = T.min(n["Sk"], T.max(T.min(i0 + Q, n["Sq"]) + n["P"], index(0)))
        reach = named(reach)
        with B.serial(T.truncdiv(reach + index(keys - 1), index(keys))) as tile:
            j0 = B.bind(tile * keys)

            def key(row: Expr, d: Expr) -> Expr:
                j = T.min(j0 + row, n["Sk"] - 1)
                item = p["k"][k0 + j * k_step + d]
                return convert(item, "float32") * p["k_scale"][s0 + j] if coded else item

            def value(row: Expr, d: Expr) -> Expr:
                # Beyond the last key zeros, which weights of zero leave as they are.
                j = T.min(j0 + row, n["Sk"] - 1)
                item = p["v"][v0 + j * v_step + d]
                return convert(item, "float32") * p["v_scale"][s0 + j] if coded else item

            sync()
            fill(Ks, D + 1, keys, D, key)
            fill(Vs, Dv, keys, Dv, value)
            sync()
            for c in range(each):
                B.buffer_store(s, T.float32(0), [c])
            with B.serial(D) as d:
                own = B.bind(Qs[mine * (D + 1) + d])
                for c in range(each):
                    at = (part + c * _SHARERS) * (D + 1) + d
                    B.buffer_store(s, T.fma(own, Ks[at], s[c]), [c])
            for c in range(each):
                j = B.bind(j0 + T.Cast("int64", part) + c * _SHARERS)
                score = named(softcapped(named(s[c]), spec["softcap"]))
                if mask != "none":
                    at = i_b * n["ms_b"] + i_h * n["ms_h"] + i * n["ms_q"] + T.min(j, n["Sk"] - 1) * n["ms_k"]
                    score = named(with_mask(score, p["mask"][at], mask))
                allowed = j < n["Sk"]
                if causal:
                    allowed = T.And(allowed, j <= i + n["P"])
                B.buffer_store(s, T.Select(allowed, score, low), [c])
            top: Expr = stats[0]
            for c in range(each):
                top = named(T.max(s[c], top))
            top = call("float32", "qg_lanes_max", top, T.int32(_SHARERS - 1))
            held = named(finite(top))
            corr = named(vexp_nonpositive(named(stats[0] - held)))
            B.buffer_store(stats, top, [0])
            total: Expr = T.float32(0)
            for c in range(each):
                weight = named(vexp_nonpositive(named(s[c] - held)))
                B.buffer_store(Ps, weight, [mine * (keys + 1) + part + c * _SHARERS])
                total = named(total + weight)
            B.buffer_store(stats, T.fma(stats[1], corr, total), [1])
            sync_warp()
            for c in range(outs):
                B.buffer_store(O, O[c] * corr, [c])
            # Keys that nobody may attend weigh nothing, whatever their values: these are not read.
            with B.serial(T.min(reach - j0, index(keys))) as j:
                weight = B.bind(Ps[mine * (keys + 1) + T.Cast("int32", j)])
                for c in range(outs):
                    d = part + c * _SHARERS
                    at = T.Cast("int32", j) * Dv + (T.min(d, Dv - 1) if Dv % _SHARERS else d)
                    B.buffer_store(O, T.fma(weight, Vs[at], O[c]), [c])

        total = call("float32", "qg_lanes_sum", stats[1], T.int32(_SHARERS - 1))
        share = named(inverse(total))
        y0 = B.bind(i_b * n["ys_b"] + i_h * n["ys_h"] + i * n["ys_s"])
        with B.If(i0 + T.Cast("int64", mine) < n["Sq"]), B.Then():
            for c in range(outs):
                d = B.bind(T.Cast("int64", part) + c * _SHARERS)
                with B.If(d < index(Dv)), B.Then():
                    B.buffer_store(p["y"], O[c] * share, [y0 + d])
    return CudaKernel(f.result, threads)
