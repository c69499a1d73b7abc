"""Prepared low-bit models of one layer or a few, with random weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from qgraph.export import EXPORTS, Context
from qgraph.formats import FORMATS, QTensor
from qgraph.passes.base import add_initializer
from qgraph.passes.lowbit_functions import DOMAIN, ROUNDINGS, AddLowbitFunctions
from qgraph.passes.lowbit_weights import FORMS, to_tensors
from qgraph.passes.save import save_lowbit

ACT_SCALE = 2.0**-8  # of activations rounded to NVFP4


def random_weight(format: str, K: int, N: int, seed: int = 0) -> QTensor:
    """Any codes, scales and offsets of a format."""
    rng, spec = np.random.default_rng(seed), FORMATS[format]
    blocks = (spec.blocks(K), N)
    scale = rng.uniform(0.5, 2, blocks).astype(spec.scale_dtype)
    offset = None
    if spec.offset == "mean":
        offset = rng.normal(0, 0.5, blocks).astype(np.float16)
    elif spec.offset == "zero_point":
        offset = rng.integers(0, len(spec.values), blocks).astype(np.uint8)
    a = {"global_scale": np.float32(0.37)} if spec.has_global_scale else {}
    codes = rng.integers(0, len(spec.values), (K, N)).astype(np.uint8)
    return QTensor(format, (K, N), codes, scale, block_offset=offset, **a)


def _value(name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))


def linear_model(
    weights: Sequence[QTensor],
    activations: str | None = None,
    lead: Sequence[int | str] = ("batch", "sequence"),
) -> ir.Model:
    """x [*lead, K] -> y0, y1, ...: layers that share an input, which may be rounded."""
    K = weights[0].shape[0]
    x = _value("x", ir.DataType.FLOAT, [*lead, K])
    graph = ir.Graph([x], [], nodes=[], opset_imports={"": 23}, name="linear")
    source = x
    if activations:
        inputs = [x]
        if activations == "nvfp4":
            inputs.append(add_initializer(graph, np.array(ACT_SCALE, np.float32), "x.act_scale"))
        node = ir.node(ROUNDINGS[activations], inputs, domain=DOMAIN, name=f"x/{activations}")
        source = node.outputs[0]
        source.name, source.type, source.shape = node.name, x.type, x.shape
        graph.append(node)
    for i, q in enumerate(weights):
        parts = [add_initializer(graph, t, str(t.name)) for t in to_tensors(q, f"W{i}")]
        node = ir.node(FORMS[q.format].linear, [source, *parts], domain=DOMAIN, name=f"layer{i}")
        y = node.outputs[0]
        y.name, y.type, y.shape = f"y{i}", x.type, ir.Shape([*lead, q.shape[1]])
        graph.append(node)
        graph.outputs.append(y)
    model = ir.Model(graph, ir_version=11)
    AddLowbitFunctions()(model)
    return model


def lookup_model(q: QTensor, columns: bool, layer: bool = False) -> ir.Model:
    """ids [batch, sequence] -> rows: columns of a linear layer's weight, which may be there as well (x ->
    y), or rows of a table [N, K]."""
    K = q.shape[0]
    ids = _value("ids", ir.DataType.INT64, ["batch", "sequence"])
    model = linear_model([q]) if layer else None
    if model is None:
        graph = ir.Graph([ids], [], nodes=[], opset_imports={"": 23}, name="lookup")
        model = ir.Model(graph, ir_version=11)
        parts = [add_initializer(graph, t, str(t.name)) for t in to_tensors(q, "W0", turned=not columns)]
    else:
        graph = model.graph
        graph.inputs.append(ids)
        parts = list(graph[0].inputs[1:])  # type: ignore[arg-type]
    form = FORMS[q.format]
    node = ir.node(form.columns if columns else form.lookup, [ids, *parts], domain=DOMAIN, name="lookup")
    rows = node.outputs[0]
    shape = [K, "batch", "sequence"] if columns else ["batch", "sequence", K]
    rows.name, rows.type, rows.shape = "rows", ir.TensorType(ir.DataType.FLOAT), ir.Shape(shape)
    graph.append(node)
    graph.outputs.append(rows)
    AddLowbitFunctions()(model)
    return model


def export_to(path: Path, name: str, model: ir.Model, **options: bool) -> Context:
    """Write the model as an engine takes it."""
    context = Context(**options)
    save_lowbit(EXPORTS[name].module.export(model, context), path)
    return context


def relative_error(got: np.ndarray, wanted: np.ndarray) -> float:
    assert got.shape == wanted.shape
    return float(np.linalg.norm(got.astype(np.float64) - wanted) / np.linalg.norm(wanted))


def dense(q: QTensor) -> np.ndarray:
    """float64 [K, N], by the definition of its format alone: a value, its scale and its offset."""
    spec = FORMATS[q.format]
    block = np.arange(q.shape[0]) // spec.block
    W = spec.values.astype(np.float64)[q.codes]
    scale = q.block_scale.astype(np.float64)[block] * np.float64(q.global_scale)
    if spec.offset == "none":
        return W * scale
    assert q.block_offset is not None
    if spec.offset == "mean":
        return W * scale + q.block_offset.astype(np.float64)[block]
    return (W - spec.values.astype(np.float64)[q.block_offset][block]) * scale
