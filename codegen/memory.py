"""Buffers and strided views of them: how the lowering sees every tensor of the graph.

Transpose, Reshape, Slice, Expand and their kin move no data: they make another view of the same buffer. A
copy is made only when a kernel needs its operand dense and the view is not.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import sympy

from qgraph.codegen.dims import Dim, equal, is_one, product, size

ITEM_SIZE = {
    "f32": 4,
    "f64": 8,
    "f16": 2,
    "bf16": 2,
    "i64": 8,
    "i32": 4,
    "i16": 2,
    "i8": 1,
    "u8": 1,
    "bool": 1,
    "u32": 4,
}


@dataclass(eq=False)
class Buffer:
    """A dense region of memory: a graph input or output, a weight, a temporary, or state, which the session
    keeps from run to run."""

    kind: str  # input | output | weight | temp | state
    dtype: str
    shape: tuple[Dim, ...]
    name: str = ""  # of the input, output or weight tensor; of the input that a state stands for
    index: int = -1  # in the plan's list of values
    data: Any = field(default=None, repr=False)  # of a weight: array as stored

    @property
    def nbytes(self) -> Dim:
        return product(self.shape) * ITEM_SIZE[self.dtype]


def dense_strides(shape: tuple[Dim, ...]) -> tuple[Dim, ...]:
    """Row-major strides, in elements."""
    strides = []
    step: Dim = sympy.Integer(1)
    for dim in reversed(shape):
        strides.append(step)
        step = sympy.expand(step * dim)
    return tuple(reversed(strides))


@dataclass(frozen=True, eq=False)
class View:
    """A strided window on a buffer: element [i, j, ...] lies `offset + i*strides[0] + ...` elements from its
    start."""

    buffer: Buffer
    shape: tuple[Dim, ...]
    strides: tuple[Dim, ...]
    offset: Dim = field(default_factory=lambda: sympy.Integer(0))

    @staticmethod
    def of(buffer: Buffer) -> View:
        return View(buffer, buffer.shape, dense_strides(buffer.shape))

    @property
    def dtype(self) -> str:
        return self.buffer.dtype

    @property
    def rank(self) -> int:
        return len(self.shape)

    def is_dense(self) -> bool:
        """Whether the elements follow one another in row-major order."""
        return all(
            is_one(dim) or equal(stride, want)
            for dim, stride, want in zip(self.shape, self.strides, dense_strides(self.shape), strict=True)
        )

    def transpose(self, perm: tuple[int, ...]) -> View:
        return replace(
            self, shape=tuple(self.shape[p] for p in perm), strides=tuple(self.strides[p] for p in perm)
        )

    def expand(self, shape: tuple[Dim, ...]) -> View:
        """Broadcast to `shape` by zero strides."""
        lead = len(shape) - self.rank
        zero = sympy.Integer(0)
        strides = (zero,) * lead + tuple(
            zero if is_one(mine) and not is_one(want) else stride
            for mine, want, stride in zip(self.shape, shape[lead:], self.strides, strict=True)
        )
        return replace(self, shape=shape, strides=strides)

    def slice(self, axis: int, start: Dim | int, length: Dim | int, step: int = 1) -> View:
        """Elements start, start + step, ... along `axis`, `length` of them."""
        shape = tuple(size(length) if i == axis else d for i, d in enumerate(self.shape))
        strides = tuple(s * step if i == axis else s for i, s in enumerate(self.strides))
        return replace(
            self, shape=shape, strides=strides, offset=sympy.expand(self.offset + start * self.strides[axis])
        )

    def reshape(self, shape: tuple[Dim, ...]) -> View | None:
        """The same elements under another shape, or None when that takes a copy."""
        if self.is_dense():
            return replace(self, shape=shape, strides=dense_strides(shape))
        # Walk both shapes from the right: a group of old dims that is one run of memory may be cut anew.
        strides: list[Dim] = [sympy.Integer(0)] * len(shape)
        old = [(d, s) for d, s in zip(self.shape, self.strides, strict=True) if not is_one(d)]
        new = [i for i, d in enumerate(shape) if not is_one(d)]
        while old and new:
            old_size, step = old.pop()
            index = new.pop()
            inside = [index]
            new_size = shape[index]
            while not equal(old_size, new_size):
                if new and _divides(new_size * shape[new[-1]], old_size):
                    index = new.pop()
                    inside.append(index)
                    new_size = sympy.expand(new_size * shape[index])
                elif old and equal(old[-1][1], step * old_size):
                    old_size = sympy.expand(old_size * old.pop()[0])
                else:
                    return None
            for i in inside:
                strides[i] = step
                step = sympy.expand(step * shape[i])
        if old or new:
            return None
        return replace(self, shape=shape, strides=tuple(strides))


def _divides(part: Dim, whole: Dim) -> bool:
    """Whether `whole` is a whole multiple of `part` for all values of the symbols, as far as algebra
    tells."""
    quotient = sympy.cancel(whole / part)
    return bool(sympy.denom(sympy.together(quotient)) == 1)


def collapse(
    shape: tuple[Dim, ...], strides: list[tuple[Dim, ...]], keep: frozenset[int] = frozenset()
) -> tuple[list[tuple[Dim, int]], list[list[Dim]]]:
    """Merge the dims of an iteration space that every operand walks as one run.

    Args:
        shape: the iteration space.
        strides: per operand, one stride a dim.
        keep: axes that must not be merged.

    Returns:
        (dims, strides): the merged dims as (size, original axis, the last of those merged), and per operand
        one stride for each. Dims of size 1 vanish unless kept.
    """
    dims: list[tuple[Dim, int]] = []
    merged: list[list[Dim]] = [[] for _ in strides]
    for axis, length in enumerate(shape):
        if is_one(length) and axis not in keep:
            continue
        joins = (
            dims
            and axis not in keep
            and dims[-1][1] not in keep
            and all(equal(m[-1], s[axis] * length) for m, s in zip(merged, strides, strict=True))
        )
        if joins:
            dims[-1] = (sympy.expand(dims[-1][0] * length), axis)
            for m, s in zip(merged, strides, strict=True):
                m[-1] = s[axis]
        else:
            dims.append((length, axis))
            for m, s in zip(merged, strides, strict=True):
                m.append(s[axis])
    return dims, merged
