"""How near two results are. All sums in float64."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def relative_error(got: npt.ArrayLike, wanted: npt.ArrayLike) -> float:
    """|got - wanted| / |wanted| in Frobenius norms: 0 where both are zero, infinite where only `wanted` is.

    Raises ValueError when the shapes differ. NaN or infinity in either gives NaN or infinity.
    """
    a, b = _pair(got, wanted)
    difference, norm = np.linalg.norm(a - b), np.linalg.norm(b)
    if norm == 0:
        return 0.0 if difference == 0 else float("inf")
    return float(difference / norm)


def sqnr_db(got: npt.ArrayLike, wanted: npt.ArrayLike) -> float:
    """Signal to quantization noise in dB, 10 log10(|wanted|^2 / |got - wanted|^2); infinite when equal."""
    error = relative_error(got, wanted)
    return float("inf") if error == 0 else -20 * float(np.log10(error))


def mean_pool(hidden: npt.ArrayLike, mask: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """The mean of the hidden states of the tokens that the mask keeps.

    hidden: [batch, sequence, hidden]; mask: [batch, sequence], nonzero for tokens. Returns [batch, hidden]; a
    row without tokens is zero. Hidden states that are masked out do not matter, not even if they are NaN.
    """
    kept = np.asarray(mask) != 0
    states = np.where(kept[..., None], np.asarray(hidden, np.float64), 0)
    return states.sum(axis=1) / np.maximum(kept.sum(axis=1), 1)[:, None]


def normalize(vectors: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Each row scaled to length 1; a zero row stays zero."""
    x = np.asarray(vectors, np.float64)
    norm = np.linalg.norm(x, axis=-1, keepdims=True)
    return np.divide(x, norm, out=np.zeros_like(x), where=norm != 0)


def cosine(a: npt.ArrayLike, b: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Cosine of the angle between the rows of a and those of b: [rows, dims] twice -> [rows]."""
    x, y = _pair(a, b)
    return (normalize(x) * normalize(y)).sum(axis=-1)


def mean_pooled_cosine(got: npt.ArrayLike, wanted: npt.ArrayLike, mask: npt.ArrayLike) -> float:
    """Mean over the batch of the cosine of two runs' mean-pooled states [batch, sequence, hidden]."""
    return float(cosine(mean_pool(got, mask), mean_pool(wanted, mask)).mean())


def _pair(a: npt.ArrayLike, b: npt.ArrayLike) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    x, y = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if x.shape != y.shape:
        raise ValueError(f"shapes differ: {list(x.shape)} and {list(y.shape)}")
    return x, y
