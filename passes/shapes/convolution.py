"""Convolution and pooling over [N, C, spatial...]."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from qgraph.passes.shapes import dims as d
from qgraph.passes.shapes.node import NodeView, rule


@rule("Conv")
def conv(n: NodeView) -> None:
    x, w = n.shape(0), n.shape(1)
    if len(x) != len(w) or len(x) < 3:
        n.fail(f"input of rank {len(x)} and kernel of rank {len(w)} do not fit")
    n.equal(x[1], d.tidy(w[1] * n.attr("group", 1)), "channels of input and kernel")
    kernel = n.attr("kernel_shape") or w[2:]
    n.out(0, n.dtype(0), [x[0], w[0], *_windows(n, x[2:], kernel)])


@rule("MaxPool", "AveragePool", "LpPool")
def pool(n: NodeView) -> None:
    x = n.shape(0)
    shape = [*x[:2], *_windows(n, x[2:], n.attr("kernel_shape"))]
    n.out(0, n.dtype(0), shape)
    n.out(1, ir.DataType.INT64, shape)


@rule("GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool")
def global_pool(n: NodeView) -> None:
    x = n.shape(0)
    n.out(0, n.dtype(0), [*x[:2], *[1] * (len(x) - 2)])


def _windows(n: NodeView, x: Sequence[d.Dim], kernel: Sequence[d.Dim]) -> list[d.Dim]:
    """Number of window positions along each spatial axis."""
    rank = len(x)
    strides = n.attr("strides") or [1] * rank
    dilations = n.attr("dilations") or [1] * rank
    pads = n.attr("pads") or [0] * (2 * rank)
    auto = n.attr("auto_pad", "NOTSET")
    if not len(kernel) == len(strides) == len(dilations) == rank or len(pads) != 2 * rank:
        n.fail("kernel, strides, dilations and pads do not fit the input's rank")
    if min(*strides, 1) < 1 or min(*dilations, 1) < 1:
        n.fail("strides and dilations must be positive")
    sizes: list[d.Dim] = []
    for i in range(rank):
        if auto in ("SAME_UPPER", "SAME_LOWER"):
            sizes.append(d.ceildiv(x[i], strides[i]))
            continue
        padding = 0 if auto == "VALID" else pads[i] + pads[i + rank]
        span = d.tidy(x[i] + padding - dilations[i] * (kernel[i] - 1) - 1)
        if isinstance(span, int) and span < 0:
            n.fail(f"its window is larger than spatial axis {i} of the padded input")
        if n.attr("ceil_mode", 0):
            sizes.append(_ceil_mode(n, x[i], span, strides[i], 0 if auto == "VALID" else pads[i]))
        else:
            sizes.append(d.tidy(d.floordiv(span, strides[i]) + 1))
    return sizes


def _ceil_mode(n: NodeView, x: d.Dim, span: d.Dim, stride: int, left: int) -> d.Dim:
    """Rounds up, but drops a window that would start in the padding on the right."""
    size = d.tidy(d.ceildiv(span, stride) + 1)
    last = d.tidy((size - 1) * stride)
    if isinstance(last, int) and isinstance(x, int):
        return size - 1 if last >= x + left else size
    if not n.world.greater_equal(d.tidy(x + left - 1), last):
        n.refuse("ceil_mode with a named spatial dimension is not supported")
    return size
