"""Running sums over the inputs of linear layers: what of them is left are `Statistics`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Executor
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from qgraph.errors import InputError
from qgraph.solvers.statistics import Statistics

ROWS = 1024  # of one float32 product; the products are added in float64
PANEL = 128  # rows of the second moment that one task works on

Rows = npt.NDArray[np.float32]


class Moments:
    """Takes in rows of x, and of x_float where these differ, and gives their `Statistics`.

    Rows are gathered to blocks of `ROWS`, so that the result depends on the sequence of all rows, not on how
    it is cut into batches, nor on how many threads do the sums: each element is a float64 sum of float32
    products of whole blocks, added in the order of the rows. Of the second moment only the upper triangle is
    computed. Memory: `nbytes` while it runs, plus the blocks that wait.

    name: of the values, for messages.
    cross: also gather E[x^T (x_float - x)].
    beside: with `cross`, the number of columns N of other values r, by name: also gather
        E[x^T (r_float - r)].
    """

    def __init__(
        self, name: str, K: int, *, cross: bool = False, beside: Mapping[str, int] | None = None
    ) -> None:
        self.name, self.K, self.cross = name, K, cross
        self.beside = dict(beside or {}) if cross else {}
        width = K + sum(self.beside.values())
        self.tokens = 0
        self._second = np.zeros((K, K), np.float64)
        self._cross = np.zeros((K, width), np.float64) if cross else None  # of x, then of each r
        self._sum = np.zeros(K, np.float64)
        self._amax = np.zeros(K, np.float32)
        self._ready: list[tuple[Rows, Rows | None]] = []  # whole blocks of x, and of x_float - x
        self._block = self._new_block()
        self._filled = 0

    @staticmethod
    def nbytes(K: int, *, cross: bool = False) -> int:
        """Bytes that the sums over rows of K elements take."""
        return (K * K * 8 + ROWS * K * 4) * (2 if cross else 1)

    def add(self, x: Rows, x_float: Rows | None = None, beside: Sequence[tuple[Rows, Rows]] = ()) -> None:
        """Takes in float32 rows [n, K]; with `cross` also what the float model has in their place, and beside
        it rows (r, r_float) [n, N] of every other value.

        The sums wait for `accumulate`.
        """
        assert [r.shape[1] for r, _ in beside] == list(self.beside.values()), self.name
        assert x.dtype == np.float32 and x.ndim == 2 and x.shape[1] == self.K, (self.name, x.dtype, x.shape)
        assert (x_float is None) == (self._cross is None), self.name
        self.tokens += len(x)
        done = 0
        while done < len(x):
            count = min(ROWS - self._filled, len(x) - done)
            take, put = slice(done, done + count), slice(self._filled, self._filled + count)
            self._block[0][put] = x[take]
            if x_float is not None and self._block[1] is not None:
                start = 0
                for now, then in ((x, x_float), *beside):
                    end = start + now.shape[1]
                    np.subtract(then[take], now[take], out=self._block[1][put, start:end])
                    start = end
            done, self._filled = done + count, self._filled + count
            if self._filled == ROWS:
                self._ready.append(self._block)
                self._block, self._filled = self._new_block(), 0

    def finish(self) -> Statistics:
        """The statistics of all rows so far; nothing may be added after.

        Raises InputError when there were no rows, or values so large that their squares overflow.
        """
        _require_tokens(self.name, self.tokens)
        if self._filled:
            x, difference = self._block
            self._ready.append(
                (x[: self._filled], None if difference is None else difference[: self._filled])
            )
        accumulate([self], None)
        H = self._second
        if not np.isfinite(H).all() or (self._cross is not None and not np.isfinite(self._cross).all()):
            raise InputError(
                f"value '{self.name}' reaches {float(self._amax.max()):.3g}: its square is beyond float32; "
                "exclude the layers that read it, or repair the model"
            )
        for start in range(0, self.K, PANEL):
            panel = slice(start, start + PANEL)
            H[panel, start:] /= self.tokens
            upper = np.triu(H[panel, panel])
            H[panel, panel] = upper + np.triu(upper, 1).T
            H[start + PANEL :, panel] = H[panel, start + PANEL :].T
        if self._cross is None:
            return Statistics(self.tokens, H, self._sum / self.tokens, self._amax)
        self._cross /= self.tokens
        ends = np.cumsum([self.K, *self.beside.values()])
        cross, *others = np.split(self._cross, ends[:-1], axis=1)
        residuals = dict(zip(self.beside, others, strict=True))
        return Statistics(self.tokens, H, self._sum / self.tokens, self._amax, cross, residuals)

    def _new_block(self) -> tuple[Rows, Rows | None]:
        block = np.empty((ROWS, self.K), np.float32)
        return block, None if self._cross is None else np.empty((ROWS, self._cross.shape[1]), np.float32)

    def _add_panel(self, panel: slice) -> None:
        """Adds the waiting blocks, in order, to rows `panel` of every sum."""
        product = _transposed_product()
        for x, difference in self._ready:
            columns = np.ascontiguousarray(x[:, panel])
            self._sum[panel] += columns.sum(axis=0, dtype=np.float64)
            np.maximum(self._amax[panel], np.abs(columns).max(axis=0), out=self._amax[panel])
            self._second[panel, panel.start :] += product(columns, x[:, panel.start :])
            if self._cross is not None:
                assert difference is not None
                self._cross[panel] += product(columns, difference)


class MeanDifference:
    """How x_float - x is on the mean over all rows: `shift` [K] float32, `error` float64 [2], the means of
    |x_float - x|^2 and of |x_float|^2, and `tokens` int64 [1].

    name: of the values, for messages. Sums are in float64, in the order of the batches.
    """

    cross = True
    beside: Mapping[str, int] = {}

    def __init__(self, name: str, K: int) -> None:
        self.name, self.tokens = name, 0
        self._sum, self._squares = np.zeros(K, np.float64), np.zeros(2, np.float64)

    def add(self, x: Rows, x_float: Rows | None = None, beside: Sequence[tuple[Rows, Rows]] = ()) -> None:
        """Takes in float32 rows [n, K], and what the float model has in their place."""
        assert x_float is not None, self.name
        difference = np.subtract(x_float, x, dtype=np.float64)
        self.tokens += len(x)
        self._sum += difference.sum(axis=0)
        self._squares += np.square(difference).sum(), np.square(x_float, dtype=np.float64).sum()

    def finish(self) -> dict[str, npt.NDArray]:
        """Raises InputError when there were no rows."""
        _require_tokens(self.name, self.tokens)
        return {
            "shift": (self._sum / self.tokens).astype(np.float32),
            "error": self._squares / self.tokens,
            "tokens": np.array([self.tokens]),
        }


class Peaks:
    """The largest |x| of every channel, alone."""

    cross = False
    beside: Mapping[str, int] = {}

    def __init__(self, K: int) -> None:
        self.amax = np.zeros(K, np.float32)

    def add(self, x: Rows, x_float: Rows | None = None, beside: Sequence[tuple[Rows, Rows]] = ()) -> None:
        """Takes in float32 rows [n, K]."""
        if len(x):
            np.maximum(self.amax, np.abs(x).max(axis=0), out=self.amax)


def accumulate(moments: Iterable[Moments], pool: Executor | None) -> None:
    """Adds all rows that wait in whole blocks to the sums; the tasks of `pool` share nothing."""
    waiting = [m for m in moments if m._ready]
    tasks = [(m, slice(start, min(start + PANEL, m.K))) for m in waiting for start in range(0, m.K, PANEL)]
    for _ in (map if pool is None else pool.map)(lambda task: task[0]._add_panel(task[1]), tasks):
        pass
    for m in waiting:
        m._ready.clear()


def _require_tokens(name: str, tokens: int) -> None:
    if not tokens:
        raise InputError(
            f"value '{name}': the calibration data holds no token for it: all is padding, or empty"
        )


@cache
def _transposed_product() -> Any:
    """float32 (a [n, p], b [n, q]) -> a^T b [p, q] on one thread, whatever BLAS was told.

    By ONNX Runtime: numpy's BLAS has one setting of threads for the whole process, and divides the work, and
    with it the order of additions, by that.
    """
    from onnx import TensorProto, helper

    from qgraph.calibration.session import open_session

    def info(name: str, dims: list[str]) -> Any:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, dims)

    graph = helper.make_graph(
        [helper.make_node("Gemm", ["a", "b"], ["c"], transA=1)],
        "transposed_product",
        [info("a", ["n", "p"]), info("b", ["n", "q"])],
        [info("c", ["p", "q"])],
    )
    opsets = [helper.make_opsetid("", 23)]
    session = open_session(helper.make_model(graph, opset_imports=opsets, ir_version=10), "a^T b")
    return lambda a, b: session.run(None, {"a": a, "b": np.ascontiguousarray(b)})[0]
