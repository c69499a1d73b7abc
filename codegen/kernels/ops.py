"""What the operators of elementwise kernels mean: typed values in, one typed value out, on scalars and
vectors alike.

Semantics are ONNX's, and where ONNX leaves a case open:

* integers wrap; x / 0 = 0 and x mod 0 = 0 (no trap); INT_MIN / -1 = INT_MIN;
* integer x^y with y < 0 is 1/x truncated, 0 where x = 0;
* float -> integer truncates and saturates, NaN becomes 0; 8-bit targets then keep the low byte of the int32;
* float min and max propagate NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from tvm.script import tirx as T
from tvm.tirx import EQ, NE

from qgraph.codegen.kernels import vmath
from qgraph.codegen.kernels.vmath import Expr, const_like, convert, let, splat
from qgraph.errors import UnsupportedError

# dtype of the contracts -> TIR element type. A bool is a byte, 0 or 1, also in registers: TVM cannot bind
# vectors of its own booleans, and simplifies logic on them slowly. LLVM turns such bytes back into masks.
STORAGE = {"f32": "float32", "i64": "int64", "i32": "int32", "bool": "uint8", "u8": "uint8", "i8": "int8"}
_NARROW = ("u8", "i8")
_INTEGERS = ("i64", "i32", "u8", "i8")


@dataclass(frozen=True)
class Value:
    """A typed expression. `expr` should be a variable or a constant: operators repeat it. `const` is known or
    None.
    """

    dtype: str
    expr: Expr
    const: float | int | bool | None = None

    @property
    def lanes(self) -> int:
        return vmath.lanes_of(self.expr)


def constant(value: float | int | bool, dtype: str, lanes: int) -> Value:
    """A constant in every lane. Integers are taken modulo the width of their type."""
    if dtype == "bool":
        value = bool(value)
    elif dtype in ("i32", "i8", "i64"):
        bits = int(STORAGE[dtype][3:])
        value = (int(value) + (1 << (bits - 1))) % (1 << bits) - (1 << (bits - 1))
    elif dtype == "u8":
        value = int(value) % 256
    return Value(dtype, splat(value, STORAGE[dtype], lanes), value)


def _flag(mask: Expr) -> Value:
    """A TIR boolean as a bool value."""
    lanes = vmath.lanes_of(mask)
    return Value("bool", T.Select(mask, splat(1, "uint8", lanes), splat(0, "uint8", lanes)))


def _mask(value: Value) -> Expr:
    """A bool value as a TIR boolean."""
    return NE(value.expr, const_like(value.expr, 0))


def from_memory(dtype: str, loaded: Expr) -> Value:
    """What a load of `dtype` gives as a value; any nonzero byte is true."""
    return _flag(NE(loaded, const_like(loaded, 0))) if dtype == "bool" else Value(dtype, loaded)


def cast(value: Value, dtype: str) -> Value:
    """ONNX Cast."""
    if dtype == value.dtype:
        return value
    x = value.expr
    if value.const is not None and not (value.dtype == "f32" and dtype in _INTEGERS):
        return constant(bool(value.const) if dtype == "bool" else value.const, dtype, value.lanes)
    if dtype == "bool":
        return _not("cast", _flag(EQ(x, const_like(x, 0))))  # of a NaN, true
    if value.dtype == "f32" and dtype != "f32":
        wide = dtype if dtype == "i64" else "i32"
        x = T.call_llvm_pure_intrin(vmath.typed(STORAGE[wide], value.lanes), "llvm.fptosi.sat", x)
        return Value(dtype, x if dtype == wide else convert(x, STORAGE[dtype]))
    return Value(dtype, convert(x, STORAGE[dtype]))


def _undefined(op: str, *args: Value) -> UnsupportedError:
    types = ", ".join(a.dtype for a in args)
    return UnsupportedError(f"no elementwise '{op}' of ({types}): cast its operands first")


def _same_type(op: str, a: Value, b: Value) -> str:
    if a.dtype != b.dtype:
        raise _undefined(op, a, b)
    return a.dtype


# Arithmetic of two values of one type


def _int_divide(a: Expr, b: Expr, of_safe: Callable[[Expr], tuple[Expr, Expr]]) -> Expr:
    """0 where b = 0, else of_safe(d) = (result for b = -1, result); d is b without its 0 and -1."""
    zero, minus = const_like(b, 0), const_like(b, -1)
    safe = T.Select(T.Or(EQ(b, zero), EQ(b, minus)), const_like(b, 1), b)

    def select(d: Expr) -> Expr:
        by_minus, other = of_safe(d)
        return T.Select(EQ(b, zero), const_like(a, 0), T.Select(EQ(b, minus), by_minus, other))

    return let(safe, select)


def int_div(a: Expr, b: Expr) -> Expr:
    return _int_divide(a, b, lambda d: (const_like(a, 0) - a, T.truncdiv(a, d)))


def _int_fmod(a: Expr, b: Expr) -> Expr:
    return _int_divide(a, b, lambda d: (const_like(a, 0), T.truncmod(a, d)))


def _int_mod(a: Expr, b: Expr) -> Expr:
    zero = const_like(a, 0)

    def floored(r: Expr) -> Expr:  # to the sign of the divisor
        opposite = T.bitwise_xor(r, b) < zero
        return T.Select(T.And(NE(r, zero), opposite), r + b, r)

    return let(_int_fmod(a, b), floored)


def _nan_first(a: Expr, b: Expr, either: Expr) -> Expr:
    """`either` = TIR's min or max of (a, b), which gives b when unordered: keep a NaN in a."""
    return T.Select(vmath.is_nan(a), a, either)


def _float_sub(a: Expr, b: Expr) -> Expr:
    # TVM's simplifier takes x - x for 0, which infinities and NaN are not.
    return T.fma(a, const_like(a, 1.0), -b) if a.same_as(b) else a - b


_FLOAT_BINARY: dict[str, Callable[[Expr, Expr], Expr]] = {
    "add": lambda a, b: a + b,
    "sub": _float_sub,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "mod": vmath.vfloor_mod,
    "fmod": vmath.vfmod,
    "min": lambda a, b: _nan_first(a, b, T.min(a, b)),
    "max": lambda a, b: _nan_first(a, b, T.max(a, b)),
}
_INT_BINARY: dict[str, Callable[[Expr, Expr], Expr]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": int_div,
    "mod": _int_mod,
    "fmod": _int_fmod,
    "min": T.min,
    "max": T.max,
}


def _arithmetic(op: str, a: Value, b: Value) -> Value:
    dtype = _same_type(op, a, b)
    if dtype == "f32":
        return Value(dtype, _FLOAT_BINARY[op](a.expr, b.expr))
    if dtype == "bool":
        raise _undefined(op, a, b)
    return _widened(lambda *e: _INT_BINARY[op](*e), a, b)


def _widened(function: Callable[..., Expr], *args: Value) -> Value:
    """An integer function of values of one type; 8-bit ones are computed in int32."""
    dtype = args[0].dtype
    if dtype not in _NARROW:
        return Value(dtype, function(*(a.expr for a in args)))
    wide = [convert(a.expr, "int32") for a in args]

    def bound(done: tuple[Expr, ...], rest: list[Expr]) -> Expr:
        return let(rest[0], lambda v: bound((*done, v), rest[1:])) if rest else function(*done)

    return Value(dtype, convert(bound((), wide), STORAGE[dtype]))


def _int_pow(x: Expr, y: Expr) -> Expr:
    zero, one = const_like(x, 0), const_like(x, 1)
    # From 2^64 on everything but 0 and +-1 has overflowed; those need the parity only.
    small = T.Select(y >= const_like(y, 64), T.bitwise_and(y, const_like(y, 1)) + const_like(y, 62), y)

    def step(power: Expr, n: Expr, bit: int) -> Expr:  # from the highest bit of n down
        if bit < 0:
            return power
        factor = T.Select(EQ(T.bitwise_and(n, const_like(n, 1 << bit)), zero), one, x)
        return let(power * power * factor, lambda p: step(p, n, bit - 1))

    def of_magnitude(n: Expr) -> Expr:
        def of_power(power: Expr) -> Expr:
            unit = T.Or(EQ(x, one), EQ(x, const_like(x, -1)))
            return T.Select(y < zero, T.Select(unit, power, zero), power)

        return let(step(one, n, 5), of_power)

    return let(T.Select(y < zero, T.bitwise_and(y, one), small), of_magnitude)


def _constant_power(x: Expr, exponent: float) -> Expr | None:
    """The exact short forms of a float power, or None."""
    one = const_like(x, 1.0)
    if exponent in (1.0, 2.0, 3.0):
        return {1.0: x, 2.0: x * x, 3.0: x * x * x}[exponent]
    if exponent == -1.0:
        return one / x
    if exponent == 0.5:  # unlike sqrt: (-0)^0.5 = 0, (-inf)^0.5 = inf
        positive = T.Select(EQ(x, const_like(x, 0.0)), const_like(x, 0.0), T.sqrt(x))
        return T.Select(EQ(x, const_like(x, -math.inf)), const_like(x, math.inf), positive)
    return None


def _pow(op: str, a: Value, b: Value) -> Value:
    """ONNX Pow: the result has the type of the base, whatever that of the exponent."""
    if "bool" in (a.dtype, b.dtype):
        raise _undefined(op, a, b)
    if "f32" not in (a.dtype, b.dtype):
        if b.const in (1, 2):
            return a if b.const == 1 else _arithmetic("mul", a, a)
        return _widened(_int_pow, a, cast(b, a.dtype))
    if b.const is not None:
        short = _constant_power(cast(a, "f32").expr, float(b.const))
        if short is not None:
            return cast(Value("f32", short), a.dtype)
    return cast(Value("f32", vmath.vpow(cast(a, "f32").expr, cast(b, "f32").expr)), a.dtype)


# Comparison, logic, selection

_COMPARE: dict[str, Callable[[Expr, Expr], Expr]] = {
    "eq": EQ,
    "ne": NE,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
}


def _compare(op: str, a: Value, b: Value) -> Value:
    dtype = _same_type(op, a, b)
    if dtype == "f32" and op == "ne":  # TIR's NE is false of a NaN
        return _not(op, _compare("eq", a, b))
    if dtype == "f32" and op == "eq" and a.expr.same_as(b.expr):  # TVM's simplifier takes x = x for true
        return _not(op, _flag(vmath.is_nan(a.expr)))
    if dtype in ("bool", *_NARROW):
        a, b = cast(a, "i32"), cast(b, "i32")
    return _flag(_COMPARE[op](a.expr, b.expr))


_BITWISE: dict[str, Callable[[Expr, Expr], Expr]] = {
    "and": T.bitwise_and,
    "or": T.bitwise_or,
    "xor": T.bitwise_xor,
}


def _logic(op: str, a: Value, b: Value) -> Value:
    dtype = _same_type(op, a, b)
    if dtype == "f32":
        raise _undefined(op, a, b)
    return Value(dtype, _BITWISE[op](a.expr, b.expr))


def _not(op: str, a: Value) -> Value:
    if a.dtype == "f32":
        raise _undefined(op, a)
    ones = {"bool": 1, "u8": 255}.get(a.dtype, -1)
    return Value(a.dtype, T.bitwise_xor(a.expr, const_like(a.expr, ones)))


def _where(op: str, c: Value, a: Value, b: Value) -> Value:
    if c.dtype != "bool":
        raise _undefined(op, c, a, b)
    dtype = _same_type(op, a, b)
    return Value(dtype, T.Select(_mask(c), a.expr, b.expr))


# Unary


def _float_sign(x: Expr) -> Expr:
    zero, one = const_like(x, 0.0), const_like(x, 1.0)
    signed = T.Select(x < zero, -one, T.Select(EQ(x, zero), zero, x))  # NaN stays
    return T.Select(x > zero, one, signed)


_FLOAT_UNARY: dict[str, Callable[[Expr], Expr]] = {
    **vmath.UNARY,
    "neg": lambda x: -x,
    "abs": vmath.vabs,
    "sign": _float_sign,
    "sqrt": T.sqrt,
    "reciprocal": lambda x: const_like(x, 1.0) / x,
    "relu": lambda x: T.max(const_like(x, 0.0), x),  # TIR's max gives its second operand when unordered
    "floor": T.floor,
    "ceil": T.ceil,
    "round": T.nearbyint,  # to even
}
_INT_UNARY: dict[str, Callable[[Expr], Expr]] = {
    "neg": lambda x: const_like(x, 0) - x,
    "abs": lambda x: T.Select(x < const_like(x, 0), const_like(x, 0) - x, x),
    "sign": lambda x: T.max(const_like(x, -1), T.min(const_like(x, 1), x)),
    "relu": lambda x: T.max(const_like(x, 0), x),
    "floor": lambda x: x,
    "ceil": lambda x: x,
    "round": lambda x: x,
}


def _unary(op: str, a: Value) -> Value:
    table = _FLOAT_UNARY if a.dtype == "f32" else _INT_UNARY
    if op not in table or a.dtype == "bool":
        raise _undefined(op, a)
    return Value(a.dtype, table[op](a.expr)) if a.dtype == "f32" else _widened(table[op], a)


def _is(op: str, a: Value) -> Value:
    if a.dtype != "f32":
        raise _undefined(op, a)
    if op == "isnan":
        return _flag(vmath.is_nan(a.expr))
    return _flag(EQ(vmath.vabs(a.expr), const_like(a.expr, math.inf)))


def _table() -> dict[str, tuple[int, Callable[..., Value]]]:
    table: dict[str, tuple[int, Callable[..., Value]]] = {}
    table |= dict.fromkeys((*_FLOAT_UNARY, *_INT_UNARY), (1, _unary))
    table |= dict.fromkeys(_FLOAT_BINARY, (2, _arithmetic))
    table |= dict.fromkeys(_COMPARE, (2, _compare))
    table |= dict.fromkeys(_BITWISE, (2, _logic))
    table |= {"isnan": (1, _is), "isinf": (1, _is), "not": (1, _not), "pow": (2, _pow), "where": (3, _where)}
    return table


OPERATORS = _table()


def apply(op: str, *args: Value) -> Value:
    """Operator `op` of the `elementwise` contract. Raises UnsupportedError for an unknown one or for wrong
    types.
    """
    if op not in OPERATORS or OPERATORS[op][0] != len(args):
        raise UnsupportedError(f"no elementwise operator '{op}' of {len(args)} operands")
    return OPERATORS[op][1](op, *args)
