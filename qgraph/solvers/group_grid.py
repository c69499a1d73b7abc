"""The grid of a block of integer or ternary weights: what its scale and offset may be, and which is best.

Everything here is about one block of rows, for n columns at once: W [b, n], with a `Grid` of n scales and
offsets, w' = v s + o for a level v of the format. That is a single formula for all three kinds of offset, and
in float32 it has the very bits of `QTensor.dequantize`: with a zero point z, o = -z s, and both (v - z) s and
v s - z s are exact (11 bits times 8).

With the levels t of a block fixed, its error (w - s t - o 1)^T M (w - s t - o 1) is a quadratic in s and o
that five sums (`Moments`) describe, for M = I as in PT2-LLM's ITF, for a diagonal M, and for M = H as in its
AGA (arXiv 2510.03267); `improve` finds its minimum among what can be stored. The sums are those of the
residual that the present grid leaves, not of w: nothing cancels, however close the grid is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from qgraph.formats import BlockFormat, QTensor, group
from qgraph.solvers._tiles import Tile, check_weight, map_ordered, tiles

Array = npt.NDArray[np.float32]
Double = npt.NDArray[np.float64]
Codes = npt.NDArray[np.uint8]

_ELEMENTS_PER_TILE = 1 << 16  # a few float32 arrays of it fit a core's cache
_SINGULAR = 1e-6  # share of the product of its diagonal below which a 2x2 determinant is noise
_TERNARY_THRESHOLD = np.float32(0.75)


class Grid(NamedTuple):
    """w' = v scale + offset, float32 [n] each, exactly as they are stored.

    scale: positive, a float16. offset: what is added; a float16 (`mean`), -z scale with z one of the format's
    levels (`zero_point`), or 0 (`none`).
    """

    scale: Array
    offset: Array


class Moments(NamedTuple):
    """Sums over a block that give the change of its error when its grid changes: float64 [n] each.

    With t the levels, r = w - (s t + o 1) what the present grid leaves, and M the weights of the errors.
    """

    tt: Double  # t^T M t
    t1: Double  # t^T M 1
    n: Double  # 1^T M 1
    rt: Double  # r^T M t
    r1: Double  # r^T M 1

    def change(self, ds: Double, do: Double) -> Double:
        """Of the error, when scale and offset change by so much: float64 [n]."""
        quadratic = ds * ds * self.tt + 2 * ds * do * self.t1 + do * do * self.n
        return quadratic - 2 * (ds * self.rt + do * self.r1)


def check_group_weight(W: Array, name: str) -> None:
    """InputError naming a weight that is not float32 [K, N], empty, not finite, or beyond float16."""
    check_weight(W, name, group.LARGEST, "scales and means in float16")


def project(spec: BlockFormat, scale: npt.NDArray, offset: npt.NDArray) -> Grid:
    """The nearest grid that can be stored: of any float [n], finite. The scale's sign is dropped."""
    s = np.abs(scale)
    stored = _float16_scale(s)
    if spec.offset == "zero_point":
        z = np.rint(-np.asarray(offset, np.float64) / np.maximum(s, group.SMALLEST_SCALE))
        z = np.clip(z, spec.values[0], spec.values[-1])
        return Grid(stored, _offset_of(z, stored))
    return Grid(stored, _float16(offset) if spec.offset == "mean" else np.zeros_like(stored))


def initial(spec: BlockFormat, W: Array) -> tuple[Grid, Codes]:
    """Grid and codes from a block's extremes alone, see `group_rtn`. W: float32 [b, n]."""
    if spec is group.TERNARY:
        return _initial_ternary(spec, W)
    low, high = W.min(axis=0), W.max(axis=0)
    steps = np.float32(len(spec.values) - 1)
    if spec.offset == "none":
        scale, offset = np.maximum(-low, high) / spec.values[-1], np.zeros_like(low)
    elif spec.offset == "zero_point":  # 0 is a level: the range must reach it
        low, high = np.minimum(low, 0), np.maximum(high, 0)
        scale, offset = high / steps - low / steps, low
    else:
        scale, offset = high / steps - low / steps, low - spec.values[0] * (high / steps - low / steps)
    grid = project(spec, np.where(scale > 0, scale, np.float32(1)), offset)
    return grid, nearest(spec, W, grid)


def _initial_ternary(spec: BlockFormat, W: Array) -> tuple[Grid, Codes]:
    mean = W.mean(axis=0, dtype=np.float64).astype(np.float32)
    v = W - mean
    size = np.abs(v)
    chosen = size > _TERNARY_THRESHOLD * size.mean(axis=0)
    count = chosen.sum(axis=0)
    alpha = (size * chosen).sum(axis=0) / np.maximum(count, 1)
    chosen &= alpha > group.SMALLEST_SCALE / 2  # what is nearer to none stays at mu
    grid = project(spec, np.where(count > 0, alpha, np.float32(1)), mean)
    return grid, (chosen * np.sign(v) - spec.values[0]).astype(np.uint8)


def nearest(spec: BlockFormat, W: Array, grid: Grid) -> Codes:
    """Codes uint8 [b, n] of the levels nearest to W; ties go to the even level, what is outside to the end.

    To float32 accuracy: (w - o) / s is rounded before it is compared.
    """
    v = (W - grid.offset) / grid.scale
    np.rint(v, out=v)
    v -= spec.values[0]
    return np.clip(v, 0, len(spec.values) - 1, out=v).astype(np.uint8)


def values(spec: BlockFormat, codes: Codes, grid: Grid) -> Array:
    """float32 [b, n] of codes [b, n]: bit for bit what `QTensor.dequantize` gives."""
    W = spec.values[codes]
    W *= grid.scale
    W += grid.offset
    return W


def fit(spec: BlockFormat, W: Array, codes: Codes, kept: Grid, power: npt.NDArray | None = None) -> Grid:
    """The grid of least sum_k power_k (w_k - w'_k)^2 with these codes; `kept` in columns where it is no
    worse.

    W float32 and codes [b, n]; power [b], not negative, by default 1. Columns whose levels are all alike have
    no best scale, and get at most another mean.
    """
    t = spec.values[codes].astype(np.float64)
    r = W.astype(np.float64) - values(spec, codes, kept)
    m = (np.ones(len(W)) if power is None else np.asarray(power, np.float64))[:, None]
    tm = t * m
    n = np.broadcast_to(m.sum(), t.shape[1:])
    return improve(spec, kept, Moments((tm * t).sum(0), tm.sum(0), n, (tm * r).sum(0), (m * r).sum(0)))


def fit_hessian(spec: BlockFormat, W: npt.NDArray, codes: Codes, kept: Grid, H: Double) -> Grid:
    """AGA: the grid of least (w - w')^T H (w - w') with these codes; `kept` where it is no worse.

    The 2x2 system [[t'Ht, t'H1], [1'Ht, 1'H1]] (alpha, mu) = (t'Hw, 1'Hw) of PT2-LLM (arXiv 2510.03267), and
    likewise for the other kinds of offset. `kept` also where that system is singular to working accuracy, or
    the best scale is not positive. W [b, n], codes [b, n], H float64 [b, b].
    """
    return improve(spec, kept, hessian_moments(spec, W, codes, kept, H))


def hessian_moments(spec: BlockFormat, W: npt.NDArray, codes: Codes, grid: Grid, H: Double) -> Moments:
    """`Moments` for M = H, float64 [b, b]; its products are BLAS's (see `hessian.one_blas_thread`)."""
    t = spec.values[codes].astype(np.float64)
    r = W.astype(np.float64) - values(spec, codes, grid)
    h1 = H.sum(axis=1)
    ht = H @ t
    n = np.broadcast_to(h1.sum(), t.shape[1:])
    return Moments((t * ht).sum(0), h1 @ t, n, (r * ht).sum(0), h1 @ r)


def improve(spec: BlockFormat, kept: Grid, m: Moments) -> Grid:
    """The best grid that can be stored at unchanged codes, `kept` in columns where it is no better.

    The `optimum`, its scale rounded first; a mean is the best for what the scale became, then rounded.
    """
    s, o = optimum(spec, kept, m)
    scale = _float16_scale(s)
    offset = kept.offset
    if spec.offset == "mean":
        offset = _float16(o + _divide((s - scale) * m.t1, m.n, m.n > 0))
    elif spec.offset == "zero_point":
        offset = _offset_of(np.rint(-o / s), scale)
    better = (
        m.change(
            np.subtract(scale, kept.scale, dtype=np.float64),
            np.subtract(offset, kept.offset, dtype=np.float64),
        )
        < 0
    )
    return Grid(np.where(better, scale, kept.scale), np.where(better, offset, kept.offset))


def optimum(spec: BlockFormat, kept: Grid, m: Moments) -> tuple[Double, Double]:
    """(scale, offset) float64 [n] of least error at unchanged codes, before they are rounded to be stored.

    With a zero point, all are tried, each with its best scale. Where the sums leave the scale open, or its
    best is not positive, it is `kept`'s, and the mean the best for that.
    """
    s, o = kept.scale.astype(np.float64), kept.offset.astype(np.float64)
    if spec.offset == "none":
        best = s + _divide(m.rt, m.tt, m.tt > 0)
        return np.where(best > 0, best, s), o
    if spec.offset == "mean":
        det = m.n * m.tt - m.t1 * m.t1
        best = s + _divide(m.n * m.rt - m.t1 * m.r1, det, det > _SINGULAR * m.n * m.tt)
        best = np.where(best > 0, best, s)
        return best, o + _divide(m.r1 - (best - s) * m.t1, m.n, m.n > 0)
    z = spec.values.astype(np.float64)[:, None]
    wt, w1 = m.rt + s * m.tt + o * m.t1, m.r1 + s * m.t1 + o * m.n
    top, bottom = wt - z * w1, m.tt - 2 * z * m.t1 + z * z * m.n
    scales = _divide(top, bottom, (top > 0) & (bottom > _SINGULAR * (m.tt + z * z * m.n)))
    choice = (scales * top).argmax(axis=0)
    best = np.take_along_axis(scales, choice[None], axis=0)[0]
    return np.where(best > 0, best, s), np.where(best > 0, -z[choice, 0] * best, o)


def assemble(spec: BlockFormat, codes: Codes, scale: Array, offset: Array) -> QTensor:
    """The QTensor of codes [K, N] and the scales and offsets of all its grids, float32 [ceil(K / block), N].

    A block that is zero gets the scale 1.
    """
    K, N = codes.shape
    starts = np.arange(0, K, spec.block)
    low, high = (f.reduceat(codes, starts, axis=0) for f in (np.minimum, np.maximum))
    zero = (low == high) & (spec.values[low] * scale + offset == 0)
    block_offset = None
    if spec.offset == "mean":
        # The lowest level of int2 and int3, the middle one of ternary, is 0: no code needs to change.
        block_offset = offset.astype(np.float16)
        zero &= offset == 0
    elif spec.offset == "zero_point":
        block_offset = (np.rint(-offset / scale) - spec.values[0]).astype(np.uint8)
    block_scale = np.where(zero, np.float32(1), scale).astype(spec.scale_dtype)
    return QTensor(spec.name, (K, N), codes, block_scale, block_offset=block_offset)


def solve_blocks(
    spec: BlockFormat, W: Array, work: Callable[[Array], tuple[Grid, Codes]], threads: int | None
) -> QTensor:
    """The QTensor of W [K, N], each of whose blocks is a column of what `work` gets: float32 [b, n], its own.

    b is the block size, or less in a shorter last block of K.
    """
    K, N = W.shape
    codes = np.empty((K, N), np.uint8)
    scale, offset = (np.empty((spec.blocks(K), N), np.float32) for _ in range(2))

    def store(tile: Tile) -> None:
        part = W[tile.rows, tile.columns]
        rows, width = min(spec.block, len(part)), part.shape[1]
        blocks = part.reshape(-1, rows, width).transpose(1, 0, 2)
        grid, found = work(np.ascontiguousarray(blocks.reshape(rows, -1)))
        at = tile.blocks, tile.columns
        scale[at], offset[at] = (array.reshape(-1, width) for array in grid)
        codes[tile.rows, tile.columns] = found.reshape(rows, -1, width).transpose(1, 0, 2).reshape(part.shape)

    map_ordered(store, tiles(K, N, spec.block, _ELEMENTS_PER_TILE // spec.block), threads)
    return assemble(spec, codes, scale, offset)


def _divide(a: Double, b: Double, where: npt.NDArray[np.bool_]) -> Double:
    """a / b, and 0 where `where` is not."""
    return np.divide(a, b, out=np.zeros(np.broadcast(a, b).shape), where=where)


def _float16(x: npt.NDArray) -> Array:
    """The nearest finite float16, as float32."""
    return np.clip(x, -group.LARGEST, group.LARGEST).astype(np.float16).astype(np.float32)


def _float16_scale(x: npt.NDArray) -> Array:
    """The nearest positive finite float16, as float32."""
    return np.clip(x, group.SMALLEST_SCALE, group.LARGEST).astype(np.float16).astype(np.float32)


def _offset_of(z: npt.NDArray, scale: Array) -> Array:
    """What the zero point at level z adds: -z s, exact in float32."""
    return (0 - z.astype(np.float32)) * scale
