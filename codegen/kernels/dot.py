"""Sums of products of bytes, exact: unsigned weights by signed activations, four of each in 32 bits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm.script import tirx as T

from qgraph.codegen.isa import Isa
from qgraph.codegen.kernels.vmath import Expr, named

_INT8 = 128  # the largest magnitude of a signed byte
_INT16 = 32767


def multiply_add(isa: Isa, acc: Expr, weights: Sequence[Expr], inputs: Sequence[Expr], largest: int) -> Expr:
    """acc + sum over t of weights[t] . inputs[t], int32 lanes.

    Args:
        acc: int32 lanes.
        weights: u32 lanes, four bytes 0 .. `largest` each.
        inputs: int32 scalars, four int8 each.
        largest: at most 255.
    """
    if isa.dot == "vnni":
        for w, x in zip(weights, inputs, strict=True):
            acc = _vpdpbusd(acc, w, x)
        return acc
    if isa.dot == "widen":
        return acc + _by_one(weights, inputs, isa.lanes)
    if isa.dot == "halves":
        return acc + _by_halves(weights, inputs, isa)
    fit = _INT16 // (2 * largest * _INT8)  # sums of pairs that are sure to fit 16 bits
    if not fit:
        return acc + _by_halves(weights, inputs, isa)
    for start in range(0, len(weights), fit):
        acc = acc + _maddubs(weights[start : start + fit], inputs[start : start + fit], isa)
    return acc


def _call(name: str, dtype: str, *args: Expr) -> Expr:
    return T.call_llvm_pure_intrin(T.llvm_lookup_intrinsic_id(name), *args, dtype=dtype)


def _spread(x: Expr, lanes: int) -> Expr:
    return T.broadcast(x, lanes)


def _vpdpbusd(acc: Expr, w: Expr, x: Expr) -> Expr:
    weights, inputs = T.reinterpret("uint8x64", w), T.reinterpret("int8x64", _spread(x, 16))
    return _call("llvm.x86.avx512.vpdpbusd.512", "int32x16", acc, weights, inputs)


def _maddubs(weights: Sequence[Expr], inputs: Sequence[Expr], isa: Isa) -> Expr:
    total: Any = None
    lanes = isa.lanes
    for w, x in zip(weights, inputs, strict=True):
        pair = (T.reinterpret(f"uint8x{4 * lanes}", w), T.reinterpret(f"int8x{4 * lanes}", _spread(x, lanes)))
        sums = _call("llvm.x86.avx2.pmadd.ub.sw", f"int16x{2 * lanes}", *pair)
        total = sums if total is None else total + sums
    return _pair_sums(total, T.broadcast(T.int16(1), 2 * lanes), isa)


_PAIR_SUMS = {"maddubs": "llvm.x86.avx2.pmadd.wd", "halves": "llvm.wasm.dot"}


def _pair_sums(a: Expr, b: Expr, isa: Isa) -> Expr:
    """a[2 i] b[2 i] + a[2 i + 1] b[2 i + 1] of int16 lanes."""
    return _call(_PAIR_SUMS[isa.dot], f"int32x{isa.lanes}", a, b)


def _by_halves(weights: Sequence[Expr], inputs: Sequence[Expr], isa: Isa) -> Expr:
    """Bytes with an even and with an odd index apart, as 16 bits: no sum of two products of those overflows
    32."""
    total: Any = None
    lanes = isa.lanes
    for w, x in zip(weights, inputs, strict=True):
        unsigned = T.reinterpret(f"uint16x{2 * lanes}", w)
        signed = named(T.reinterpret(f"int16x{2 * lanes}", _spread(x, lanes)))
        eight = T.broadcast(T.int16(8), 2 * lanes)
        even = (
            T.bitwise_and(unsigned, T.broadcast(T.uint16(255), 2 * lanes)),
            T.shift_right(T.shift_left(signed, eight), eight),
        )
        odd = T.shift_right(unsigned, T.broadcast(T.uint16(8), 2 * lanes)), T.shift_right(signed, eight)
        for a, b in (even, odd):
            sums = _pair_sums(T.reinterpret(f"int16x{2 * lanes}", a), b, isa)
            total = sums if total is None else total + sums
    return total


def _by_one(weights: Sequence[Expr], inputs: Sequence[Expr], lanes: int) -> Expr:
    total: Any = None
    for w, x in zip(weights, inputs, strict=True):
        for q in range(4):
            byte = T.bitwise_and(T.shift_right(w, T.broadcast(T.uint32(8 * q), lanes)), _mask(lanes))
            code = T.shift_right(T.shift_left(x, T.int32(24 - 8 * q)), T.int32(24))
            product = T.reinterpret(f"int32x{lanes}", byte) * _spread(code, lanes)
            total = product if total is None else total + product
    return total


def _mask(lanes: int) -> Expr:
    return T.broadcast(T.uint32(255), lanes)
