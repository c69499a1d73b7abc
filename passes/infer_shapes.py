"""Gives every value of the graph its dtype and a complete shape."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from typing import NoReturn

import onnx_ir as ir
import sympy

from qgraph.errors import InputError, QGraphError, UnsupportedError
from qgraph.passes.base import GraphPass, describe, printable
from qgraph.passes.shapes import RULES, Dim, Fact, NewFactError, NodeView, World, object_array
from qgraph.passes.shapes.dims import from_ir, symbol, tidy, to_ir
from qgraph.passes.shapes.node import MAX_CONTENT

CHECKS = "qgraph.checks"
CONTENT = "qgraph.content"

_MAX_FACTS = 1000


class InferShapes(GraphPass):
    """Walks the graph in order and computes dtypes and shapes as functions of the inputs' dimensions.

    What it writes:
    * `value.dtype` and `value.shape` of every input, initializer and node output. A dimension is an int or an
      `ir.SymbolicDim` that is a name or an expression over the names in the inputs' shapes.
    * Inputs: unnamed dimensions get names; a dimension that the graph needs to equal another is declared as
       that.
    * `graph.meta["qgraph.checks"]`: list of (a, b, message), a and b int or `ir.SymbolicDim`; `a >= b` must
       hold
      at run time for the shapes to be right.
    * `value.meta["qgraph.content"]`: the elements of small integer tensors that depend on shapes only, as an
       object
      array of int, `ir.SymbolicDim`, or None for unknown ones. Such a value need not be computed at run time.

    Every named dimension is taken to be at least 1. What stands in the file as shapes of intermediate values
    is ignored.

    Raises:
        InputError: shapes or types do not fit.
        UnsupportedError: an operator without a rule, or a size that depends on data.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        world = World(at_least=known_checks(graph))
        self._name_dimensions(graph, world)
        for _ in range(_MAX_FACTS):
            try:
                facts = _infer(graph, world, graph.opset_imports.get("", 23))
                break
            except NewFactError:
                continue
        else:
            raise UnsupportedError(
                f"shape inference needs more than {_MAX_FACTS} assumptions about the inputs' dimensions"
            )
        for note in world.notes:
            self.refuse("inputs", note)
        return ir.passes.PassResult(model, self._write(graph, facts, world))

    def _name_dimensions(self, graph: ir.Graph, world: World) -> None:
        """Makes every dimension of every input an int, a name, or an expression over such names."""
        names: dict[sympy.Symbol, int] = {}
        for value in graph.inputs:
            if value.shape is None or value.dtype is None:
                raise InputError(
                    f"input {describe(value)} has no declared shape or type; export the model with both"
                )
            for dim in value.shape:
                if isinstance(dim, ir.SymbolicDim) and dim.value and dim.value.isidentifier():
                    names.setdefault(symbol(dim.value), len(names))
        for value in graph.inputs:
            for dim in value.shape or ():
                if isinstance(dim, ir.SymbolicDim) and (told := _told(dim, names)) is not None:
                    names.setdefault(told, len(names))
        for value in graph.inputs:
            assert value.shape is not None
            if any(isinstance(dim, int) and dim < 0 for dim in value.shape):
                raise InputError(f"input {describe(value)} has a negative dimension")
            dims = []
            for axis, dim in enumerate(value.shape):
                if isinstance(dim, ir.SymbolicDim) and not _is_bound(dim, names):
                    fresh = _fresh_name(dim.value or f"{value.name}_dim{axis}", names)
                    names[symbol(fresh)] = len(names)
                    dim = ir.SymbolicDim(fresh)
                dims.append(dim)
            if tuple(dims) != value.shape.dims:
                value.shape = ir.Shape(dims)
        world.order = names

    @staticmethod
    def _write(graph: ir.Graph, facts: dict[ir.Value, Fact], world: World) -> bool:
        modified = False
        for value, fact in facts.items():
            shape = ir.Shape([to_ir(dim) for dim in fact.shape])
            if value.shape is None or value.shape.dims != shape.dims or value.dtype != fact.dtype:
                value.shape, value.type = shape, ir.TensorType(fact.dtype)
                modified = True
            content = None if value.is_initializer() else _content_to_ir(fact)
            if content is None:
                value.meta.pop(CONTENT, None)
            else:
                value.meta[CONTENT] = content
        checks = [
            (to_ir(world.substitute(a)), to_ir(world.substitute(b)), message)
            for a, b, message in world.at_least
        ]
        modified |= checks != graph.meta.get(CHECKS, [])
        graph.meta[CHECKS] = checks
        return modified

    def ensures(self, model: ir.Model) -> None:
        for node in model.graph:
            for value in node.outputs:
                if value.dtype is None or value.shape is None or value.shape.has_unknown_dim():
                    raise ir.passes.PostconditionError(f"{describe(value)} has no complete shape")


def known_checks(graph: ir.Graph) -> list[tuple[Dim, Dim, str]]:
    """Checks of an earlier run hold on: a pass may since have removed the node that needed them."""
    known: list[tuple[Dim, Dim, str]] = []
    for a, b, message in graph.meta.get(CHECKS, []):
        left, right = from_ir(a), from_ir(b)
        assert left is not None and right is not None
        known.append((left, right, message))
    return known


def _is_bound(dim: ir.SymbolicDim, names: Iterable[sympy.Symbol]) -> bool:
    """Whether `dim` is an expression over names that other dimensions bind."""
    value = _expression(dim)
    return value is not None and value.free_symbols <= set(names)


def _told(dim: ir.SymbolicDim, names: Iterable[sympy.Symbol]) -> sympy.Symbol | None:
    """The name that no dimension has for itself, but that `dim` tells, being that name less others: `total`,
    of the length `total - sequence` of a cache. It is at least 1, as `dim` is at least 0 and `sequence` 1."""
    value = _expression(dim)
    new = set() if value is None else value.free_symbols - set(names)
    if value is None or len(new) != 1:
        return None
    (name,) = new
    rest = tidy(name - value)
    known = isinstance(rest, int) or name not in rest.free_symbols
    return name if known and World().greater_equal(rest, 1) else None


def _expression(dim: ir.SymbolicDim) -> sympy.Expr | None:
    """`dim` where it is arithmetic over names."""
    try:
        value = from_ir(dim)
    except (ValueError, ZeroDivisionError, TypeError):
        return None
    return None if isinstance(value, int) else value


def _fresh_name(wanted: str, names: Iterable[sympy.Symbol]) -> str:
    base = re.sub(r"\W", "_", printable(wanted), flags=re.ASCII).strip("_") or "dim"
    base = f"dim_{base}" if base[0].isdigit() else base
    taken, name, count = {s.name for s in names}, base, 2
    while name in taken:
        name, count = f"{base}_{count}", count + 1
    return name


def _infer(graph: ir.Graph, world: World, opset: int) -> dict[ir.Value, Fact]:
    """One walk. Raises NewFactError when the world has learnt something and the walk must start again."""
    facts: dict[ir.Value, Fact] = {}
    for value in graph.inputs:
        assert value.shape is not None and value.dtype is not None
        dims = [from_ir(dim) for dim in value.shape]
        facts[value] = Fact(value.dtype, tuple(world.substitute(dim) for dim in dims if dim is not None))
    for value in graph.initializers.values():
        facts[value] = _constant(value)
    for node in graph:
        inputs = [None if v is None else facts.get(v) or _undefined(node, v) for v in node.inputs]
        for value, fact in zip(node.outputs, _infer_node(node, inputs, world, opset), strict=True):
            facts[value] = fact
    return facts


def _undefined(node: ir.Node, value: ir.Value) -> NoReturn:
    raise InputError(f"{describe(node)} reads {describe(value)}, which is not computed before it")


def _infer_node(node: ir.Node, inputs: list[Fact | None], world: World, opset: int) -> list[Fact]:
    found = RULES.get((node.domain, node.op_type))
    if found is None:
        raise UnsupportedError(f"{describe(node)}: this operator is not supported")
    _check_types(node, inputs, opset)
    view = NodeView(node, inputs, world)
    try:
        found(view)
    except (QGraphError, NewFactError):
        raise
    except (TypeError, ValueError, IndexError, KeyError, AttributeError, ArithmeticError) as error:
        raise InputError(
            f"{describe(node)}: its inputs or attributes are malformed ({printable(error)})"
        ) from error
    missing = [i for i in range(len(node.outputs)) if i not in view.outputs]
    if missing:
        raise UnsupportedError(f"{describe(node)}: its output {missing[0]} is not supported")
    return [view.outputs[i] for i in range(len(node.outputs))]


def _constant(value: ir.Value) -> Fact:
    tensor = value.const_value
    if tensor is None:
        raise InputError(f"initializer {describe(value)} has no data")
    shape = tuple(int(dim) for dim in tensor.shape)  # type: ignore[arg-type]
    content = None
    tracked = (
        ir.DataType.INT64,
        ir.DataType.INT32,
        ir.DataType.BOOL,
        ir.DataType.FLOAT,
        ir.DataType.DOUBLE,
    )
    if tensor.size <= MAX_CONTENT and tensor.dtype in tracked:
        content = object_array(tensor.numpy().reshape(-1).tolist(), shape)
    return Fact(tensor.dtype, shape, content)


def _content_to_ir(fact: Fact):
    """The tracked elements in terms of the IR; None where none is known or they are not integers."""
    if fact.content is None or not fact.dtype.is_integer():
        return None
    elements = [to_ir(v) if isinstance(v, (int, sympy.Expr)) else None for v in fact.content.reshape(-1)]
    if not elements or all(e is None for e in elements):
        return None
    return object_array(elements, fact.content.shape)


# -- dtypes --------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1024)
def _formal_inputs(op_type: str, opset: int) -> tuple[list[tuple[str, frozenset[str], bool]], bool] | None:
    """Per formal input: its type variable, the types it admits, whether a variadic one is of one type."""
    import onnx

    try:
        schema = onnx.defs.get_schema(op_type, opset, "")
    except onnx.defs.SchemaError:
        return None
    formal = [(p.type_str, frozenset(p.types), p.is_homogeneous) for p in schema.inputs]
    variadic = (
        bool(schema.inputs) and schema.inputs[-1].option == onnx.defs.OpSchema.FormalParameterOption.Variadic
    )
    return formal, variadic


_TYPE_NAMES = {ir.DataType.FLOAT: "float", ir.DataType.DOUBLE: "double"}


def _check_types(node: ir.Node, inputs: list[Fact | None], opset: int) -> None:
    """Holds the inputs' dtypes against the operator's schema."""
    found = _formal_inputs(node.op_type, opset) if node.domain == "" else None
    if found is None:
        return
    formal, variadic = found
    bound: dict[str, ir.DataType] = {}
    for index, fact in enumerate(inputs):
        if fact is None:
            continue
        if index >= len(formal) and not variadic:
            raise InputError(f"{describe(node)} has too many inputs")
        variable, admitted, homogeneous = formal[min(index, len(formal) - 1)]
        name = _TYPE_NAMES.get(fact.dtype, fact.dtype.name.lower())
        if f"tensor({name})" not in admitted:
            raise InputError(f"{describe(node)}: its input {index} may not be {fact.dtype.name}")
        if homogeneous and bound.setdefault(variable, fact.dtype) != fact.dtype:
            raise InputError(f"{describe(node)}: its inputs are {bound[variable].name} and {fact.dtype.name}")
