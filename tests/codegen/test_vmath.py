"""Elementary functions against float64, to the errors that their docstrings state."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from kernel_harness import Kernel, compile_kernel, link_kernel, native_isas

from qgraph.codegen.isa import ISAS, Isa
from qgraph.codegen.kernels import kernel, load_builders
from qgraph.codegen.spec import KernelSpec

load_builders()
from tvm.script.ir_builder import tirx as B  # noqa: E402, N812

from qgraph.codegen.kernels import loops, vmath  # noqa: E402
from qgraph.codegen.kernels.function import function  # noqa: E402

isas = pytest.mark.parametrize("isa", native_isas(), ids=lambda i: i.name)
erf = np.vectorize(math.erf, otypes=[float])
erfc = np.vectorize(math.erfc, otypes=[float])


@kernel("vmath")
def _vmath(spec: KernelSpec, isa: Isa, symbol: str) -> object:
    """y = fn(x, ..) over n elements in vectors of `lanes`. Arguments: y, x.., n."""
    fn = getattr(vmath, spec["fn"])
    arity = 2 if spec["fn"] in ("vpow", "vfmod", "vfloor_mod") else 1
    names = ["y", "x0", "x1"][: arity + 1]
    with function(symbol, [(name, "float32") for name in names], ["n"]) as f:

        def body(start: object, count: object) -> None:
            args = [vmath.named(loops.load(f.buffers[x], start, spec["lanes"], count)) for x in names[1:]]
            loops.store(f.buffers["y"], fn(*args), start, count)

        if spec["lanes"] > 1:
            loops.each_vector(f.scalars["n"], spec["lanes"], body)
        else:
            with B.serial(f.scalars["n"]) as i:
                args = [vmath.named(f.buffers[x][i]) for x in names[1:]]
                B.buffer_store(f.buffers["y"], fn(*args), [i])
    return f.result


def _kernel(fn: str, isa: Isa, lanes: int | None = None) -> Kernel:
    return compile_kernel(KernelSpec.make("vmath", fn=fn, lanes=lanes or isa.lanes), isa)


def _call(fn: str, isa: Isa, *x: np.ndarray, lanes: int | None = None) -> np.ndarray:
    y = np.empty_like(x[0])
    _kernel(fn, isa, lanes)(y, *x, len(y), blocks=1)
    return y


def _spread(low: float, high: float, tiny: float = 1e-40) -> np.ndarray:
    """Dense in [low, high], and logarithmic towards 0 from both sides."""
    near = np.geomspace(tiny, 1.0, 20000)
    x = np.concatenate([np.linspace(low, high, 100000), near, -near]).astype(np.float32)
    return x[(x >= low) & (x <= high)]


# function -> (reference in float64, samples, largest relative error); results below 1.2e-38 count absolutely.
FUNCTIONS: dict[str, tuple[Callable[[np.ndarray], np.ndarray], np.ndarray, float]] = {
    "vexp": (np.exp, _spread(-87, 88.7), 1e-7),
    "vexp_nonpositive": (np.exp, _spread(-87, 0), 1e-7),
    "vlog": (np.log, np.concatenate([np.geomspace(1e-45, 3e38, 100000), np.linspace(0.5, 2, 50000)]), 1e-7),
    "verf": (erf, _spread(-5, 5), 2e-7),
    "vtanh": (np.tanh, _spread(-10, 10), 3.2e-7),
    "vsigmoid": (lambda x: 1 / (1 + np.exp(-x)), _spread(-87, 30), 1.5e-7),
    "vsilu": (lambda x: x / (1 + np.exp(-x)), _spread(-87, 30), 2e-7),
    "vsoftplus": (lambda x: np.logaddexp(0, x), _spread(-87, 100), 1.5e-7),
    "vgelu_erf": (lambda x: x * erfc(-x / math.sqrt(2)) / 2, _spread(-2, 10), 3.3e-7),
    "vgelu_tanh": (
        lambda x: x / (1 + np.exp(-2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
        _spread(-2, 10),
        5e-7,
    ),
    "vsin": (np.sin, np.concatenate([_spread(-1000, 1000), np.geomspace(1, 2.0**40, 50000)]), 1.5e-7),
    "vcos": (np.cos, np.concatenate([_spread(-1000, 1000), np.geomspace(1, 2.0**40, 50000)]), 1.5e-7),
}


def _error(y: np.ndarray, reference: np.ndarray) -> float:
    assert np.isfinite(y).all()
    return float((np.abs(y - reference) / np.maximum(np.abs(reference), 1.2e-38)).max())


@isas
@pytest.mark.parametrize("fn", FUNCTIONS)
def test_error(isa: Isa, fn: str) -> None:
    reference, x, bound = FUNCTIONS[fn]
    x = x.astype(np.float32)
    assert _error(_call(fn, isa, x), reference(x.astype(np.float64))) < bound


@isas
@pytest.mark.parametrize("fn", ["vgelu_erf", "vgelu_tanh"])
def test_gelu_keeps_digits_where_it_vanishes(isa: Isa, fn: str) -> None:
    reference = FUNCTIONS[fn][0]
    x = np.linspace(-9, -2, 50000, dtype=np.float32)
    assert _error(_call(fn, isa, x), reference(x.astype(np.float64))) < 1e-5


@isas
def test_exp_underflows_gradually(isa: Isa) -> None:
    x = np.linspace(-110, -87, 50000, dtype=np.float32)
    reference = np.exp(x.astype(np.float64))
    assert np.abs(_call("vexp", isa, x) - reference).max() <= 1.01 * 2.0**-149
    flushed = _call("vexp_nonpositive", isa, x)
    assert np.all((flushed == 0) | (np.abs(flushed - reference) <= 1.01 * 2.0**-149))
    assert np.all(flushed[reference < 2.0**-127] == 0)


INF, NAN, TINY, MAX = math.inf, math.nan, 1e-45, 3.4028234663852886e38
SPECIAL: dict[str, list[tuple[float, float]]] = {
    "vexp": [
        (0.0, 1),
        (-0.0, 1),
        (INF, INF),
        (-INF, 0),
        (88.73, INF),
        (-104.0, 0),
        (MAX, INF),
        (-MAX, 0),
        (TINY, 1),
    ],
    "vexp_nonpositive": [(0.0, 1), (-0.0, 1), (-INF, 0), (-104.0, 0), (-MAX, 0), (-TINY, 1)],
    "vlog": [
        (0.0, -INF),
        (-0.0, -INF),
        (INF, INF),
        (-INF, NAN),
        (-1.0, NAN),
        (-TINY, NAN),
        (1.0, 0),
        (TINY, -103.27893),
    ],
    "verf": [(0.0, 0.0), (-0.0, -0.0), (INF, 1), (-INF, -1), (4.0, 1), (-4.0, -1), (MAX, 1), (TINY, TINY)],
    "vtanh": [(0.0, 0.0), (-0.0, -0.0), (INF, 1), (-INF, -1), (9.05, 1), (-9.05, -1), (MAX, 1), (TINY, TINY)],
    "vsigmoid": [(0.0, 0.5), (INF, 1), (-INF, 0), (MAX, 1), (-MAX, 0), (TINY, 0.5)],
    "vsilu": [(0.0, 0.0), (-0.0, -0.0), (INF, INF), (MAX, MAX), (-MAX, -0.0), (-100.0, -0.0)],
    "vsoftplus": [(INF, INF), (-INF, 0), (MAX, MAX), (-MAX, 0), (0.0, math.log(2)), (TINY, math.log(2))],
    "vgelu_erf": [(0.0, 0.0), (-0.0, -0.0), (INF, INF), (MAX, MAX), (-MAX, 0.0), (-20.0, 0.0), (20.0, 20.0)],
    "vgelu_tanh": [
        (0.0, 0.0),
        (-0.0, -0.0),
        (INF, INF),
        (MAX, MAX),
        (-MAX, -0.0),
        (-20.0, -0.0),
        (20.0, 20.0),
    ],
    "vsin": [(0.0, 0.0), (-0.0, -0.0), (INF, NAN), (-INF, NAN), (TINY, TINY)],
    "vcos": [(0.0, 1), (-0.0, 1), (INF, NAN), (-INF, NAN), (TINY, 1)],
}


@isas
@pytest.mark.parametrize("fn", SPECIAL)
def test_special_values(isa: Isa, fn: str) -> None:
    x, want = np.array([*SPECIAL[fn], (NAN, NAN)], np.float32).T.copy()
    got = _call(fn, isa, x)
    np.testing.assert_allclose(got, want, rtol=1e-7)
    zero = want == 0
    np.testing.assert_array_equal(np.signbit(got[zero]), np.signbit(want[zero]))


@isas
@pytest.mark.parametrize("fn", ["vsin", "vcos"])
def test_huge_angles_stay_in_range(isa: Isa, fn: str) -> None:
    x = np.geomspace(1e12, 3e38, 10000, dtype=np.float32)
    assert np.abs(_call(fn, isa, np.concatenate([x, -x]))).max() <= 1.0


@isas
def test_pow(isa: Isa) -> None:
    rng = np.random.default_rng(0)
    x = np.exp(rng.uniform(-20, 20, 50000)).astype(np.float32)
    y = rng.uniform(-4, 4, 50000).astype(np.float32)
    assert _error(_call("vpow", isa, x, y), np.power(x.astype(float), y.astype(float))) < 6.1e-8
    n = np.rint(y)
    assert _error(_call("vpow", isa, -x, n), np.power(-x.astype(float), n.astype(float))) < 6.1e-8


@isas
def test_pow_of_special_values_is_that_of_c(isa: Isa) -> None:
    values = [
        0.0,
        -0.0,
        1.0,
        -1.0,
        0.5,
        -0.5,
        2.0,
        -2.0,
        3.0,
        -3.0,
        1e-40,
        -1e-40,
        1e38,
        INF,
        -INF,
        NAN,
        8388609.0,
    ]
    x, y = (a.ravel() for a in np.meshgrid(np.float32(values), np.float32(values)))
    with np.errstate(all="ignore"):
        want = np.power(x.astype(np.float64), y.astype(np.float64)).astype(np.float32)
    got = _call("vpow", isa, x, y)
    np.testing.assert_allclose(got, want, rtol=1.3e-7, atol=1e-45)
    np.testing.assert_array_equal(np.signbit(got[want == 0]), np.signbit(want[want == 0]))


@isas
@pytest.mark.parametrize(("fn", "reference"), [("vfloor_mod", np.mod), ("vfmod", np.fmod)])
def test_mod_is_exact(isa: Isa, fn: str, reference: np.ufunc) -> None:
    rng = np.random.default_rng(1)
    x = (rng.standard_normal(20000) * 10.0 ** rng.integers(-3, 6, 20000)).astype(np.float32)
    y = (rng.standard_normal(20000) * 10.0 ** rng.integers(-1, 3, 20000)).astype(np.float32)
    special = np.float32([0.0, -0.0, 3.0, -3.0, 0.1, INF, -INF, NAN])
    xs, ys = (a.ravel() for a in np.meshgrid(special, special))
    x, y = np.concatenate([x, xs]), np.concatenate([y, ys])
    with np.errstate(all="ignore"):
        want = reference(x.astype(np.float64), y.astype(np.float64)).astype(np.float32)
        near = ~(np.abs(x / y) >= 2**29) | ~np.isfinite(y) | (y == 0)
    got = _call(fn, isa, x, y)
    np.testing.assert_array_equal(got[near], want[near])
    zero = near & (want == 0)
    np.testing.assert_array_equal(np.signbit(got[zero]), np.signbit(want[zero]))


@isas
@pytest.mark.parametrize("fn", [*FUNCTIONS, "vpow"])
def test_scalar_and_vector_agree_to_the_bit(isa: Isa, fn: str) -> None:
    x = np.linspace(-12, 12, 1001, dtype=np.float32)
    x = [np.abs(x), x[::-1].copy()] if fn == "vpow" else [-np.abs(x) if fn == "vexp_nonpositive" else x]
    np.testing.assert_array_equal(_call(fn, isa, *x), _call(fn, isa, *x, lanes=1))


@pytest.mark.parametrize("fn", [*FUNCTIONS, "vpow", "vfmod", "vfloor_mod"])
def test_no_function_is_called_on_any_isa(fn: str) -> None:
    """Linking fails on an undefined symbol, such as a call to libm."""
    for isa in ISAS.values():
        for lanes in {1, isa.lanes}:
            assert link_kernel(KernelSpec.make("vmath", fn=fn, lanes=lanes), isa).code
