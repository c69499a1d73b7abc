"""layer_norm, RMSNorm and softmax against float64, over row lengths that break vectors."""

from __future__ import annotations

import math

import numpy as np
import pytest
from emulated import emulated
from kernel_harness import compile_kernel, link_kernel, native_isas

from qgraph.codegen.isa import ISAS, Isa
from qgraph.codegen.spec import KernelSpec

isas = pytest.mark.parametrize("isa", native_isas(), ids=lambda i: i.name)
EPS = 1e-5
SPLITS = ((1,) * 9, (4, 1, 2), (1, 6))


def _layer_norm(
    isa: Isa, x: np.ndarray, rms: bool, bias: bool, split: tuple[int, ...] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """(result, float64 reference)"""
    rows, n = x.shape
    rng = np.random.default_rng(n)
    scale, shift = rng.standard_normal((2, n)).astype(np.float32)
    extra = [shift] if bias else []
    y = np.empty_like(x)
    spec = KernelSpec.make("layer_norm", n=n, eps=EPS, rms=rms, bias=bias)
    compile_kernel(spec, isa)(
        y, x, scale.copy(), *(e.copy() for e in extra), rows, blocks=rows, split=split, guard=split is None
    )
    wide = x.astype(np.float64)
    centred = wide if rms else wide - wide.mean(1, keepdims=True)
    want = centred / np.sqrt((centred**2).mean(1, keepdims=True) + EPS) * scale
    return y, want + shift if bias else want


@isas
@pytest.mark.parametrize("n", [1, 2, 5, 16, 17, 64, 384, 1000])
@pytest.mark.parametrize(("rms", "bias"), [(False, True), (False, False), (True, False)])
def test_layer_norm(isa: Isa, n: int, rms: bool, bias: bool) -> None:
    x = np.random.default_rng(n).standard_normal((9, n)).astype(np.float32) * 3 + 0.5
    y, want = _layer_norm(isa, x, rms, bias)
    np.testing.assert_allclose(y, want, rtol=1e-6, atol=1.5e-6)
    for split in SPLITS:
        np.testing.assert_array_equal(_layer_norm(isa, x, rms, bias, split)[0], y)


@emulated
def test_layer_norm_on_others(isa: Isa) -> None:
    x = np.random.default_rng(0).standard_normal((9, 77)).astype(np.float32) * 3 + 0.5
    y, want = _layer_norm(isa, x, rms=False, bias=True)
    np.testing.assert_allclose(y, want, rtol=1e-6, atol=1.5e-6)


@isas
def test_layer_norm_of_a_large_mean_keeps_the_variance(isa: Isa) -> None:
    """The one-pass formula E[x^2] - mean^2 would lose every digit here."""
    x = (np.random.default_rng(0).standard_normal((3, 384)) + 3000).astype(np.float32)
    y, want = _layer_norm(isa, x, rms=False, bias=True)
    np.testing.assert_allclose(y, want, atol=2e-3)  # a float32 mean of 3000 is exact to 1.2e-4


@isas
def test_layer_norm_of_constant_rows(isa: Isa) -> None:
    x = np.stack([np.zeros(384), np.full(384, 7.0)]).astype(np.float32)
    for rms in (False, True):
        y, want = _layer_norm(isa, x, rms=rms, bias=False)
        np.testing.assert_allclose(y, want, rtol=1e-6, atol=1e-6)


@isas
def test_a_row_depends_on_nothing_else(isa: Isa) -> None:
    x = np.random.default_rng(0).standard_normal((4, 100)).astype(np.float32)
    alone = _layer_norm(isa, x[2:3].copy(), rms=False, bias=True)[0]
    x[:2] = np.nan
    np.testing.assert_array_equal(_layer_norm(isa, x, rms=False, bias=True)[0][2:3], alone)


def _softmax(isa: Isa, x: np.ndarray, log: bool, split: tuple[int, ...] | None = None) -> np.ndarray:
    y = np.full_like(x, -7)
    spec = KernelSpec.make("softmax", log=log)
    compile_kernel(spec, isa)(y, x, x.shape[1], blocks=len(x), split=split, guard=split is None)
    return y


def _softmax_reference(x: np.ndarray, log: bool) -> np.ndarray:
    wide = x.astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        shifted = wide - wide.max(1, keepdims=True)
        total = np.exp(shifted).sum(1, keepdims=True)
        return shifted - np.log(total) if log else np.exp(shifted) / total


@isas
@pytest.mark.parametrize("log", [False, True])
def test_softmax(isa: Isa, log: bool) -> None:
    for n in (1, 2, 15, 16, 17, 64, 65, 100, 1000, 4096):
        x = np.random.default_rng(n).standard_normal((7, n)).astype(np.float32) * 4
        y = _softmax(isa, x, log)
        # x - max is rounded to float32 before the exponential; log(sum) has its own last digit.
        atol = 1e-6 if log else 1e-30
        np.testing.assert_allclose(y, _softmax_reference(x, log), rtol=3e-6, atol=atol, err_msg=str(n))
        for split in SPLITS[:2]:
            np.testing.assert_array_equal(_softmax(isa, x, log, split), y)


@isas
@pytest.mark.parametrize("log", [False, True])
def test_softmax_of_masked_and_extreme_rows(isa: Isa, log: bool) -> None:
    inf, nan = math.inf, math.nan
    rows = [[0, -inf, 1, -inf], [-inf, -inf, -inf, 5], [3e38, -3e38, 3e38, 0], [-200, -200, -200, -300]]
    x = np.array(rows, np.float32)
    with np.errstate(over="ignore"):
        want = _softmax_reference(x, log).astype(np.float32)
    np.testing.assert_allclose(_softmax(isa, x, log), want, rtol=1e-6, atol=1e-38)
    bad = np.array([[-inf] * 4, [nan, 0, 0, 0], [0, 0, inf, 0], [0, 1, 2, nan]], np.float32)
    wide = np.pad(bad, ((0, 0), (0, 35)), constant_values=-1)
    wide[0] = -inf
    for x in (bad, wide):
        y = _softmax(isa, x, log)
        want = _softmax_reference(x, log)
        np.testing.assert_array_equal(np.isnan(y)[[0, 1, 3]], True)
        np.testing.assert_array_equal(np.isnan(y), np.isnan(want))


@isas
def test_softmax_of_nothing(isa: Isa) -> None:
    y = np.full(3, 7, np.float32)
    compile_kernel(KernelSpec.make("softmax", log=False), isa)(
        y[:0].copy(), y[:0].copy(), 0, blocks=3, guard=True
    )


@pytest.mark.parametrize("isa", ISAS.values(), ids=lambda i: i.name)
def test_links(isa: Isa) -> None:
    for spec in (
        KernelSpec.make("softmax", log=True),
        KernelSpec.make("softmax", log=False),
        KernelSpec.make("layer_norm", n=383, eps=EPS, rms=False, bias=True),
    ):
        assert link_kernel(spec, isa).code
