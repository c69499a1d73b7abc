"""Operators that move elements without changing them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qgraph.passes.shapes import dims as d
from qgraph.passes.shapes.node import NodeView, rule

FAR = 2**31 - 1  # exporters write INT32_MAX or INT64_MAX for "to the end"


@rule("Reshape")
def reshape(n: NodeView) -> None:
    x = n.shape(0)
    target = n.dims(1, "its target shape")
    shape: list[d.Dim] = []
    for i, dim in enumerate(target):
        if dim == 0 and not n.attr("allowzero", 0):
            if i >= len(x):
                n.fail(f"0 in its target shape copies axis {i}, which the input does not have")
            dim = x[i]
        shape.append(dim)
    unknown = [i for i, dim in enumerate(shape) if dim == -1]
    if len(unknown) > 1:
        n.fail(f"its target shape {target} leaves two dimensions open")
    total = d.product(x)
    if unknown:
        rest = d.product(dim for dim in shape if dim != -1)
        if rest == 0:
            n.fail(f"its target shape {target} does not say how to divide nothing")
        shape[unknown[0]] = _divide(n, total, rest)
    elif d.tidy(total - d.product(shape)) != 0:
        _match_sizes(n, total, d.product(shape))
    content = n.content(0)
    n.out(0, n.dtype(0), shape, _reshaped(content, shape))


def _divide(n: NodeView, total: d.Dim, rest: d.Dim) -> d.Dim:
    """total / rest, which must come out even. Where that is not certain, it becomes a check."""
    quotient = d.floordiv(total, rest)
    product = d.tidy(quotient * rest)
    if d.tidy(product - total) == 0:
        return quotient
    if isinstance(total, int) and isinstance(rest, int):
        n.fail(f"{total} elements do not divide by {rest}")
    try:
        n.world.assume_at_least(
            product, total, f"{total} must be a multiple of {rest} (reshape '{n.node.name}')"
        )
    except d.UnequalError as error:
        n.fail(str(error))
    return quotient


def _match_sizes(n: NodeView, total: d.Dim, wanted: d.Dim) -> None:
    import sympy

    ratio = sympy.cancel(sympy.sympify(total) / wanted) if wanted != 0 else None
    if ratio is None:
        n.fail(f"{total} elements do not fit a shape of {wanted}")
    left, right = sympy.fraction(ratio)
    n.equal(d.tidy(left), d.tidy(right), f"{total} elements do not fit a shape of {wanted}")


def _reshaped(content: np.ndarray | None, shape: Sequence[d.Dim]) -> np.ndarray | None:
    if content is None or not all(isinstance(v, int) for v in shape) or content.size != d.product(shape):
        return None
    return content.reshape(tuple(shape))


@rule("Flatten")
def flatten(n: NodeView) -> None:
    x = n.shape(0)
    axis = n.attr("axis", 1)
    if not -len(x) <= axis <= len(x):
        n.fail(f"axis {axis} is out of range for rank {len(x)}")
    axis = axis + len(x) if axis < 0 else axis
    shape = [d.product(x[:axis]), d.product(x[axis:])]
    n.out(0, n.dtype(0), shape, _reshaped(n.content(0), shape))


@rule("Transpose")
def transpose(n: NodeView) -> None:
    x = n.shape(0)
    perm = list(n.attr("perm") or reversed(range(len(x))))
    if sorted(perm) != list(range(len(x))):
        n.fail(f"perm {perm} is not a permutation of {len(x)} axes")
    content = n.content(0)
    n.out(0, n.dtype(0), [x[p] for p in perm], None if content is None else content.transpose(perm))


@rule("Squeeze")
def squeeze(n: NodeView) -> None:
    x = n.shape(0)
    if n.has(1):
        axes = n.axes(n.ints(1, "the axes"), len(x))
        for axis in axes:
            n.equal(x[axis], 1, f"squeezed axis {axis}")
    else:
        for dim in x:
            if not isinstance(dim, int) and not n.world.greater_equal(dim, 2):
                n.refuse(f"it names no axes, and '{dim}' may be 1 or more")
        axes = [i for i, dim in enumerate(x) if dim == 1]
    shape = [dim for i, dim in enumerate(x) if i not in axes]
    n.out(0, n.dtype(0), shape, _reshaped(n.content(0), shape))


@rule("Unsqueeze")
def unsqueeze(n: NodeView) -> None:
    x = n.shape(0)
    axes = n.ints(1, "the axes")
    places = n.axes(axes, len(x) + len(axes))
    rest = iter(x)
    shape = [1 if i in places else next(rest) for i in range(len(x) + len(axes))]
    n.out(0, n.dtype(0), shape, _reshaped(n.content(0), shape))


@rule("Concat")
def concat(n: NodeView) -> None:
    shape = list(n.shape(0))
    axis = n.axis(n.attr("axis"), len(shape))
    for index in range(1, len(n)):
        other = n.shape(index)
        if len(other) != len(shape):
            n.fail(f"inputs of rank {len(shape)} and {len(other)} do not concatenate")
        for i, dim in enumerate(other):
            if i == axis:
                shape[i] = shape[i] + dim
            else:
                shape[i] = n.equal(shape[i], dim, f"axis {i} of inputs 0 and {index}")
    contents = [c for c in (n.content(i) for i in range(len(n))) if c is not None]
    known = n.known_size([d.tidy(s) for s in shape]) and len(contents) == len(n)
    n.out(0, n.dtype(0), shape, np.concatenate(contents, axis=axis) if known else None)


@rule("Split")
def split(n: NodeView) -> None:
    x = n.shape(0)
    axis = n.axis(n.attr("axis", 0), len(x))
    count = len(n.node.outputs)
    if n.has(1):
        sizes = n.dims(1, "the sizes of its parts")
        if len(sizes) != count:
            n.fail(f"{len(sizes)} sizes for {count} outputs")
        n.equal(d.tidy(sum(sizes)), x[axis], "the sum of its parts and the axis")
    else:
        parts = n.attr("num_outputs", count)
        chunk = d.ceildiv(x[axis], parts)
        # Smaller last part: ONNX splits into equal chunks, rounded up.
        sizes = [chunk] * (parts - 1) + [d.tidy(x[axis] - chunk * (parts - 1))]
    content, start = n.content(0), 0
    for index, size in enumerate(sizes):
        part = None
        if content is not None and isinstance(size, int):
            part = content.take(range(start, start + size), axis=axis)
            start += size
        else:
            content = None
        n.out(index, n.dtype(0), [*x[:axis], size, *x[axis + 1 :]], part)


@rule("Slice")
def slice_(n: NodeView) -> None:
    x = n.shape(0)
    starts, ends = n.dims(1, "the start"), n.dims(2, "the end")
    axes = n.axes(n.ints(3, "the axes"), len(x)) if n.has(3) else list(range(len(starts)))
    steps = n.ints(4, "the step") if n.has(4) else [1] * len(starts)
    if not len(starts) == len(ends) == len(axes) == len(steps):
        n.fail("starts, ends, axes and steps differ in length")
    shape = list(x)
    picks: list[slice] | None = [slice(None)] * len(x)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        if step == 0:
            n.fail("a step is 0")
        shape[axis] = _sliced(n, x[axis], start, end, step)
        if picks is not None and all(isinstance(v, int) for v in (start, end, x[axis])):
            picks[axis] = _python_slice(start, end, step, x[axis])
        else:
            picks = None
    content = n.content(0)
    n.out(0, n.dtype(0), shape, content[tuple(picks)] if content is not None and picks is not None else None)


def _python_slice(start: int, end: int, step: int, size: int) -> slice:
    """ONNX clamps as Python does, but an end before the first element is written as a very negative
    number."""
    stop: int | None = end
    if step < 0 and end < -size:
        stop = None
    return slice(start, stop, step)


def _sliced(n: NodeView, dim: d.Dim, start: d.Dim, end: d.Dim, step: int) -> d.Dim:
    if all(isinstance(v, int) for v in (dim, start, end)):
        return len(range(dim)[_python_slice(start, end, step, dim)])
    if step < 0:
        return _reversed_size(n, dim, start, end, step)
    first, last = _clamped(n, dim, start), _clamped(n, dim, end)
    return d.ceildiv(n.world.maximum(d.tidy(last - first), 0), step)


def _clamped(n: NodeView, dim: d.Dim, place: d.Dim) -> d.Dim:
    """`place` in [0, dim]; negative places count from the end."""
    if isinstance(place, int):
        if place >= FAR:
            return dim
        if place <= -FAR:
            return 0
        if place < 0:
            return n.world.maximum(d.tidy(dim + place), 0)
    elif not n.world.nonnegative(place):
        if not n.world.nonnegative(d.tidy(-place - 1)):
            n.refuse(f"its bound {place} may be negative or not")
        return n.world.maximum(d.tidy(dim + place), 0)
    bounded = n.world.minimum(dim, place)
    if not isinstance(bounded, int) and bounded not in (dim, place):
        n.world.origin.setdefault(bounded, n.input_name(0) or "")
    return bounded


def _reversed_size(n: NodeView, dim: d.Dim, start: d.Dim, end: d.Dim, step: int) -> d.Dim:
    """Only the whole axis backwards: what `flip` exports."""
    whole = start == -1 or (isinstance(start, int) and start >= FAR)
    if not (whole and isinstance(end, int) and end <= -FAR):
        n.refuse("a backward slice of a named dimension must cover all of it")
    return d.ceildiv(dim, -step)


@rule("Expand")
def expand(n: NodeView) -> None:
    target = n.dims(1, "its target shape")
    shape = n.broadcast(n.shape(0), target)
    content = n.content(0)
    if content is not None:
        content = np.broadcast_to(content, shape) if n.known_size(shape) else None
    n.out(0, n.dtype(0), shape, content)


@rule("Tile")
def tile(n: NodeView) -> None:
    x = n.shape(0)
    repeats = n.dims(1, "its repeats")
    if len(repeats) != len(x):
        n.fail(f"{len(repeats)} repeats for rank {len(x)}")
    shape = [d.tidy(a * b) for a, b in zip(x, repeats, strict=True)]
    content = n.content(0)
    if content is not None:
        content = np.tile(content, repeats) if n.known_size(shape) else None
    n.out(0, n.dtype(0), shape, content)


@rule("Pad")
def pad(n: NodeView) -> None:
    x = list(n.shape(0))
    pads = n.dims(1, "its pads")
    axes = n.axes(n.ints(3, "the axes"), len(x)) if n.has(3) else list(range(len(x)))
    if len(pads) != 2 * len(axes):
        n.fail(f"{len(pads)} pads for {len(axes)} axes")
    for i, axis in enumerate(axes):
        x[axis] = d.tidy(x[axis] + pads[i] + pads[i + len(axes)])
    n.out(0, n.dtype(0), x)


@rule("DepthToSpace", "SpaceToDepth")
def depth_space(n: NodeView) -> None:
    batch, channels, height, width = n.shape(0)
    block = n.attr("blocksize")
    if n.node.op_type == "DepthToSpace":
        shape = [batch, _divide(n, channels, block * block), height * block, width * block]
    else:
        shape = [batch, channels * block * block, _divide(n, height, block), _divide(n, width, block)]
    n.out(0, n.dtype(0), shape)


@rule("Resize")
def resize(n: NodeView) -> None:
    x = n.shape(0)
    if n.attr("axes") is not None or n.attr("keep_aspect_ratio_policy", "stretch") != "stretch":
        n.refuse("axes or an aspect ratio policy are not supported")
    if n.has(3) and n.shape(3) != (0,):
        n.out(0, n.dtype(0), n.dims(3, "its sizes"))
        return
    scales = n.content(2)
    if scales is None or not all(isinstance(v, (int, float)) for v in scales) or len(scales) != len(x):
        n.refuse("its scales are not constants")
    shape = [dim if scale == 1 else _scaled(n, dim, scale) for dim, scale in zip(x, scales, strict=True)]
    n.out(0, n.dtype(0), shape)


def _scaled(n: NodeView, dim: d.Dim, scale: float) -> d.Dim:
    if isinstance(dim, int):
        return int(np.floor(dim * np.float32(scale)))
    if not float(scale).is_integer():
        n.refuse("a fractional scale of a named dimension is not supported")
    return d.tidy(dim * int(scale))
