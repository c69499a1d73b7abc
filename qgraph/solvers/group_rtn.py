"""Round to nearest in integer and ternary formats, the grid from each block's extremes alone: the baseline.

Symmetric formats map the largest magnitude to the highest level, the others a block's lowest and highest
weight to the ends of the grid. Ternary is PT2-LLM's initialization (arXiv 2510.03267; the threshold is that
of Ternary Weight Networks, arXiv 1605.04711): mu = mean w, v = w - mu, T = sign(v) where |v| > 0.75 mean|v|,
alpha = mean |v| over these.
"""

from __future__ import annotations

from functools import partial

from qgraph.formats import FORMATS, QTensor
from qgraph.solvers import group_grid
from qgraph.solvers.group_grid import Array


def solve(W: Array, *, format: str, name: str = "", threads: int | None = None) -> QTensor:
    """W float32 [K, N] -> `format`, as above. InputError for weights that are not finite, or beyond
    float16."""
    group_grid.check_group_weight(W, name)
    spec = FORMATS[format]
    return group_grid.solve_blocks(spec, W, partial(group_grid.initial, spec), threads)
