"""gather, gather_nd and gather_nvfp4 against numpy; indices that are wrong."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from emulated import emulated
from kernel_harness import compile_kernel, link_kernel, native_isas

from qgraph.codegen.isa import ISAS, Isa
from qgraph.codegen.packing import pack_nvfp4_rows
from qgraph.codegen.spec import KernelSpec
from qgraph.formats import QTensor
from qgraph.formats.nvfp4 import NVFP4

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


def _table(V: int, H: int) -> tuple[tuple[np.ndarray, np.ndarray, np.ndarray], np.ndarray]:
    """(packed codes, block scales, global scale) of a random table, and its float32 values. Every code and
    every E4M3 number that may be a scale occurs, where there is room."""
    rng = np.random.default_rng(V * 1000 + H)
    codes = rng.permutation(np.arange(V * H) % 16).astype(np.uint8).reshape(V, H)
    blocks = -(-H // 16)
    scale = rng.permutation(np.arange(V * blocks) % 127).astype(np.uint8).reshape(V, blocks)
    q = QTensor(
        "nvfp4",
        (H, V),
        np.ascontiguousarray(codes.T),
        np.ascontiguousarray(scale.T).view(NVFP4.scale_dtype),
        np.float32(0.0123),
    )
    parts = (*pack_nvfp4_rows(codes, scale), np.array([q.global_scale]))
    return parts, np.ascontiguousarray(q.dequantize().T)


def _lookup(isa: Isa, parts: tuple[np.ndarray, ...], h: int, ids: np.ndarray) -> tuple[np.ndarray, int]:
    y, status = np.ones((len(ids), h), np.float32), np.zeros(1, np.int32)
    index = next(k for k, t in INDEX.items() if t == ids.dtype)
    kernel = compile_kernel(KernelSpec.make("gather_nvfp4", h=h, index=index), isa)
    kernel(y, *parts, ids, status, len(parts[0]), blocks=len(ids), split=(1, 4), guard=True)
    return y, int(status[0])


@isas
@pytest.mark.parametrize(
    ("V", "H"), [(1, 1), (9, 7), (5, 15), (40, 16), (7, 17), (6, 24), (150, 31), (4, 33), (3, 384)]
)
def test_gather_nvfp4_is_exact(isa: Isa, V: int, H: int) -> None:
    """To the bit what DequantizeLinear gives, the sign of zeros included."""
    parts, table = _table(V, H)
    index = np.int32 if H % 2 else np.int64
    ids = np.concatenate([[-V, V - 1, 0, -1], np.arange(V), -np.arange(V) - 1]).astype(index)
    y, status = _lookup(isa, parts, H, ids)
    assert y.tobytes() == table[ids].tobytes() and status == 0


@emulated
def test_gathers_on_others(isa: Isa) -> None:
    parts, table = _table(150, 31)
    ids = np.concatenate([np.arange(150), [-1, -150]])
    y, status = _lookup(isa, parts, 31, ids)
    assert y.tobytes() == table[ids].tobytes() and status == 0
    data = _data("f32", (2, 5, 21))
    got, status = _gather(isa, data, np.array([0, 5, -1]), "f32")
    np.testing.assert_array_equal(got[:, [0, 2]], data[:, [0, 4]])
    assert status == 1


@isas
@pytest.mark.parametrize("index", INDEX)
def test_gather_nvfp4_out_of_range(isa: Isa, index: str) -> None:
    parts, table = _table(5, 21)
    info = np.iinfo(INDEX[index])
    for bad in (5, -6, info.max, info.min):
        y, status = _lookup(isa, parts, 21, np.array([0, bad, -1], INDEX[index]))
        assert status == 1 and not y[1].any()
        np.testing.assert_array_equal(y[[0, 2]], table[[0, -1]])


@pytest.mark.parametrize("isa", ISAS.values(), ids=lambda i: i.name)
def test_links(isa: Isa) -> None:
    for spec in (
        KernelSpec.make("gather", dtype="f32", index="i64"),
        KernelSpec.make("gather", dtype="bool", index="i32"),
        KernelSpec.make("gather_nd", dtype="i64", index="i64", k=3),
        KernelSpec.make("gather_nvfp4", h=40, index="i64"),
    ):
        assert link_kernel(spec, isa).code
