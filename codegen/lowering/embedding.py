"""Lookups in quantized tables."""

from __future__ import annotations

import onnx_ir as ir

from qgraph.codegen import packing
from qgraph.codegen.dims import product
from qgraph.codegen.lowering.context import Lowering, lowers, unsupported
from qgraph.codegen.lowering.linear import nvfp4_weight
from qgraph.codegen.memory import View
from qgraph.codegen.spec import KernelSpec

_GRAIN_ELEMENTS = 4096  # decoded at least by a thread at once


@lowers("QGatherNVFP4", domain="ai.qgraph", data=(0,))
def qgather_nvfp4(low: Lowering, node: ir.Node) -> None:
    """`QGatherNVFP4(ids, codes, block_scale, global_scale)`: the table stays packed, as `nvfp4_rows`."""
    ids = node.inputs[0]
    if ids is None:
        raise unsupported(node, "an input is missing")
    kind = low.dtype(ids)
    if kind not in ("i64", "i32"):
        raise unsupported(node, f"indices of type {kind}")
    (rows, columns), table = nvfp4_weight(low, node, "rows", packing.pack_nvfp4_rows)
    out = low.allocate(node.outputs[0])
    spec = KernelSpec.make("gather_nvfp4", h=columns, index=kind)
    args = [out, *(View.of(part) for part in table), low.dense(ids), ("status",), rows]
    grain = max(1, _GRAIN_ELEMENTS // columns)
    blocks = product(low.shape(ids))
    step = low.emit(node.name or "QGatherNVFP4", spec, args, blocks, grain, weights=table)
    low.layers.append((node, step))
    low.bind(node, out)
