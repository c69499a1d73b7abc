"""Elementary functions as TIR expressions: arithmetic, polynomials and bit operations only, never a call.

Every function takes a float32 expression, scalar or vector of any number of lanes, and returns one of the
same type. The target must have fused multiply-add; what else is used (division, min, max, rounding) is one
instruction on AVX2, AVX-512 and NEON of aarch64; elsewhere rounding is a routine of the image (support.py).
NaN propagates, infinities and signed zeros follow C's libm unless a docstring says otherwise.

Errors quoted are the largest over dense samples of the whole range, against float64
(tests/codegen/test_vmath.py asserts them); 1 ulp is at most 1.2e-7 of the value. Polynomials and rationals
are minimax fits for relative error by Lawson's iteratively reweighted least squares in double precision; the
error of the fit itself stands beside each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from tvm import tirx
from tvm.script import tirx as T
from tvm.script.ir_builder.tirx import bind

Expr = Any  # tvm.ir.Expr of a primitive type

# exp(r) = 1 + r + r^2 q(r), |r| <= ln2/2: 3e-9.
_EXP = (
    0.5000000095184888,
    0.16666518839459235,
    0.041666205803683416,
    0.008368889373045986,
    0.0013950491036510268,
)
# log(1 + f) = f - f^2/2 + f^3 p(f), sqrt(1/2) <= 1 + f <= sqrt(2): 6e-9.
_LOG = (
    0.33333331707804653, -0.250008210355006, 0.20001226865402932, -0.16623357298101654,
    0.14201758233850972, -0.13160183062691355, 0.12761575643226086, -0.0763449302304416,
)  # fmt: skip
# Phi(-z) = e^(-z^2/2) p(z) / q(z), the tail of the normal distribution, 0 <= z <= 14: 6e-9. Nothing cancels.
_TAIL_P = (
    0.5000000027581732,
    0.43725151175731775,
    0.18246225784322678,
    0.04037269242048815,
    0.004077628808486503,
)
_TAIL_Q = (
    1.0, 1.6723879788246891, 1.1992925449784988,
    0.4674302234030877, 0.10120614201717885, 0.010220970918953078,
)  # fmt: skip
_TAIL_MAX = 14.0  # Phi(-14) < 2^-126
# erf(x) = x p(x^2), |x| <= 0.9: 1e-8.
_ERF = (
    1.1283791537972774, -0.37612523276230964, 0.11282140812299683,
    -0.02677890893323089, 0.005011962847312954, -0.0006090360130403218,
)  # fmt: skip
# tanh(x) = x p(x^2) / q(x^2), |x| <= 9.05: 2e-8.
_TANH_P = (
    0.9999999783438509, 0.133777548718363, 0.003491703296998611,
    2.0545112404431368e-05, 1.3265853868655533e-08,
)  # fmt: skip
_TANH_Q = (1.0, 0.46711069574762737, 0.02586220380112049, 0.0003279280266130613, 7.740251733613486e-07)
_TANH_MAX = 9.05
# sin(r) = r + r^3 s(r^2) and cos(r) = 1 - r^2/2 + r^4 c(r^2), |r| <= pi/4: 4e-9 and 1e-10.
_SIN = (-0.16666654602253775, 0.008332160290789753, -0.00019515217993869475)
_COS = (0.041666645670111795, -0.0013887315614715375, 2.4433082511270546e-05)
# For pow, in float64: log2(m) = s p(s^2), s = (m-1)/(m+1), sqrt(1/2) <= m <= sqrt(2): 1e-11.
_LOG2 = (2.8853900817901534, 0.9617966732675823, 0.5770835978152202, 0.411672006149757, 0.34074246635919836)
# 2^r, |r| <= 1/2: 4e-11.
_EXP2 = (
    0.9999999999594847, 0.6931471805349851, 0.2402265121420639, 0.05550410976244309,
    0.009618025521185816, 0.0013333422534102257, 0.00015469758203643768, 1.5316487855488344e-05,
)  # fmt: skip

_LN2_HI, _LN2_LO = 0.693147182464599609375, -1.904654299957768e-09  # float32(ln 2) and the rest
_PIO2_HI, _PIO2_LO = 1.5707963267948966, 6.123233995736766e-17  # float64(pi/2) and the rest
# Adding 1.5 * 2^(mantissa bits) rounds to an integer and leaves that integer in the low bits.
_ROUND32, _ROUND32_BITS = 12582912.0, 0x4B400000
_ROUND64 = 6755399441055744.0
_SQRT_HALF32, _SQRT_HALF64 = 0x3F3504F3, 0x3FE6A09E667F3BCD  # bits of sqrt(1/2)


def lanes_of(x: Expr) -> int:
    """Number of lanes of an expression (1 for a scalar)."""
    return int(x.ty.dtype.lanes)


def element_of(x: Expr) -> str:
    """Element type of an expression, without its lanes: "float32", "int64", "bool"."""
    return str(x.ty.dtype).split("x")[0]


def typed(dtype: str, lanes: int) -> str:
    """TVM's name of a vector type: ("float32", 16) -> "float32x16"."""
    return dtype if lanes == 1 else f"{dtype}x{lanes}"


def splat(value: float | int | bool, dtype: str, lanes: int) -> Expr:
    """A constant in every lane."""
    imm = tirx.FloatImm(dtype, float(value)) if dtype.startswith("float") else tirx.IntImm(dtype, int(value))
    return imm if lanes == 1 else T.broadcast(imm, lanes)


def const_like(x: Expr, value: float | int) -> Expr:
    """`value` in the type of `x`."""
    return splat(value, element_of(x), lanes_of(x))


def let(value: Expr, body: Callable[[Expr], Expr]) -> Expr:
    """`body(v)` with v bound to `value`, evaluated once however often v is used.

    The binding is a statement at the current place of the function being built, by TVMScript or by the IR
    builder. A vector of booleans cannot be bound.
    """
    return body(value if isinstance(value, (tirx.Var, tirx.IntImm, tirx.FloatImm)) else named(value))


def named(value: Expr) -> Expr:
    """A variable bound to `value`.

    TVM's simplifier substitutes a binding that is pure back into every use, exponentially in the depth of an
    expression. So the value passes through an intrinsic that TVM does not see through and LLVM removes:
    fma(x, 1, -0) = x, max(x, smallest) = x.
    """
    dtype = element_of(value)
    others: list[float] | list[int]
    if dtype.startswith("float"):
        identity, others = "llvm.fma", [1.0, -0.0]
    elif dtype.startswith("uint"):
        identity, others = "llvm.umax", [0]
    else:
        identity, others = "llvm.smax", [-(1 << (int(dtype[3:]) - 1))]
    rest = [const_like(value, other) for other in others]
    return bind(T.call_llvm_intrin(str(value.ty.dtype), identity, value, *rest))


def convert(x: Expr, dtype: str) -> Expr:
    """Convert the elements of `x`, keeping its lanes."""
    return T.Cast(typed(dtype, lanes_of(x)), x)


def bits_as(x: Expr, dtype: str) -> Expr:
    """Reinterpret the elements of `x` as another type of the same width."""
    return T.reinterpret(typed(dtype, lanes_of(x)), x)


def polynomial(x: Expr, coefficients: Sequence[float]) -> Expr:
    """sum_i coefficients[i] x^i by Horner's rule, one fused multiply-add a term. `x` should be a variable."""
    acc = const_like(x, coefficients[-1])
    for c in reversed(coefficients[:-1]):
        acc = T.fma(acc, x, const_like(x, c))
    return acc


def is_nan(x: Expr) -> Expr:
    """Whether a float32 is NaN, as a boolean. By its bits: TVM's simplifier takes `x != x` for false."""
    magnitude = _and(bits_as(x, "int32"), 0x7FFFFFFF)
    return magnitude > const_like(magnitude, 0x7F800000)


def vabs(x: Expr) -> Expr:
    """|x|, exact; of a float only the sign bit changes, also of NaN."""
    return T.abs(x)


def clamp(x: Expr, low: float, high: float) -> Expr:
    """min(max(x, low), high) that keeps NaN: TIR's min and max return their second operand when unordered."""
    return T.max(const_like(x, low), T.min(const_like(x, high), x))


def _shift_left(x: Expr, count: int) -> Expr:
    return T.shift_left(x, const_like(x, count))


def _shift_right(x: Expr, count: int) -> Expr:
    return T.shift_right(x, const_like(x, count))


def _and(x: Expr, mask: int) -> Expr:
    return T.bitwise_and(x, const_like(x, mask))


def _exp_parts(x: Expr, finish: Callable[[Expr, Expr], Expr]) -> Expr:
    """finish(e^r, n) where x = n ln2 + r and n is an int32 expression; x must be clamped to |n| < 2^22."""
    return let(
        T.fma(x, const_like(x, 1 / math.log(2)), const_like(x, _ROUND32)),
        lambda t: let(
            t - const_like(x, _ROUND32),
            lambda n: let(
                T.fma(n, const_like(x, -_LN2_LO), T.fma(n, const_like(x, -_LN2_HI), x)),
                lambda r: let(
                    T.fma(r * r, polynomial(r, _EXP), r) + const_like(x, 1.0),
                    lambda p: let(
                        bits_as(t, "int32") - splat(_ROUND32_BITS, "int32", lanes_of(x)),
                        lambda i: finish(p, i),
                    ),
                ),
            ),
        ),
    )


def _pow2(n: Expr) -> Expr:
    """2^n as float32 for int32 n in [-127, 127]; 2^-127 comes out as 0."""
    return bits_as(_shift_left(n + const_like(n, 127), 23), "float32")


def vexp(x: Expr) -> Expr:
    """e^x, 1.0 ulp. Overflows to infinity above 88.72, underflows gradually to 0 below -103.97."""

    def scale(p: Expr, n: Expr) -> Expr:  # in two halves: 2^n itself may be out of range
        return let(_shift_right(n, 1), lambda h: p * _pow2(h) * _pow2(n - h))

    return let(clamp(x, -104.0, 89.0), lambda v: _exp_parts(v, scale))


def vexp_nonpositive(x: Expr) -> Expr:
    """e^x for x <= 0, 1.0 ulp, a little cheaper than `vexp`: results below 1.2e-38 are 0."""
    low = const_like(x, -88.0)  # rounds to 2^-127
    return let(T.max(low, x), lambda v: _exp_parts(v, lambda p, n: p * _pow2(n)))


def _log_of_parts(f: Expr, e: Expr) -> Expr:
    """log((1 + f) 2^e) for sqrt(1/2) <= 1 + f <= sqrt(2); e is float32."""
    return let(
        f * f,
        lambda s: T.fma(
            e,
            const_like(f, _LN2_HI),
            f
            + T.fma(
                const_like(f, -0.5),
                s,
                T.fma(f * s, polynomial(f, _LOG), e * const_like(f, _LN2_LO)),
            ),
        ),
    )


def vlog(x: Expr) -> Expr:
    """Natural logarithm, 1.5 ulp, also of denormals; log(0) = -inf, log of a negative number is NaN."""
    lanes = lanes_of(x)

    def body(v: Expr) -> Expr:
        tiny = v < const_like(v, 2.0**-126)

        def of_bits(bits: Expr) -> Expr:
            return let(
                _shift_right(bits - const_like(bits, _SQRT_HALF32), 23),
                lambda e: let(
                    bits_as(bits - _shift_left(e, 23), "float32") - const_like(v, 1.0),
                    lambda f: let(
                        convert(e, "float32") - T.Select(tiny, const_like(v, 23.0), const_like(v, 0.0)),
                        lambda ef: _log_of_parts(f, ef),
                    ),
                ),
            )

        scaled = T.Select(tiny, v * const_like(v, 2.0**23), v)
        y = let(bits_as(scaled, "int32"), of_bits)
        y = T.Select(v < splat(math.inf, "float32", lanes), y, v)  # infinity and NaN
        zero = const_like(v, 0.0)
        special = T.Select(v < zero, const_like(v, math.nan), const_like(v, -math.inf))
        return T.Select(v <= zero, special, y)

    return let(x, body)


def vsoftplus(x: Expr) -> Expr:
    """log(1 + e^x) = max(x, 0) + log1p(e^-|x|), 2 ulp."""

    def log1p(z: Expr) -> Expr:  # 0 <= z <= 1
        large = z > const_like(z, math.sqrt(2) - 1)
        one, zero = const_like(z, 1.0), const_like(z, 0.0)
        f = T.Select(large, (z - one) * const_like(z, 0.5), z)
        return let(f, lambda fv: let(T.Select(large, one, zero), lambda e: _log_of_parts(fv, e)))

    def body(v: Expr) -> Expr:
        zero = const_like(v, 0.0)
        tail = let(vexp(-vabs(v)), log1p)
        return T.max(zero, v) + tail

    return let(x, body)


def _normal_tail(z: Expr) -> Expr:
    """Phi(-z) for 0 <= z <= _TAIL_MAX, a variable."""
    e = vexp_nonpositive(z * z * const_like(z, -0.5))
    return e * (polynomial(z, _TAIL_P) / polynomial(z, _TAIL_Q))


def verf(x: Expr) -> Expr:
    """Error function, relative error 1.8e-7; exactly +-1 from |x| = 4 on."""

    def body(v: Expr) -> Expr:
        def outer(z: Expr) -> Expr:  # erf |v| = 1 - 2 Phi(-sqrt2 |v|)
            return T.fma(const_like(z, -2.0), _normal_tail(z), const_like(z, 1.0))

        z = T.min(const_like(v, _TAIL_MAX), vabs(v) * const_like(v, math.sqrt(2)))
        sign = _and(bits_as(v, "int32"), -(2**31))
        signed = bits_as(T.bitwise_or(bits_as(let(z, outer), "int32"), sign), "float32")
        inner = v * let(v * v, lambda u: polynomial(u, _ERF))
        return T.Select(vabs(v) <= const_like(v, 0.9), inner, signed)

    return let(x, body)


def vtanh(x: Expr) -> Expr:
    """Hyperbolic tangent, relative error 3.1e-7; exactly +-1 from |x| = 9.05 on."""

    def of_clamped(v: Expr) -> Expr:
        return let(v * v, lambda u: clamp(v * polynomial(u, _TANH_P) / polynomial(u, _TANH_Q), -1.0, 1.0))

    return let(clamp(x, -_TANH_MAX, _TANH_MAX), of_clamped)


def vsigmoid(x: Expr) -> Expr:
    """1 / (1 + e^-x), 2 ulp; 0 below -88.72, where the true value is a denormal."""
    return const_like(x, 1.0) / (const_like(x, 1.0) + vexp(-x))


def vsilu(x: Expr) -> Expr:
    """x / (1 + e^-x), 3 ulp; 0 below -88.72. NaN at -inf, as x * sigmoid(x) gives."""
    return let(x, lambda v: v / (const_like(v, 1.0) + vexp(-v)))


def vgelu_erf(x: Expr) -> Expr:
    """x/2 (1 + erf(x / sqrt 2)) as max(x, 0) - |x| Phi(-|x|), which never cancels; 0 at -inf.

    Relative error 3e-7 for x >= -2; it grows as x^2 to 4e-6 at -13, where the result vanishes.
    """

    def body(v: Expr) -> Expr:
        z = T.min(const_like(v, _TAIL_MAX), vabs(v))
        tail = let(z, lambda zv: zv * _normal_tail(zv))
        return T.max(const_like(v, 0.0), v) - tail

    return let(x, body)


def vgelu_tanh(x: Expr) -> Expr:
    """x/2 (1 + tanh u), u = sqrt(2/pi) (x + 0.044715 x^3), as x / (1 + e^-2u), which never cancels.

    Relative error 5e-7 for x >= -2; it grows as |u| to 1e-5 where the result vanishes. NaN at
    -inf.
    """
    a = -2 * math.sqrt(2 / math.pi)

    def body(v: Expr) -> Expr:
        exponent = v * T.fma(v * v, const_like(v, a * 0.044715), const_like(v, a))
        return v / (const_like(v, 1.0) + vexp(exponent))

    return let(x, body)


def _sin_cos(x: Expr, quarter: int) -> Expr:
    """sin(x + quarter * pi/2). The reduction to |r| <= pi/4 is done in float64."""
    lanes = lanes_of(x)

    def f64(value: float) -> Expr:
        return splat(value, "float64", lanes)

    def finish(r: Expr, n: Expr) -> Expr:
        def select(s: Expr) -> Expr:
            sine = T.fma(r * s, polynomial(s, _SIN), r)
            cosine = T.fma(s * s, polynomial(s, _COS), T.fma(const_like(s, -0.5), s, const_like(s, 1.0)))
            one = const_like(n, 1)
            value = T.Select(_and(n, 1) == one, cosine, sine)
            sign = _shift_left(_and(n, 2), 30)
            return bits_as(T.bitwise_xor(bits_as(value, "int32"), sign), "float32")

        return let(r * r, select)

    def reduce(d: Expr) -> Expr:
        return let(
            T.fma(d, f64(2 / math.pi), f64(_ROUND64)),
            lambda t: let(
                t - f64(_ROUND64),
                lambda n: let(
                    convert(T.fma(n, f64(-_PIO2_LO), T.fma(n, f64(-_PIO2_HI), d)), "float32"),
                    lambda r: let(
                        convert(_and(bits_as(t, "int64"), 3), "int32") + splat(quarter, "int32", lanes),
                        lambda q: finish(r, q),
                    ),
                ),
            ),
        )

    def body(v: Expr) -> Expr:
        limit = 2.0**50  # keeps the result within [-1, 1] where the reduction has lost the angle
        y = let(convert(clamp(v, -limit, limit), "float64"), reduce)
        return T.Select(vabs(v) < const_like(v, math.inf), y, const_like(v, math.nan))

    return let(x, body)


def vsin(x: Expr) -> Expr:
    """Sine, 1.5 ulp for |x| <= 2^40. Beyond, where float32 cannot tell turns apart, some value in [-1, 1]."""
    zero = const_like(x, 0.0)
    return let(x, lambda v: T.Select(tirx.EQ(v, zero), v, _sin_cos(v, 0)))  # sin(-0) = -0


def vcos(x: Expr) -> Expr:
    """Cosine, as `vsin`."""
    return _sin_cos(x, 1)


def vpow(x: Expr, y: Expr) -> Expr:
    """x^y of float32 x and y, 1 ulp, by way of float64; C's pow for zeros, infinities, NaN and x < 0."""
    lanes = lanes_of(x)

    def f64(value: float) -> Expr:
        return splat(value, "float64", lanes)

    def f32(value: float) -> Expr:
        return splat(value, "float32", lanes)

    def log2(ax: Expr) -> Expr:  # of |x| > 0, float32
        def of_bits(bits: Expr) -> Expr:
            def of_exponent(e: Expr) -> Expr:
                m = bits_as(bits - _shift_left(e, 52), "float64")
                fraction = let(
                    m,
                    lambda mv: let(
                        (mv - f64(1.0)) / (mv + f64(1.0)),
                        lambda s: let(s * s, lambda u: s * polynomial(u, _LOG2)),
                    ),
                )
                return convert(convert(e, "int32"), "float64") + fraction

            return let(_shift_right(bits - const_like(bits, _SQRT_HALF64), 52), of_exponent)

        value = let(bits_as(convert(ax, "float64"), "int64"), of_bits)
        value = T.Select(ax == f32(0.0), f64(-math.inf), value)
        return T.Select(ax == f32(math.inf), f64(math.inf), value)

    def exp2(p: Expr) -> Expr:  # float64 -> float32, which rounds, overflows and underflows
        def of_round(t: Expr) -> Expr:
            scale = bits_as(
                _shift_left(bits_as(t, "int64") + splat(1023, "int64", lanes), 52), "float64"
            )  # the bits of _ROUND64 are shifted out
            return let(p - (t - f64(_ROUND64)), lambda r: convert(polynomial(r, _EXP2) * scale, "float32"))

        return let(p + f64(_ROUND64), of_round)

    def with_sign(ax: Expr, xv: Expr, yv: Expr) -> Expr:
        one = ax == f32(1.0)
        p = T.Select(one, f64(0.0), convert(yv, "float64") * log2(ax))
        magnitude = let(clamp(p, -200.0, 200.0), exp2)
        half = yv * f32(0.5)
        integer = T.floor(yv) == yv
        odd = T.And(integer, T.Not(T.floor(half) == half))
        sign = T.Select(odd, _and(bits_as(xv, "int32"), -(2**31)), splat(0, "int32", lanes))
        signed = bits_as(T.bitwise_or(bits_as(magnitude, "int32"), sign), "float32")
        undefined = T.And(T.And(xv < f32(0.0), T.Not(integer)), xv > f32(-math.inf))
        unordered = T.Or(T.Or(is_nan(xv), is_nan(yv)), undefined)
        result = T.Select(unordered, f32(math.nan), signed)
        return T.Select(T.Or(xv == f32(1.0), yv == f32(0.0)), f32(1.0), result)

    return let(x, lambda xv: let(y, lambda yv: let(vabs(xv), lambda ax: with_sign(ax, xv, yv))))


def vfloor_mod(x: Expr, y: Expr) -> Expr:
    """Numpy's `mod`: x - floor(x / y) y with the sign of y, exact for |x / y| < 2^29."""
    return _mod(x, y, T.floor)


def vfmod(x: Expr, y: Expr) -> Expr:
    """C's `fmod`: x - trunc(x / y) y with the sign of x, exact for |x / y| < 2^29."""
    return _mod(x, y, T.trunc)


def _mod(x: Expr, y: Expr, rounding: Callable[[Expr], Expr]) -> Expr:
    """x - rounding(x / y) y, in float64. NaN for y = 0 or x infinite."""

    def remainder(xd: Expr, yd: Expr) -> Expr:
        return T.fma(-rounding(xd / yd), yd, xd)

    def body(xv: Expr, yv: Expr) -> Expr:
        zero, inf = const_like(xv, 0.0), const_like(xv, math.inf)
        y_wins = rounding is T.floor
        finite = let(
            convert(xv, "float64"),
            lambda xd: let(convert(yv, "float64"), lambda yd: convert(remainder(xd, yd), "float32")),
        )
        # An infinite divisor: the quotient is 0, or -1 when floor rounds it down.
        opposite = T.Or(T.And(xv < zero, yv > zero), T.And(xv > zero, yv < zero))
        by_inf = T.Select(opposite, yv, xv) if y_wins else xv
        infinite = T.And(vabs(yv) == inf, vabs(xv) < inf)
        sign_of = yv if y_wins else xv

        def sign_zero(r: Expr) -> Expr:
            signed = _and(bits_as(sign_of, "int32"), -(2**31))
            return T.Select(r == zero, bits_as(signed, "float32"), r)

        return let(T.Select(infinite, by_inf, finite), sign_zero)

    return let(x, lambda xv: let(y, lambda yv: body(xv, yv)))


UNARY: dict[str, Callable[[Expr], Expr]] = {
    "exp": vexp,
    "log": vlog,
    "softplus": vsoftplus,
    "erf": verf,
    "tanh": vtanh,
    "sigmoid": vsigmoid,
    "silu": vsilu,
    "gelu_erf": vgelu_erf,
    "gelu_tanh": vgelu_tanh,
    "sin": vsin,
    "cos": vcos,
}
