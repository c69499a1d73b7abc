"""Random small graphs over dims B and S: what a list of single operators misses is how they meet."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Shape = tuple[int | str, ...]
INPUTS: dict[str, Shape] = {"x": ("B", "S", 8), "z": ("B", "S", 8), "m": ("S", "S")}


@dataclass
class RandomGraph:
    """Grows by one random operator at a time; `values` are what the next may read."""

    seed: int
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: list[onnx.TensorProto] = field(default_factory=list)
    values: list[tuple[str, Shape]] = field(default_factory=lambda: list(INPUTS.items()))

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.normal = np.random.default_rng(self.seed).standard_normal

    def op(self, op_type: str, inputs: list[str], shape: Shape, **attributes: object) -> str:
        name = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(op_type, inputs, [name], f"n{len(self.nodes)}", **attributes))
        self.values.append((name, shape))
        return name

    def const(self, value: np.ndarray | list[int]) -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def floats(self, *shape: int) -> str:
        return self.const((self.normal(shape) / 2).astype(np.float32))

    def like(self, shape: Shape) -> str:
        """Any value of this shape."""
        return self.random.choice([name for name, other in self.values if other == shape])

    def grow(self) -> None:
        """Add one operator, if the one drawn suits the value drawn."""
        a, s = self.random.choice(self.values[-6:] if self.random.random() < 0.7 else self.values)
        axis = self.random.randrange(len(s)) if s else 0
        last = s[-1] if s and isinstance(s[-1], int) else None
        match self.random.randrange(16):
            case 0 | 1:
                self.op(self.random.choice(["Relu", "Tanh", "Sigmoid", "Gelu"]), [a], s)
            case 2 | 3 if last and len(s) >= 2:
                n = self.random.choice([1, 3, 8, 17])
                self.op("MatMul", [a, self.floats(last, n)], (*s[:-1], n))
            case 4 if last:
                operands = [a, self.floats(last)]
                self.op("Add", operands[:: self.random.choice([1, -1])], s)
            case 5 | 6:
                self.op(self.random.choice(["Add", "Sub", "Mul", "Max"]), [a, self.like(s)], s)
            case 7:
                perm = self.random.sample(range(len(s)), len(s))
                self.op("Transpose", [a], tuple(s[i] for i in perm), perm=perm)
            case 8 if last and last % 2 == 0 and len(s) < 5:
                target = [0] * (len(s) - 1) + [2, last // 2]
                self.op("Reshape", [a, self.const(target)], (*s[:-1], 2, last // 2))
            case 9 if len(s) > 1:
                kept = tuple(d for i, d in enumerate(s) if i != axis)
                op = self.random.choice(["ReduceMean", "ReduceMax", "ReduceSum"])
                self.op(op, [a, self.const([axis])], kept, keepdims=0)
            case 10 if s and isinstance(s[axis], int):
                wide = tuple(d * 2 if i == axis else d for i, d in enumerate(s))
                self.op("Concat", [a, self.like(s)], wide, axis=axis)
            case 11 if last and last > 1:
                start, step = self.random.randrange(last), self.random.choice([1, 2])
                bounds = [self.const([v]) for v in (start, 2**40, len(s) - 1, step)]
                self.op("Slice", [a, *bounds], (*s[:-1], len(range(start, last, step))))
            case 12 if s:
                self.op("Softmax", [a], s, axis=axis)
            case 13 if last:
                self.op("LayerNormalization", [a, self.floats(last), self.floats(last)], s)
            case 14 if s and isinstance(s[axis], int):
                index = self.const(np.array(self.random.randrange(s[axis])))
                self.op("Gather", [a, index], s[:axis] + s[axis + 1 :], axis=axis)
            case 15 if len(s) >= 2:
                turn = [*range(len(s) - 2), len(s) - 1, len(s) - 2]
                turned = self.op("Transpose", [a], tuple(s[i] for i in turn), perm=turn)
                self.op("MatMul", [a, turned], (*s[:-1], s[-2]))

    def model(self) -> onnx.ModelProto:
        """The graph, with its last value and up to two others as outputs."""
        made = self.values[len(INPUTS) :]
        outputs = dict([made[-1], *self.random.sample(made, min(2, len(made)))])

        def infos(values: dict[str, Shape]) -> list[onnx.ValueInfoProto]:
            return [helper.make_tensor_value_info(n, TensorProto.FLOAT, list(s)) for n, s in values.items()]

        graph = helper.make_graph(
            self.nodes, f"seed{self.seed}", infos(INPUTS), infos(outputs), self.constants
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)


def random_model(seed: int) -> onnx.ModelProto:
    """A valid model of about ten operators, the same for the same seed."""
    graph = RandomGraph(seed)
    while len(graph.nodes) < 10:
        graph.grow()
    return graph.model()
