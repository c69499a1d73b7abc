"""Decomposed GELU becomes Gelu."""

from __future__ import annotations

import math
from dataclasses import dataclass

import onnx_ir as ir

from qgraph.passes.base import (
    GraphPass,
    is_op,
    make_node,
    remove_dead,
    replace_node,
    same_shape,
    scalar,
    used_once,
)

# GELU(x) = x/2 (1 + erf(x/sqrt(2))), and its approximation x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))
# (Hendrycks and Gimpel, "Gaussian error linear units", 2016, section 2).
_ERF = {1: math.sqrt(0.5)}
_TANH = {1: math.sqrt(2 / math.pi), 3: math.sqrt(2 / math.pi) * 0.044715}
_TOLERANCE = 1e-5
_DEPTH = 6  # nodes between x and the argument of erf or tanh, along any path

Polynomial = dict[int, float]


@dataclass(frozen=True)
class GeluMatch:
    last: ir.Node
    x: ir.Value
    approximate: str


class FuseGelu(GraphPass):
    """Matches from the Erf or Tanh outwards, whatever the order of the factors.

    Rules: 1. the argument, as a polynomial in x, is that of the definition, for some value x that it is made
    of;
    2. what is made of the result is (a f + b) x with a = b = 1/2. Values in between that others read keep
       being computed;
    3. the result has the shape of x: a constant of one element but more axes would add those to it.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in tuple(model.graph):
            match = match_gelu(node) if node.graph is not None else None
            if match is not None:
                gelu = make_node("Gelu", [match.x], {"approximate": match.approximate}, name=match.last.name)
                replaced = list(match.last.inputs)
                replace_node(match.last, [gelu])
                remove_dead(replaced)
                modified = True
            elif is_op(node, "Erf"):
                self.refuse(node, "it is not part of a GELU in a known spelling")
        return ir.passes.PassResult(model, modified)


def match_gelu(node: ir.Node) -> GeluMatch | None:
    """The GELU around the Erf or Tanh `node`."""
    if not is_op(node, "Erf", "Tanh") or node.inputs[0] is None:
        return None
    argument = node.inputs[0]
    wanted, approximate = (_ERF, "none") if node.op_type == "Erf" else (_TANH, "tanh")
    for x in _made_of(argument, _DEPTH):
        if not _close(_polynomial(argument, x, _DEPTH), wanted):
            continue
        last = _outer(node, x)
        if last is not None and same_shape(last.outputs[0], x):
            return GeluMatch(last, x, approximate)
    return None


def _made_of(value: ir.Value, depth: int) -> list[ir.Value]:
    """The non-constant values that `value` is computed from, nearest first."""
    found: list[ir.Value] = []
    level = [value]
    for _ in range(depth):
        found += [v for v in level if v not in found]
        producers = [v.producer() for v in level]
        level = [
            v
            for p in producers
            if p is not None and is_op(p, "Add", "Sub", "Mul", "Div", "Pow")
            for v in p.inputs
            if v is not None and v.const_value is None
        ]
    return found


def _polynomial(value: ir.Value | None, x: ir.Value, depth: int) -> Polynomial | None:
    """`value` as a polynomial in x (power -> coefficient), or None."""
    if value is x:
        return {1: 1.0}
    if (number := scalar(value)) is not None:
        return {0: number}
    node = value.producer() if value is not None else None
    if node is None or depth == 0 or not is_op(node, "Add", "Mul", "Div", "Pow"):
        return None
    left, right = (_polynomial(v, x, depth - 1) for v in node.inputs[:2])
    if left is None or right is None:
        return None
    if node.op_type == "Add":
        return {p: left.get(p, 0.0) + right.get(p, 0.0) for p in left | right}
    if node.op_type == "Mul":
        return _times(left, right)
    exponent = right.get(0, 0.0)
    if set(right) != {0}:
        return None
    if node.op_type == "Div":
        return _times(left, {0: 1 / exponent}) if exponent else None
    if exponent not in (1.0, 2.0, 3.0):
        return None
    result = left
    for _ in range(int(exponent) - 1):
        result = _times(result, left)
    return result


def _times(a: Polynomial, b: Polynomial) -> Polynomial:
    product: Polynomial = {}
    for p, u in a.items():
        for q, v in b.items():
            product[p + q] = product.get(p + q, 0.0) + u * v
    return product


def _close(found: Polynomial | None, wanted: Polynomial) -> bool:
    if found is None:
        return False
    powers = {p for p, c in found.items() if c != 0.0}
    return powers == set(wanted) and all(
        math.isclose(found[p], wanted[p], rel_tol=_TOLERANCE) for p in wanted
    )


def _outer(node: ir.Node, x: ir.Value) -> ir.Node | None:
    """The last node of x (f/2 + 1/2), where f is the output of `node`."""
    a, b, multiplied = 1.0, 0.0, False
    while not (
        multiplied and math.isclose(a, 0.5, rel_tol=_TOLERANCE) and math.isclose(b, 0.5, rel_tol=_TOLERANCE)
    ):
        output = node.outputs[0]
        if not used_once(output):
            return None
        node = output.consumers()[0]
        if not is_op(node, "Add", "Mul", "Div") or len(node.inputs) != 2:
            return None
        place = list(node.inputs).index(output)
        other = _polynomial(node.inputs[1 - place], x, 2)
        if other is None or len(other) != 1:
            return None
        ((power, factor),) = other.items()
        if node.op_type == "Add" and power == 0 and not multiplied:
            b += factor
        elif node.op_type == "Mul" and power <= (0 if multiplied else 1):
            a, b, multiplied = a * factor, b * factor, multiplied or power == 1
        elif node.op_type == "Div" and power == 0 and place == 0 and factor:
            a, b = a / factor, b / factor
        else:
            return None
    return node
