"""Elementwise kernels against numpy: layouts, sizes, operators, data types, values at the edges."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from emulated import emulated
from kernel_harness import Kernel, compile_kernel, link_kernel, native_isas

from qgraph.codegen.isa import ISAS, Isa
from qgraph.codegen.kernels import build_kernel
from qgraph.codegen.spec import KernelSpec
from qgraph.errors import UnsupportedError

BLOCK = 4096
NUMPY = {
    "f32": np.float32,
    "i64": np.int64,
    "i32": np.int32,
    "bool": np.bool_,
    "u8": np.uint8,
    "i8": np.int8,
}
NAMES = {np.dtype(t): name for name, t in NUMPY.items()}
x, y, z = ("in", 0), ("in", 1), ("in", 2)

isas = pytest.mark.parametrize("isa", native_isas(), ids=lambda i: i.name)


def const(value: float | int | bool, dtype: str = "f32") -> tuple[Any, ...]:
    return ("const", value, dtype)


def _root(view: np.ndarray) -> np.ndarray:
    """The contiguous array that `view` is a view of, which must begin where the view does."""
    root = view
    while isinstance(root.base, np.ndarray):
        root = root.base
    assert root.flags.c_contiguous and root.ctypes.data == view.ctypes.data
    return root


class Call:
    """An elementwise kernel and its arguments for these views; all have the shape of `out`."""

    def __init__(
        self, isa: Isa, expr: Any, out: np.ndarray, inputs: Sequence[np.ndarray], args: Sequence[int] = ()
    ) -> None:
        operands = [out, *(np.broadcast_to(v, out.shape) for v in inputs)]
        inner: list[int | str] = []
        strides: list[int] = []
        for v in operands:
            s = [b // v.itemsize for b in v.strides]
            inner.append(s[-1] if s[-1] in (0, 1) else "s")
            strides += s if inner[-1] == "s" else s[:-1]
        self.spec = KernelSpec.make(
            "elementwise",
            rank=out.ndim,
            inputs=[NAMES[v.dtype] for v in operands[1:]],
            in_inner=inner[1:],
            out=NAMES[out.dtype],
            out_inner=inner[0],
            args=len(args),
            expr=expr,
        )
        self.kernel: Kernel = compile_kernel(self.spec, isa)
        self.values = [*(_root(v) for v in operands), *out.shape, *strides, *args]
        self.blocks = -(-out.size // BLOCK) if out.ndim == 1 else math.prod(out.shape[:-1])

    def __call__(self, split: Sequence[int] | None = None, guard: bool = True) -> None:
        self.kernel(*self.values, blocks=self.blocks, split=split, guard=guard)


def run(isa: Isa, expr: Any, dtype: str, *inputs: np.ndarray, args: Sequence[int] = ()) -> np.ndarray:
    out = np.empty(np.broadcast_shapes(*(v.shape for v in inputs)), NUMPY[dtype])
    Call(isa, expr, out, inputs, args)(guard=False)
    return out


# Sizes and layouts

SIZES = (1, 3, 15, 16, 17, 4095, 4096, 4097, 10000)


@isas
@pytest.mark.parametrize("n", SIZES)
def test_sizes_stay_in_their_buffers(isa: Isa, n: int) -> None:
    rng = np.random.default_rng(n)
    c, a = rng.random(n) < 0.5, rng.standard_normal(n).astype(np.float32)
    i, b = rng.integers(-9, 9, n), rng.integers(0, 200, n).astype(np.uint8)
    out = np.empty(n, np.float32)
    expr = ("where", x, ("mul", y, ("cast", "f32", z)), ("add", ("in", 4), ("cast", "f32", ("in", 3))))
    Call(isa, expr, out, [c, a, i, b, np.float32(0.5)])()
    np.testing.assert_array_equal(out, np.where(c, a * i, np.float32(0.5) + b).astype(np.float32))


@isas
def test_any_split_of_the_blocks_gives_the_same_bits(isa: Isa) -> None:
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 5 * BLOCK + 77)).astype(np.float32)
    rows, scale = rng.standard_normal((37, 45)).astype(np.float32), rng.standard_normal(45).astype(np.float32)
    for inputs in ([a.copy(), b.copy()], [rows, scale]):
        out = np.empty(inputs[0].shape, np.float32)
        call = Call(isa, ("gelu_erf", ("add", x, ("exp", y))), out, inputs)
        call(guard=False)
        whole = out.copy()
        for split in ((1,) * 40, (4, 1, 2), (1, 3)):
            out[...] = np.nan
            call(split)
            np.testing.assert_array_equal(out, whole)


@isas
def test_a_result_does_not_depend_on_its_position(isa: Isa) -> None:
    a = np.linspace(-5, 5, 37, dtype=np.float32)
    whole = run(isa, ("tanh", x), "f32", a)
    for start in range(1, 37):
        np.testing.assert_array_equal(run(isa, ("tanh", x), "f32", a[start:].copy()), whole[start:])


def _layouts(rng: np.random.Generator, shape: tuple[int, ...]) -> list[np.ndarray]:
    """Views of `shape` of every kind: dense, broadcast along some axes, transposed, strided."""
    rank = len(shape)
    dense = rng.standard_normal(shape).astype(np.float32)
    views = [dense]
    for axes in ([0], [rank - 1], list(range(0, rank, 2)), list(range(rank))):
        part = [1 if i in axes else d for i, d in enumerate(shape)]
        views.append(np.broadcast_to(rng.standard_normal(part).astype(np.float32), shape))
    for order in {
        tuple(range(rank)[::-1]),
        (*range(1, rank), 0),
        (*range(rank - 2), rank - 1, rank - 2)[-rank:],
    }:
        back = rng.standard_normal([shape[i] for i in order]).astype(np.float32)
        views.append(back.transpose(np.argsort(order)))
    double = rng.standard_normal([2 * d + 1 for d in shape]).astype(np.float32)
    views.append(double[tuple(slice(0, 2 * d, 2) for d in shape)])
    return views


@isas
@pytest.mark.parametrize("rank", [1, 2, 3, 4, 5])
def test_strided_inputs(isa: Isa, rank: int) -> None:
    rng = np.random.default_rng(rank)
    for shape in ((3, 2, 4, 3, 19)[-rank:], (2, 1, 3, 2, 5)[:rank]):
        for view in _layouts(rng, shape):
            dense = rng.standard_normal(shape).astype(np.float32)
            out = np.empty(shape, np.float32)
            Call(isa, ("sub", x, y), out, [view, dense])(
                split=(1, 3), guard=len(shape) < 2 or shape[-1] == 19
            )
            np.testing.assert_array_equal(out, view - dense)


@isas
@pytest.mark.parametrize("rank", [1, 2, 3, 4, 5])
def test_strided_output_leaves_the_rest_alone(isa: Isa, rank: int) -> None:
    rng = np.random.default_rng(rank)
    shape = (3, 2, 4, 3, 19)[-rank:]
    a = rng.standard_normal(shape).astype(np.float32)
    for step in (1, 2):
        base = np.full([step * d + 2 for d in shape], -7, np.float32)
        where = tuple(slice(0, step * d, step) for d in shape)
        want = base.copy()
        want[where] = 2 * a
        Call(isa, ("add", x, x), base[where], [a])(split=(2, 1))
        np.testing.assert_array_equal(base, want)


@isas
def test_output_transposed(isa: Isa) -> None:
    a = np.random.default_rng(0).standard_normal((5, 21)).astype(np.float32)
    out = np.empty((21, 5), np.float32)
    Call(isa, x, out.T, [a])()
    np.testing.assert_array_equal(out, a.T)


@isas
def test_empty_ranges_touch_nothing(isa: Isa) -> None:
    kernel = compile_kernel(
        Call(isa, x, np.empty((1, 1, 3), np.float32), [np.ones((1, 1, 3), np.float32)]).spec, isa
    )
    out, a = np.full(3, 7, np.float32), np.ones(3, np.float32)
    function, values = kernel.bind(out, a, 0, 0, 3, 0, 3, 0, 3)
    function(*values, 0, 0)
    assert (out == 7).all()


@isas
def test_index_and_arguments(isa: Isa) -> None:
    out = np.empty((3, 4, 21), np.int64)
    expr = ("add", ("mul", ("iota", 0), ("arg", 0)), ("sub", ("mul", ("iota", 1), ("arg", 1)), ("iota", 2)))
    Call(isa, expr, out, [], args=[1000, -(10**12)])(split=(5, 2))
    i, j, k = np.indices(out.shape)
    np.testing.assert_array_equal(out, i * 1000 - j * 10**12 - k)
    flat = np.empty(9000, np.int64)
    Call(isa, ("mod", ("iota", 0), ("arg", 0)), flat, [], args=[97])(split=(1,))
    np.testing.assert_array_equal(flat, np.arange(9000) % 97)


def test_shared_subexpressions_are_computed_once() -> None:
    expr: Any = x
    for _ in range(14):
        expr = ("mul", ("add", expr, const(1.0)), expr)
    spec = KernelSpec.make(
        "elementwise", rank=1, inputs=("f32",), in_inner=(1,), out="f32", out_inner=1, args=0, expr=expr
    )
    text = build_kernel(spec, ISAS["x86-64-v4"]).script()
    assert text.count(" * v_") <= 2 * 14 + 8  # vectors and the masked end


# Operators. One kernel holds all operators of a kind, and an argument selects: a trap in any of them shows.


def _menu(exprs: Sequence[Any]) -> Any:
    """exprs[arg 0]"""
    choice = exprs[-1]
    for i in range(len(exprs) - 1):
        choice = ("where", ("eq", ("arg", 0), const(i, "i64")), exprs[i], choice)
    return choice


def _check(
    isa: Isa, dtype: str, cases: Sequence[tuple[Any, np.ndarray]], *inputs: np.ndarray, rtol: float = 0
) -> None:
    menu = _menu([expr for expr, _ in cases])
    for i, (expr, want) in enumerate(cases):
        got = run(isa, menu, dtype, *inputs, args=[i])
        np.testing.assert_allclose(got, want.astype(NUMPY[dtype]), rtol=rtol, err_msg=str(expr))


EDGES = [
    0.0,
    -0.0,
    0.5,
    -0.5,
    1.5,
    2.5,
    -2.5,
    1.0,
    -1.0,
    3.0,
    1e-40,
    1e38,
    -1e38,
    math.inf,
    -math.inf,
    math.nan,
]


def _floats(n: int) -> np.ndarray:
    a = np.random.default_rng(n).standard_normal(301).astype(np.float32) * 3
    a[: len(EDGES)] = EDGES
    return a


def _float_pairs() -> tuple[np.ndarray, np.ndarray]:
    a, b = np.meshgrid(np.float32(EDGES), np.float32(EDGES))
    return np.concatenate([a.ravel(), _floats(1)]), np.concatenate([b.ravel(), _floats(2)])


def _ints(dtype: str) -> np.ndarray:
    info = np.iinfo(NUMPY[dtype])
    edges = [info.min, info.min + 1, info.max, info.max - 1, 0, 1, 2, 3, 7, 100]
    edges += [-1, -2, -3, -7] if info.min < 0 else [128, 200]
    return np.array(edges, NUMPY[dtype])


def _int_pairs(dtype: str) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.meshgrid(_ints(dtype), _ints(dtype))
    return a.ravel().copy(), b.ravel().copy()


@isas
def test_float_unary(isa: Isa) -> None:
    a = _floats(0)
    with np.errstate(all="ignore"):
        cases = [
            (("neg", x), -a),
            (("abs", x), np.abs(a)),
            (("sign", x), np.sign(a)),
            (("sqrt", x), np.sqrt(a)),
            (("reciprocal", x), 1 / a),
            (("relu", x), np.maximum(a, 0)),
            (("floor", x), np.floor(a)),
            (("ceil", x), np.ceil(a)),
            (("round", x), np.rint(a)),
        ]
        _check(isa, "f32", cases, a)
        wide = a.astype(np.float64)
        cases = [
            (("exp", x), np.exp(wide)),
            (("log", x), np.log(wide)),
            (("tanh", x), np.tanh(wide)),
            (("sigmoid", x), 1 / (1 + np.exp(-wide))),
            (("softplus", x), np.logaddexp(0, wide)),
            (("erf", x), np.vectorize(math.erf)(wide)),
        ]
        _check(isa, "f32", cases, a, rtol=4e-7)
    small = a[np.abs(a) < 1e3]
    wide = small.astype(np.float64)
    cases = [
        (("sin", x), np.sin(wide)),
        (("cos", x), np.cos(wide)),
        (("silu", x), wide / (1 + np.exp(-wide))),
        (("gelu_erf", x), wide / 2 * np.vectorize(math.erfc)(-wide / math.sqrt(2))),
        (("gelu_tanh", x), wide / (1 + np.exp(-2 * math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3)))),
    ]
    _check(isa, "f32", cases, small, rtol=1e-5)


@isas
def test_signs_of_zero(isa: Isa) -> None:
    zero = np.float32([0.0, -0.0])
    for expr, signs in (
        (("neg", x), [True, False]),
        (("abs", x), [False, False]),
        (("sqrt", x), [False, True]),
        (("round", ("mul", x, const(0.25))), [False, True]),
        (("add", x, const(0.0)), [False, False]),
        (("mul", const(0.0), ("neg", x)), [True, False]),
        (("pow", x, const(0.5)), [False, False]),
    ):
        np.testing.assert_array_equal(np.signbit(run(isa, expr, "f32", zero)), signs, err_msg=str(expr))


@isas
def test_float_binary(isa: Isa) -> None:
    a, b = _float_pairs()
    with np.errstate(all="ignore"):
        cases = [
            (("add", x, y), a + b),
            (("sub", x, y), a - b),
            (("mul", x, y), a * b),
            (("div", x, y), a / b),
            (("min", x, y), np.minimum(a, b)),
            (("max", x, y), np.maximum(a, b)),
            (("mod", x, y), np.mod(a, b)),
            (("fmod", x, y), np.fmod(a, b)),
        ]
        keep = ~(np.abs(a / b) >= 2**29) | ~np.isfinite(b) | (b == 0)  # where vfloor_mod is exact
        _check(isa, "f32", [(e, w[keep]) for e, w in cases], a[keep], b[keep], rtol=2e-7)
        power = np.power(a.astype(np.float64), b.astype(np.float64))
        np.testing.assert_allclose(run(isa, ("pow", x, y), "f32", a, b), power.astype(np.float32), rtol=2e-7)


@isas
def test_what_a_simplifier_may_not_do_to_floats(isa: Isa) -> None:
    a = np.float32([1, math.inf, -math.inf, math.nan])
    for view in (a, np.stack([a, a], 1)[:, 0]):  # vectors; scalars
        assert np.isnan(run(isa, ("sub", x, x), "f32", view)[1:]).all()
        assert np.isnan(run(isa, ("mul", const(0.0), x), "f32", view)[1:]).all()
        assert np.isnan(run(isa, ("div", x, x), "f32", view)[1:]).all()
        np.testing.assert_array_equal(run(isa, ("eq", x, x), "bool", view), [True, True, True, False])
        np.testing.assert_array_equal(run(isa, ("ne", x, x), "bool", view), [False, False, False, True])
        negated = ("not", ("lt", x, const(2.0)))
        np.testing.assert_array_equal(run(isa, negated, "bool", view), [False, True, False, True])


@isas
@pytest.mark.parametrize("exponent", [-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0])
def test_pow_of_a_constant(isa: Isa, exponent: float) -> None:
    a = _floats(3)
    with np.errstate(all="ignore"):
        want = np.power(a.astype(np.float64), np.full(a.shape, exponent)).astype(np.float32)
    np.testing.assert_allclose(run(isa, ("pow", x, const(exponent)), "f32", a), want, rtol=1.3e-7)


def _trunc_div(a: int, b: int) -> int:
    if b == 0:
        return 0
    q = abs(a) // abs(b)
    return q if (a < 0) == (b < 0) else -q


def _each(function: Any, dtype: str, *arrays: np.ndarray) -> np.ndarray:
    """`function` on Python's integers, wrapped to the type."""
    bits = 8 * np.dtype(NUMPY[dtype]).itemsize
    raw = [function(*map(int, v)) % (1 << bits) for v in zip(*arrays, strict=True)]
    return np.array(raw, f"uint{bits}").view(NUMPY[dtype])


@isas
@pytest.mark.parametrize("dtype", ["i64", "i32", "u8", "i8"])
def test_integer_arithmetic(isa: Isa, dtype: str) -> None:
    a, b = _int_pairs(dtype)
    functions = {
        "add": lambda p, q: p + q,
        "sub": lambda p, q: p - q,
        "mul": lambda p, q: p * q,
        "div": _trunc_div,
        "mod": lambda p, q: p % q if q else 0,
        "fmod": lambda p, q: p - q * _trunc_div(p, q) if q else 0,
        "min": min,
        "max": max,
        "and": lambda p, q: p & q,
        "or": lambda p, q: p | q,
        "xor": lambda p, q: p ^ q,
    }
    cases = [((op, x, y), _each(f, dtype, a, b)) for op, f in functions.items()]
    unary = {
        "neg": lambda p: -p,
        "abs": abs,
        "sign": lambda p: (p > 0) - (p < 0),
        "relu": lambda p: max(p, 0),
        "not": lambda p: ~p,
        "floor": lambda p: p,
        "round": lambda p: p,
    }
    cases += [((op, x), _each(f, dtype, a)) for op, f in unary.items()]
    _check(isa, dtype, cases, a, b)


@isas
@pytest.mark.parametrize("dtype", ["i64", "i8"])
def test_integer_pow(isa: Isa, dtype: str) -> None:
    base, exponent = (
        v.ravel().astype(NUMPY[dtype]) for v in np.meshgrid(np.arange(-5, 12), np.arange(-3, 70))
    )

    def power(p: int, n: int) -> int:
        if n < 0:
            return 1 if p == 1 else (-1) ** -n if p == -1 else 0
        return p**n

    keep = np.array([abs(int(p)) < 2 or n < 64 for p, n in zip(base, exponent, strict=True)])
    base, exponent = base[keep], exponent[keep]
    np.testing.assert_array_equal(
        run(isa, ("pow", x, y), dtype, base, exponent), _each(power, dtype, base, exponent)
    )


@isas
def test_pow_of_two_types_has_the_type_of_the_base(isa: Isa) -> None:
    a, n = np.float32([2, 3, -2, 0.5]), np.int64([10, 2, 3, -1])
    np.testing.assert_array_equal(run(isa, ("pow", x, y), "f32", a, n), np.float32([1024, 9, -8, 2]))
    np.testing.assert_array_equal(run(isa, ("pow", x, const(2, "i64")), "i64", n), n * n)
    i, f = np.int64([4, 9, 2, 10]), np.float32([0.5, 1.5, 10, 2])
    np.testing.assert_array_equal(run(isa, ("pow", x, y), "i64", i, f), [2, 27, 1024, 100])


@isas
@pytest.mark.parametrize("dtype", NUMPY)
def test_comparisons(isa: Isa, dtype: str) -> None:
    if dtype == "bool":
        a, b = np.array([0, 0, 1, 1], bool), np.array([0, 1, 0, 1], bool)
    else:
        a, b = _float_pairs() if dtype == "f32" else _int_pairs(dtype)
    functions = {
        "eq": np.equal,
        "ne": np.not_equal,
        "lt": np.less,
        "le": np.less_equal,
        "gt": np.greater,
        "ge": np.greater_equal,
    }
    _check(isa, "bool", [((op, x, y), f(a, b)) for op, f in functions.items()], a, b)


@isas
def test_logic(isa: Isa) -> None:
    a, b = np.array([0, 0, 1, 1] * 9, bool), np.array([0, 1, 0, 1] * 9, bool)
    cases = [
        (("and", x, y), a & b),
        (("or", x, y), a | b),
        (("xor", x, y), a ^ b),
        (("not", x), ~a),
        (("where", x, ("not", y), y), np.where(a, ~b, b)),
        (("and", const(True, "bool"), ("or", x, const(False, "bool"))), a),
    ]
    _check(isa, "bool", cases, a, b)
    # Any nonzero byte of an input is true, and what is stored is 0 or 1.
    bytes_ = np.arange(256, dtype=np.uint8)
    got = run(isa, ("or", x, x), "bool", bytes_.view(bool))
    np.testing.assert_array_equal(got.view(np.uint8), bytes_ != 0)


@isas
def test_where_and_predicates(isa: Isa) -> None:
    a = _floats(5)
    np.testing.assert_array_equal(run(isa, ("isnan", x), "bool", a), np.isnan(a))
    np.testing.assert_array_equal(run(isa, ("isinf", x), "bool", a), np.isinf(a))
    mask = a > 0
    for dtype in ("f32", "i64", "u8"):
        p, q = np.arange(301).astype(NUMPY[dtype]), np.arange(301)[::-1].astype(NUMPY[dtype])
        np.testing.assert_array_equal(run(isa, ("where", x, y, z), dtype, mask, p, q), np.where(mask, p, q))


@isas
@pytest.mark.parametrize("source", NUMPY)
@pytest.mark.parametrize("target", NUMPY)
def test_cast(isa: Isa, source: str, target: str) -> None:
    if source == "f32":
        a = np.float32([0, -0.0, 0.5, -0.5, 1.9, -1.9, 100.7, -100.7, 126.9, 1e-40])
    elif source == "bool":
        a = np.array([True, False] * 10)
    else:
        a = _ints(source)
    expr = x if source == target else ("cast", target, x)
    with np.errstate(all="ignore"):
        want = (
            a.astype(np.int32).astype(NUMPY[target])
            if (source, target) == ("f32", "u8")
            else a.astype(NUMPY[target])
        )
    np.testing.assert_array_equal(run(isa, expr, target, a), want)


@isas
def test_cast_of_floats_out_of_range_saturates(isa: Isa) -> None:
    a = np.float32([1e10, -1e10, 1e30, -1e30, math.inf, -math.inf, math.nan])
    low, high = np.iinfo(np.int32).min, np.iinfo(np.int32).max
    np.testing.assert_array_equal(
        run(isa, ("cast", "i32", x), "i32", a), [high, low, high, low, high, low, 0]
    )
    low, high = np.iinfo(np.int64).min, np.iinfo(np.int64).max
    want = [10**10, -(10**10), high, low, high, low, 0]
    np.testing.assert_array_equal(run(isa, ("cast", "i64", x), "i64", a), want)
    np.testing.assert_array_equal(run(isa, ("cast", "bool", x), "bool", a), [True] * 7)


@emulated
def test_what_may_be_a_routine_on_others(isa: Isa) -> None:
    """Division and conversion of 64 bits, rounding."""
    a, b = _int_pairs("i64")
    quotient = run(isa, ("div", x, y), "i64", a, b)
    np.testing.assert_array_equal(quotient, _each(_trunc_div, "i64", a, b))
    np.testing.assert_array_equal(run(isa, ("cast", "f32", x), "f32", a), a.astype(np.float32))
    near = np.int64([2**60 + 2**36, 2**60 + 2**36 + 1, -(2**60) - 2**36 - 1, 2**53 + 1])  # ties, all but
    np.testing.assert_array_equal(run(isa, ("cast", "f32", x), "f32", near), near.astype(np.float32))
    f = np.float32([0.5, -0.5, -0.0, 2.5, -2.5, 1e9, -1.5, 8388607.5, -1e-30, math.inf])
    for op, function in (("floor", np.floor), ("ceil", np.ceil), ("round", np.round)):
        got = run(isa, (op, x), "f32", f)
        np.testing.assert_array_equal(got, function(f))
        np.testing.assert_array_equal(np.signbit(got), np.signbit(function(f)))
    wide = np.float32([1e18, -1e18, 3e9, -1.9, 9.3e18, -9.3e18, math.nan])
    want = [int(v) for v in wide[:4]] + [2**63 - 1, -(2**63), 0]
    np.testing.assert_array_equal(run(isa, ("cast", "i64", x), "i64", wide), want)


@isas
def test_constants(isa: Isa) -> None:
    a = np.zeros(5, np.int64)
    big = run(isa, ("add", x, const(2**62, "i64")), "i64", a)
    np.testing.assert_array_equal(big, [2**62] * 5)
    np.testing.assert_array_equal(run(isa, ("cast", "i32", const(-1.5)), "i32", a), [-1] * 5)
    f = np.ones(5, np.float32)
    np.testing.assert_array_equal(run(isa, ("mul", x, const(-math.inf)), "f32", f), [-math.inf] * 5)
    assert np.isnan(run(isa, ("mul", x, const(math.nan)), "f32", f)).all()


# Every ISA, and errors


PREDICATES = {"eq", "ne", "lt", "le", "gt", "ge", "isnan", "isinf"}
ARITHMETIC = {"add", "sub", "mul", "div", "mod", "fmod", "min", "max", "pow", "neg", "abs", "sign", "relu"}
ROUNDING = {"floor", "ceil", "round"}
INTEGER_OPERATORS = (
    PREDICATES - {"isnan", "isinf"} | ARITHMETIC | ROUNDING | {"and", "or", "xor", "not", "where"}
)
FLOAT_OPERATORS = (
    PREDICATES | ARITHMETIC | ROUNDING | {"where", "sqrt", "reciprocal", "exp", "log", "erf", "tanh"}
)
FLOAT_OPERATORS |= {"sigmoid", "gelu_erf", "gelu_tanh", "silu", "softplus", "sin", "cos"}


@pytest.mark.parametrize("isa", [i for i in ISAS.values() if i not in native_isas()], ids=lambda i: i.name)
def test_every_operator_links_where_it_cannot_run(isa: Isa) -> None:
    """No operator may call a library: linking fails on an undefined symbol. (The tests above link the
    others.)
    """
    from qgraph.codegen.kernels.ops import OPERATORS

    operands = {1: (x,), 2: (x, y), 3: (("lt", x, y), x, y)}
    for dtype, inner in (("f32", 1), ("i64", "s")):
        linked = set()
        for op, (arity, _) in OPERATORS.items():
            out = "bool" if op in PREDICATES else dtype
            try:
                assert link_kernel(_spec((op, *operands[arity]), (dtype, dtype), out, inner), isa).code
                linked.add(op)
            except UnsupportedError:
                continue
        assert linked == (FLOAT_OPERATORS if dtype == "f32" else INTEGER_OPERATORS)
    for inner in (1, "s"):
        logic = ("or", ("isnan", x), ("and", ("isinf", x), ("xor", y, ("cast", "bool", z))))
        assert link_kernel(_spec(logic, ("f32", "bool", "i32"), "bool", inner), isa).code


def _spec(expr: Any, inputs: Sequence[str], out: str, inner: int | str = 1, args: int = 0) -> KernelSpec:
    return KernelSpec.make(
        "elementwise",
        rank=2,
        inputs=inputs,
        in_inner=[inner] * len(inputs),
        out=out,
        out_inner=inner,
        args=args,
        expr=expr,
    )


def _build(isa: Isa, expr: Any, dtype: str) -> None:
    build_kernel(_spec(expr, (dtype, dtype), dtype), isa)


@pytest.mark.parametrize(
    ("expr", "message"),
    [
        (("add", x, ("cast", "i64", y)), r"'add' of \(f32, i64\)"),
        (("and", x, y), r"'and' of \(f32, f32\)"),
        (("erf", ("cast", "i64", x)), r"'erf' of \(i64\)"),
        (("where", x, x, y), r"'where' of \(f32, f32, f32\)"),
        (("mystery", x), "'mystery'"),
        (("add", x), "'add' of 1 operands"),
        (("lt", x, y), "expression is bool, the output f32"),
    ],
)
def test_wrong_expressions(expr: Any, message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        _build(ISAS["x86-64-v4"], expr, "f32")


def test_too_many_arguments() -> None:
    expr: Any = x
    for i in range(1, 11):
        expr = ("add", expr, ("in", i))
    with pytest.raises(UnsupportedError, match="at most 32"):
        build_kernel(_spec(expr, ("f32",) * 11, "f32", "s"), ISAS["x86-64-v4"])
