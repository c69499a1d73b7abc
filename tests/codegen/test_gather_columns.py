"""gather_columns: columns of packed weights, beside what their formats say they are."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from group_cases import CASES, packed, random_weight
from kernel_harness import compile_kernel, native_isas

from qgraph.codegen.isa import Isa
from qgraph.codegen.packing import pack_f32_n16, pack_nvfp4_n16k8
from qgraph.codegen.spec import KernelSpec
from qgraph.formats import FORMATS
from qgraph.solvers import get_solver

isas = pytest.mark.parametrize("isa", native_isas(), ids=lambda i: i.name)
WEIGHTS = [("f32", ""), ("nvfp4", ""), *CASES]
SHAPES = [(1, 1), (40, 33), (300, 17)]


def weight(name: str, packing: str, K: int, N: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """(W float32 [K, N], the arrays that kernels read)."""
    if name in ("f32", "nvfp4"):
        W = np.random.default_rng(K * N).standard_normal((K, N)).astype(np.float32)
        if name == "f32":
            return W, [pack_f32_n16(W)]
        q = get_solver("rtn")(W, format="nvfp4")
        codes, scale = pack_nvfp4_n16k8(q.codes, q.block_scale.view(np.uint8))
        return q.dequantize(), [codes, scale, np.array([q.global_scale], np.float32)]
    q = random_weight(name, K, N)
    return q.dequantize(), packed(q, packing)


def look_up(isa: Isa, name: str, packing: str, shape: tuple[int, int], ids: np.ndarray) -> tuple[Any, ...]:
    """(what comes out, what should, status)."""
    K, N = shape
    W, arrays = weight(name, packing, K, N)
    params: dict[str, Any] = {"block": FORMATS[name].block} if name not in ("f32", "nvfp4") else {}
    params |= {"packing": packing} if packing else {}
    index = {np.dtype(np.int64): "i64", np.dtype(np.int32): "i32"}[ids.dtype]
    suffix = name if name == "f32" else FORMATS[name].suffix
    spec = KernelSpec.make(f"gather_columns_{suffix}", k=K, n=N, index=index, **params)
    y, status = np.full((len(ids), K), np.nan, np.float32), np.zeros(1, np.int32)
    compile_kernel(spec, isa)(y, *arrays, ids, status, blocks=len(ids), guard=True)
    return y, W, int(status[0])


@isas
@pytest.mark.parametrize(("name", "packing"), WEIGHTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_columns(isa: Isa, name: str, packing: str, shape: tuple[int, int]) -> None:
    N = shape[1]
    ids = np.array([0, N - 1, N // 2, -1, -N, 0], np.int64)
    y, W, status = look_up(isa, name, packing, shape, ids)
    assert status == 0
    if name in ("f32", "nvfp4"):
        np.testing.assert_array_equal(y, W.T[ids])
    else:  # a product and a sum may be one rounding
        np.testing.assert_allclose(y, W.T[ids], rtol=1e-6, atol=1e-8)


@isas
def test_an_index_out_of_range(isa: Isa) -> None:
    y, W, status = look_up(isa, "int4", "", (64, 20), np.array([3, 20, -21, 5], np.int32))
    assert status == 1
    np.testing.assert_array_equal(y[1:3], 0)
    np.testing.assert_allclose(y[[0, 3]], W.T[[3, 5]], rtol=1e-6, atol=1e-8)
