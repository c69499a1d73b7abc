"""Gathers: reading by index."""

from __future__ import annotations

import numpy as np

from qgraph.passes.base import describe
from qgraph.passes.shapes.dims import Dim, UnequalError
from qgraph.passes.shapes.node import NodeView, object_array, rule


@rule("Gather")
def gather(n: NodeView) -> None:
    data, indices = n.shape(0), n.shape(1)
    axis = n.axis(n.attr("axis", 0), len(data))
    require_range(n, data[axis], n.content(1))
    shape = [*data[:axis], *indices, *data[axis + 1 :]]
    n.out(0, n.dtype(0), shape, _picked(n, axis))


def require_range(n: NodeView, length: Dim, indices: np.ndarray | None) -> None:
    """Constant indices must lie inside an axis of whatever length."""
    known = [] if indices is None else [i for i in indices.reshape(-1) if isinstance(i, int)]
    if not known:
        return
    needed = max(max(known) + 1, -min(known))
    worst = max(known) if max(known) + 1 >= -min(known) else min(known)
    try:
        message = f"{describe(n.node)} reads index {worst}, so {length} must be at least {needed}"
        n.world.assume_at_least(length, needed, message)
    except UnequalError:
        n.fail(f"index {worst} is out of range for {length} elements")


def _picked(n: NodeView, axis: int) -> np.ndarray | None:
    content, indices = n.content(0), n.content(1)
    if content is None or indices is None or axis != 0 or content.ndim != 1:
        return None
    length = content.shape[0]
    picked = []
    for index in indices.reshape(-1):
        if not isinstance(index, int):
            return None
        if not -length <= index < length:
            n.fail(f"index {index} is out of range for {length} elements")
        picked.append(content[index])
    return object_array(picked, indices.shape)


@rule("GatherElements")
def gather_elements(n: NodeView) -> None:
    if n.rank(0) != n.rank(1):
        n.fail("data and indices must have the same rank")
    n.axis(n.attr("axis", 0), n.rank(0))
    n.out(0, n.dtype(0), n.shape(1))


@rule("GatherND")
def gather_nd(n: NodeView) -> None:
    data, indices = n.shape(0), n.shape(1)
    batch_dims = n.attr("batch_dims", 0)
    if not 0 <= batch_dims < min(len(data), len(indices)):
        n.fail(f"batch_dims {batch_dims} is out of range for ranks {len(data)} and {len(indices)}")
    depth = indices[-1] if indices else None
    if not isinstance(depth, int):
        n.refuse("the last dimension of its indices is not fixed")
    if batch_dims + depth > len(data):
        n.fail(f"indices of depth {depth} after {batch_dims} batch axes do not fit rank {len(data)}")
    for i in range(batch_dims):
        n.equal(data[i], indices[i], f"batch axis {i}")
    n.out(0, n.dtype(0), [*indices[:-1], *data[batch_dims + depth :]])


@rule("TensorScatter")
def tensor_scatter(n: NodeView) -> None:
    if n.axis(n.attr("axis", -2), n.rank(0)) == 0:
        n.fail("its axis may not be the batch")
    n.out(0, n.dtype(0), n.shape(0))
