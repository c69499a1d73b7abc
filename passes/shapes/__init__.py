"""Shape and dtype rules of the operators, by family. Importing the package fills the table `RULES`."""

from __future__ import annotations

from qgraph.passes.shapes import (
    convolution,
    elementwise,
    generate,
    index,
    layout,
    linear,
    lowbit,
    normalize,
    reduce,
)
from qgraph.passes.shapes.dims import Dim, NewFactError, UnequalError, World
from qgraph.passes.shapes.node import RULES, Fact, NodeView, object_array, rule

__all__ = [
    "RULES",
    "Dim",
    "Fact",
    "NewFactError",
    "NodeView",
    "UnequalError",
    "World",
    "object_array",
    "rule",
]

del convolution, elementwise, generate, index, layout, linear, lowbit, normalize, reduce
