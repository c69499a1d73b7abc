"""Masks of Attention: what follows from places alone becomes `is_causal`, the rest has the form that runs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
import sympy

from qgraph.passes.attention_mask import (
    HIDES,
    Frame,
    Known,
    addends,
    condition_of,
    conjuncts,
    formula_of,
    is_causal,
    leaves_a_key,
)
from qgraph.passes.base import (
    GraphPass,
    add_initializer,
    attribute,
    constant,
    is_op,
    make_node,
    remove_dead,
    shape_of,
)
from qgraph.passes.index_functions import dims_of, index_functions
from qgraph.passes.shapes.dims import tidy, to_ir

LOW = -1e38  # hides what it is added to, and absorbs it, but is not the lowest float32
_LOWEST = float(np.finfo(np.float32).min)

_Condition = tuple[ir.Value, bool]  # a boolean value, and whether it is negated


class SimplifyMask(GraphPass):
    """Rewrites the masks of Attention nodes, to the same results. Runs on inferred shapes.

    Rules:
    1. A mask that adds 0 or -inf by a condition is that condition; so is one that adds 0 or at most -10^4
       where each query is sure to attend a key. (Where a query attends none, finite numbers cancel and all
       keys count alike: such a mask stays a sum.)
    2. `key <= query + past` among the conditions, or as a summand of 0 and -inf, becomes `is_causal`. A
       condition that always holds goes.
    3. What is left names every query: ONNX Runtime does not broadcast a mask along them. The lowest float32
       in it becomes -10^38, which hides as well: ONNX Runtime takes just that number for -inf.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        masked = [
            n for n in model.graph if is_op(n, "Attention") and n.inputs[3:] and n.inputs[3] is not None
        ]
        if not masked:
            return ir.passes.PassResult(model, False)
        editor = _Editor(model.graph, index_functions(model.graph))
        modified = False
        for node in masked:
            modified |= editor.simplify(node)
        return ir.passes.PassResult(model, modified)


def frame_of(node: ir.Node) -> Frame | None:
    """Queries and keys of an Attention; None where their numbers are not known."""
    q, k = dims_of(node.inputs[0]), dims_of(node.inputs[1])
    past = node.inputs[4] if len(node.inputs) > 4 else None
    held = dims_of(past)
    if q is None or k is None or (past is not None and held is None):
        return None
    at = 2 if len(q) == 4 else 1
    before = 0 if held is None else held[2]
    return Frame(q[at], tidy(k[at] + before), before)


class _Editor:
    """Writes masks, each once."""

    def __init__(self, graph: ir.Graph, known: Known) -> None:
        self.graph = graph
        self.known = known
        self._made: dict[tuple, ir.Value] = {}

    def simplify(self, node: ir.Node) -> bool:
        mask, frame = node.inputs[3], frame_of(node)
        dims = dims_of(mask)
        # A mask shorter than the keys also hides those beyond it.
        if mask is None or frame is None or not dims or dims[-1] != frame.keys:
            return False
        modified = self._raise_lowest(mask)
        causal, rest = self._split(node, mask, frame)
        if causal and not attribute(node, "is_causal", 0):
            node.attributes["is_causal"] = ir.AttrInt64("is_causal", 1)
            modified = True
        if rest is not None:
            rest_dims = dims_of(rest)
            rest = rest if rest_dims and rest_dims[-1] == frame.keys else mask
            rest = self._for_all_queries(node, rest, frame)
        if rest is not mask:
            node.replace_input_with(3, rest)
            remove_dead([mask])
            modified = True
        return modified

    def _raise_lowest(self, mask: ir.Value) -> bool:
        """Rule 3 of the lowest float32."""
        modified = False
        for node in [term.producer() for term in addends(mask)]:
            for index in (1, 2) if is_op(node, "Where") else (0, 1) if is_op(node, "Mul") else ():
                assert node is not None  # is_op
                number = constant(node.inputs[index])
                if number is None or number.size != 1 or number.reshape(()) != _LOWEST:
                    continue
                key = ("lowest", number.shape)
                if key not in self._made:
                    array = np.full(number.shape, LOW, np.float32)
                    self._made[key] = add_initializer(self.graph, array, "mask.hidden")
                node.replace_input_with(index, self._made[key])
                modified = True
        return modified

    def _split(self, node: ir.Node, mask: ir.Value, frame: Frame) -> tuple[bool, ir.Value | None]:
        """Whether it hides the future, and what it hides beyond that: `mask` itself where that is no less."""
        if mask.dtype == ir.DataType.BOOL:
            conditions = list(conjuncts(mask))
            causal, rest = self._split_conditions(conditions, frame)
            return causal, mask if len(rest) == len(conditions) else self._all_of(node, rest)
        terms = list(addends(mask))
        found = [condition_of(term) for term in terms]
        if len(terms) == 1 and found[0] is not None:
            condition, negated, value = found[0]
            conditions = list(conjuncts(condition, negated))
            if value == -np.inf or (value <= HIDES and self._leave_a_key(conditions, frame)):
                causal, rest = self._split_conditions(conditions, frame)
                return causal, self._all_of(node, rest)
        causal, kept = False, []
        for term, hidden in zip(terms, found, strict=True):
            conditions = list(conjuncts(*hidden[:2])) if hidden is not None and hidden[2] == -np.inf else []
            is_past, rest = self._split_conditions(conditions, frame)
            causal |= is_past
            if not conditions or rest:
                kept.append(term)
        return causal, mask if len(kept) == len(terms) else self._joined(node, "Add", kept)

    def _split_conditions(self, conditions: list[_Condition], frame: Frame) -> tuple[bool, list[_Condition]]:
        """Whether they hide the future, and those that say more than that."""
        causal, rest = False, []
        for condition in conditions:
            found = formula_of(*condition, self.known)
            says_more = found is None or (found[0] != sympy.true and not is_causal(*found, frame))
            if found is not None and is_causal(*found, frame):
                causal, says_more = True, isinstance(found[0], sympy.And)
            if says_more:
                rest.append(condition)
        return causal, rest

    def _leave_a_key(self, conditions: list[_Condition], frame: Frame) -> bool:
        formulas = [formula_of(*condition, self.known) for condition in conditions]
        return all(f is not None and leaves_a_key(*f, frame) for f in formulas)

    def _all_of(self, node: ir.Node, conditions: list[_Condition]) -> ir.Value | None:
        values = [self._op(node, "Not", [v]) if negated else v for v, negated in conditions]
        return self._joined(node, "And", values)

    def _joined(self, node: ir.Node, op_type: str, values: Sequence[ir.Value]) -> ir.Value | None:
        if not values:
            return None
        result = values[0]
        for value in values[1:]:
            result = self._op(node, op_type, [result, value])
        return result

    def _op(self, node: ir.Node, op_type: str, inputs: list[ir.Value]) -> ir.Value:
        """An elementwise operator of masks, in front of the first Attention that needs it."""
        key = (op_type, *inputs)
        if key not in self._made:
            self._made[key] = self._insert(node, [make_node(op_type, inputs)], _broadcast(inputs), inputs[0])
        return self._made[key]

    def _for_all_queries(self, node: ir.Node, mask: ir.Value, frame: Frame) -> ir.Value:
        """`mask` with its axis of queries in full."""
        dims, q = dims_of(mask), node.inputs[0]
        assert dims is not None and q is not None  # simplify has looked
        if frame.queries == 1 or (len(dims) > 1 and dims[-2] == frame.queries):
            return mask
        key = ("Expand", mask, frame.queries)
        if key not in self._made:
            at = 2 if len(shape_of(q) or ()) == 4 else 1
            length = make_node("Shape", [q], {"start": at, "end": at + 1})
            one = add_initializer(self.graph, np.array([1], np.int64), "mask.one")
            target = make_node("Concat", [one, one, length.outputs[0], one], {"axis": 0})
            expand = make_node("Expand", [mask, target.outputs[0]])
            full = [1] * (4 - len(dims)) + list(dims)
            full[-2] = frame.queries
            self._made[key] = self._insert(node, [length, target, expand], [to_ir(d) for d in full], mask)
        return self._made[key]

    def _insert(self, node: ir.Node, new: list[ir.Node], dims: list, like: ir.Value) -> ir.Value:
        self.graph.insert_before(node, new)
        result = new[-1].outputs[0]
        result.shape, result.type = ir.Shape(dims), like.type
        return result


def _broadcast(values: list[ir.Value]) -> list[int | ir.SymbolicDim]:
    """The shape of masks joined: of two dimensions, one is 1 or they are the same."""
    shapes = [tuple(shape_of(v) or ()) for v in values]
    rank = max(map(len, shapes))
    padded = [(1,) * (rank - len(s)) + s for s in shapes]
    return [next((d for d in column if d != 1), 1) for column in zip(*padded, strict=True)]
