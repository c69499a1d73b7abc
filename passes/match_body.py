"""Finds the body of a low-bit operator that was written out in standard operators."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from qgraph.passes.base import describe, is_op
from qgraph.passes.lowbit_bodies import DEFINITIONS


def match_body(last: ir.Node, op_type: str, opset: int) -> list[ir.Value] | str:
    """The inputs that the operator had if `last` ends its body, else where the two part, for a message.

    The pattern is the body itself (lowbit_bodies.py): operators, attributes (one that is left out has its
    default), constants to the bit and the use of values must agree. Names do not matter, nor whether a
    constant is a node or an initializer, nor who else reads a value.
    """
    formals = [ir.Value(name=name) for name in DEFINITIONS[op_type].formals]
    match = _Match(formals, opset)
    pattern = DEFINITIONS[op_type].body(formals)[-1]
    if match.values(pattern.outputs[0], last.outputs[0]):
        return [match.bound[formal] for formal in formals]
    return match.reason


class _Match:
    """One comparison: what the values of the pattern are in the graph, so far."""

    def __init__(self, formals: list[ir.Value], opset: int) -> None:
        self.bound: dict[ir.Value, ir.Value] = {}
        self.reason = ""
        self._formals = frozenset(formals)
        self._opset = opset

    def values(self, want: ir.Value | None, have: ir.Value | None) -> bool:
        """Whether `have` is computed as `want` is. Sets `reason` where not."""
        if want is None or have is None:
            return want is have or self._differ(want, have)
        if want in self.bound:
            return self.bound[want] is have or self._differ(want, have)
        pattern = want.producer()
        if pattern is not None:
            same = self._constants if is_op(pattern, "Constant") else self._nodes
            if not same(pattern, have):
                return self._differ(want, have)
        self.bound[want] = have
        return True

    def _nodes(self, pattern: ir.Node, have: ir.Value) -> bool:
        node = have.producer()
        if node is None or node.op_identifier() != pattern.op_identifier() or have.index() != 0:
            return False
        want_inputs, have_inputs = _given(pattern), _given(node)
        return (
            len(want_inputs) == len(have_inputs)
            and self._attributes(pattern) == self._attributes(node)
            and all(self.values(w, h) for w, h in zip(want_inputs, have_inputs, strict=True))
        )

    def _attributes(self, node: ir.Node) -> dict[str, Any]:
        """All attributes, those left out at their defaults."""
        from onnx import defs, helper

        schema = defs.get_schema(node.op_type, self._opset, "").attributes
        found = {
            n: helper.get_attribute_value(a.default_value) for n, a in schema.items() if a.default_value.name
        }
        found.update({name: attribute.value for name, attribute in node.attributes.items()})
        return {n: v.decode() if isinstance(v, bytes) else v for n, v in found.items()}

    @staticmethod
    def _constants(pattern: ir.Node, have: ir.Value) -> bool:
        want = pattern.attributes["value"].as_tensor()
        tensor = None if have.is_graph_input() else ir.convenience.get_const_tensor(have)
        return (
            tensor is not None
            and tensor.dtype == want.dtype
            and tensor.shape == want.shape
            and tensor.tobytes() == want.tobytes()
        )

    def _differ(self, want: ir.Value | None, have: ir.Value | None) -> bool:
        if not self.reason:  # the first is the deepest
            found = "nothing" if have is None else describe(have)
            self.reason = f"{found} is not its {'nothing' if want is None else want.name}"
        return False


def _given(node: ir.Node) -> list[ir.Value | None]:
    """The inputs without the empty ones at the end."""
    inputs = list(node.inputs)
    while inputs and inputs[-1] is None:
        inputs.pop()
    return inputs
