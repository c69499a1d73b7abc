"""TensorRT: the form that NVIDIA's Model Optimizer gives NVFP4 layers, which TensorRT's parser knows.

Weights lie as [N, K], with blocks along K, behind two DequantizeLinear and a Transpose; activations go
through `trt::TRT_FP4DynamicQuantize`, whose block scales are found at run time. Nothing else has a low-bit
form: integers are taken in blocks of 64 or 128 without offset alone, and FP4 in products alone.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qgraph.errors import UnsupportedError
from qgraph.export import Context
from qgraph.export.rewrite import (
    Replacement,
    constant_shape,
    finish,
    input_of,
    rank,
    to_float,
    weight_name,
    width,
)
from qgraph.formats import FORMATS
from qgraph.formats.nvfp4 import BLOCK, NVFP4
from qgraph.formats.packing import pack_bits
from qgraph.passes.base import replace_value
from qgraph.passes.cache import find_cache
from qgraph.passes.lowbit_functions import ROUNDINGS, lowbit_nodes
from qgraph.passes.lowbit_weights import LINEARS, from_node

DOMAIN = "trt"
NEWEST_OPSET = 25  # that TensorRT 11 reads, by NVIDIA's "ONNX Opset Guide"

Held = dict[ir.Value, tuple[ir.Value, ...]]


def export(model: ir.Model, context: Context) -> ir.Model:
    """See `qgraph.export`. Raises UnsupportedError for a model that TensorRT's parser refuses as a whole."""
    opset = model.graph.opset_imports[""]
    if opset > NEWEST_OPSET:
        raise UnsupportedError(
            f"export 'tensorrt': the model has opset {opset}, TensorRT 11 reads {NEWEST_OPSET} at most: "
            "export it with an earlier one"
        )
    if find_cache(model.graph) is not None:
        raise UnsupportedError(
            "export 'tensorrt': the model has a cache of keys and values: TensorRT takes no Attention with "
            "one: export it without"
        )
    held: Held = {}
    tables: dict[ir.Value, ir.Value] = {}
    for node in lowbit_nodes(model):
        if node.op_type == ROUNDINGS["int8"]:
            continue
        reason = _reason(node)
        if node.op_type == ROUNDINGS["nvfp4"]:
            if reason:
                context.leave(node, reason)
                replace_value(node.outputs[0], input_of(node, 0))
            else:
                _rounding(node)
        elif reason:
            context.leave(node, reason)
            to_float(node, tables)
        else:
            _linear(node, held)
            context.keep(node)
    return finish(model, {DOMAIN: 1})


def _reason(node: ir.Node) -> str:
    """Why TensorRT has no low-bit form of this node; empty where it has one."""
    if node.op_type == ROUNDINGS["nvfp4"]:
        x = input_of(node, 0)
        if rank(x) not in (2, 3):
            return f"TensorRT quantizes activations of 2 or 3 dims, not {rank(x)}"
        assert x.shape is not None
        K = x.shape[-1]
    elif node.op_type in LINEARS:
        form = LINEARS[node.op_type]
        if form.format != NVFP4.name:
            return f"TensorRT has no {form.format} with blocks of {FORMATS[form.format].block}"
        K = constant_shape(input_of(node, 1))[0]
    else:
        return "TensorRT has FP4 in products alone, not in lookups"
    if not isinstance(K, int) or K % BLOCK:
        return f"TensorRT takes FP4 in whole blocks of {BLOCK}, and {K} inputs are not"
    return ""


def _linear(node: ir.Node, held: Held) -> None:
    """x @ Transpose(DequantizeLinear(codes, DequantizeLinear(block_scale, global_scale)))."""
    new, codes = Replacement(node), input_of(node, 1)
    if codes not in held:
        q, name = from_node(node), weight_name(node)
        K, N = q.shape
        packed = ir.PackedTensor(
            pack_bits(q.codes.T, 4), ir.DataType.FLOAT4E2M1, shape=(N, K), name=f"{name}.fp4"
        )
        scale = new.tensor(f"{name}.fp4_scale", np.ascontiguousarray(q.block_scale.T))
        held[codes] = (new.tensor(f"{name}.fp4", packed), scale, input_of(node, 3))
    fp4, block_scale, global_scale = held[codes]
    W = new.add(
        "weight_t", "Transpose", _dequantized(new, "weight", fp4, block_scale, global_scale), perm=[1, 0]
    )
    new.add("y", "MatMul", input_of(node, 0), W)
    new.finish()


def _rounding(node: ir.Node) -> None:
    """x rounded to NVFP4 with block scales of its own."""
    new = Replacement(node)
    x, scale = input_of(node, 0), input_of(node, 1)
    fp4, block_scale = new.add_two(
        "fp4", "TRT_FP4DynamicQuantize", x, scale, domain=DOMAIN, axis=-1, block_size=BLOCK,
        scale_type=int(ir.DataType.FLOAT8E4M3FN),
    )  # fmt: skip
    assert x.shape is not None
    K = width(x)
    for value, dtype, last in ((fp4, "FLOAT4E2M1", K), (block_scale, "FLOAT8E4M3FN", K // BLOCK)):
        value.type, value.shape = ir.TensorType(ir.DataType[dtype]), ir.Shape([*x.shape[:-1], last])
    _dequantized(new, "y", fp4, block_scale, scale)
    new.finish()


def _dequantized(
    new: Replacement, name: str, fp4: ir.Value, block_scale: ir.Value, global_scale: ir.Value
) -> ir.Value:
    """float32, its blocks along the last axis."""
    s = new.add(f"{name}_scale", "DequantizeLinear", block_scale, global_scale)
    return new.add(name, "DequantizeLinear", fp4, s, axis=-1, block_size=BLOCK)
