"""Refuses files that are not well-formed ONNX, before anything expands, sorts or computes them.

Works on the protobuf, where duplicates and undefined names are still visible. Time is linear in the file's
size: a function budget (`MAX_NODES`) is computed without expanding anything.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from qgraph.errors import InputError, UnsupportedError
from qgraph.passes.base import printable

if TYPE_CHECKING:
    import onnx

MAX_NODES = 1_000_000  # after inlining all model-local functions
NEWEST_OPSET = 28
OLDEST_OPSET = 9

FunctionKey = tuple[str, str, str]

_DATA_FIELDS = tuple(
    f"{kind}_data" for kind in ("raw", "float", "int32", "int64", "double", "uint64", "string")
)


def check_structure(proto: onnx.ModelProto) -> None:
    """Raises unless `proto` is one graph in SSA form whose nodes fit their schemas.

    Raises:
        InputError: no graph, duplicate or undefined names, a recursive function, a node against its schema,
            a tensor whose bytes do not fit its shape, an expansion beyond `MAX_NODES`.
        UnsupportedError: an opset this version does not know, sparse initializers.
    """
    _check_text(proto)
    if not proto.HasField("graph") or not (proto.graph.node or proto.graph.output):
        raise InputError("the file holds no ONNX graph: it is not an ONNX model, or it is truncated")
    if proto.ir_version < 3:
        raise InputError(f"IR version {proto.ir_version} is older than ONNX 1.0; re-export the model")
    opsets = _opsets(proto.opset_import)
    if "" not in opsets:
        raise InputError("the model imports no opset of the default domain; re-export it with opset 23")
    functions = {_key(f): f for f in proto.functions}
    if len(functions) != len(proto.functions):
        raise InputError("two model-local functions share one name")
    _check_expansion(proto.graph, functions)
    _Scope(functions, opsets).check_graph(proto.graph, frozenset())
    for function in proto.functions:
        _Scope(functions, {**opsets, **_opsets(function.opset_import)}).check_function(function)


def _check_text(proto: onnx.ModelProto) -> None:
    """ONNX strings are UTF-8. The parser hands out others as bytes, which nothing downstream expects."""
    stack: list[Any] = [proto]
    while stack:
        for field, value in stack.pop().ListFields():
            if field.type not in (field.TYPE_STRING, field.TYPE_MESSAGE):
                continue
            values = (value,) if hasattr(value, "ListFields") or isinstance(value, (str, bytes)) else value
            if field.type == field.TYPE_MESSAGE:
                stack.extend(values)
            elif any(isinstance(v, bytes) for v in values):
                raise InputError(f"the file is damaged: a '{field.name}' in it is not UTF-8")


def _opsets(imports: Iterable[Any]) -> dict[str, int]:
    opsets: dict[str, int] = {}
    for entry in imports:
        domain = "" if entry.domain == "ai.onnx" else entry.domain
        if opsets.setdefault(domain, entry.version) != entry.version:
            raise InputError(
                f"the model imports domain '{printable(entry.domain)}' twice, at different versions"
            )
    default = opsets.get("")
    if default is not None and not OLDEST_OPSET <= default <= NEWEST_OPSET:
        raise UnsupportedError(
            f"opset {default} is outside {OLDEST_OPSET}..{NEWEST_OPSET}, which this version reads; "
            "re-export with opset 23"
        )
    return opsets


def _key(item: Any) -> FunctionKey:
    """Identifies a function; of a node, the function it would call."""
    name = item.op_type if hasattr(item, "op_type") else item.name
    return ("" if item.domain == "ai.onnx" else item.domain, name, item.overload)


def _subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def _count(nodes: Iterable[onnx.NodeProto], functions: dict) -> tuple[int, dict[FunctionKey, int]]:
    """Own nodes, and how often each function is called, in `nodes` and their subgraphs."""
    own, stack = 0, [nodes]
    calls: dict[FunctionKey, int] = {}
    while stack:
        for node in stack.pop():
            own += 1
            if (key := _key(node)) in functions:
                calls[key] = calls.get(key, 0) + 1
            stack.extend(g.node for g in _subgraphs(node))
    return own, calls


def _check_expansion(graph: onnx.GraphProto, functions: dict[FunctionKey, onnx.FunctionProto]) -> None:
    """Counts the nodes that inlining would make. Refuses recursion and more than `MAX_NODES`."""
    counted = {key: _count(f.node, functions) for key, f in functions.items()}
    size: dict[FunctionKey, int] = {}
    open_: set[FunctionKey] = set()
    for root in functions:
        stack = [root]
        while stack:
            key = stack[-1]
            if key in size:
                stack.pop()
                continue
            own, calls = counted[key]
            waiting = [callee for callee in calls if callee not in size]
            if waiting:
                open_.add(key)
                if recursive := next((c for c in waiting if c in open_), None):
                    raise InputError(
                        f"function '{printable(recursive[1])}' calls itself; ONNX forbids recursion"
                    )
                stack.extend(waiting)
                continue
            size[key] = own + sum(times * size[callee] for callee, times in calls.items())
            open_.discard(key)
            stack.pop()
    own, calls = _count(graph.node, functions)
    total = own + sum(times * size[callee] for callee, times in calls.items())
    if total > MAX_NODES:
        raise InputError(
            f"the model's functions expand to more than {MAX_NODES} nodes; refusing to inline them"
        )


class _Scope:
    """Checks names, schemas and tensors of one graph or function."""

    def __init__(self, functions: dict, opsets: dict[str, int]) -> None:
        self.functions = functions
        self.opsets = opsets

    def check_function(self, function: onnx.FunctionProto) -> None:
        self._check_nodes(function.node, set(function.input), frozenset(), function.output, function.name)

    def check_graph(self, graph: onnx.GraphProto, outer: frozenset[str]) -> None:
        if graph.sparse_initializer:
            raise UnsupportedError(
                f"graph '{printable(graph.name)}' has sparse initializers; store them dense"
            )
        inputs = [i.name for i in graph.input]
        initializers = [i.name for i in graph.initializer]
        for what, names in (("input", inputs), ("initializer", initializers)):
            seen: set[str] = set()
            for name in names:
                if name in seen or not name:
                    raise InputError(f"{what} '{printable(name)}' is unnamed or defined twice")
                seen.add(name)
        for tensor in graph.initializer:
            check_tensor(tensor)
        outputs = [o.name for o in graph.output]
        self._check_nodes(graph.node, {*inputs, *initializers}, outer, outputs, graph.name)

    def _check_nodes(self, nodes, defined: set[str], outer: frozenset[str], outputs, where: str) -> None:
        for node in nodes:
            for name in node.output:
                if name and (name in defined or name in outer):
                    raise InputError(
                        f"value '{printable(name)}' is defined twice; ONNX graphs are in SSA form"
                    )
                defined.add(name)
        defined.discard("")
        visible = outer | defined if any(next(_subgraphs(n), None) for n in nodes) else outer
        for node in nodes:
            for name in node.input:
                if name and name not in defined and name not in outer:
                    raise InputError(f"{_at(node)} reads '{printable(name)}', which nothing defines")
            self._check_node(node)
            for graph in _subgraphs(node):
                self.check_graph(graph, visible)
        for name in outputs:
            if name not in defined and name not in outer:
                raise InputError(
                    f"output '{printable(name)}' of graph '{printable(where)}' is not computed by any node"
                )

    def _check_node(self, node: onnx.NodeProto) -> None:
        import onnx

        names = [a.name for a in node.attribute]
        if len(set(names)) != len(names):
            raise InputError(f"{_at(node)} has an attribute twice")
        for attribute in node.attribute:
            for tensor in (*([attribute.t] if attribute.HasField("t") else []), *attribute.tensors):
                check_tensor(tensor)
        domain = "" if node.domain == "ai.onnx" else node.domain
        if _key(node) in self.functions or domain != "":
            return
        try:
            schema = onnx.defs.get_schema(node.op_type, self.opsets[""], "")
        except onnx.defs.SchemaError:
            return  # unknown operators are refused, with their names, where shapes are inferred
        if not schema.min_input <= len(node.input) <= schema.max_input:
            raise InputError(
                f"{_at(node)} has {len(node.input)} inputs; the operator takes {schema.min_input} to "
                f"{schema.max_input}"
            )
        if not schema.min_output <= len(node.output) <= schema.max_output:
            raise InputError(
                f"{_at(node)} has {len(node.output)} outputs; the operator has {schema.min_output} to "
                f"{schema.max_output}"
            )
        missing = [n for n, a in schema.attributes.items() if a.required and n not in names]
        if missing:
            raise InputError(f"{_at(node)} lacks its attribute '{missing[0]}'")
        for attribute in node.attribute:
            known = schema.attributes.get(attribute.name)
            if known is None:
                raise InputError(f"{_at(node)} has an unknown attribute '{printable(attribute.name)}'")
            if not attribute.ref_attr_name and known.type != attribute.type:
                raise InputError(f"{_at(node)}: attribute '{printable(attribute.name)}' has the wrong type")


def _at(node: onnx.NodeProto) -> str:
    return f"node '{printable(node.name)}' ({printable(node.op_type)})"


def check_tensor(tensor: onnx.TensorProto) -> None:
    """Raises InputError unless an inline tensor holds exactly the elements its shape promises, in the field
    of its type; UnsupportedError for strings."""
    import math

    import onnx
    import onnx_ir as ir

    where = f"tensor '{printable(tensor.name)}'"
    if any(d < 0 for d in tensor.dims):
        raise InputError(f"{where} has a negative dimension")
    try:
        dtype = ir.DataType(tensor.data_type)
        if dtype == ir.DataType.UNDEFINED:
            raise ValueError
    except ValueError:
        raise InputError(f"{where} has an unknown data type ({tensor.data_type})") from None
    if tensor.HasField("segment"):
        raise UnsupportedError(f"{where} is stored in segments")
    count = math.prod(tensor.dims)
    if dtype == ir.DataType.STRING:
        raise UnsupportedError(f"{where} holds strings, which are not supported; tokenize outside the model")
    if tensor.data_location == tensor.EXTERNAL or dtype.bitwidth == 6:
        return  # external files are checked by load.py; FLOAT6 is not an operand of anything supported
    field = "raw_data" if tensor.HasField("raw_data") else onnx.helper.tensor_dtype_to_field(dtype)
    held = len(getattr(tensor, field))
    if strange := [f for f in _DATA_FIELDS if f != field and len(getattr(tensor, f))]:
        raise InputError(f"{where} is {dtype.name} but has data in '{strange[0]}'; the file is damaged")
    if field == "raw_data":
        wanted = math.ceil(count * dtype.bitwidth / 8)
    else:
        packed = 8 // dtype.bitwidth if dtype.bitwidth < 8 else 1
        complex_ = 2 if dtype in (ir.DataType.COMPLEX64, ir.DataType.COMPLEX128) else 1
        wanted = math.ceil(count / packed) * complex_
    if held != wanted:
        raise InputError(
            f"{where} of shape {list(tensor.dims)} needs {wanted} items of data but holds {held}; the file "
            "is damaged"
        )
