"""quantize_int8 against numpy: the codes of `dynamic_int8`, in the order of every layout."""

from __future__ import annotations

import numpy as np
import pytest
from emulated import emulated
from int8_cases import FORMATS_A8, input_of, quantize_spec, quantized
from kernel_harness import compile_kernel, link_kernel, native_isas, stack_bytes

from qgraph.codegen.int8_input import int8_input
from qgraph.codegen.isa import ISAS, Isa
from qgraph.formats.activations import dynamic_int8

isas = pytest.mark.parametrize("isa", native_isas(), ids=lambda i: i.name)
INPUTS = {input_of(name): name for name in FORMATS_A8}


def awkward(K: int) -> np.ndarray:
    """[12, K]: rows of every magnitude, zeros, ties, one huge element; the last four not finite."""
    rng = np.random.default_rng(K)
    x = rng.standard_normal((12, K)) * np.exp(5 * rng.standard_normal((12, 1)))
    x[0], x[1] = 0.0, -0.0
    x[2] = rng.integers(-254, 255, K) / 2
    x[2, 0] = 127
    x[3] *= 1e-42 / np.abs(x[3]).max()
    x[4] *= 3e38 / np.abs(x[4]).max()
    x[5, K // 2] = 1e6
    x[8, -1], x[9, 0], x[10, K // 2], x[11] = np.nan, -np.inf, np.inf, np.nan
    return x.astype(np.float32)


@isas
@pytest.mark.parametrize("wanted", INPUTS, ids=INPUTS.get)
def test_the_codes_of_numpy(isa: Isa, wanted) -> None:
    for K in (1, 15, 16, 17, 33, 128, 172):
        x = awkward(K)
        codes, scale, sums = want = quantized(np.nan_to_num(x, posinf=0, neginf=0), wanted)
        got = [np.full_like(a, 77) for a in want]
        kernel = compile_kernel(quantize_spec(K, wanted), isa)
        kernel(*got, x, len(x), blocks=len(x), guard=True)
        split = [np.full_like(a, 77) for a in want]
        kernel(*split, x, len(x), blocks=len(x), split=(5, 1))
        for a, b in zip(got, split, strict=True):
            assert a.tobytes() == b.tobytes()
        for a, b in zip(got, (codes, scale, sums), strict=True):
            np.testing.assert_array_equal(a[:8], b[:8])
        # What is NaN in float: codes of 0, by a scale that makes zeros NaN.
        assert not got[0][8:].any() and not got[2][8:].any() and not np.isfinite(got[1][8:]).any()


@pytest.mark.parametrize("wanted", INPUTS, ids=INPUTS.get)
def test_the_reference_is_what_the_model_computes(wanted) -> None:
    """Put back in order, codes times scales are `dynamic_int8`, to the bit but for the sign of zeros."""
    x = awkward(172)[:8]
    codes, scale, _ = quantized(x, wanted)
    ordered = codes.reshape(len(x), -1, wanted.fields, 4).swapaxes(2, 3).reshape(len(x), -1)
    np.testing.assert_array_equal(ordered[:, :172] * scale[:, None], dynamic_int8(x))


@pytest.mark.parametrize("isa", ISAS.values(), ids=lambda i: i.name)
@pytest.mark.parametrize("wanted", INPUTS, ids=INPUTS.get)
def test_links_and_stays_on_a_small_stack(isa: Isa, wanted) -> None:
    assert link_kernel(quantize_spec(172, wanted), isa).code
    assert stack_bytes(quantize_spec(172, wanted), isa) < 4096


@emulated
def test_the_codes_of_numpy_on_others(isa: Isa) -> None:
    x = awkward(172)[:8]
    for wanted in INPUTS:
        want = quantized(x, wanted)
        got = [np.full_like(a, 77) for a in want]
        compile_kernel(quantize_spec(172, wanted), isa)(*got, x, len(x), blocks=len(x))
        for ours, theirs in zip(got, want, strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_formats_without_a_product_in_integers() -> None:
    assert int8_input("int3") is None and int8_input("mxfp4") is None
