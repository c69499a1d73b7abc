"""The state of a lowering: what each graph value has become, and the steps emitted so far."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
import sympy

from qgraph.codegen.bf16_rows import PARTS, ROWS, row_words
from qgraph.codegen.digits import COMPUTE_DIGITS, DigitRows
from qgraph.codegen.dims import CONTENT, Dim, ceildiv, equal, grain_of, is_one, product, size, static
from qgraph.codegen.int8_input import Int8Input, int8_input
from qgraph.codegen.lowering.device import DEVICES, Device
from qgraph.codegen.lowering.state import State
from qgraph.codegen.memory import ITEM_SIZE, Buffer, View, collapse
from qgraph.codegen.spec import EPILOGUE_OPERANDS, KernelSpec
from qgraph.errors import QGraphError, UnsupportedError
from qgraph.formats.nvfp4 import NVFP4
from qgraph.passes.cache import Cache

DTYPES = {
    ir.DataType.FLOAT: "f32",
    ir.DataType.INT64: "i64",
    ir.DataType.INT32: "i32",
    ir.DataType.BOOL: "bool",
    ir.DataType.UINT8: "u8",
    ir.DataType.INT8: "i8",
}

_MAX_ARGS = 30  # of a kernel, before `begin` and `end` (runtime/FORMAT.md)

Arg = tuple[Any, ...]  # ("v", Buffer, byte offset) | ("i", size) | ("scratch", bytes) | ("status",)


@dataclass
class Step:
    """One kernel call of the plan."""

    name: str
    spec: KernelSpec
    args: list[Arg]
    blocks: Dim
    grain: int = 1
    weights: tuple[Buffer, ...] = ()  # of a layer: the tensors among its arguments that hold its matrix


@dataclass(frozen=True, eq=False)
class Pointwise:
    """A value not computed yet: an expression over views, in the terms of the `elementwise` kernel."""

    expr: tuple[Any, ...]
    leaves: tuple[View, ...]
    args: tuple[Dim, ...]
    shape: tuple[Dim, ...]
    dtype: str
    name: str


@dataclass(frozen=True, eq=False)
class Linear:
    """A matrix product not emitted yet, so that what follows it can become its epilogue."""

    node: ir.Node
    op: str  # kernel
    x: tuple[View, ...]  # the arguments that the kernel takes for its left operand
    k: int
    n: int
    weights: tuple[Buffer, ...]
    shape: tuple[Dim, ...]
    epilogue: tuple[str, ...] = ()
    operands: tuple[View, ...] = ()  # of the epilogue, in its order
    params: tuple[tuple[str, Any], ...] = ()  # of the kernel, beside those that all have
    sums: View | None = None  # of blocks of x, for weights with an offset a block


@dataclass(frozen=True, eq=False)
class Rounded:
    """A value rounded to int8, not computed in float32 yet: who multiplies in integers takes codes instead
    (`Lowering.int8`)."""

    node: ir.Node  # DynamicQDQInt8
    x: View  # what is rounded, dense


Lazy = View | Pointwise | Linear | Rounded
Handler = Callable[["Lowering", ir.Node], None]
HANDLERS: dict[tuple[str, str], Handler] = {}
# Inputs that carry data. Others (target shapes, axes, pads) are known from shape inference.
DATA_INPUTS: dict[tuple[str, str], tuple[int, ...]] = {}
# Attributes that are honoured: by the handler, by shape inference, or by having no bearing on float32.
ATTRIBUTES: dict[tuple[str, str], frozenset[str]] = {}


def lowers(
    *ops: str, domain: str = "", data: tuple[int, ...] | None = None, attributes: str = ""
) -> Callable[[Handler], Handler]:
    """Register the lowering of operators.

    `data` lists the inputs that it reads as data (default: all), `attributes` the attributes that it honours;
    any other attribute must have its default value, or the node is refused.
    """

    def register(handler: Handler) -> Handler:
        for op in ops:
            HANDLERS[domain, op] = handler
            ATTRIBUTES[domain, op] = frozenset(attributes.split())
            if data is not None:
                DATA_INPUTS[domain, op] = data
        return handler

    return register


def data_inputs(node: ir.Node) -> list[ir.Value]:
    """The inputs of `node` that must be in memory when it runs."""
    picked = DATA_INPUTS.get((node.domain, node.op_type))
    inputs = node.inputs if picked is None else [node.inputs[i] for i in picked if i < len(node.inputs)]
    return [v for v in inputs if v is not None]


def check_attributes(node: ir.Node, opset: int) -> None:
    """UnsupportedError for an attribute that would be ignored and is not at its default."""
    from onnx import defs

    ignored = [a for name, a in node.attributes.items() if name not in ATTRIBUTES[node.domain, node.op_type]]
    if not ignored or not defs.has(node.op_type, opset, node.domain):
        return
    schema = defs.get_schema(node.op_type, opset, node.domain)
    for attribute in ignored:
        known = schema.attributes.get(attribute.name)
        default = None
        if known is not None and known.default_value.name:  # one without a default has no name either
            default = ir.serde.deserialize_attribute(known.default_value)
        if default is None or default.value != attribute.value:
            raise unsupported(node, f"attribute {attribute.name} = {attribute.value} is not supported")


def unsupported(node: ir.Node, why: str) -> UnsupportedError:
    """The error for a node that this version cannot lower."""
    name = node.name or "(unnamed)"
    return UnsupportedError(f"{node.op_type} node '{name}': {why}")


@dataclass
class Lowering:
    """Turns a prepared graph into steps over buffers, node by node.

    Attributes:
        steps: in order of execution.
        layers: (node, step) of every node that became a step of its own kernel, for the report.
        packing: `fast` | `small`, where a weight can be stored in more than one way.
        compute: `f32` | `bf16` | `int16` | `int8`, what products of many rows round float activations to.
        device: whose kernels the steps are of.
        positions: how many positions the logits have, where a run may ask for fewer (last_positions.py).
        cache: that of the graph, if it has one.
        states: the memory of the session that stands for an input of the graph, and the output it becomes.
        places: the states that new keys and values are computed in (`allocate` with `strided`).
        rounded_to_nvfp4: of values that a DynamicQDQNVFP4 rounds: what is rounded, and the global scale.
    """

    graph: ir.Graph
    packing: str = "fast"
    compute: str = "f32"
    device: Device = DEVICES["cpu"]
    steps: list[Step] = field(default_factory=list)
    values: dict[ir.Value, Lazy] = field(default_factory=dict)
    uses: Counter[ir.Value] = field(default_factory=Counter)
    weights: dict[tuple[ir.Value, str], Buffer] = field(default_factory=dict)
    inputs: list[Buffer] = field(default_factory=list)
    outputs: dict[ir.Value, Buffer] = field(default_factory=dict)
    layers: list[tuple[ir.Node, Step]] = field(default_factory=list)
    positions: Dim | None = None
    cache: Cache | None = None
    states: dict[ir.Value, State] = field(default_factory=dict)
    places: dict[ir.Value, State] = field(default_factory=dict)
    rounded_to_nvfp4: dict[ir.Value, tuple[View, View]] = field(default_factory=dict)
    _dense: dict[ir.Value, View] = field(default_factory=dict)
    _block_sums: dict[tuple[ir.Value, int], View] = field(default_factory=dict)
    _digits: dict[tuple[ir.Value, Int8Input], View] = field(default_factory=dict)
    _rounded: dict[ir.Value, Rounded] = field(default_factory=dict)
    _nvfp4: dict[ir.Value, tuple[View, View]] = field(default_factory=dict)
    _int8: dict[tuple[ir.Value, Int8Input], tuple[View, View, View]] = field(default_factory=dict)

    # Values

    def shape(self, value: ir.Value) -> tuple[Dim, ...]:
        """The shape that inference found."""
        if value.shape is None:
            raise QGraphError(f"value '{value.name}' has no shape: the graph was not prepared")
        return tuple(size(d) for d in value.shape)

    def dtype(self, value: ir.Value) -> str:
        """The element type in the plan's terms; UnsupportedError for types that have no kernels."""
        if value.dtype not in DTYPES:
            known = ", ".join(t.name for t in DTYPES)
            name = value.dtype.name if value.dtype is not None else "unknown"
            raise UnsupportedError(f"value '{value.name}' has data type {name}; supported are {known}")
        return DTYPES[value.dtype]

    def constant(self, value: ir.Value | None) -> np.ndarray | None:
        """The content of an initializer, else None."""
        if value is None or value.const_value is None:
            return None
        return value.const_value.numpy()

    def integers(self, value: ir.Value | None) -> list[Dim] | None:
        """The elements of a small integer tensor that is constant or that shape inference worked out (sizes,
        starts, axes), else None."""
        array = self.constant(value)
        if array is None and value is not None:
            array = value.meta.get(CONTENT)
        if array is None or any(item is None for item in array.reshape(-1)):
            return None
        return [size(item if isinstance(item, ir.SymbolicDim) else int(item)) for item in array.reshape(-1)]

    def weight(self, value: ir.Value, part: str, dtype: str, make: Callable[[], np.ndarray]) -> Buffer:
        """The weight tensor that holds `part` of an initializer (empty: all, as it is), made on first use."""
        key = (value, part)
        if key not in self.weights:
            data = np.ascontiguousarray(make())
            shape = tuple(sympy.Integer(d) for d in data.shape)
            plain = (value.name or "").replace("\0", "\\0")
            name = wanted = f"w/{plain}/{part}" if part else f"w/{plain}"
            taken = {buffer.name for buffer in self.weights.values()}
            count = 2
            while name in taken:  # an initializer may itself be called `a/f32_n16`
                name, count = f"{wanted}.{count}", count + 1
            self.weights[key] = Buffer("weight", dtype, shape, name=name, data=data)
        return self.weights[key]

    def get(self, value: ir.Value) -> Lazy:
        """What `value` has become; an initializer becomes a weight in its own layout."""
        if value not in self.values:
            array = self.constant(value)
            if array is None:
                raise QGraphError(f"value '{value.name}' is read before it is computed")
            dtype = self.dtype(value)
            self.values[value] = View.of(self.weight(value, "", dtype, lambda: array))
        return self.values[value]

    def view(self, value: ir.Value) -> View:
        """`value` in memory, computing it now if that was put off."""
        lazy = self.get(value)
        if isinstance(lazy, Linear):
            lazy = self.emit_linear(lazy, self.allocate(value))
        elif isinstance(lazy, Pointwise):
            lazy = self.emit_pointwise(lazy, self.allocate(value, strided=True))
        elif isinstance(lazy, Rounded):
            lazy = self.emit_rounded(lazy, self.allocate(value))
        self.values[value] = lazy
        return lazy

    def dense(self, value: ir.Value) -> View:
        """`value` in memory, its elements in row-major order; a copy that this takes serves all readers."""
        if value not in self._dense:
            view = self.view(value)
            self._dense[value] = view if view.is_dense() else self.copy(view, f"{value.name}/copy")
        return self._dense[value]

    def operand(self, value: ir.Value) -> View:
        """`value` as the left operand of a product: dense, and where kernels can read it."""
        view = self.dense(value)
        self._dense[value] = self.device.readable(self, view, f"{value.name}/copy")
        return self._dense[value]

    def block_sums(self, value: ir.Value, k: int, block: int) -> View:
        """Sums of blocks along the last axis of `value`, of size k; computed once for all readers."""
        key = (value, block)
        if key not in self._block_sums:
            lead, x = self.shape(value)[:-1], self.dense(value)
            rows = product(lead)
            out = self.temp("f32", (*lead, ceildiv(k, block)))
            spec = KernelSpec.make("block_sums", k=k, block=block)
            grain = grain_of(k)
            self.emit(f"{value.name}/block_sums", spec, [out, x], rows, grain)
            self._block_sums[key] = out
        return self._block_sums[key]

    def int8(self, value: ir.Value, k: int, wanted: Int8Input) -> tuple[View, View, View] | None:
        """Codes, scales and block sums of a value that is rounded to int8 along its last axis, of size k;
        computed once for all readers that want them alike. None for a value that is not rounded."""
        rounded, key = self._rounded.get(value), (value, wanted)
        if rounded is None:
            return None
        if key not in self._int8:
            lead, blocks = rounded.x.shape[:-1], -(-k // wanted.block)
            tiles = 4 * row_words(k, 1) if wanted == int8_input(NVFP4.name) else 0
            rows = product(lead)
            out = (
                self.temp("i8", (_room_rows(rows, wanted), sympy.Integer(max(blocks * wanted.block, tiles)))),
                self.temp("f32", lead),
                self.temp("i32", (*lead, sympy.Integer(blocks))),
            )
            spec = KernelSpec.make(
                "quantize_int8", k=k, fields=wanted.fields, block=wanted.block, factor=wanted.factor
            )
            name = rounded.node.name or rounded.node.op_type
            step = self.emit(name, spec, [*out, rounded.x, rows], rows, grain_of(k))
            self.layers.append((rounded.node, step))
            self._int8[key] = out
        return self._int8[key]

    def nvfp4(self, value: ir.Value, k: int, runs: Dim) -> tuple[View, View, View]:
        """Codes, block scales and the global scale of a value in `rounded_to_nvfp4`, which is rounded along
        its last axis, of size k; computed once for all readers, in runs where `runs` is 1 and not 0."""
        source, scale = self.rounded_to_nvfp4[value]
        if value not in self._nvfp4:
            lead, blocks = source.shape[:-1], sympy.Integer(-(-k // 16))
            out = self.temp("i32", (*lead, 2 * blocks)), self.temp("u8", (*lead, blocks))
            spec = KernelSpec.make("quantize_nvfp4", k=k)
            self.emit(f"{value.name}/codes", spec, [*out, source, scale], product(lead) * runs)
            self._nvfp4[value] = out
        return *self._nvfp4[value], scale

    @property
    def fewer_digits(self) -> dict[str, int]:
        """What the specs of kernels have that make, or take, digits: nothing where all rows have as many;
        `parts` of bfloat16 is for NVFP4 only, others multiply two digits in as much time."""
        if self.compute == "bf16":
            return {"parts": 1}
        return {} if self.compute == "f32" else {"digits": COMPUTE_DIGITS[self.compute]}

    def digits(self, value: ir.Value, wanted: DigitRows, fewer: dict[str, int]) -> View:
        """A value split into digits along its last axis, `fewer` as above or nothing; computed once for all
        who want them alike."""
        key = (value, wanted.input)
        if key not in self._digits:
            rows, x = product(self.shape(value)[:-1]), self.dense(value)
            parts = fewer.get("parts", PARTS)
            out = self.temp("i32", (_room_rows(rows, wanted.input), sympy.Integer(wanted.room(parts))))
            params = {
                "fields": wanted.input.fields,
                "block": wanted.input.block,
                "offset": wanted.input.offset,
            }
            spec = KernelSpec.make("split_digits", k=wanted.k, **params, **fewer)
            self.emit(f"{value.name}/digits", spec, [out, x, rows], rows, grain_of(wanted.k))
            self._digits[key] = out
        return self._digits[key]

    def copy(self, view: View, name: str, out: View | None = None) -> View:
        """A dense copy of `view`, or a copy into `out`."""
        return self.emit_pointwise(Pointwise(("in", 0), (view,), (), view.shape, view.dtype, name), out)

    def allocate(self, value: ir.Value, strided: bool = False) -> View:
        """Memory for a value: the caller's where it is an output of the graph, else a temporary.

        With `strided`, for who writes any strides, its place if it has one.
        """
        if strided and value in self.places:
            return self.places[value].window(self.places[value].buffer)
        if value in self.outputs:
            return View.of(self.outputs[value])
        return self.temp(self.dtype(value), self.shape(value))

    def temp(self, dtype: str, shape: Sequence[Dim]) -> View:
        """A new temporary."""
        return View.of(Buffer("temp", dtype, tuple(shape)))

    # Steps

    @staticmethod
    def pointer(view: View) -> Arg:
        return ("v", view.buffer, sympy.expand(view.offset * ITEM_SIZE[view.dtype]))

    def emit(
        self,
        name: str,
        spec: KernelSpec,
        args: Sequence[Arg | View | Dim | int],
        blocks: Dim,
        grain: int = 1,
        weights: tuple[Buffer, ...] = (),
    ) -> Step:
        """Append a step. Views become pointers, sizes become integers."""
        plain: list[Arg] = []
        for arg in args:
            if isinstance(arg, View):
                plain.append(self.pointer(arg))
            elif isinstance(arg, tuple):
                plain.append(arg)
            else:
                plain.append(("i", sympy.sympify(arg)))
        step = Step(name, spec, plain, sympy.sympify(blocks), grain, weights)
        self.steps.append(step)
        return step

    def emit_linear(self, linear: Linear, out: View) -> View:
        """Emit the matrix product with its epilogue into `out` (dense)."""
        rows = product(linear.shape[:-1])
        params = {"k": linear.k, "n": linear.n, "epilogue": linear.epilogue, **dict(linear.params)}
        # Kernels take them in an order of their own, whatever the one that they are applied in.
        named = dict(
            zip([e for e in linear.epilogue if e in EPILOGUE_OPERANDS], linear.operands, strict=True)
        )
        extra = [named[e] for e in EPILOGUE_OPERANDS if e in named]
        read = [*(View.of(w) for w in linear.weights), *([linear.sums] if linear.sums else []), *extra]
        name = linear.node.name or "MatMul"
        step = self.device.emit_linear(self, linear, name, [out, *linear.x, *read, rows], rows, params)
        self.layers.append((linear.node, step))
        return out

    def emit_rounded(self, rounded: Rounded, out: View) -> View:
        """Emit the rounding to int8 and back in float32 into `out` (dense)."""
        *lead, n = rounded.x.shape
        name = rounded.node.name or rounded.node.op_type
        step = self.emit(
            name, KernelSpec.make("dynamic_int8"), [out, rounded.x, n], product(lead), grain_of(n)
        )
        self.layers.append((rounded.node, step))
        return out

    def emit_pointwise(self, pw: Pointwise, out: View | None = None) -> View:
        """Emit an elementwise kernel for `pw` into `out` (default: a new temporary)."""
        out = out if out is not None else self.temp(pw.dtype, pw.shape)
        iotas = frozenset(_iota_axes(pw.expr))
        operands = [out, *(leaf.expand(pw.shape) for leaf in pw.leaves)]
        # Strided operands pass a stride a dim. Where that is too much for one call, the last ones are made
        # dense; dense operands merge their dims and pass next to nothing.
        for at in reversed(range(1, len(operands))):
            dims, strides = collapse(pw.shape, [v.strides for v in operands], iotas)
            if len(operands) + len(dims) * (1 + len(operands)) + len(pw.args) <= _MAX_ARGS:
                break
            operands[at] = self.copy(operands[at], f"{pw.name}/copy")
        dims, strides = collapse(pw.shape, [v.strides for v in operands], iotas)
        if not dims:
            dims, strides = [(sympy.Integer(1), -1)], [[sympy.Integer(0)] for _ in operands]
            strides[0] = [sympy.Integer(1)]
        renumber = {axis: i for i, (_, axis) in enumerate(dims)}
        modes: list[int | str] = []
        numbers: list[Dim] = []
        for operand in strides:
            inner = static(operand[-1])
            modes.append(inner if inner in (0, 1) else "s")
            numbers += operand if modes[-1] == "s" else operand[:-1]
        spec = KernelSpec.make(
            "elementwise",
            rank=len(dims),
            inputs=tuple(v.dtype for v in operands[1:]),
            in_inner=tuple(modes[1:]),
            out=pw.dtype,
            out_inner=modes[0],
            args=len(pw.args),
            expr=_renumber(pw.expr, renumber),
        )
        sizes = [d for d, _ in dims]
        blocks, grain = self.device.elementwise_blocks(sizes)
        self.emit(pw.name, spec, [*operands, *sizes, *numbers, *pw.args], blocks, grain)
        return out

    def same_shape(self, a: Sequence[Dim], b: Sequence[Dim]) -> bool:
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))

    def leading(self, value: ir.Value, axis: int) -> tuple[Dim, Dim, Dim]:
        """(product before axis, size of axis, product after)."""
        shape = self.shape(value)
        return product(shape[:axis]), shape[axis], product(shape[axis + 1 :])

    def bind(self, node: ir.Node, *results: Lazy) -> None:
        """Record what the outputs of `node` have become; an output of the graph is computed at once."""
        for value, lazy in zip(node.outputs, results, strict=False):
            self.values[value] = lazy
            if isinstance(lazy, Rounded):
                self._rounded[value] = lazy
            if value in self.outputs:
                self.deliver(value)

    def deliver(self, value: ir.Value) -> None:
        """See that an output of the graph is in the caller's memory."""
        view = self.view(value)
        if view.buffer is not self.outputs[value]:
            self.values[value] = self.copy(view, f"{value.name}/copy", View.of(self.outputs[value]))


def _room_rows(rows: Dim, wanted: Int8Input) -> Dim:
    """So many rows that there is room for them: on tiles NVFP4's are bfloat16 (codegen/bf16_rows.py)."""
    return ceildiv(rows, ROWS) * ROWS if wanted == int8_input(NVFP4.name) else rows


def _iota_axes(expr: Any) -> set[int]:
    if not isinstance(expr, tuple) or not expr:
        return set()
    if expr[0] == "iota":
        return {expr[1]}
    return set().union(*(_iota_axes(e) for e in expr[1:]))


def _renumber(expr: Any, axes: dict[int, int]) -> Any:
    if not isinstance(expr, tuple) or not expr:
        return expr
    if expr[0] == "iota":
        return ("iota", axes[expr[1]])
    return (expr[0], *(_renumber(e, axes) for e in expr[1:]))


def broadcast(shapes: Sequence[tuple[Dim, ...]], where: str) -> tuple[Dim, ...]:
    """The shape that `shapes` broadcast to (ONNX rules); sizes that are not known to be 1 must be equal."""
    rank = max(len(s) for s in shapes)
    out: list[Dim] = []
    for axis in range(rank):
        result: Dim = sympy.Integer(1)
        for s in shapes:
            at = axis - rank + len(s)
            if at < 0 or is_one(s[at]):
                continue
            if not is_one(result) and not equal(result, s[at]):
                raise UnsupportedError(f"{where}: cannot broadcast size {s[at]} with {result}")
            result = s[at]
        out.append(result)
    return tuple(out)
