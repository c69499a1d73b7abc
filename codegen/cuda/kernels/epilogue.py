"""What is done to a finished sum of a product: operands added and multiplied, activations."""

from __future__ import annotations

from collections.abc import Sequence

from qgraph.codegen.cuda.kernels.frame import Frame
from qgraph.codegen.kernels.epilogue import ACTIVATIONS
from qgraph.codegen.kernels.vmath import Expr, named


def finished(f: Frame, value: Expr, row: Expr, column: Expr, n: int, epilogue: Sequence[str]) -> Expr:
    """The result at (row, column) of [M, n], of its sum."""
    for name in epilogue:
        value = named(value)
        if name == "bias":
            value = value + f.buffers["bias"][column]
        elif name == "residual":
            value = value + f.buffers["residual"][row * n + column]
        elif name == "factor":
            value = value * f.buffers["factor"][row * n + column]
        else:
            value = ACTIVATIONS[name](value)
    return value
