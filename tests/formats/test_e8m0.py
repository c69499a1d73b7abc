"""E8M0 bit for bit against ml_dtypes and its definition."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from qgraph.formats import e8m0, mxfp4

CODES = np.arange(256, dtype=np.uint8)


def test_decode_is_the_definition():
    values = e8m0.decode(e8m0.from_codes(CODES))
    assert values.dtype == np.float32
    assert np.array_equal(values[:255].astype(np.float64), 2.0 ** (np.arange(255) - 127))
    assert np.isnan(values[255])
    assert values[e8m0.ONE_CODE] == 1 and e8m0.MAX_CODE == 254


def test_every_code_survives_here_and_in_ml_dtypes():
    values = e8m0.decode(e8m0.from_codes(CODES))
    assert np.array_equal(e8m0.floor(values).view(np.uint8), CODES)
    assert np.array_equal(values.astype(ml_dtypes.float8_e8m0fnu).view(np.uint8), CODES)


def test_floor_is_the_power_of_two_below():
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.uniform(1, 2, 1000) * 2.0**e for e in range(-127, 128)]).astype(np.float32)
    x = x[np.isfinite(x)]
    exponent = np.frexp(x.astype(np.float64))[1] - 1
    assert np.array_equal(e8m0.floor(x).view(np.uint8), np.maximum(exponent, -127) + 127)
    edges = np.array([0, 1e-45, 2**-127, 2**-126, 1.9999999, 2, 3.4e38, np.inf, np.nan], np.float32)
    assert e8m0.floor(edges).view(np.uint8).tolist() == [0, 0, 0, 1, 127, 128, 254, 255, 255]


def test_mxfp4_scales_are_two_powers_below_the_largest_magnitude():
    amax = np.array([0, 1e-45, 2**-125, 2**-124, 0.99, 1, 3.99, 4, 6, 7.99, 8, 1e37], np.float32)
    found = mxfp4.amax_block_scale(amax).astype(np.float64)
    expected = [1, *(2.0 ** max(np.floor(np.log2(float(v))) - 2, -127) for v in amax[1:])]
    assert found.tolist() == expected
