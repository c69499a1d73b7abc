"""Reductions along axes."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from qgraph.passes.shapes import dims as d
from qgraph.passes.shapes.node import NodeView, object_array, rule


@rule(
    *(
        f"Reduce{kind}"
        for kind in ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "Sum", "SumSquare")
    )
)
def reduce(n: NodeView) -> None:
    x = n.shape(0)
    if n.has(1):
        axes = n.axes(n.ints(1, "the axes"), len(x))
    else:
        axes = []
    if not axes and n.attr("noop_with_empty_axes", 0):
        n.out(0, n.dtype(0), x, n.content(0))
        return
    axes = axes or list(range(len(x)))
    keep = n.attr("keepdims", 1)
    n.out(0, n.dtype(0), _reduced(x, axes, keep), _content(n, axes, keep))


@rule("ArgMax", "ArgMin")
def arg(n: NodeView) -> None:
    x = n.shape(0)
    axis = n.axis(n.attr("axis", 0), len(x))
    n.out(0, ir.DataType.INT64, _reduced(x, [axis], n.attr("keepdims", 1)))


@rule("TopK")
def topk(n: NodeView) -> None:
    x = list(n.shape(0))
    x[n.axis(n.attr("axis", -1), len(x))] = n.dims(1, "k")[0]
    n.out(0, n.dtype(0), x)
    n.out(1, ir.DataType.INT64, x)


def _reduced(x, axes, keep) -> list[d.Dim]:
    return [1 if i in axes else dim for i, dim in enumerate(x) if keep or i not in axes]


def _content(n: NodeView, axes: list[int], keep: int):
    """The reduction of a tracked vector of integers: TorchScript computes element counts by
    ReduceProd(Shape)."""
    content = n.content(0)
    functions: dict[str, Callable[[d.Dim, d.Dim], d.Dim]] = {
        "ReduceProd": lambda a, b: a * b,
        "ReduceSum": lambda a, b: a + b,
        "ReduceMax": n.world.maximum,
        "ReduceMin": n.world.minimum,
    }
    function = functions.get(n.node.op_type)
    if function is None or content is None or content.ndim != 1 or axes != [0] or content.size == 0:
        return None
    if not n.dtype(0).is_integer() or any(v is None for v in content):
        return None
    total = content[0]
    for value in content[1:]:
        total = function(total, value)
    return object_array([d.tidy(total)], (1,) if keep else ())
