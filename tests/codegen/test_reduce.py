"""The reduce kernel against numpy: both its loops (along and across vectors), every operator and type."""

from __future__ import annotations

import math

import numpy as np
import pytest
from kernel_harness import compile_kernel, link_kernel, native_isas

from qgraph.codegen.isa import ISAS, Isa
from qgraph.codegen.kernels import build_kernel
from qgraph.codegen.spec import KernelSpec
from qgraph.errors import UnsupportedError

isas = pytest.mark.parametrize("isa", native_isas(), ids=lambda i: i.name)
SHAPES = (
    (3, 1, 1), (2, 15, 1), (2, 17, 1), (3, 64, 1), (2, 1000, 1), (1, 7, 3), (2, 33, 16),
    (3, 5, 17), (2, 5, 150),
)  # fmt: skip
NUMPY = {"f32": np.float32, "i64": np.int64, "i32": np.int32, "u8": np.uint8, "i8": np.int8, "bool": np.bool_}


def _reduce(
    isa: Isa, op: str, x: np.ndarray, split: tuple[int, ...] | None = None, guard: bool = False
) -> np.ndarray:
    dtype = next(name for name, t in NUMPY.items() if x.dtype == t)
    outer, n, inner = x.shape
    y = np.empty((outer, inner), x.dtype)
    kernel = compile_kernel(KernelSpec.make("reduce", op=op, dtype=dtype), isa)
    kernel(y, x, n, inner, blocks=outer, split=split, guard=guard)
    return y


FLOAT = {
    "sum": lambda x: x.sum(1),
    "mean": lambda x: x.mean(1),
    "max": lambda x: x.max(1),
    "min": lambda x: x.min(1),
    "prod": lambda x: x.prod(1),
    "sumsq": lambda x: (x**2).sum(1),
    "l2": lambda x: np.sqrt((x**2).sum(1)),
}


@isas
@pytest.mark.parametrize("op", FLOAT)
def test_floats(isa: Isa, op: str) -> None:
    for shape in SHAPES:
        x = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
        if op == "prod":
            x = np.exp(x / 8).astype(np.float32)
        wide = x.astype(np.float64)
        # A sum of n terms is judged by the size of its terms: they may cancel.
        scale = np.abs(wide).sum(1).max() if op in ("sum", "mean") else 1.0
        y = _reduce(isa, op, x, guard=op in ("max", "l2"))
        exact = op in ("max", "min")
        rtol = 0 if exact else 1e-4 if op == "prod" and shape[1] == 1000 else 1e-6
        np.testing.assert_allclose(
            y, FLOAT[op](wide), rtol=rtol, atol=0 if exact else 3e-7 * scale, err_msg=str(shape)
        )
        np.testing.assert_array_equal(_reduce(isa, op, x, split=(1, 1)), y)


@isas
@pytest.mark.parametrize("dtype", ["i64", "i32"])
@pytest.mark.parametrize("op", ["sum", "mean", "max", "min", "prod", "sumsq"])
def test_integers_wrap_and_means_truncate(isa: Isa, op: str, dtype: str) -> None:
    info = np.iinfo(NUMPY[dtype])
    for shape in SHAPES:
        x = np.random.default_rng(2).integers(info.min, info.max, shape, NUMPY[dtype])
        if op == "mean":
            x = x // (2 * shape[1])  # its sum must not wrap
        with np.errstate(over="ignore"):
            exact = x.astype(object)
            want = {
                "sum": lambda x=x: x.sum(1, dtype=x.dtype),
                "mean": lambda e=exact, n=shape[1]: np.vectorize(
                    lambda v: int(abs(v) // n * (1 if v > 0 else -1))
                )(e.sum(1)),
                "max": lambda x=x: x.max(1),
                "min": lambda x=x: x.min(1),
                "prod": lambda x=x: x.prod(1, dtype=x.dtype),
                "sumsq": lambda x=x: (x * x).sum(1, dtype=x.dtype),
            }[op]()
        np.testing.assert_array_equal(_reduce(isa, op, x), want, err_msg=str(shape))


@isas
@pytest.mark.parametrize("dtype", ["u8", "i8", "bool"])
def test_bytes(isa: Isa, dtype: str) -> None:
    for shape in SHAPES:
        x = np.random.default_rng(3).integers(0, 256, shape).astype(np.uint8)
        x = x % 5 == 0 if dtype == "bool" else x.view(NUMPY[dtype])
        np.testing.assert_array_equal(_reduce(isa, "max", x, guard=True), x.max(1))
        np.testing.assert_array_equal(_reduce(isa, "min", x), x.min(1))


@isas
@pytest.mark.parametrize("op", ["max", "min", "sum"])
def test_nan_and_infinity_propagate(isa: Isa, op: str) -> None:
    for shape in ((1, 150, 1), (1, 9, 21)):
        for at in (0, 1, shape[1] // 2, shape[1] - 1):
            for value in (math.nan, math.inf, -math.inf):
                x = np.random.default_rng(4).standard_normal(shape).astype(np.float32)
                x[0, at] = value
                np.testing.assert_allclose(_reduce(isa, op, x), FLOAT[op](x), rtol=1e-5)


@isas
@pytest.mark.parametrize("inner", [1, 5])
def test_an_empty_axis_gives_the_neutral_element(isa: Isa, inner: int) -> None:
    x = np.empty((2, 0, inner), np.float32)
    neutral = {"sum": 0, "mean": math.nan, "max": -math.inf, "min": math.inf, "prod": 1, "sumsq": 0, "l2": 0}
    for op, value in neutral.items():
        np.testing.assert_array_equal(_reduce(isa, op, x), np.full((2, inner), value, np.float32), err_msg=op)
    i = np.empty((2, 0, inner), np.int64)
    np.testing.assert_array_equal(_reduce(isa, "mean", i), np.zeros((2, inner)))
    np.testing.assert_array_equal(_reduce(isa, "max", i), np.full((2, inner), np.iinfo(np.int64).min))


@isas
def test_sums_of_many_terms_keep_their_digits(isa: Isa) -> None:
    x = np.random.default_rng(5).random((1, 100000, 1)).astype(np.float32)
    np.testing.assert_allclose(_reduce(isa, "mean", x), x.astype(float).mean(1), rtol=1e-6)


@pytest.mark.parametrize("isa", ISAS.values(), ids=lambda i: i.name)
def test_links(isa: Isa) -> None:
    for op, dtype in (("l2", "f32"), ("max", "f32"), ("mean", "i64"), ("prod", "i32"), ("min", "u8")):
        assert link_kernel(KernelSpec.make("reduce", op=op, dtype=dtype), isa).code


@pytest.mark.parametrize(("op", "dtype"), [("sum", "u8"), ("l2", "i64"), ("mean", "bool")])
def test_types_without_a_kernel(op: str, dtype: str) -> None:
    with pytest.raises(UnsupportedError, match=f"no '{op}' of {dtype}"):
        build_kernel(KernelSpec.make("reduce", op=op, dtype=dtype), ISAS["x86-64-v3"])
