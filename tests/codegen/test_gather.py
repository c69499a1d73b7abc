"""gather and gather_nd against numpy; indices that are wrong."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from kernel_harness import compile_kernel, link_kernel, native_isas

from qgraph.codegen.isa import ISAS, Isa
from qgraph.codegen.spec import KernelSpec

isas = pytest.mark.parametrize("isa", native_isas(), ids=lambda i: i.name)
NUMPY = {"f32": np.float32, "i64": np.int64, "i32": np.int32, "u8": np.uint8, "i8": np.int8, "bool": np.bool_}
INDEX = {"i64": np.int64, "i32": np.int32}


def _data(dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    values = np.arange(1, np.prod(shape) + 1).reshape(shape)
    return (values % 3 == 0) if dtype == "bool" else values.astype(NUMPY[dtype])


def _gather(
    isa: Isa,
    data: np.ndarray,
    indices: np.ndarray,
    dtype: str,
    split: tuple[int, ...] | None = None,
    guard: bool = True,
) -> tuple[np.ndarray, int]:
    """(y, status) for data [outer, n, inner] and indices [m]."""
    outer, n, inner = data.shape
    y = np.ones((outer, len(indices), inner), data.dtype)
    status = np.zeros(1, np.int32)
    index = next(k for k, t in INDEX.items() if t == indices.dtype)
    kernel = compile_kernel(KernelSpec.make("gather", dtype=dtype, index=index), isa)
    kernel(
        y,
        data,
        indices,
        status,
        n,
        len(indices),
        inner,
        blocks=outer * len(indices),
        split=split,
        guard=guard,
    )
    return y, int(status[0])


@isas
@pytest.mark.parametrize("dtype", NUMPY)
def test_gather(isa: Isa, dtype: str) -> None:
    for index, (outer, n, inner) in itertools.product(
        INDEX.values(), ((1, 5, 1), (3, 4, 7), (2, 9, 16), (2, 3, 33), (1, 100, 384))
    ):
        data = _data(dtype, (outer, n, inner))
        indices = np.random.default_rng(n).integers(-n, n, 11).astype(index)
        indices[:2] = -n, n - 1
        y, status = _gather(isa, data, indices, dtype, split=(1, 4), guard=dtype in ("f32", "bool"))
        np.testing.assert_array_equal(y, data[:, indices])
        assert status == 0


@isas
@pytest.mark.parametrize("index", INDEX)
def test_index_out_of_range_is_reported_and_reads_nothing(isa: Isa, index: str) -> None:
    data = _data("f32", (2, 5, 21))
    info = np.iinfo(INDEX[index])
    for bad in (5, -6, 1000, info.max, info.min):
        indices = np.array([0, bad, -1], INDEX[index])
        y, status = _gather(isa, data, indices, "f32")
        assert status == 1
        np.testing.assert_array_equal(y[:, 1], 0)
        np.testing.assert_array_equal(y[:, [0, 2]], data[:, [0, 4]])


@isas
def test_gather_from_an_empty_axis(isa: Isa) -> None:
    y, status = _gather(isa, np.empty((1, 0, 3), np.float32), np.zeros(2, np.int64), "f32")
    assert status == 1 and (y == 0).all()


def _gather_nd(isa: Isa, data: np.ndarray, indices: np.ndarray, dtype: str) -> tuple[np.ndarray, int]:
    """(y, status) for data [batch, d.., inner] and indices [batch, m, k]."""
    batch, m, k = indices.shape
    inner = data.shape[-1]
    y = np.ones((batch, m, inner), data.dtype)
    status = np.zeros(1, np.int32)
    index = next(key for key, t in INDEX.items() if t == indices.dtype)
    kernel = compile_kernel(KernelSpec.make("gather_nd", dtype=dtype, index=index, k=k), isa)
    kernel(
        y, data, indices, status, m, inner, *data.shape[1:-1], blocks=batch * m, split=(1, 3), guard=inner > 1
    )  # fmt: skip
    return y, int(status[0])


@isas
@pytest.mark.parametrize("dtype", ["f32", "i64", "bool"])
@pytest.mark.parametrize("dims", [(5,), (4, 3), (3, 2, 5)])
def test_gather_nd(isa: Isa, dtype: str, dims: tuple[int, ...]) -> None:
    for batch, inner, index in itertools.product((1, 3), (1, 17), INDEX.values()):
        data = _data(dtype, (batch, *dims, inner))
        rng = np.random.default_rng(inner)
        indices = np.stack([rng.integers(-d, d, (batch, 6)) for d in dims], -1).astype(index)
        y, status = _gather_nd(isa, data, indices, dtype)
        want = np.stack([data[b][tuple(indices[b].T)] for b in range(batch)])
        np.testing.assert_array_equal(y, want)
        assert status == 0


@isas
def test_gather_nd_out_of_range(isa: Isa) -> None:
    data = _data("f32", (2, 4, 3, 9))
    good = np.array([[1, 2], [0, -3], [-4, 0]])
    for bad in ([4, 0], [0, 3], [-5, 0], [0, -4], [2**62, 2**62]):
        indices = np.stack([np.array([*good, bad]), np.array([bad, *good])])
        y, status = _gather_nd(isa, data, indices, "f32")
        assert status == 1
        np.testing.assert_array_equal(y[0, :3], data[0][tuple(good.T)])
        np.testing.assert_array_equal(y[1, 1:], data[1][tuple(good.T)])
        assert (y[0, 3] == 0).all() and (y[1, 0] == 0).all()


@pytest.mark.parametrize("isa", ISAS.values(), ids=lambda i: i.name)
def test_links(isa: Isa) -> None:
    for spec in (
        KernelSpec.make("gather", dtype="f32", index="i64"),
        KernelSpec.make("gather", dtype="bool", index="i32"),
        KernelSpec.make("gather_nd", dtype="i64", index="i64", k=3),
    ):
        assert link_kernel(spec, isa).code
