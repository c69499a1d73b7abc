"""Strided views against numpy's own, and the merging of dims against brute force."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import sympy
from hypothesis import given, settings
from hypothesis import strategies as st

from qgraph.codegen.dims import symbol
from qgraph.codegen.memory import Buffer, View, collapse, dense_strides

B, S = symbol("batch"), symbol("sequence")


def sizes(*dims):
    return tuple(sympy.sympify(d) for d in dims)


def make(*dims):
    return View.of(Buffer("temp", "f32", sizes(*dims)))


def elements(view: View) -> np.ndarray:
    """The element numbers that a view of constant size names."""
    out = np.full(tuple(int(d) for d in view.shape), int(view.offset))
    for axis, stride in enumerate(view.strides):
        index = np.arange(int(view.shape[axis])) * int(stride)
        out = out + index.reshape((-1,) + (1,) * (view.rank - axis - 1))
    return out


def test_attention_layout_needs_no_copy():
    hidden = make(B, S, 384)
    heads = hidden.reshape(sizes(B, S, 12, 32)).transpose((0, 2, 1, 3))
    assert heads.shape == (B, 12, S, 32) and not heads.is_dense()
    assert heads.strides == (384 * S, 32, 384, 1)
    assert heads.reshape(sizes(B, S, 384)) is None
    back = heads.transpose((0, 2, 1, 3))
    assert back.is_dense() and back.reshape(sizes(B, S, 384)).is_dense()
    assert heads.reshape((B, 3, 4, S, sympy.Integer(32))).strides == (384 * S, 128, 32, 384, 1)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_views_name_the_same_elements_as_numpy(data):
    shape = tuple(data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=4)))
    view, array = make(*shape), np.arange(np.prod(shape)).reshape(shape)
    for _ in range(3):
        kind = data.draw(st.sampled_from(["transpose", "slice", "expand", "reshape"]))
        if kind == "transpose":
            perm = tuple(data.draw(st.permutations(range(array.ndim))))
            view, array = view.transpose(perm), array.transpose(perm)
        elif kind == "slice":
            axis = data.draw(st.integers(0, array.ndim - 1))
            start = data.draw(st.integers(0, array.shape[axis] - 1))
            step = data.draw(st.sampled_from([1, 2, -1]))
            picked = array[(slice(None),) * axis + (slice(start, None, step),)]
            view, array = view.slice(axis, start, picked.shape[axis], step), picked
        elif kind == "expand":
            target = (2, *(3 if d == 1 else d for d in array.shape))
            if len(target) > 5:
                continue
            view, array = view.expand(sizes(*target)), np.broadcast_to(array, target)
        else:
            total = array.size
            cut = data.draw(st.sampled_from([d for d in range(1, total + 1) if total % d == 0]))
            new = view.reshape(sizes(cut, total // cut))
            if new is not None:
                view, array = new, array.reshape(cut, total // cut)
        np.testing.assert_array_equal(elements(view), array)
        assert view.is_dense() == (
            view.strides == dense_strides(view.shape)
            or all(
                d == 1 or s == w
                for d, s, w in zip(view.shape, view.strides, dense_strides(view.shape), strict=True)
            )
        )


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 3), min_size=1, max_size=4), st.data())
def test_collapse_walks_the_same_elements(shape, data):
    dims = sizes(*shape)
    views = []
    for _ in range(2):
        perm = tuple(data.draw(st.permutations(range(len(shape)))))
        inverse = tuple(perm.index(i) for i in range(len(perm)))
        views.append(make(*(shape[p] for p in perm)).transpose(inverse))
    keep = frozenset(data.draw(st.sets(st.integers(0, len(shape) - 1), max_size=1)))
    merged, strides = collapse(dims, [v.strides for v in views], keep)
    assert keep <= {axis for _, axis in merged}
    for view, mine in zip(views, strides, strict=True):
        walked = [
            sum(i * int(s) for i, s in zip(index, mine, strict=True))
            for index in itertools.product(*(range(int(d)) for d, _ in merged))
        ]
        assert walked == elements(view).reshape(-1).tolist()


def test_collapse_of_symbolic_dims():
    merged, strides = collapse((B, S, sympy.Integer(384)), [dense_strides((B, S, sympy.Integer(384)))])
    assert len(merged) == 1 and merged[0][0] == sympy.expand(B * S * 384) and strides == [[1]]
    bias = make(384).expand((B, S, sympy.Integer(384)))
    merged, strides = collapse(
        (B, S, sympy.Integer(384)), [dense_strides((B, S, sympy.Integer(384))), bias.strides]
    )
    assert [d for d, _ in merged] == [B * S, 384] and strides == [[384, 1], [0, 1]]


@pytest.mark.parametrize("dtype, bytes_each", [("f32", 4), ("i64", 8), ("bool", 1)])
def test_buffer_bytes(dtype, bytes_each):
    assert Buffer("temp", dtype, (B, sympy.Integer(3))).nbytes == 3 * bytes_each * B
