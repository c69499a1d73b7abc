"""The view of one node that shape rules work with, and the table they register in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import onnx_ir as ir

from qgraph.errors import InputError, UnsupportedError
from qgraph.passes.base import describe, printable
from qgraph.passes.shapes.dims import Dim, UnequalError, World, tidy

MAX_CONTENT = 64  # elements of a tensor whose values are tracked


@dataclass
class Fact:
    """What is known of a value: dtype, shape, and, of small tensors, the elements.

    `content` is an object array of the value's shape holding ints, floats, bools, sympy expressions, or None
    for an element that depends on data.
    """

    dtype: ir.DataType
    shape: tuple[Dim, ...]
    content: np.ndarray | None = None


Rule = Callable[["NodeView"], None]
RULES: dict[tuple[str, str], Rule] = {}


def rule(*op_types: str, domain: str = "") -> Callable[[Rule], Rule]:
    """Registers a rule for operators."""

    def register(function: Rule) -> Rule:
        for op_type in op_types:
            RULES[(domain, op_type)] = function
        return function

    return register


class NodeView:
    """One node during inference: its inputs' facts in, its outputs' facts out."""

    def __init__(self, node: ir.Node, inputs: Sequence[Fact | None], world: World) -> None:
        self.node = node
        self.world = world
        self._inputs = inputs
        self.outputs: dict[int, Fact] = {}

    # -- inputs -------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._inputs)

    def has(self, index: int) -> bool:
        return index < len(self._inputs) and self._inputs[index] is not None

    def fact(self, index: int) -> Fact:
        found = self._inputs[index] if index < len(self._inputs) else None
        if found is None:
            self.fail(f"input {index} is missing")
        return found

    def shape(self, index: int) -> tuple[Dim, ...]:
        return self.fact(index).shape

    def rank(self, index: int) -> int:
        return len(self.fact(index).shape)

    def dtype(self, index: int) -> ir.DataType:
        return self.fact(index).dtype

    def content(self, index: int) -> np.ndarray | None:
        return self.fact(index).content if self.has(index) else None

    def dims(self, index: int, what: str) -> list[Dim]:
        """The elements of a small integer tensor, all known. Raises UnsupportedError where they depend on
        data."""
        content = self.content(index)
        if content is None or any(v is None for v in content.reshape(-1)):
            self.refuse(f"{what} ('{printable(self.input_name(index))}') depends on data")
        return [v if isinstance(v, int) else tidy(v) for v in map(_integer, content.reshape(-1))]

    def ints(self, index: int, what: str) -> list[int]:
        """As `dims`, but plain integers."""
        values = self.dims(index, what)
        if not all(isinstance(v, int) for v in values):
            self.refuse(f"{what} ('{printable(self.input_name(index))}') depends on the input's shape")
        return values

    def input_name(self, index: int) -> str | None:
        value = self.node.inputs[index] if index < len(self.node.inputs) else None
        return None if value is None else value.name

    # -- attributes ---------------------------------------------------------------------------------------

    def attr(self, name: str, default: Any = None) -> Any:
        found = self.node.attributes.get(name)
        return default if found is None else found.value

    def axis(self, axis: int, rank: int) -> int:
        """`axis` counted from the front."""
        if not -rank <= axis < rank:
            self.fail(f"axis {axis} is out of range for rank {rank}")
        return axis % rank

    def axes(self, axes: Sequence[int], rank: int) -> list[int]:
        found = [self.axis(a, rank) for a in axes]
        if len(set(found)) != len(found):
            self.fail(f"axes {list(axes)} repeat")
        return found

    # -- outputs ------------------------------------------------------------------------------------------

    def out(
        self, index: int, dtype: ir.DataType, shape: Sequence[Dim], content: np.ndarray | None = None
    ) -> None:
        """Sets what is known of output `index`, if the node has it."""
        if index >= len(self.node.outputs):
            return
        dims = tuple(d if isinstance(d, int) else tidy(d) for d in shape)
        if any(isinstance(d, int) and d < 0 for d in dims):
            self.fail(f"a dimension of its output would be negative: {list(dims)}")
        if content is not None and (content.size > MAX_CONTENT or content.shape != dims):
            content = None
        self.outputs[index] = Fact(dtype, dims, content)

    # -- errors -------------------------------------------------------------------------------------------

    def fail(self, message: str) -> NoReturn:
        """The model is wrong."""
        raise InputError(f"{describe(self.node)}: {message}")

    def refuse(self, message: str) -> NoReturn:
        """The model is right but beyond this version."""
        raise UnsupportedError(f"{describe(self.node)}: {message}, so shapes cannot be known before it runs")

    # -- relations of dimensions --------------------------------------------------------------------------

    def equal(self, a: Dim, b: Dim, what: str) -> Dim:
        """The common value of two dimensions the operator needs to be equal."""
        try:
            return self.world.require_equal(a, b, describe(self.node))
        except UnequalError as error:
            self.fail(f"{what}: {error}")

    def broadcast(self, *shapes: Sequence[Dim]) -> tuple[Dim, ...]:
        """Numpy broadcasting. A named dimension is not taken to be 1: against another size it must equal
        that."""
        rank = max((len(s) for s in shapes), default=0)
        result: list[Dim] = [1] * rank
        for shape in shapes:
            for i, dim in enumerate(shape, start=rank - len(shape)):
                if result[i] == 1:
                    result[i] = dim
                elif dim != 1:
                    shown = [str(list(s)) for s in shapes]
                    result[i] = self.equal(result[i], dim, f"shapes {' and '.join(shown)} do not broadcast")
        return tuple(result)

    def known_size(self, shape: Sequence[Dim]) -> bool:
        """Whether the elements of a tensor of this shape are few enough, and their number known, to be
        tracked."""
        size = 1
        for dim in shape:
            if not isinstance(dim, int):
                return False
            size *= dim
        return size <= MAX_CONTENT


def _integer(value: Any) -> Any:
    return int(value) if isinstance(value, (bool, np.generic, float)) else value


def object_array(values: Sequence[Any], shape: Sequence[int] | None = None) -> np.ndarray:
    """An object array of `values`, which numpy must not try to interpret."""
    array = np.empty(len(values), dtype=object)
    for i, value in enumerate(values):
        array[i] = value
    return array if shape is None else array.reshape(shape)
