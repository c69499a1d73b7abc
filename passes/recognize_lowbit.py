"""Low-bit weights and roundings of activations that are written out in standard operators become low-bit
nodes again."""

from __future__ import annotations

import onnx_ir as ir

from qgraph.errors import InputError
from qgraph.formats.nvfp4 import NVFP4
from qgraph.passes.base import GraphPass, attribute, is_op, remove_dead, replace_node
from qgraph.passes.lowbit_functions import DOMAIN, AddLowbitFunctions
from qgraph.passes.lowbit_weights import COLUMNS, LINEARS, OF_LAYERS, from_node
from qgraph.passes.match_body import match_body


class RecognizeLowbit(GraphPass):
    """`MatMul(x, DequantizeLinear(codes, DequantizeLinear(block_scale, global_scale)))` -> `QLinearNVFP4`,
    and `Gather(DequantizeLinear(codes, ..), ids)` along axis 0 -> `QGatherNVFP4`; the bodies of `QLinearInt4`
    and its kin, of `QGatherColumns*`, of `DynamicQDQNVFP4` and `DynamicQDQInt8` (match_body.py) -> these.

    The inverse of `InlineLowbitFunctions`, so that a file of style `qdq` (ours, or another tool's with blocks
    of 16 along K, or along the rows of a table) compiles to the same kernels as one with functions. `codes`
    must be a FLOAT4E2M1 matrix and `block_scale` FLOAT8E4M3FN, both constant, dequantized to float32 without
    a zero point; anything else stays and is refused with the reason. So is a rounding to FLOAT4E2M1 and
    back that is not ours, and a weight of integers: no kernel dequantizes it by itself.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in tuple(model.graph.all_nodes()):
            if is_op(node, "MatMul", "Gather") and (op_types := _operators(node)):
                modified |= self._try_body(node, op_types, model.graph.opset_imports[""])
            elif is_op(node, "MatMul"):
                modified |= self._try(node, "QLinearNVFP4", weight=node.inputs[1], other=node.inputs[0])
            elif is_op(node, "Gather"):
                modified |= self._try(node, "QGatherNVFP4", weight=node.inputs[0], other=node.inputs[1])
            elif rounding := _rounding(node):
                modified |= self._try_rounding(node, rounding, model.graph.opset_imports[""])
        if modified:
            AddLowbitFunctions()(model)
        return ir.passes.PassResult(model, modified)

    def _try(self, node: ir.Node, op_type: str, weight: ir.Value | None, other: ir.Value | None) -> bool:
        outer = weight.producer() if weight is not None else None
        if outer is None or not is_op(outer, "DequantizeLinear"):
            return False
        codes, scale = outer.inputs[:2]
        if codes is None or codes.dtype != ir.DataType.FLOAT4E2M1 or scale is None:
            return False
        inner = scale.producer()
        if inner is None or not is_op(inner, "DequantizeLinear"):
            self.refuse(node, "the scale of its 4-bit weight is not a dequantized E4M3 tensor")
            return False
        block_scale, global_scale = inner.inputs[:2]
        reason = _mismatch(node, outer, inner, codes, block_scale, global_scale)
        if reason:
            self.refuse(node, reason)
            return False
        layer = ir.node(op_type, [other, codes, block_scale, global_scale], domain=DOMAIN, name=node.name)
        layer.doc_string = node.doc_string
        replace_node(node, [layer])
        remove_dead([weight])
        return True

    def _try_body(self, node: ir.Node, op_types: list[str], opset: int) -> bool:
        """Whether `node` ends the body of one of these operators, whose codes have the type of its weight."""
        reasons: dict[str, str] = {}
        for op_type in op_types:
            inputs = match_body(node, op_type, opset)
            if isinstance(inputs, str):
                reasons[op_type] = inputs
                continue
            layer = ir.node(op_type, inputs, domain=DOMAIN, name=node.name)
            if any(v.const_value is None or v.is_graph_input() for v in inputs[1:]):
                reasons[op_type] = "its weight is not constant"
            elif misfit := _misfit(layer):
                reasons[op_type] = misfit
            else:
                layer.doc_string = node.doc_string
                body = tuple(node.inputs)
                replace_node(node, [layer])
                remove_dead(body)
                return True
            for i in range(len(layer.inputs)):  # undo the uses
                layer.replace_input_with(i, None)
        bits = OF_LAYERS[op_types[0]].code_bits
        found = " or ".join(f"{op_type} ({reason})" for op_type, reason in reasons.items())
        self.refuse(node, f"it has {bits}-bit weights, but not as {found}")
        return False

    def _try_rounding(self, node: ir.Node, op_type: str, opset: int) -> bool:
        inputs = match_body(node, op_type, opset)
        if isinstance(inputs, str):
            if op_type == "DynamicQDQNVFP4":
                self.refuse(node, f"it rounds to FLOAT4E2M1, but not as {op_type} does: {inputs}")
            return False
        for value in inputs[1:]:  # the global scale, where there is one
            if value.const_value is None or value.dtype != ir.DataType.FLOAT or value.shape != []:
                self.refuse(node, f"the global scale of {op_type} is not one constant float32")
                return False
        rounding = ir.node(op_type, inputs, domain=DOMAIN, name=node.name)
        rounding.doc_string = node.doc_string
        body = tuple(node.inputs)
        replace_node(node, [rounding])
        remove_dead(body)
        return True


def _operators(node: ir.Node) -> list[str]:
    """The operators whose body may end at this MatMul, or Gather along axis 1: those with codes of the type
    that its weight is dequantized from."""
    lookup = is_op(node, "Gather")
    weight = node.inputs[0 if lookup else 1]
    source = weight.producer() if weight is not None else None
    if source is not None and is_op(source, "Add") and source.inputs[0] is not None:
        source = source.inputs[0].producer()
    if source is None or not is_op(source, "DequantizeLinear") or source.inputs[0] is None:
        return []
    dtype = source.inputs[0].dtype
    if lookup:
        by_columns = attribute(node, "axis", 0) in (1, -1)
        return [op for op, form in COLUMNS.items() if form.code_type == dtype] if by_columns else []
    return [op for op, form in LINEARS.items() if form.code_type == dtype != ir.DataType.FLOAT4E2M1]


def _misfit(layer: ir.Node) -> str:
    """Why the parts of this layer are no weight; empty when they are one."""
    try:
        from_node(layer)
    except (InputError, ValueError) as error:
        return str(error)
    return ""


def _rounding(node: ir.Node) -> str:
    """The operator whose body may end at `node`; empty where none can."""
    source = node.inputs[0].producer() if node.inputs and node.inputs[0] is not None else None
    if is_op(node, "DequantizeLinear") and source is not None and is_op(source, "QuantizeLinear"):
        to_fp4 = attribute(source, "output_dtype", 0) == int(ir.DataType.FLOAT4E2M1)
        return "DynamicQDQNVFP4" if to_fp4 else ""
    if is_op(node, "Mul") and source is not None and is_op(source, "Round"):
        quotient = source.inputs[0].producer() if source.inputs[0] is not None else None
        same = quotient is not None and is_op(quotient, "Div") and quotient.inputs[1] is node.inputs[1]
        return "DynamicQDQInt8" if same else ""
    return ""


def _mismatch(
    node: ir.Node,
    outer: ir.Node,
    inner: ir.Node,
    codes: ir.Value,
    block_scale: ir.Value | None,
    global_scale: ir.Value | None,
) -> str:
    """Why `node` and these two DequantizeLinear are not the body of a low-bit operator; empty when they
    are."""
    if any(len(n.inputs) > 2 and n.inputs[2] is not None for n in (outer, inner)):
        return "its 4-bit weight has a zero point"
    if block_scale is None or block_scale.dtype != ir.DataType.FLOAT8E4M3FN:
        return "the block scales of its 4-bit weight are not FLOAT8E4M3FN"
    if any(v is None or v.const_value is None for v in (codes, block_scale, global_scale)):
        return "its 4-bit weight or a scale of it is not constant"
    assert global_scale is not None and global_scale.const_value is not None and codes.shape is not None
    if global_scale.dtype != ir.DataType.FLOAT or global_scale.const_value.size != 1:
        return "the global scale of its 4-bit weight is not one float32"
    lookup = is_op(node, "Gather")
    if lookup and attribute(node, "axis", 0) not in (0, -2):
        return "it does not pick rows of its 4-bit table"
    axes, which = ((1, -1), "second") if lookup else ((0, -2), "first")
    if len(codes.shape) != 2 or attribute(outer, "axis", 1) not in axes:
        return f"its 4-bit weight is not a matrix with blocks along the {which} axis"
    if attribute(outer, "block_size", 0) != NVFP4.block:
        return f"the blocks of its 4-bit weight are not of {NVFP4.block}"
    for n in (outer, inner):
        if attribute(n, "output_dtype", 0) not in (0, int(ir.DataType.FLOAT)):
            return "its 4-bit weight is not dequantized to float32"
    return ""
