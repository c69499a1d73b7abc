"""Layers to try calibrated solvers on: inputs with their second moments, weights, and what is no moment."""

from __future__ import annotations

import numpy as np
import pytest


def inputs(K: int, tokens: int = 2000, seed: int = 0) -> np.ndarray:
    """x [tokens, K] as layers see it: correlated, of unequal power, with a mean."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((tokens, K)) @ (np.eye(K) + rng.standard_normal((K, K)) / np.sqrt(K))
    return x * np.exp(rng.standard_normal(K) / 2) + 0.3 * rng.standard_normal(K)


def moment(x: np.ndarray) -> np.ndarray:
    H = x.T @ x / len(x)
    return (H + H.T) / 2


def weight(K: int, N: int, seed: int = 1) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal((K, N)) * 0.05).astype(np.float32)


def broken(change: str) -> np.ndarray:
    H = moment(inputs(32))
    if change == "asymmetric":
        H[3, 5] *= 1.5
    elif change == "negative":
        H[3, 3] = -1
    elif change == "hollow":
        np.fill_diagonal(H, 0)
    elif change == "indefinite":
        H[3, 5] = H[5, 3] = 1000
    elif change == "float32":
        H = H.astype(np.float32)
    elif change == "shape":
        H = H[:31, :31].copy()
    else:
        H[3, 5] = H[5, 3] = float(change)
    return H


every_broken = pytest.mark.parametrize(
    ("change", "message"),
    [
        ("nan", r"layer7.*holds nan at \[3, 5\]"),
        ("inf", r"layer7.*holds inf at \[3, 5\]"),
        ("asymmetric", "layer7.*not symmetric"),
        ("negative", "layer7.*negative diagonal"),
        ("hollow", "layer7.*nothing on it"),
        ("indefinite", "layer7.*not positive semidefinite"),
        ("float32", r"layer7.*float32 \[32, 32\], not float64 \[32, 32\]"),
        ("shape", r"layer7.*float64 \[31, 31\], not float64 \[32, 32\]"),
    ],
)
