"""Brings every node of the default domain to opset 23."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from qgraph.errors import UnsupportedError
from qgraph.passes.base import (
    GraphPass,
    attribute,
    copy_metadata,
    describe,
    make_node,
    replace_node,
    shape_of,
    top_graphs,
)

TARGET = 23
LOWEST_IR_VERSION = 11

# Operators whose later versions (up to 23) only accept more types, more broadcasting or more optional
# attributes: a node written for the older version means the same in the newer one. Read off the operators'
# changelog.
_ONLY_WIDENED = """
    Abs Acos Acosh Add And ArgMax ArgMin Asin Asinh Atan Atanh AveragePool Cast CastLike Ceil Concat
    Constant ConstantOfShape Conv Cos Cosh CumSum DepthToSpace DequantizeLinear Div Elu Equal Erf
    Exp Expand EyeLike Flatten Floor Gather GatherElements GatherND Gemm GlobalAveragePool
    GlobalMaxPool Greater GreaterOrEqual HardSigmoid HardSwish Identity If InstanceNormalization
    IsInf IsNaN LRN LeakyRelu Less LessOrEqual Log Loop LpNormalization MatMul Max MaxPool Mean Min
    Mish Mod Mul Neg NonZero Or PRelu Pow QLinearMatMul QuantizeLinear Range Reciprocal Relu Reshape
    Round ScatterElements ScatterND Selu Shape Sigmoid Sign Sin Sinh Size Softplus Softsign
    SpaceToDepth Sqrt Sub Sum Tan Tanh ThresholdedRelu Tile Transpose Where Xor
"""

Adapter = Callable[["RaiseOpset", ir.Node, int], None]


class RaiseOpset(GraphPass):
    """Rewrites nodes for opset 23, in the graph, its subgraphs and all functions; later opsets stay as they
    are.

    Rules:
    1. A node whose operator did not change since the file's opset, or was only widened, stays.
    2. Attributes that became inputs (axes, split, min/max, ratio) become constants.
    3. Softmax and its kin of opset < 13 flatten their input: only the last axis means the same today.
    4. Anything else is refused, with the name of the node.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = self._join_default_domain(model)
        for top in top_graphs(model):
            version = top.opset_imports.get("", model.opset_imports.get("", TARGET))
            if version < TARGET:
                for node in tuple(top.all_nodes()):
                    if node.domain == "" and node.op_identifier() not in model.functions:
                        self._raise_node(node, version)
                        modified = True
            if top.opset_imports.get("", 0) < TARGET:
                top.opset_imports[""] = TARGET
                modified = True
            for node in top.all_nodes():
                node.version = None
        newest = max(top.opset_imports[""] for top in top_graphs(model))
        for top in top_graphs(model):
            if top.opset_imports[""] < newest:
                # Every operator in use means the same from 23 on: see infer_shapes for those of 24 and later.
                top.opset_imports[""] = newest
                modified = True
        if model.ir_version < LOWEST_IR_VERSION:
            model.ir_version = LOWEST_IR_VERSION
            modified = True
        return ir.passes.PassResult(model, modified)

    @staticmethod
    def _join_default_domain(model: ir.Model) -> bool:
        """`ai.onnx` is a second spelling of the default domain."""
        modified = False
        for top in top_graphs(model):
            version = top.opset_imports.pop("ai.onnx", None)
            if version is not None:
                top.opset_imports[""] = max(version, top.opset_imports.get("", 0))
                modified = True
        return modified

    def _raise_node(self, node: ir.Node, version: int) -> None:
        import onnx

        def since(opset: int) -> int | None:
            try:
                return onnx.defs.get_schema(node.op_type, opset, "").since_version
            except onnx.defs.SchemaError:
                return None

        old, new = since(version), since(TARGET)
        if old is None or old == new:
            return  # an operator that ONNX does not define is left for shape inference to name
        adapter = _ADAPTERS.get(node.op_type)
        if adapter is not None:
            adapter(self, node, version)
        elif node.op_type not in _ONLY_WIDENED.split():
            raise UnsupportedError(
                f"{describe(node)}: no rule to raise it from opset {version} to {TARGET}; re-export with "
                f"opset {TARGET}"
            )

    # -- adapters -----------------------------------------------------------------------------------------

    def _constant(self, node: ir.Node, value: np.ndarray) -> ir.Value:
        constant = make_node("Constant", [], {"value": ir.tensor(value)})
        copy_metadata(node, [constant])
        assert node.graph is not None
        node.graph.insert_before(node, constant)
        return constant.outputs[0]

    def _append_input(self, node: ir.Node, index: int, value: ir.Value) -> None:
        if len(node.inputs) <= index:
            node.resize_inputs(index + 1)
        node.replace_input_with(index, value)

    def _move_to_input(
        self, node: ir.Node, name: str, index: int, dtype: np.typing.DTypeLike = np.int64
    ) -> None:
        given = node.attributes.pop(name, None)
        if given is not None:
            if given.is_ref():
                raise UnsupportedError(
                    f"{describe(node)}: '{name}' is a parameter of its function; re-export with opset "
                    f"{TARGET}"
                )
            self._append_input(node, index, self._constant(node, np.array(given.value, dtype)))

    def axes_to_input(self, node: ir.Node, version: int) -> None:
        self._move_to_input(node, "axes", 1)

    def split_to_input(self, node: ir.Node, version: int) -> None:
        self._move_to_input(node, "split", 1)
        if (len(node.inputs) < 2 or node.inputs[1] is None) and "num_outputs" not in node.attributes:
            node.attributes.add(ir.AttrInt64("num_outputs", len(node.outputs)))

    def slice_to_inputs(self, node: ir.Node, version: int) -> None:
        for index, name in enumerate(("starts", "ends", "axes"), start=1):
            self._move_to_input(node, name, index)

    def clip_to_inputs(self, node: ir.Node, version: int) -> None:
        for index, name in enumerate(("min", "max"), start=1):
            self._move_to_input(node, name, index, _float_type(node))

    def pad_to_inputs(self, node: ir.Node, version: int) -> None:
        self._move_to_input(node, "pads", 1)
        self._move_to_input(node, "value", 2, _float_type(node))

    def topk(self, node: ir.Node, version: int) -> None:
        if (given := node.attributes.pop("k", None)) is not None:
            self._append_input(node, 1, self._constant(node, np.array([given.value], np.int64)))

    def drop_ratio(self, node: ir.Node, version: int) -> None:
        """Inference ignores the ratio, and an old Dropout has no training input: it is the identity."""
        node.attributes.pop("ratio", None)

    def softmax_axis(self, node: ir.Node, version: int) -> None:
        if version >= 13:
            return
        axis = attribute(node, "axis", 1)
        shape = shape_of(node.inputs[0])
        if axis == -1 or (shape is not None and axis == len(shape) - 1):
            node.attributes.add(ir.AttrInt64("axis", -1))
            return
        if shape is not None and axis >= 0 and all(d == 1 for d in shape[axis + 1 :]):
            node.attributes.add(ir.AttrInt64("axis", axis))  # the default changed, too
            return
        raise UnsupportedError(
            f"{describe(node)}: before opset 13 it flattens from axis {axis} on, which is not the last; "
            f"re-export with opset {TARGET}"
        )

    def batch_norm(self, node: ir.Node, version: int) -> None:
        """Inference mode is the same since opset 9; training outputs never were."""
        if len(node.outputs) > 1 or attribute(node, "training_mode", 0):
            raise UnsupportedError(
                f"{describe(node)}: batch normalization in training mode; export for inference"
            )

    def scatter(self, node: ir.Node, version: int) -> None:
        renamed = make_node(
            "ScatterElements", node.inputs, {"axis": attribute(node, "axis", 0)}, name=node.name
        )
        replace_node(node, [renamed])


def _float_type(node: ir.Node) -> np.dtype:
    """The type of the constants that become inputs: that of the data, float32 where it is not declared."""
    dtype = node.inputs[0].dtype if node.inputs and node.inputs[0] is not None else None
    return (dtype or ir.DataType.FLOAT).numpy()


_ADAPTERS: dict[str, Adapter] = {
    **{
        f"Reduce{kind}": RaiseOpset.axes_to_input
        for kind in ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "Sum", "SumSquare")
    },
    "Squeeze": RaiseOpset.axes_to_input,
    "Unsqueeze": RaiseOpset.axes_to_input,
    "Split": RaiseOpset.split_to_input,
    "Slice": RaiseOpset.slice_to_inputs,
    "Clip": RaiseOpset.clip_to_inputs,
    "Pad": RaiseOpset.pad_to_inputs,
    "TopK": RaiseOpset.topk,
    "Dropout": RaiseOpset.drop_ratio,
    "Softmax": RaiseOpset.softmax_axis,
    "LogSoftmax": RaiseOpset.softmax_axis,
    "Hardmax": RaiseOpset.softmax_axis,
    "BatchNormalization": RaiseOpset.batch_norm,
    "Scatter": RaiseOpset.scatter,
}
