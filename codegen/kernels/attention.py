"""softmax(q k^T * scale + mask) v without the score matrix: `attention`.

The online softmax of Milakov and Gimelshein (arXiv:1805.02867) over tiles of keys, as in FlashAttention
(arXiv:2205.14135, algorithm 1): running maximum m and sum of weights (norm) per query, and outputs
rescaled by corr = e^(m_old - m_new).

Two arrangements of the same sums:
* queries in lanes, for a chunk of many queries. q is transposed once, then keys and values are read as they
  lie, one element to all lanes, and the softmax needs no reduction over lanes. The outputs are transposed at
  the end.
* one query at a time, for the last few of a chunk: head dims and keys in lanes.

Keys and values may be int8 codes with a scale each: a tile of them is decoded to scratch memory first.

Scores that the mask or causality forbids are -inf whatever their value. As in ONNX's reference, a query with
no key to attend (or none with a score above -inf) gives zeros.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from qgraph.codegen.isa import Isa
from qgraph.codegen.kernels import kernel
from qgraph.codegen.kernels.gemm import accumulate, accumulator
from qgraph.codegen.kernels.signature import drop_parameters
from qgraph.codegen.kernels.vector import f32, first, lanes_at, load_first, reduce_lanes, splat, store_first
from qgraph.codegen.kernels.vmath import const_like, let, named, vexp_nonpositive, vtanh
from qgraph.codegen.spec import ATTENTION_TILE, KernelSpec
from qgraph.errors import QGraphError

_STACK_FLOATS = 15 * 1024  # of the 16 Ki that a kernel may put on the stack
_MAX_HEAD = 256
_MASK_DTYPE = {"none": "uint8", "bool": "uint8", "f32": "float32"}


@kernel("attention")
def attention(spec: KernelSpec, isa: Isa, symbol: str) -> PrimFunc:
    """ONNX Attention-23 on float32 q, k, v.

    Spec: head_dim and value_dim <= 256, mask "none" | "bool" (true: attend) | "f32" (added), causal (query i
    attends keys j <= i + P), scale, softcap (0: none; c tanh(s / c)), q_block: queries of one block.
    Arguments: y, q, k, v, [mask], H query heads, G of them per key head, Sq, Sk, P, strides qs_b, qs_h, qs_s,
    ks_b, ks_h, ks_s, vs_b, vs_h, vs_s, [ms_b, ms_h, ms_q, ms_k], ys_b, ys_h, ys_s; begin, end. The stride
    within a head is 1. Blocks: batch * H * ceil(Sq/q_block), the last fastest.
    With the parameter cache = "i8", k and v are codes; k_scale, v_scale and a scratch of `attention_scratch`
    bytes follow them. The tokens of a head lie one behind the other, in codes and in scales: there is no ks_s
    and no vs_s, and strides ss_b, ss_h of both scales follow vs_h.
    """
    coded = dict(spec.params).get("cache", "f32") == "i8"
    stored = "int8" if coded else "float32"
    D, Dv, mask_kind, causal = spec["head_dim"], spec["value_dim"], spec["mask"], spec["causal"]
    scale, softcap, q_block = spec["scale"], spec["softcap"], spec["q_block"]
    if not (0 < D <= _MAX_HEAD and 0 < Dv <= _MAX_HEAD and q_block > 0 and mask_kind in _MASK_DTYPE):
        raise QGraphError(f"{spec.op}: cannot build {dict(spec.params)}")

    L = isa.lanes
    R, V = accumulator(isa)
    KT = 8 * R  # keys of a tile
    assert KT <= ATTENTION_TILE
    Dv_rows = -(-Dv // R) * R
    biased = mask_kind != "none"
    adjusted = bool(softcap or biased or causal)
    while V > 1 and V * L * (D + Dv_rows + (2 if biased else 1) * KT) > _STACK_FLOATS:
        V //= 2
    W = V * L  # queries side by side
    few = max(1, W // 4)  # queries up to which one at a time is faster
    Dp, Dvp, KTp = (-(-n // L) * L for n in (D, Dv, KT))
    chunk_vectors = min(4, Dvp // L)  # of a value row, summed at a time
    chunks = -(-Dvp // (chunk_vectors * L))

    def add(a: Any, b: Any) -> Any:
        return a + b

    def keys_up_to(end: Any, Sk: Any) -> Any:
        """How many of the keys any query here may attend. Named, for TVM takes seconds to see through it."""
        return named(T.min(Sk, T.max(end, T.int64(0)))) if causal else Sk

    def capped(s: Any) -> Any:
        return vtanh(s * const_like(s, 1 / softcap)) * const_like(s, softcap) if softcap else s

    def bias_at(B: Any, at: Any) -> Any:
        """What one mask element adds to a score."""
        if mask_kind == "bool":
            return T.Select(B[at] != T.uint8(0), T.float32(0), T.float32(-math.inf))
        return B[at]

    def masked(s: Any, bias: Any) -> Any:
        """s + bias; -inf wherever the bias is, so that a NaN in a forbidden place does not count."""
        low = const_like(s, -math.inf)
        return let(bias, lambda b: T.Select(b == low, low, s + b))

    def rescale(m_old: Any, m_new: Any) -> Any:
        """e^(m_old - m_new); m_new is finite, or NaN."""
        return vexp_nonpositive(m_old - m_new)

    def finite(m: Any) -> Any:
        """A maximum that exponents can be taken against: 0 where nothing was above -inf yet."""
        return T.Select(m == const_like(m, -math.inf), const_like(m, 0.0), m)

    def inverse(total: Any) -> Any:
        """1 / sum of weights; of no weights, 1: the outputs are zeros already."""
        one = const_like(total, 1.0)
        return one / T.Select(total == const_like(total, 0.0), one, total)

    @T.inline
    def decode_tile(F, A, a0, stride, scales, s0, keys, width):
        """F[j, :] = code * scale of `keys` rows of A from a0."""
        for j in T.serial(keys):
            for c in T.serial(T.int64(width // L)):
                F[lanes_at(j * width + c * L, L)] = T.Cast(
                    f"float32x{L}", A[lanes_at(a0 + j * stride + c * L, L)]
                ) * splat(scales[s0 + j], L)
            for d in T.serial(T.int64(width % L)):
                F[j * width + width // L * L + d] = (
                    T.Cast("float32", A[a0 + j * stride + width // L * L + d]) * scales[s0 + j]
                )

    # ---- queries in lanes ----

    def key_at(K: Any, k0: Any, stride: Any, row: Any, keys: Any) -> Callable[[Any, Any], Any]:
        return lambda r, d: K[k0 + T.min(row + r, keys - 1) * stride + d]

    def value_at(Vb: Any, v0: Any, stride: Any, row: Any) -> Callable[[Any, Any], Any]:
        return lambda r, j: Vb[v0 + j * stride + T.min(row + r, Dv - 1)]

    def column_of(A: Any) -> Callable[[Any, Any], Any]:
        return lambda k, v: A[k, lanes_at(v * L, L)]

    def causal_mask(s: Any, j: Any, last: Any, v: Any) -> Any:
        """-inf in the lanes whose query may not attend key j; lane 0 may attend keys up to `last`."""
        ahead = T.cast(T.max(T.min(j - last, T.int64(W)), T.int64(0)), "int32")
        return T.Select(T.ramp(T.Cast("int32", v * L), 1, L) < splat(ahead, L), f32(-math.inf, L), s)

    @T.inline
    def bias_tile(Bt, B, b0, stride_q, stride_k, keys, queries):
        """Bt[j, lane] = bias of key j for the lane's query. Unused lanes keep what they have."""
        if stride_q == 0:
            for j in T.serial(keys):
                for v in T.unroll(V):
                    Bt[j, lanes_at(v * L, L)] = splat(bias_at(B, b0 + j * stride_k), L)
        else:
            for i in T.serial(queries):
                for j in T.serial(keys):
                    Bt[j, i] = bias_at(B, b0 + i * stride_q + j * stride_k)

    @T.inline
    def score_tile(S, Qt, Bt, K, k0, stride, keys, last):
        """S[j, lane] = masked score of key j."""
        for t in T.serial(T.truncdiv(keys + (R - 1), T.int64(R))):
            acc = T.alloc_buffer((R, V, L), "float32", scope="local")
            accumulate(acc, key_at(K, k0, stride, t * R, keys), column_of(Qt), T.int64(D), R, V, L)
            for r in T.unroll(R):
                for v in T.unroll(V):
                    S[t * R + r, lanes_at(v * L, L)] = acc[r, v, lanes_at(0, L)]
        if adjusted:
            for j in T.serial(keys):
                for v in T.unroll(V):
                    s = T.alloc_buffer((L,), "float32", scope="local")
                    s[lanes_at(0, L)] = capped(S[j, lanes_at(v * L, L)])
                    if biased:
                        s[lanes_at(0, L)] = masked(s[lanes_at(0, L)], Bt[j, lanes_at(v * L, L)])
                    if causal:
                        s[lanes_at(0, L)] = causal_mask(s[lanes_at(0, L)], j, last, v)
                    S[j, lanes_at(v * L, L)] = s[lanes_at(0, L)]

    @T.inline
    def weight_tile(S, m, norm, corr, keys):
        """Scores to weights e^(s - m), with m, norm and corr = e^(m_old - m_new) brought up to date."""
        for v in T.unroll(V):
            top = T.alloc_buffer((L,), "float32", scope="local")
            total = T.alloc_buffer((L,), "float32", scope="local")
            top[lanes_at(0, L)] = m[v, lanes_at(0, L)]
            for j in T.serial(keys):
                top[lanes_at(0, L)] = T.max(S[j, lanes_at(v * L, L)], top[lanes_at(0, L)])
            corr[v, lanes_at(0, L)] = rescale(m[v, lanes_at(0, L)], finite(top[lanes_at(0, L)]))
            m[v, lanes_at(0, L)] = top[lanes_at(0, L)]
            top[lanes_at(0, L)] = finite(top[lanes_at(0, L)])
            total[lanes_at(0, L)] = norm[v, lanes_at(0, L)] * corr[v, lanes_at(0, L)]
            for j in T.serial(keys):
                S[j, lanes_at(v * L, L)] = vexp_nonpositive(S[j, lanes_at(v * L, L)] - top[lanes_at(0, L)])
                total[lanes_at(0, L)] = total[lanes_at(0, L)] + S[j, lanes_at(v * L, L)]
            norm[v, lanes_at(0, L)] = total[lanes_at(0, L)]

    @T.inline
    def add_values(Ot, S, corr, Vb, v0, stride, keys):
        """Ot[d, lane] = Ot * corr + sum over j of v[j, d] S[j, lane]."""
        for t in T.serial(T.int64(Dv_rows // R)):
            acc = T.alloc_buffer((R, V, L), "float32", scope="local")
            accumulate(acc, value_at(Vb, v0, stride, t * R), column_of(S), keys, R, V, L)
            for r in T.unroll(R):
                for v in T.unroll(V):
                    Ot[t * R + r, lanes_at(v * L, L)] = (
                        Ot[t * R + r, lanes_at(v * L, L)] * corr[v, lanes_at(0, L)]
                        + acc[r, v, lanes_at(0, L)]
                    )

    @T.inline
    def many_queries(
        Y, Q, K, Vb, C, B, Qt, Ot, S, Bt, y0, q0, k0, v0, s0, b0, sy, sq, sk, sv, bq, bk, n, Sk, last
    ):
        """Queries 0 .. n-1, n <= W, from the offsets given; query i attends keys j < Sk, j <= last + i."""
        m = T.alloc_buffer((V, L), "float32", scope="local")
        norm = T.alloc_buffer((V, L), "float32", scope="local")
        corr = T.alloc_buffer((V, L), "float32", scope="local")
        for v in T.unroll(V):
            m[v, lanes_at(0, L)] = f32(-math.inf, L)
            norm[v, lanes_at(0, L)] = f32(0, L)
        for d in T.serial(T.int64(D)):
            for v in T.unroll(V):
                Qt[d, lanes_at(v * L, L)] = f32(0, L)
        for i in T.serial(n):
            for d in T.serial(T.int64(D)):
                Qt[d, i] = Q[q0 + i * sq + d] * T.float32(scale)
        for d in T.serial(T.int64(Dv_rows)):
            for v in T.unroll(V):
                Ot[d, lanes_at(v * L, L)] = f32(0, L)
        if biased:
            for j in T.serial(T.int64(KT)):  # lanes without a query
                for v in T.unroll(V):
                    Bt[j, lanes_at(v * L, L)] = f32(0, L)
        reach: T.let = keys_up_to(last + n, Sk)
        for t in T.serial(T.truncdiv(reach + (KT - 1), T.int64(KT))):
            j0: T.let = t * KT
            keys: T.let = T.min(T.int64(KT), reach - j0)
            if biased:
                bias_tile(Bt, B, b0 + j0 * bk, bq, bk, keys, n)
            if coded:
                decode_tile(C[2], K, k0 + j0 * sk, sk, C[0], s0 + j0, keys, D)
                decode_tile(C[3], Vb, v0 + j0 * sv, sv, C[1], s0 + j0, keys, Dv)
                score_tile(S, Qt, Bt, C[2], T.int64(0), T.int64(D), keys, last - j0)
            else:
                score_tile(S, Qt, Bt, K, k0 + j0 * sk, sk, keys, last - j0)
            weight_tile(S, m, norm, corr, keys)
            if coded:
                add_values(Ot, S, corr, C[3], T.int64(0), T.int64(Dv), keys)
            else:
                add_values(Ot, S, corr, Vb, v0 + j0 * sv, sv, keys)
        for v in T.unroll(V):
            corr[v, lanes_at(0, L)] = inverse(norm[v, lanes_at(0, L)])
        for d in T.serial(T.int64(Dv)):
            for v in T.unroll(V):
                Ot[d, lanes_at(v * L, L)] = Ot[d, lanes_at(v * L, L)] * corr[v, lanes_at(0, L)]
        for i in T.serial(n):
            for d in T.serial(T.int64(Dv)):
                Y[y0 + i * sy + d] = Ot[d, i]

    # ---- one query ----

    def element_of_row(A: Any) -> Callable[[Any, Any], Any]:
        return lambda r, k: A[k]

    def value_row(Vb: Any, v0: Any, stride: Any, chunk: Any) -> Callable[[Any, Any], Any]:
        def at(j: Any, v: Any) -> Any:
            d = chunk * (chunk_vectors * L) + v * L
            if Dv % (chunk_vectors * L):
                return load_first(Vb, v0 + j * stride + d, Dv - d, L)
            return Vb[lanes_at(v0 + j * stride + d, L)]

        return at

    @T.inline
    def score_row(Sr, Qr, K, k0, stride, keys):
        """Sr[j] = q . k_j, head dims in lanes."""
        for j in T.serial(keys):
            acc = T.alloc_buffer((L,), "float32", scope="local")
            acc[lanes_at(0, L)] = f32(0, L)
            for c in T.unroll(D // L):
                acc[lanes_at(0, L)] = (
                    acc[lanes_at(0, L)] + Qr[lanes_at(c * L, L)] * K[lanes_at(k0 + j * stride + c * L, L)]
                )
            if D % L != 0:
                acc[lanes_at(0, L)] = acc[lanes_at(0, L)] + Qr[lanes_at(D // L * L, L)] * load_first(
                    K, k0 + j * stride + D // L * L, T.int64(D % L), L
                )
            Sr[j] = reduce_lanes(add, acc[lanes_at(0, L)])

    @T.inline
    def weight_row(Sr, Br, m, norm, corr, keys):
        """Scores to weights, keys in lanes; m, norm and corr as in `weight_tile`, scalars."""
        top = T.alloc_buffer((L,), "float32", scope="local")
        total = T.alloc_buffer((L,), "float32", scope="local")
        top[lanes_at(0, L)] = f32(-math.inf, L)
        total[lanes_at(0, L)] = f32(0, L)
        for c in T.serial(T.int64(KTp // L)):
            s = T.alloc_buffer((L,), "float32", scope="local")
            s[lanes_at(0, L)] = capped(Sr[lanes_at(c * L, L)])
            if biased:
                s[lanes_at(0, L)] = masked(s[lanes_at(0, L)], Br[lanes_at(c * L, L)])
            s[lanes_at(0, L)] = T.Select(first(keys - c * L, L), s[lanes_at(0, L)], f32(-math.inf, L))
            top[lanes_at(0, L)] = T.max(s[lanes_at(0, L)], top[lanes_at(0, L)])
            Sr[lanes_at(c * L, L)] = s[lanes_at(0, L)]
        m_old: T.let = m[0]
        m[0] = T.max(reduce_lanes(T.max, top[lanes_at(0, L)]), m_old)
        corr[0] = rescale(m_old, finite(m[0]))
        for c in T.serial(T.int64(KTp // L)):
            Sr[lanes_at(c * L, L)] = vexp_nonpositive(Sr[lanes_at(c * L, L)] - splat(finite(m[0]), L))
            total[lanes_at(0, L)] = total[lanes_at(0, L)] + Sr[lanes_at(c * L, L)]
        norm[0] = norm[0] * corr[0] + reduce_lanes(add, total[lanes_at(0, L)])

    @T.inline
    def one_query(Y, Q, K, Vb, C, B, Qr, Or, Sr, Br, y0, q0, k0, v0, s0, b0, sk, sv, bk, Sk, last):
        """A query that attends keys j < Sk, j <= last."""
        m = T.alloc_buffer((1,), "float32", scope="local")
        norm = T.alloc_buffer((1,), "float32", scope="local")
        corr = T.alloc_buffer((1,), "float32", scope="local")
        m[0] = T.float32(-math.inf)
        norm[0] = T.float32(0)
        for c in T.serial(T.int64(Dp // L)):
            Qr[lanes_at(c * L, L)] = load_first(Q, q0 + c * L, D - c * L, L) * f32(scale, L)
        for c in T.serial(T.int64(chunks * chunk_vectors)):
            Or[lanes_at(c * L, L)] = f32(0, L)
        reach: T.let = keys_up_to(last + 1, Sk)
        for t in T.serial(T.truncdiv(reach + (KT - 1), T.int64(KT))):
            j0: T.let = t * KT
            keys: T.let = T.min(T.int64(KT), reach - j0)
            if coded:
                decode_tile(C[2], K, k0 + j0 * sk, sk, C[0], s0 + j0, keys, D)
                decode_tile(C[3], Vb, v0 + j0 * sv, sv, C[1], s0 + j0, keys, Dv)
                score_row(Sr, Qr, C[2], T.int64(0), T.int64(D), keys)
            else:
                score_row(Sr, Qr, K, k0 + j0 * sk, sk, keys)
            if biased:
                for j in T.serial(keys):
                    Br[j] = bias_at(B, b0 + (j0 + j) * bk)
            weight_row(Sr, Br, m, norm, corr, keys)
            for chunk in T.serial(T.int64(chunks)):
                acc = T.alloc_buffer((1, chunk_vectors, L), "float32", scope="local")
                accumulate(
                    acc,
                    element_of_row(Sr),
                    value_row(C[3], T.int64(0), T.int64(Dv), chunk)
                    if coded
                    else value_row(Vb, v0 + j0 * sv, sv, chunk),
                    keys,
                    1,
                    chunk_vectors,
                    L,
                )
                for v in T.unroll(chunk_vectors):
                    at: T.let = (chunk * chunk_vectors + v) * L
                    Or[lanes_at(at, L)] = Or[lanes_at(at, L)] * splat(corr[0], L) + acc[0, v, lanes_at(0, L)]
        for c in T.serial(T.int64(Dvp // L)):
            store_first(
                Y, Or[lanes_at(c * L, L)] * splat(inverse(norm[0]), L), y0 + c * L, T.int64(Dv) - c * L, L
            )

    @T.prim_func(s_tir=True)
    def func(
        y: T.handle("float32"),
        q: T.handle("float32"),
        k: T.handle(stored),
        v: T.handle(stored),
        k_scale: T.handle("float32"),
        v_scale: T.handle("float32"),
        scratch: T.handle("float32"),
        mask: T.handle(_MASK_DTYPE[mask_kind]),
        H: T.int64,
        G: T.int64,
        Sq: T.int64,
        Sk: T.int64,
        P: T.int64,
        qs_b: T.int64,
        qs_h: T.int64,
        qs_s: T.int64,
        ks_b: T.int64,
        ks_h: T.int64,
        ks_s: T.int64,
        vs_b: T.int64,
        vs_h: T.int64,
        vs_s: T.int64,
        ss_b: T.int64,
        ss_h: T.int64,
        ms_b: T.int64,
        ms_h: T.int64,
        ms_q: T.int64,
        ms_k: T.int64,
        ys_b: T.int64,
        ys_h: T.int64,
        ys_s: T.int64,
        begin: T.int64,
        end: T.int64,
    ):
        T.func_attr({"global_symbol": symbol, "tirx.noalias": True})
        # Only addresses matter: the shapes of strided operands are not known.
        Y = T.decl_buffer((1,), "float32", data=y)
        Q = T.decl_buffer((1,), "float32", data=q)
        K = T.decl_buffer((1,), stored, data=k)
        Vb = T.decl_buffer((1,), stored, data=v)
        KS = T.decl_buffer((1,), "float32", data=k_scale) if coded else T.meta_var(None)
        VS = T.decl_buffer((1,), "float32", data=v_scale) if coded else T.meta_var(None)
        Kf = T.decl_buffer((KT * D,), "float32", data=scratch) if coded else T.meta_var(None)
        Vf = (
            T.decl_buffer((KT * Dv,), "float32", data=scratch, elem_offset=KT * D)
            if coded
            else T.meta_var(None)
        )
        C = T.meta_var((KS, VS, Kf, Vf))
        B = T.decl_buffer((1,), _MASK_DTYPE[mask_kind], data=mask) if biased else T.meta_var(None)
        Qt = T.alloc_buffer((D, W), "float32")
        Ot = T.alloc_buffer((Dv_rows, W), "float32")
        S = T.alloc_buffer((KT, W), "float32")
        Bt = T.alloc_buffer((KT, W), "float32") if biased else T.meta_var(None)
        Qr = T.alloc_buffer((Dp,), "float32")
        Or = T.alloc_buffer((chunks * chunk_vectors * L,), "float32")
        Sr = T.alloc_buffer((KTp,), "float32")
        Br = T.alloc_buffer((KTp,), "float32") if biased else T.meta_var(None)
        for block in T.serial(end - begin):
            per_head: T.let = T.truncdiv(Sq + (q_block - 1), T.int64(q_block))
            head: T.let = T.truncdiv(begin + block, per_head)
            i_b: T.let = T.truncdiv(head, H)
            i_h: T.let = T.truncmod(head, H)
            from_q: T.let = T.truncmod(begin + block, per_head) * q_block
            to_q: T.let = T.min(from_q + q_block, Sq)
            k0: T.let = i_b * ks_b + T.truncdiv(i_h, G) * ks_h
            v0: T.let = i_b * vs_b + T.truncdiv(i_h, G) * vs_h
            s0: T.let = i_b * ss_b + T.truncdiv(i_h, G) * ss_h if coded else T.int64(0)
            for g in T.serial(T.truncdiv(to_q - from_q + (W - 1), T.int64(W))):
                i0: T.let = from_q + g * W
                sk: T.let = T.int64(D) if coded else ks_s
                sv: T.let = T.int64(Dv) if coded else vs_s
                n: T.let = T.min(T.int64(W), to_q - i0)
                y0: T.let = i_b * ys_b + i_h * ys_h + i0 * ys_s
                q0: T.let = i_b * qs_b + i_h * qs_h + i0 * qs_s
                b0: T.let = i_b * ms_b + i_h * ms_h + i0 * ms_q if biased else T.int64(0)
                mq: T.let = ms_q if biased else T.int64(0)
                mk: T.let = ms_k if biased else T.int64(0)
                if n <= few or q_block <= few:
                    for i in T.serial(n):
                        one_query(
                            Y, Q, K, Vb, C, B, Qr, Or, Sr, Br,
                            y0 + i * ys_s, q0 + i * qs_s, k0, v0, s0, b0 + i * mq,
                            sk, sv, mk, Sk, i0 + i + P,
                        )  # fmt: skip
                else:
                    many_queries(
                        Y, Q, K, Vb, C, B, Qt, Ot, S, Bt,
                        y0, q0, k0, v0, s0, b0, ys_s, qs_s, sk, sv, mq, mk, n, Sk, i0 + P,
                    )  # fmt: skip

    unused = () if biased else ("mask", "ms_b", "ms_h", "ms_q", "ms_k")
    return drop_parameters(
        func, unused + (("ks_s", "vs_s") if coded else ("k_scale", "v_scale", "scratch", "ss_b", "ss_h"))
    )
