"""GPTQ for integer and ternary groups: codes, scales and offsets of least output error on calibration data.

That error is tr((W - W')^T H (W - W')), here with H damped. Three steps, each measured on held-out data by
`benchmarks/group_output_error.py`:

1. *Order*: blocks by falling power of their inputs, and so inside each block (`hessian.energy_order`).
2. *Pass* (`group_gptq_pass`): rows rounded one after another with GPTQ's error feedback (arXiv 2210.17323),
   each block's grid searched with the feedback in view.
3. *Annealing* (`group_gptq_anneal`): all levels and grids again and again, each with the others fixed, and
   with noise that fades. Its result is taken for the columns where it leaves less error.

Inputs that calibration never saw (H_kk = 0) are damped like all others: their weights are rounded as they
are, not set to 0 as GPTQ does, as other data may use them. With H = 0 every W' is as good as another, and the
result is that of `itf`.

Sums of many terms are matrix products in float32, so the result may differ between CPU models, by which BLAS
chooses its kernels; on one machine it is the same, byte for byte, for any number of threads, as these work on
fixed slices of columns, each with random numbers of its own, and BLAS is held to one thread.
"""

from __future__ import annotations

import numpy as np

from qgraph.errors import UsageError
from qgraph.formats import FORMATS, QTensor
from qgraph.solvers import group_grid, itf
from qgraph.solvers._tiles import column_slices, map_ordered
from qgraph.solvers.group_gptq_anneal import anneal
from qgraph.solvers.group_gptq_pass import CHOICES, first_pass
from qgraph.solvers.group_gptq_problem import Problem
from qgraph.solvers.group_grid import Array
from qgraph.solvers.hessian import Matrix, check_second_moment, default_damping, energy_order, one_blas_thread

_COLUMNS = 768  # of a slice, at most
_LEAST_DAMPING = 0.03  # by default


def solve(
    W: Array,
    *,
    format: str,
    H: Matrix,
    tokens: int = 0,
    name: str = "",
    threads: int | None = None,
    damping: float | None = None,
    grids: str = "search",
    order: bool = True,
    sweeps: int = 32,
) -> QTensor:
    """W float32 [K, N], H float64 [K, K], the mean of x^T x, -> `format`, of small output error.

    Args:
        tokens: that H is the mean of; 0 where that is not known.
        damping: in units of the mean of diag(H). None is K / (2 tokens), from 0.03 to 0.3; 0.03 where the
            tokens are not known.
        grids: how a block's grid is found in the pass, a key of `CHOICES`.
        order: whether blocks go by the power of their inputs, or from first to last.
        sweeps: of annealing; 0 leaves the pass as it is.

    The keywords after `threads` are there for comparisons. Deterministic, whatever `threads`. Memory beyond W
    and H: two or three times H in float64 while it is factorized, later as much once; a thread takes some
    50 MiB, and 30 KiB more for every input.

    Raises InputError for weights that are not finite or beyond float16, and for an H that is no second
    moment.
    """
    if damping is None:
        damping = default_damping(len(W), tokens, _LEAST_DAMPING)
    if grids not in CHOICES or sweeps < 0 or not 0 <= damping < np.inf:
        raise UsageError(f"gptq: grids={grids!r}, sweeps={sweeps}, damping={damping}")
    group_grid.check_group_weight(W, name)
    spec = FORMATS[format]
    K, N = W.shape
    check_second_moment(H, K, name)
    if not H.any() or not W.any():
        return itf.solve(W, format=format, name=name, threads=threads)
    rows = energy_order(H, spec.block) if order else np.arange(K)
    blocks = rows[:: spec.block] // spec.block
    codes = np.empty((K, N), np.uint8)
    scale, offset = np.empty((2, len(blocks), N), np.float32)

    with one_blas_thread():
        problem = Problem(spec, H[np.ix_(rows, rows)], damping, name)

        def work(part: slice) -> None:
            found = first_pass(problem, W[rows, part], CHOICES[grids])
            if sweeps:
                anneal(found, sweeps, seed=part.start)
            codes[rows, part] = found.levels - problem.low
            scale[blocks, part], offset[blocks, part] = found.scale, found.offset

        map_ordered(work, column_slices(N, _COLUMNS), threads)
    return group_grid.assemble(spec, codes, scale, offset)
