"""Orders of inputs: SSR against a naive reference, planted structure found, errors that only fall."""

from __future__ import annotations

import numpy as np
import pytest

from qgraph.errors import InputError, UsageError
from qgraph.formats import FORMATS
from qgraph.solvers import get_solver
from qgraph.solvers.reorder import (
    Layer,
    choose_order,
    direction_order,
    fitted_order,
    magnitude_order,
    plain,
    similarity_order,
)

BLOCK = FORMATS["ternary"].block


def normal(K: int, N: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((K, N)).astype(np.float32)


def error(W: np.ndarray, format: str = "ternary") -> float:
    back = get_solver("itf")(W, format=format).dequantize()
    return float(np.square(W - back).sum() / np.square(W).sum())


def planted(kind: str, K: int = 512, N: int = 96) -> tuple[np.ndarray, np.ndarray]:
    """Rows of four kinds, shuffled, and which kind each is: scales, or points around which they lie."""
    rng = np.random.default_rng(1)
    label = np.repeat(np.arange(4), K // 4)
    W = normal(K, N)
    if kind == "scales":
        W *= 4.0 ** label[:, None]
    else:
        W += 2 * np.outer(label - 1.5, rng.standard_normal(N))
    shuffled = rng.permutation(K)
    return W[shuffled].astype(np.float32), label[shuffled]


def naive_similarity(W: np.ndarray, block: int) -> list[int]:
    """The docstring of `similarity_order`, word for word, on the whole matrix S."""
    W = W.astype(np.float64)
    S = W @ W.T / np.outer(np.linalg.norm(W, axis=1), np.linalg.norm(W, axis=1))
    left, order = list(range(len(W))), []
    while len(left) > block:
        seed = max(left, key=lambda i: sum(S[i, j] for j in left))
        members = sorted(left, key=lambda i: -S[seed, i])[:block]
        order += members
        left = [i for i in left if i not in members]
    return order + left


@pytest.mark.parametrize("K", [7, 40, 64])
def test_similarity_against_a_naive_reference(K: int):
    W = normal(K, 12)
    np.testing.assert_array_equal(similarity_order(W, 16), naive_similarity(W, 16))


@pytest.mark.parametrize("K", [96, 172, 200, 256, 300])
def test_every_order_is_a_permutation_and_repeats(K: int):
    W = normal(K, 24)
    W[5] = 0
    start = np.arange(K)
    for make in (
        lambda: similarity_order(W, BLOCK),
        lambda: direction_order(W),
        lambda: magnitude_order([W, W[:, :3]]),
        lambda: fitted_order(W, "ternary", start, threads=1),
        lambda: choose_order([plain(W, "ternary")], threads=1).order,
    ):
        order = make()
        assert sorted(order) == list(range(K))
        np.testing.assert_array_equal(order, make())
    np.testing.assert_array_equal(
        fitted_order(W, "ternary", start, threads=1), fitted_order(W, "ternary", start, threads=3)
    )


@pytest.mark.parametrize("kind", ["scales", "points"])
def test_planted_kinds_are_found(kind: str):
    W, label = planted(kind)
    choice = choose_order([plain(W, "ternary")])
    blocks = label[choice.order].reshape(4, BLOCK)
    assert (blocks == blocks[:, :1]).all()  # each block is of one kind
    assert choice.after < 0.9 * choice.before
    assert error(W[choice.order]) == pytest.approx(choice.after, rel=0.01)
    assert error(W) == pytest.approx(choice.before, rel=0.01)


def test_what_each_order_is_for():
    scales, kinds = planted("scales")
    np.testing.assert_array_equal(kinds[magnitude_order([scales])].reshape(4, -1)[:, 0], [3, 2, 1, 0])
    points, kinds = planted("points")
    found = kinds[direction_order(points)].reshape(4, -1)[:, 0].tolist()
    assert found in ([0, 1, 2, 3], [3, 2, 1, 0])


@pytest.mark.parametrize("format", ["ternary", "int2", "int4", "int4-sym"])
def test_fitting_lowers_the_error_from_any_start(format: str):
    W = normal(300, 16) * np.exp(normal(300, 1, 2))
    for start in (np.arange(300), np.random.default_rng(0).permutation(300)):
        order = fitted_order(W, format, start)
        assert error(W[order], format) < 0.97 * error(W[start], format)


def test_rows_that_stay_together_do():
    """Units of 8 rows: the same rows stand in a row, in their order, and the best order of units is found."""
    W = normal(512, 32) * 4.0 ** np.random.default_rng(0).integers(0, 4, 64).repeat(8)[:, None]
    W = W.astype(np.float32)
    layer = Layer(W, "ternary", np.arange(512).reshape(1, 64, 8))
    choice = choose_order([layer])
    index = layer.index(choice.order)
    assert (np.diff(index.reshape(64, 8), axis=1) == 1).all()
    assert choice.gain > 0.05 and error(W[index]) == pytest.approx(choice.after, rel=1e-6)


def test_units_in_several_places_move_alike():
    rows = np.concatenate([np.arange(0, 128), np.arange(256, 384)]).reshape(2, 128, 1)
    layer = Layer(normal(384, 4), "ternary", rows)
    order = np.random.default_rng(0).permutation(128)
    index = layer.index(order)
    np.testing.assert_array_equal(index[:128], order)
    np.testing.assert_array_equal(index[128:256], np.arange(128, 256))
    np.testing.assert_array_equal(index[256:], order + 256)


def test_what_moves():
    W = normal(256, 4)
    assert plain(W, "ternary").moves and not plain(W[:128], "ternary").moves
    heads = np.arange(256)
    assert Layer(W, "ternary", heads.reshape(1, 8, 32)).moves  # whole heads of 32
    assert not Layer(W, "ternary", heads.reshape(8, 32, 1)).moves  # the channels inside of them
    assert not Layer(W, "ternary", heads.reshape(1, 2, 128)).moves  # heads that are blocks
    assert Layer(W[:240], "ternary", heads[:240].reshape(3, 80, 1)).moves  # heads that straddle blocks


def test_layers_share_an_order_that_serves_them_all():
    W, label = planted("points")
    layers = [plain(W, "ternary"), plain(W[:, ::-1].copy(), "ternary"), plain(normal(512, 64), "ternary")]
    choice = choose_order(layers)
    blocks = label[choice.order].reshape(4, BLOCK)
    assert (blocks == blocks[:, :1]).all()
    errors = [error(layer.W[choice.order]) for layer in layers]
    assert choice.after == pytest.approx(float(np.mean(errors)), rel=0.02)
    with pytest.raises(UsageError, match="equally many"):
        choose_order([plain(W, "ternary"), plain(W[:256], "ternary")])


def test_noise_has_no_order():
    """What looks better on the columns that made it does not on others."""
    choice = choose_order([plain(normal(512, 2048), "ternary")])
    assert choice.gain < 0.005


def test_zero_and_broken_weights():
    zero = np.zeros((256, 8), np.float32)
    assert choose_order([plain(zero[:100], "ternary")]).gain == 0
    choice = choose_order([plain(zero, "ternary")])
    assert choice.gain == 0 and (choice.order == np.arange(256)).all()
    zero[3, 4] = np.nan
    with pytest.raises(InputError, match=r"'w' holds 1 values that are not finite"):
        choose_order([plain(zero, "ternary", "w")])
    with pytest.raises(UsageError, match="nvfp4"):
        fitted_order(normal(64, 4), "nvfp4", np.arange(64))


def test_formats_without_groups_are_ordered_too():
    W = normal(256, 32) * 16.0 ** np.random.default_rng(0).integers(0, 2, 256)[:, None]
    choice = choose_order([plain(W.astype(np.float32), "nvfp4")])
    assert choice.name and choice.gain > 0.01
