"""What every pass shares: the base class that collects refusals, and small helpers to read and edit a
graph."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import onnx_ir as ir

_F = TypeVar("_F")  # a function

MAX_NAME = 120  # characters of a model's name that a message shows


@dataclass(frozen=True)
class Refusal:
    """Why a pass left something as it was, or what it assumed. Shown by `--explain`."""

    pass_name: str
    node: str
    reason: str

    def __str__(self) -> str:
        return f"{self.pass_name}: {self.node}: {self.reason}"


class GraphPass(ir.passes.InPlacePass):
    """Base of qgraph's passes: `onnx_ir`'s in-place pass plus the list of what it refused, with reasons."""

    def __init__(self) -> None:
        super().__init__()
        self.refusals: list[Refusal] = []

    def refuse(self, where: ir.Node | ir.Value | str, reason: str) -> None:
        """Records once that `where` was left alone because of `reason`."""
        refusal = Refusal(type(self).__name__, where if isinstance(where, str) else describe(where), reason)
        if refusal not in self.refusals:
            self.refusals.append(refusal)


def printable(name: object) -> str:
    """`name` as it may stand in a terminal: control characters escaped, cut at `MAX_NAME` characters."""
    text = str(name)
    cut = text[:MAX_NAME]
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in cut)
    return shown if len(text) <= MAX_NAME else f"{shown}... ({len(text)} characters)"


def describe(item: ir.Node | ir.Value) -> str:
    """`node 'name' (domain::Op)` or `'value'`, safe to print."""
    if isinstance(item, ir.Node):
        op = f"{item.domain}::{item.op_type}" if item.domain else item.op_type
        return f"node '{printable(item.name)}' ({printable(op)})"
    return f"'{printable(item.name)}'"


def register(table: dict[str, _F], *op_types: str) -> Callable[[_F], _F]:
    """A decorator that enters a function into `table` under these operators of the default domain."""

    def enter(function: _F) -> _F:
        table.update(dict.fromkeys(op_types, function))
        return function

    return enter


def top_graphs(model: ir.Model) -> list[ir.Graph | ir.Function]:
    """The main graph and the functions."""
    found: list[ir.Graph | ir.Function] = [model.graph]
    found.extend(model.functions.values())
    return found


def all_graphs(model: ir.Model) -> list[ir.Graph | ir.Function]:
    """The main graph, the functions, and every subgraph of both."""
    found: list[ir.Graph | ir.Function] = []
    for top in top_graphs(model):
        found.append(top)
        found.extend(top.subgraphs())
    return found


def is_op(node: ir.Node | None, *op_types: str) -> bool:
    """Whether `node` is one of these operators of the default domain."""
    return node is not None and node.domain == "" and node.op_type in op_types


def constant(value: ir.Value | None) -> np.ndarray | None:
    """The array of an initializer that no caller can override, else None."""
    if value is None or value.const_value is None or value.is_graph_input():
        return None
    return value.const_value.numpy()


def scalar(value: ir.Value | None) -> float | None:
    """The number in a constant of one element, else None. Does not load larger constants."""
    if value is None or value.const_value is None or value.const_value.size != 1 or value.is_graph_input():
        return None
    return float(value.const_value.numpy().reshape(()))


def int_list(value: ir.Value | None) -> list[int] | None:
    """The integers in a constant 1-D (or scalar) tensor, else None."""
    array = constant(value)
    return None if array is None else [int(v) for v in array.reshape(-1)]


def shape_of(value: ir.Value | None) -> tuple[int | ir.SymbolicDim, ...] | None:
    """The value's dims, or None where the rank is not known."""
    return None if value is None or value.shape is None else value.shape.dims


def input_dims(graph: ir.Graph) -> list[str]:
    """The names of all dims that the graph's inputs have, sorted."""
    dims = [dim for value in graph.inputs for dim in shape_of(value) or ()]
    named = [dim for dim in dims if isinstance(dim, ir.SymbolicDim) and dim.value is not None]
    return sorted({name for dim in named for name in dim.free_symbols()})


def same_shape(a: ir.Value, b: ir.Value) -> bool:
    """Whether two values are known to have the same shape; dims without a name equal nothing."""
    left, right = shape_of(a), shape_of(b)
    if left is None or right is None or len(left) != len(right):
        return False
    return all(
        p == q and not (isinstance(p, ir.SymbolicDim) and p.value is None)
        for p, q in zip(left, right, strict=True)
    )


def used_once(value: ir.Value) -> bool:
    """Whether exactly one node input reads `value` and nothing else needs it."""
    return len(value.uses()) == 1 and not value.is_graph_output()


def attribute(node: ir.Node, name: str, default):
    """The Python value of an attribute, or `default`."""
    found = node.attributes.get(name)
    return default if found is None else found.value


def copy_metadata(source: ir.Node, targets: Iterable[ir.Node]) -> None:
    """Gives `targets` what `source` carries (module path and the like), without overwriting."""
    for target in targets:
        for key, value in source.metadata_props.items():
            target.metadata_props.setdefault(key, value)


def make_node(
    op_type: str,
    inputs: Sequence[ir.Value | None],
    attributes: dict | None = None,
    *,
    name: str | None = None,
) -> ir.Node:
    """A node of the default domain with one unnamed output."""
    return ir.node(op_type, inputs, attributes=attributes or {}, name=name)


def replace_node(
    node: ir.Node, new_nodes: Sequence[ir.Node], outputs: Sequence[ir.Value] | None = None
) -> None:
    """Puts `new_nodes` in the place of `node`; `outputs` (default: of the last new node) take over its
    outputs.

    Names, types and shapes of the old outputs go to the new ones, metadata of the node to all new nodes.
    """
    graph = node.graph
    assert graph is not None
    copy_metadata(node, new_nodes)
    new_values = list(new_nodes[-1].outputs if outputs is None else outputs)
    ir.convenience.replace_nodes_and_values(graph, node, [node], new_nodes, node.outputs, new_values)


def remove_dead(values: Iterable[ir.Value | None]) -> None:
    """Removes the producers of `values` that nobody reads any more, and what only they read."""
    waiting = list(values)
    while waiting:
        value = waiting.pop()
        node = value.producer() if value is not None else None
        if node is None or node.graph is None:
            continue
        if not any(v.uses() or v.is_graph_output() for v in node.outputs):
            waiting.extend(node.inputs)
            node.graph.remove(node, safe=True)


def replace_value(old: ir.Value, new: ir.Value) -> bool:
    """Lets every reader of `old` read `new`. False, and nothing done, where ONNX cannot express it.

    An output of the graph keeps its name: `new` takes it, unless `new` is an input, an initializer or
    itself an output, whose names are fixed too.
    """
    if old.is_graph_output():
        if (
            new.is_graph_input()
            or new.is_initializer()
            or new.is_graph_output()
            or new.graph is not old.graph
        ):
            return False
        name = old.name
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        old.name = None
        new.name = name
    else:
        old.replace_all_uses_with(new)
    return True


def add_behind(value: ir.Value, addend: ir.Value, name: str, before: str) -> ir.Node:
    """Lets every reader of `value`, and every output of the graph that it is, have value + addend.

    The sum takes over name, type, shape and `meta`: the value is `<its name>/<before>` from then on. Returns
    the Add, `name`, which stands right behind the value's producer.
    """
    producer = value.producer()
    assert producer is not None and producer.graph is not None
    add = ir.node("Add", [value, addend], name=name)
    total = add.outputs[0]
    total.name, total.type, total.shape = value.name, value.type, value.shape
    total.meta.update(value.meta)
    value.replace_all_uses_with(total, replace_graph_outputs=True)
    add.replace_input_with(0, value)
    value.name = f"{value.name}/{before}"
    producer.graph.insert_after(producer, add)
    return add


def fresh_name(graph: ir.Graph, wanted: str) -> str:
    """`wanted`, or `wanted_2`, ... : not the name of an initializer or input of `graph`.

    Names of node outputs are not searched; `NameFixPass` at the end of a phase separates any clash with
    those.
    """
    taken = {v.name for v in graph.inputs}
    name, count = wanted, 2
    while name in taken or name in graph.initializers:
        name, count = f"{wanted}_{count}", count + 1
    return name


def add_initializer(graph: ir.Graph, tensor: ir.TensorProtocol | np.ndarray, wanted: str) -> ir.Value:
    """Registers a new initializer under a free name near `wanted` and returns its value."""
    name = fresh_name(graph, wanted)
    held: ir.TensorProtocol = ir.Tensor(tensor, name=name) if isinstance(tensor, np.ndarray) else tensor
    value = ir.Value(
        name=name, shape=ir.Shape(held.shape.numpy()), type=ir.TensorType(held.dtype), const_value=held
    )
    graph.register_initializer(value)
    return value
