"""The outputs stay what the file declares and what inference found before any pass touched a layer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import onnx_ir as ir
import sympy

from qgraph.errors import InputError, QGraphError
from qgraph.passes.base import GraphPass, describe
from qgraph.passes.infer_shapes import CHECKS
from qgraph.passes.shapes.dims import Dim, from_ir

DECLARED = "qgraph.declared_outputs"  # in graph.meta: list of Signature, until the first HoldOutputs
HELD = "qgraph.held_outputs"  # in graph.meta: Held, from then on

Dims = tuple[int | ir.SymbolicDim, ...]


@dataclass(frozen=True)
class Signature:
    """What is said of a value; None for what is left open."""

    name: str | None
    type: ir.TypeProtocol | None
    dims: Dims | None

    @classmethod
    def of(cls, value: ir.Value) -> Signature:
        return cls(value.name, value.type, None if value.shape is None else value.shape.dims)

    def __str__(self) -> str:
        kind = "untyped" if self.type is None else str(self.type)
        if isinstance(self.type, ir.TensorType):
            kind = self.type.dtype.name
        return kind if self.dims is None else f"{kind} [{', '.join(map(str, self.dims))}]"


@dataclass(frozen=True)
class Held:
    """The outputs as inferred, in terms of the names that the inputs had then."""

    outputs: list[Signature]
    inputs: dict[str | None, Dims | None]


class DeclareOutputs(GraphPass):
    """Remembers what the file says of its outputs. The first pass of all, since inference writes over it."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        graph.meta[DECLARED] = [Signature.of(value) for value in graph.outputs]
        graph.meta.pop(HELD, None)
        return ir.passes.PassResult(model, False)


class HoldOutputs(GraphPass):
    """Compares the outputs as inferred with the file's declaration, later with what it saw the first time.

    Changes nothing. Runs after `InferShapes`. Names of dimensions in the declaration mean nothing (exporters
    make them up), and a fixed dimension is accepted where inference finds a named one (exporters that are
    told of dynamic inputs only write the traced size): the inferred dimension is the one that counts.

    Raises:
        InputError: the file declares another type, rank or fixed dimension than its nodes compute.
        QGraphError: a pass changed an output: a defect of that pass.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        found = [Signature.of(value) for value in graph.outputs]
        declared = graph.meta.pop(DECLARED, None)
        if declared is not None:
            self._check_declaration(declared, found)
            graph.meta[HELD] = Held(found, {v.name: _dims(v) for v in graph.inputs})
        elif (held := graph.meta.get(HELD)) is not None:
            _check_kept(held, found, graph)
        return ir.passes.PassResult(model, False)

    def _check_declaration(self, declared: list[Signature], found: list[Signature]) -> None:
        for promise, value in zip(declared, found, strict=True):
            require_agreement(promise, value)
            for axis, (a, b) in enumerate(zip(promise.dims or (), value.dims or (), strict=False)):
                if isinstance(a, int) and a >= 0 and isinstance(b, ir.SymbolicDim):
                    self.refuse(f"output {describe_name(value)}", f"axis {axis} is declared {a} but is '{b}'")


def describe_name(signature: Signature) -> str:
    return describe(ir.Value(name=signature.name))


def require_agreement(declared: Signature, found: Signature) -> None:
    """Raises InputError where the file declares an output as what it is not."""
    if _contradict(declared, found):
        raise InputError(
            f"output {describe_name(found)} is declared as {declared}, but the model computes {found}; "
            "the file is damaged or was edited by hand: export it again"
        )


def _contradict(a: Signature, b: Signature) -> bool:
    """Whether no tensor fits both. What one of them leaves open, or names, contradicts nothing."""
    untyped = any(s.type is None or s.type.dtype == ir.DataType.UNDEFINED for s in (a, b))
    if not untyped and a.type != b.type:
        return True
    if a.dims is None or b.dims is None:
        return False
    if len(a.dims) != len(b.dims):
        return True
    fixed = [(p, q) for p, q in zip(a.dims, b.dims, strict=True) if isinstance(p, int) and isinstance(q, int)]
    # Some exporters write -1 for a dimension they leave open.
    return any(p != q for p, q in fixed if p >= 0 and q >= 0)


def _check_kept(held: Held, found: list[Signature], graph: ir.Graph) -> None:
    renamed = _renamed(held.inputs, graph.inputs)
    checks = graph.meta.get(CHECKS, [])
    for old, new in zip(held.outputs, found, strict=True):
        if old.name != new.name or _contradict(old, new) or _sizes_differ(old, new, renamed, checks):
            raise QGraphError(
                f"output {describe_name(old)} was {old} and a pass made it {new} ({describe_name(new)}); "
                "this is a defect of qgraph: please report it"
            )


def _dims(value: ir.Value) -> Dims | None:
    return None if value.shape is None else value.shape.dims


def _renamed(before: dict[str | None, Dims | None], inputs: Iterable[ir.Value]) -> dict[sympy.Symbol, Dim]:
    """What the inputs' dimension names of then are now: a later inference may find two of them equal."""
    found: dict[sympy.Symbol, Dim] = {}
    for value in inputs:
        for old, new in zip(before.get(value.name) or (), _dims(value) or (), strict=False):
            left, right = from_ir(old), from_ir(new)
            if isinstance(left, sympy.Symbol) and right is not None:
                found[left] = right
    return found


def _sizes_differ(old: Signature, new: Signature, renamed: dict[sympy.Symbol, Dim], checks: list) -> bool:
    """Whether two shapes of one rank have different sizes for some legal sizes of the inputs.

    Tried at a few points rather than proved: equal expressions may be written differently.
    """
    pairs = [(from_ir(a), from_ir(b)) for a, b in zip(old.dims or (), new.dims or (), strict=True)]
    known = [(sympy.sympify(a).subs(renamed), sympy.sympify(b)) for a, b in pairs if None not in (a, b)]
    different = [(a, b) for a, b in known if a != b]
    if not different:
        return False
    bounds = [(sympy.sympify(from_ir(a)), sympy.sympify(from_ir(b))) for a, b, _ in checks]
    symbols = set().union(*(e.free_symbols for pair in (*different, *bounds) for e in pair))
    return any(
        any(a.subs(point) != b.subs(point) for a, b in different)
        for point in _points(sorted(symbols, key=str))
        if all(a.subs(point) >= b.subs(point) for a, b in bounds)
    )


def _points(symbols: list[sympy.Symbol]) -> Iterator[dict[sympy.Symbol, int]]:
    """Sizes that tell dimensions apart, small and large, some with many divisors."""
    for start, step in ((1, 0), (2, 1), (12, 12), (420, 420), (1680, 1680)):
        yield {symbol: start + step * i for i, symbol in enumerate(symbols)}
