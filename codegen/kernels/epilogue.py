"""How matrix products write their result [M, N], and what is done to it: operands added and multiplied,
activations.

The functions emit statements at the current place of the function being built, by TVMScript or by the IR
builder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tvm.script import tirx as T
from tvm.script.ir_builder import tirx as B

from qgraph.codegen.kernels.loops import index
from qgraph.codegen.kernels.vector import lanes_at, load_first, store_first
from qgraph.codegen.kernels.vmath import (
    Expr,
    const_like,
    vgelu_erf,
    vgelu_tanh,
    vsigmoid,
    vsilu,
    vtanh,
)
from qgraph.codegen.kernels.weights import Columns
from qgraph.codegen.packing import LANES
from qgraph.codegen.spec import EPILOGUE_OPERANDS

ACTIVATIONS = {
    "gelu_erf": vgelu_erf,
    "gelu_tanh": vgelu_tanh,
    "relu": lambda x: T.max(const_like(x, 0.0), x),  # keeps NaN: max returns its second operand then
    "silu": vsilu,
    "tanh": vtanh,
    "sigmoid": vsigmoid,
}


def epilogue_pointers(epilogue: Sequence[str]) -> list[tuple[str, str]]:
    """The operands of an epilogue, as kernels take them, in this order: bias [N], residual and factor
    [M, N]."""
    return [(name, "float32") for name in EPILOGUE_OPERANDS if name in epilogue]


@dataclass(frozen=True)
class Result:
    """The result of a product, in vectors of `lanes` columns.

    Attributes:
        N: its columns.
        n_block: columns of a block of the grid.
        epilogue: names applied in order, of "bias" (+ [N]), "residual" (+ [M, N]), "factor" (* [M, N]) and
            ACTIVATIONS.
    """

    N: int
    n_block: int
    lanes: int
    epilogue: tuple[str, ...]

    @property
    def ragged(self) -> bool:
        """Whether the last block has columns beyond N."""
        return self.N % self.n_block != 0

    @property
    def known(self) -> bool:
        """Whether there is nothing in the epilogue that has no meaning."""
        return all(name in (*EPILOGUE_OPERANDS, *ACTIVATIONS) for name in self.epilogue)

    def columns(self, start: Expr) -> Columns:
        """The weight's columns for a vector of these; beyond the last tile, of the last (its sums are
        dropped)."""
        tile = T.truncdiv(start, index(LANES))
        if self.ragged:
            tile = T.min(tile, index(-(-self.N // LANES) - 1))
        return Columns(tile, lanes_at(T.truncmod(start, index(LANES)), self.lanes))

    def load(self, A: Any, row: Expr, column: Expr) -> Expr:
        """Columns of a flat buffer of rows of N; those beyond N are not read."""
        if self.ragged:
            return load_first(A, row * self.N + column, self.N - column, self.lanes)
        return A[lanes_at(row * self.N + column, self.lanes)]

    def store(self, Y: Any, row: Expr, column: Expr, value: Expr) -> None:
        """Emits the store of columns; those beyond N are not written."""
        if self.ragged:
            store_first(Y, value, row * self.N + column, self.N - column, self.lanes)
        else:
            B.buffer_store(Y, value, [lanes_at(row * self.N + column, self.lanes)])

    def finish(self, Y: Any, operands: Mapping[str, Any], m0: Expr, rows: Expr, panel: Expr) -> None:
        """Emits the epilogue on the finished sums of a block: rows m0 .. m0 + rows - 1 of a panel. Operands
        are flat buffers, by their name in the epilogue."""
        if not self.epilogue:
            return
        with B.serial(rows) as r, B.serial(index(self.n_block // self.lanes)) as v:
            column = B.bind(panel * self.n_block + v * self.lanes)
            value = self.load(Y, m0 + r, column)
            for name in self.epilogue:
                if name == "bias":
                    value = value + self.load(operands[name], index(0), column)
                elif name == "residual":
                    value = value + self.load(operands[name], m0 + r, column)
                elif name == "factor":
                    value = value * self.load(operands[name], m0 + r, column)
                else:
                    value = ACTIVATIONS[name](value)
            self.store(Y, m0 + r, column, value)
