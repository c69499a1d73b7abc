"""Orders of a layer's inputs in which quantization blocks cost less: which rows of W [K, N] share a scale.

    W[order] is quantized in place of W, and the layer reads x[:, order]

An order is a permutation of 0..K-1 (intp [K]): what stands at place k from then on was row order[k]. Blocks
are runs of `block` rows, of which the last may be shorter.

* `similarity_order` is PT2-LLM's structural similarity reordering (SSR, arXiv 2510.03267): rows by cosine.
* `direction_order`, `magnitude_order` and `fitted_order` are ours: what sets rows apart in a real model is
  one direction, or their size. benchmarks/reorder_output_error.py measures them all.

`choose_order` takes the one that leaves least error in all layers that have to share an order. All of it goes
by weights alone, is deterministic, and does not depend on threads: products are BLAS's, on one of them
(`hessian.one_blas_thread`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qgraph.errors import UsageError
from qgraph.formats import FORMATS, BlockFormat
from qgraph.formats.group import GROUP_FORMATS
from qgraph.solvers import get_solver, group_grid, itf
from qgraph.solvers._tiles import check_weight, map_ordered
from qgraph.solvers.group_grid import Grid
from qgraph.solvers.hessian import one_blas_thread

Array = npt.NDArray[np.float32]
Order = npt.NDArray[np.intp]

COLUMNS = 512  # of all layers that share an order; what an order costs them is told by a sample of these
_LEAST_COLUMNS = 16  # of one layer
ROUNDS = 6  # of fitted_order
KINDS = ("similarity", "direction", "magnitude", "fitted")  # of orders that choose_order tries


@dataclass(frozen=True, eq=False)
class Layer:
    """A weight some of whose rows are to be ordered, in units of one or many."""

    W: Array  # [K, N]
    format: str
    rows: Order  # [outer, n, inner], each once: unit u is rows[:, u], and trades places with whole units only
    name: str = ""  # for messages

    @property
    def moves(self) -> bool:
        """Whether an order can change what shares a block: not where units are made of whole blocks, nor
        where all that trade places are in one."""
        block = FORMATS[self.format].block
        blocks = self.rows // block
        whole = self.rows.shape[2] % block == 0 and bool((self.rows[:, :, 0] % block == 0).all())
        return not whole and bool((blocks != blocks[:, :1, :1]).any())

    def index(self, order: Order) -> Order:
        """[K]: W[index] has the units in this order."""
        index = np.arange(len(self.W))
        index[self.rows] = self.rows[:, order]
        return index


@dataclass(frozen=True, eq=False)
class Choice:
    """An order, and the mean relative weight error of the layers without and with it."""

    name: str  # empty: as it is
    order: Order
    before: float
    after: float

    @property
    def gain(self) -> float:
        """The share of the error that is gone."""
        return 1 - self.after / self.before if self.before else 0.0


def plain(W: Array, format: str, name: str = "") -> Layer:
    """A layer whose rows are units by themselves."""
    return Layer(W, format, np.arange(len(W))[None, :, None], name)


def choose_order(
    layers: Sequence[Layer], threads: int | None = None, kinds: Collection[str] = KINDS
) -> Choice:
    """The best order of the units that these layers have in common.

    Tried are the three orders above, or those of `kinds`; and from the best of them, where all layers have
    one group format and no units, `fitted_order`. They are made from, and judged on, a sample of each
    layer's columns (others, where there are enough), by what the best solver without calibration leaves.

    Where no order can change what shares a block the choice is none, its errors 0. InputError naming a weight
    that is not finite, or too large for its format.
    """
    for layer in layers:
        check = group_grid.check_group_weight if _is_group(layer.format) else check_weight
        check(layer.W, layer.name)
    n = layers[0].rows.shape[1]
    if any(layer.rows.shape[1] != n for layer in layers):
        raise UsageError("layers that share an order need equally many units")
    count = max(_LEAST_COLUMNS, COLUMNS // len(layers))
    none = np.arange(n)
    if not any(layer.moves for layer in layers):
        return Choice("", none, 0.0, 0.0)
    samples = [_sample(layer, count, 0.0) for layer in layers]
    judged = [_sample(layer, count, 0.5) for layer in layers]
    parts = [_features(layer) for layer in samples]
    parts = [part / size for part in parts if (size := float(np.linalg.norm(part))) > 0]
    before = _mean_error(judged, none, threads)
    best = Choice("", none, before, before)
    if not parts or not before:
        return best
    features = np.concatenate(parts, axis=1) * np.float32(np.sqrt(parts[0].size))
    for name, order in _orders(kinds, features, parts, min(_units(layer) for layer in layers)):
        best = min(best, Choice(name, order, before, _mean_error(judged, order, threads)), key=_after)
    if "fitted" in kinds and (format := _common_format(layers)) is not None:
        order = fitted_order(features, format, best.order, threads=threads)
        name = f"{best.name}, fitted" if best.name else "fitted"
        best = min(best, Choice(name, order, before, _mean_error(judged, order, threads)), key=_after)
    return best


def similarity_order(W: Array, block: int) -> Order:
    """PT2-LLM's SSR: blocks of rows that point the same way. W: float32 [K, N].

    The seed of a block is the row that is most alike to all that are left, by the sum of cosines; its
    `block - 1` nearest, by S_ij = cos(w_i, w_j), join it. Only one row of S is held at a time: O(K N) memory.
    The paper gives the greedy clusters; the choice of the seed is ours.
    """
    _check(W, block)
    norms = np.linalg.norm(W, axis=1, keepdims=True)
    X = W / np.where(norms > 0, norms, 1)
    left, order = np.arange(len(W)), []
    with one_blas_thread():
        while len(left) > block:
            unit = X[left]
            near = unit @ unit[(unit @ unit.sum(axis=0)).argmax()]
            nearest = np.argsort(-near, kind="stable")[:block]
            order.append(left[nearest])
            left = np.delete(left, nearest)
    return np.concatenate([*order, left])


def direction_order(W: Array) -> Order:
    """By the coordinate along the direction in which rows differ most: W float32 [K, N].

    Sorting by the first left singular vector of W less its mean row is the relaxed optimum of splitting rows
    into blocks of least variance, as in spectral clustering, and leaves no last block of leftovers.
    """
    _check(W, 1)
    X = W.astype(np.float64)
    X -= X.mean(axis=0)
    with one_blas_thread():
        if X.shape[0] <= X.shape[1]:
            coordinate = np.linalg.eigh(X @ X.T)[1][:, -1]
        else:
            coordinate = X @ np.linalg.eigh(X.T @ X)[1][:, -1]
    if coordinate[np.abs(coordinate).argmax()] < 0:  # an eigenvector's sign is nobody's choice
        coordinate = -coordinate
    return np.argsort(-coordinate, kind="stable")


def magnitude_order(parts: Sequence[Array]) -> Order:
    """By size: rows that are large in the same ones of the weights `parts`, each [K, N], share their blocks.

    `direction_order` of the logarithms of all row norms [K, parts]; of one weight, by falling norm.
    """
    squares = np.stack([np.square(part, dtype=np.float64).sum(axis=1) for part in parts], axis=1)
    return direction_order(np.log(squares + 1e-12 * squares.mean(axis=0)).astype(np.float32))


def power_order(power: npt.NDArray) -> Order:
    """By falling power of the inputs, diag(H) [K]: GPTQ's activation order, across blocks.

    For comparison: needs data, and does no better than the orders by weights.
    """
    return np.argsort(-np.asarray(power, np.float64), kind="stable")


def fitted_order(
    W: Array, format: str, start: Order, *, rounds: int = ROUNDS, threads: int | None = None
) -> Order:
    """Lowers the weight error itself from an order to begin with: W float32 [K, N].

    Balanced Lloyd iterations in which a block is its grids, not a centre: fit scale and offset of every block
    and column (`itf`), then exchange rows between blocks wherever each leaves less error on the other's
    grids. No step raises the error. Inside a block, rows keep the order that they have in W.

    O(K^2 N / block) a round; K x (K / block) float64 of memory, and copies of W. UsageError for a format
    without such grids.
    """
    spec = FORMATS[format]
    if spec not in GROUP_FORMATS:
        raise UsageError(f"inputs cannot be fitted to the grids of {format}: it is no group format")
    _check(W, spec.block)
    sizes = np.diff([*range(0, len(W), spec.block), len(W)])
    label = np.empty(len(W), np.intp)
    label[start] = np.repeat(np.arange(len(sizes)), sizes)
    grids = [group_grid.initial(spec, W[label == b])[0] for b in range(len(sizes))]

    def fit(b: int) -> tuple[Grid, npt.NDArray[np.float64]]:
        # From the grid of the round before: so no error rises.
        grid = itf.converge(spec, W[label == b], grids[b])
        return grid, _errors(spec, W, grid)

    for _ in range(rounds):
        grids, columns = map(list, zip(*map_ordered(fit, range(len(sizes)), threads), strict=True))
        if not _exchange(np.stack(columns, axis=1), label):
            break
    return np.argsort(label, kind="stable")


def _errors(spec: BlockFormat, W: Array, grid: Grid) -> npt.NDArray[np.float64]:
    """[K]: the squared error of each row on the grids of one block."""
    back = group_grid.values(spec, group_grid.nearest(spec, W, grid), grid)
    np.subtract(W, back, out=back)
    return np.square(back, out=back).sum(axis=1, dtype=np.float64)


def _exchange(cost: npt.NDArray[np.float64], label: Order) -> bool:
    """Exchanges rows between each pair of blocks where that lowers the sum of cost [K, blocks]. Changes
    `label` [K]; whether it did."""
    changed = False
    for a in range(cost.shape[1]):
        for b in range(a + 1, cost.shape[1]):
            ours, theirs = np.flatnonzero(label == a), np.flatnonzero(label == b)
            gain_ours, gain_theirs = cost[ours, a] - cost[ours, b], cost[theirs, b] - cost[theirs, a]
            first, second = np.argsort(-gain_ours, kind="stable"), np.argsort(-gain_theirs, kind="stable")
            n = min(len(ours), len(theirs))
            # The best partner of the best is the best: gains fall along both lists.
            count = int((gain_ours[first[:n]] + gain_theirs[second[:n]] > 0).sum())
            label[ours[first[:count]]], label[theirs[second[:count]]] = b, a
            changed |= count > 0
    return changed


def _orders(
    kinds: Collection[str], features: Array, parts: Sequence[Array], block: int
) -> Iterator[tuple[str, Order]]:
    """Those of `kinds`, but `fitted`."""
    if "similarity" in kinds:
        yield "similarity", similarity_order(features, block)
    if "direction" in kinds:
        yield "direction", direction_order(features)
    if "magnitude" in kinds:
        yield "magnitude", magnitude_order(parts)


def _after(choice: Choice) -> float:
    return choice.after


def _sample(layer: Layer, count: int, phase: float) -> Layer:
    """The layer with at most so many of its columns, evenly spread; other ones at another phase in [0, 1),
    where there are twice as many."""
    N = layer.W.shape[1]
    count = min(count, N)
    columns = ((np.arange(count) + phase) * N / count).astype(np.intp)
    return Layer(np.ascontiguousarray(layer.W[:, columns]), layer.format, layer.rows)


def _features(layer: Layer) -> Array:
    """[n, ..]: the weights of each unit."""
    return layer.W[layer.rows].swapaxes(0, 1).reshape(layer.rows.shape[1], -1)


def _units(layer: Layer) -> int:
    """How many units a block holds, one at least."""
    return max(1, FORMATS[layer.format].block // layer.rows.shape[2])


def _common_format(layers: Sequence[Layer]) -> str | None:
    """The format to fit grids to; None where there is no single one."""
    formats = {layer.format for layer in layers}
    single = all(layer.rows.shape == (1, len(layer.W), 1) for layer in layers)
    return next(iter(formats)) if single and len(formats) == 1 and _is_group(layers[0].format) else None


def _is_group(format: str) -> bool:
    return FORMATS[format] in GROUP_FORMATS


def _mean_error(layers: Sequence[Layer], order: Order, threads: int | None) -> float:
    """The mean over layers of |W - W'|^2 / |W|^2."""
    return float(np.mean([_error(layer, order, threads) for layer in layers]))


def _error(layer: Layer, order: Order, threads: int | None) -> float:
    W = layer.W[layer.index(order)]
    solver = get_solver("itf" if _is_group(layer.format) else "sweep")
    back = solver(W, format=layer.format, threads=threads).dequantize()
    signal = np.square(W, dtype=np.float64).sum()
    return float(np.square(W - back, dtype=np.float64).sum() / signal) if signal else 0.0


def _check(W: Array, block: int) -> None:
    if W.ndim != 2 or W.size == 0 or block < 1:
        raise UsageError(f"an order of blocks of {block} for {list(W.shape)}: expected [K, N], not empty")
