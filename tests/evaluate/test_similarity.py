"""Similarity measures against values worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from qgraph.evaluate.similarity import (
    cosine,
    mean_pool,
    mean_pooled_cosine,
    normalize,
    relative_error,
    sqnr_db,
)


def test_relative_error():
    assert relative_error([3.0, 5.0], [3.0, 4.0]) == pytest.approx(1 / 5)
    assert relative_error([[0.0]], [[0.0]]) == 0
    assert relative_error([1.0], [0.0]) == np.inf
    assert np.isnan(relative_error([np.nan], [1.0]))
    small = np.full(10, 1e-30, np.float32)  # its square is 0 in float32
    assert relative_error(small * 2, small) == pytest.approx(1)


def test_sqnr():
    assert sqnr_db([1.1], [1.0]) == pytest.approx(20)
    assert sqnr_db([10.0, 0.0], [10.0, 1.0]) == pytest.approx(10 * np.log10(101))
    assert sqnr_db([1.0], [1.0]) == np.inf


def test_shapes_must_agree():
    with pytest.raises(ValueError, match="shapes differ"):
        relative_error(np.zeros((2, 3)), np.zeros((3, 2)))


def test_mean_pool_sees_only_what_the_mask_keeps():
    hidden = np.array([[[1.0, 2], [3, 4], [np.nan, np.inf]], [[5, 6], [7, 8], [9, 10]]])
    mask = np.array([[1, 1, 0], [0, 0, 0]])
    assert np.array_equal(mean_pool(hidden, mask), [[2, 3], [0, 0]])


def test_normalize_and_cosine():
    assert np.allclose(normalize([[3.0, 4], [0, 0]]), [[0.6, 0.8], [0, 0]])
    assert np.allclose(cosine([[1.0, 0], [1, 1], [0, 0]], [[0.0, 2], [3, 3], [1, 1]]), [0, 1, 0])


def test_mean_pooled_cosine():
    hidden = np.array([[[1.0, 0], [1, 0]], [[0, 1], [9, 9]]])
    other = np.array([[[0.0, 1], [2, 1]], [[0, 3], [0, 0]]])  # pooled (1, 1) and (0, 3)
    assert mean_pooled_cosine(hidden, other, [[1, 1], [1, 0]]) == pytest.approx((np.sqrt(0.5) + 1) / 2)
