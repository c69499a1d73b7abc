"""Weights stand as MatMul reads them, [K, N], and are stored once."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qgraph.passes.base import (
    GraphPass,
    add_initializer,
    attribute,
    copy_metadata,
    is_op,
    make_node,
    printable,
    replace_node,
)

TIED = "qgraph.tied"


class OrientWeights(GraphPass):
    """MatMul(x, Transpose(W)) with a constant matrix W  ->  MatMul(x, W^T), deciding once for each W.

    Rules:
    1. W is read through transposes only: W^T replaces it and takes its name.
    2. W is also an embedding table, read by Gather along axis 0 (tied input and output embeddings): W^T
       replaces it too, and each such Gather reads columns: Gather(W, ids, axis=0) = Transpose(Gather(W^T,
       ids, axis=1)). So there is one initializer, and the output layer is an ordinary linear layer. Both
       nodes carry `qgraph.tied` with the other's name. The price is a strided read of one column for each
       token.
    3. The exporter has stored W^T beside such a table already (equal bytes, turned): the table goes as in 2.
    4. W is read some other way too: W^T is stored beside it, and the reason is recorded.
    A Transpose of a constant that no MatMul reads as its right operand is treated alike.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        modified = False
        for value in list(graph.initializers.values()):
            turns = [node for node, _ in value.uses() if self._turns(node)]
            if turns:
                self._orient(graph, value, turns)
                modified = True
        for table in list(graph.initializers.values()):
            if (weight := _stored_transpose(graph, table)) is not None:
                self._tie(graph, table, weight)
                modified = True
        return ir.passes.PassResult(model, modified)

    @staticmethod
    def _turns(node: ir.Node) -> bool:
        """Whether `node` transposes a constant matrix."""
        if not is_op(node, "Transpose"):
            return False
        value = node.inputs[0]
        if (
            value is None
            or value.const_value is None
            or len(value.const_value.shape) != 2
            or value.is_graph_input()
        ):
            return False
        return list(attribute(node, "perm", (1, 0))) == [1, 0] and not node.outputs[0].is_graph_output()

    def _orient(self, graph: ir.Graph, weight: ir.Value, turns: list[ir.Node]) -> None:
        others = [node for node, _ in weight.uses() if node not in turns]
        gathers = [node for node in others if _is_embedding(node, weight)]
        turned = _transposed(weight)
        name = weight.name or "weight"
        if len(gathers) == len(others) and not weight.is_graph_output():
            readers = sorted({n.name or "" for t in turns for n in t.outputs[0].consumers()})
            for gather in gathers:
                gather.metadata_props[TIED] = ", ".join(readers)
            weight.name = f"{name}.rows"
            new = add_initializer(graph, turned, name)
            new.metadata_props.update(weight.metadata_props)
            tied = [_gather_columns(gather, new) for gather in gathers]
            for turn in turns:
                for reader in turn.outputs[0].consumers():
                    if tied:
                        reader.metadata_props[TIED] = ", ".join(sorted(tied))
        else:
            new = add_initializer(graph, turned, f"{name}.transposed")
            kinds = sorted({node.op_type for node in others if node not in gathers}) or ["an output"]
            self.refuse(
                f"initializer '{printable(name)}'",
                f"is stored a second time, transposed: {', '.join(kinds)} needs its rows",
            )
        for turn in turns:
            turn.outputs[0].replace_all_uses_with(new)
            graph.remove(turn, safe=True)
        if not weight.uses() and not weight.is_graph_output() and weight.name is not None:
            del graph.initializers[weight.name]

    @staticmethod
    def _tie(graph: ir.Graph, table: ir.Value, weight: ir.Value) -> None:
        """Lets every lookup in `table` read columns of `weight`, its transpose."""
        readers = [node for node, _ in weight.uses()]
        names = sorted({node.name or "" for node in readers})
        gathers = [node for node, _ in table.uses()]
        for gather in gathers:
            gather.metadata_props[TIED] = ", ".join(names)
        tied = sorted(_gather_columns(gather, weight) for gather in gathers)
        for reader in readers:
            reader.metadata_props[TIED] = ", ".join(tied)
        name = table.name
        assert name is not None
        del graph.initializers[name]
        weight.name = name  # the table's name is the model's own; a transposed copy has the exporter's

    def ensures(self, model: ir.Model) -> None:
        if left := [node for node in model.graph if self._turns(node)]:
            raise ir.passes.PostconditionError(f"{left[0].name} still transposes a constant")


def _is_embedding(node: ir.Node, weight: ir.Value) -> bool:
    return (
        is_op(node, "Gather")
        and node.inputs[0] is weight
        and node.inputs[1] is not weight
        and attribute(node, "axis", 0) in (0, -2)
        and node.inputs[1] is not None
        and node.inputs[1].shape is not None
    )


def _stored_transpose(graph: ir.Graph, table: ir.Value) -> ir.Value | None:
    """The right operand of a MatMul that equals `table` transposed, where only embedding lookups read
    `table`."""
    tensor = table.const_value
    if tensor is None or len(tensor.shape) != 2 or table.is_graph_output() or not table.uses():
        return None
    if not all(_is_embedding(node, table) for node, _ in table.uses()):
        return None
    for weight in graph.initializers.values():
        other = weight.const_value
        if (
            weight is not table
            and other is not None
            and other.dtype == tensor.dtype
            and tuple(other.shape) == tuple(tensor.shape)[::-1]
            and not weight.is_graph_output()
            and all(is_op(node, "MatMul") and index == 1 for node, index in weight.uses())
            and _is_transpose(tensor.numpy(), other.numpy())
        ):
            return weight
    return None


def _is_transpose(a: np.ndarray, b: np.ndarray) -> bool:
    return np.array_equal(a[0], b[:, 0]) and np.array_equal(a, b.T)


def _gather_columns(node: ir.Node, columns: ir.Value) -> str:
    """Rewrites an embedding lookup to read columns. Returns its name."""
    ids = node.inputs[1]
    assert ids is not None and ids.shape is not None
    rank = len(ids.shape)
    gather = make_node("Gather", [columns, ids], {"axis": 1}, name=node.name)
    if rank == 0:
        replace_node(node, [gather])
    else:
        perm = [*range(1, rank + 1), 0]
        back = make_node("Transpose", [gather.outputs[0]], {"perm": perm}, name=f"{node.name}/rows")
        copy_metadata(node, [gather])
        replace_node(node, [gather, back])
        back.metadata_props.pop(TIED, None)
    return gather.name or ""


def _transposed(weight: ir.Value) -> ir.TensorProtocol:
    """W^T, computed when it is read; nothing is copied before."""
    tensor = weight.const_value
    assert tensor is not None
    rows, columns = tensor.shape.numpy()
    return ir.LazyTensor(
        lambda: ir.Tensor(np.ascontiguousarray(tensor.numpy().T), dtype=tensor.dtype),
        dtype=tensor.dtype,
        shape=ir.Shape((columns, rows)),
        cache=True,
    )
