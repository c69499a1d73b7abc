"""Lookups in quantized tables, and in the weights of linear layers that serve as tables too."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from qgraph.codegen import packing
from qgraph.codegen.dims import grain_of, product
from qgraph.codegen.lowering.context import Lowering, lowers, unsupported
from qgraph.codegen.lowering.linear import f32_weight, nvfp4_weight
from qgraph.codegen.lowering.linear_group import OPERATORS, group_weight
from qgraph.codegen.memory import Buffer, View
from qgraph.codegen.spec import KernelSpec
from qgraph.formats import FORMATS
from qgraph.formats.nvfp4 import NVFP4


@lowers("QGatherNVFP4", domain="ai.qgraph", data=(0,))
def qgather_nvfp4(low: Lowering, node: ir.Node) -> None:
    """`QGatherNVFP4(ids, codes, block_scale, global_scale)`: the table stays packed, as `nvfp4_rows`."""
    ids = _indices(low, node, 0)
    (rows, columns), table = nvfp4_weight(low, node, "rows", packing.pack_nvfp4_rows)
    out = low.allocate(node.outputs[0])
    spec = KernelSpec.make("gather_nvfp4", h=columns, index=ids.dtype)
    _emit(low, node, spec, table, [out, *(View.of(part) for part in table), ids, ("status",), rows], columns)
    low.bind(node, out)


@lowers("QGatherColumnsNVFP4", domain="ai.qgraph", data=(0,))
def qgather_columns_nvfp4(low: Lowering, node: ir.Node) -> None:
    """`QGatherColumnsNVFP4(ids, codes, block_scale, global_scale)`: the weight of a layer, `nvfp4_n16k8`."""
    shape, weights = nvfp4_weight(low, node, "n16k8", packing.pack_nvfp4_n16k8)
    _columns(low, node, 0, NVFP4.suffix, shape, weights, {})


@lowers(*(f"QGatherColumns{title}" for title in OPERATORS), domain="ai.qgraph", data=(0,))
def qgather_columns_group(low: Lowering, node: ir.Node) -> None:
    """`QGatherColumns<Format>(ids, codes, block_scale, ..)`: the weight of a layer, as its product has it."""
    q, weights, params = group_weight(low, node, OPERATORS[node.op_type.removeprefix("QGatherColumns")])
    _columns(low, node, 0, FORMATS[q.format].suffix, q.shape, weights, params)


def gather_columns(low: Lowering, node: ir.Node, weight: ir.Value, array: np.ndarray) -> None:
    """`Gather(weight [K, N], ids){axis=1}` of a float weight, as its product has it."""
    K, N = array.shape
    _columns(low, node, 1, "f32", (K, N), (f32_weight(low, weight, array),), {})


def _columns(
    low: Lowering,
    node: ir.Node,
    ids_at: int,
    suffix: str,
    shape: tuple[int, int],
    weights: tuple[Buffer, ...],
    params: dict[str, Any],
) -> None:
    """Rows are written, and [K, ids..] is a view of them, which a Transpose turns back."""
    K, N = shape
    ids = _indices(low, node, ids_at)
    rows = low.temp("f32", (*ids.shape, K))
    spec = KernelSpec.make(f"gather_columns_{suffix}", k=K, n=N, index=ids.dtype, **params)
    _emit(low, node, spec, weights, [rows, *(View.of(part) for part in weights), ids, ("status",)], K)
    low.bind(node, rows.transpose((rows.rank - 1, *range(rows.rank - 1))))


def _indices(low: Lowering, node: ir.Node, at: int) -> View:
    ids = node.inputs[at]
    if ids is None:
        raise unsupported(node, "an input is missing")
    if low.dtype(ids) not in ("i64", "i32"):
        raise unsupported(node, f"indices of type {low.dtype(ids)}")
    return low.dense(ids)


def _emit(
    low: Lowering, node: ir.Node, spec: KernelSpec, table: tuple[Buffer, ...], args: list[Any], columns: int
) -> None:
    """One step, a block a row of the result."""
    blocks, grain = product(args[0].shape[:-1]), grain_of(columns)
    low.layers.append((node, low.emit(node.name or node.op_type, spec, args, blocks, grain, weights=table)))
