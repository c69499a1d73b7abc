"""matmul_dynamic against numpy: every order of the operands' axes, broadcast, sizes that break tiling."""

from __future__ import annotations

import numpy as np
import pytest
from kernel_harness import compile_kernel, link_kernel, native_isas

from qgraph.codegen.isa import ISAS, Isa
from qgraph.codegen.spec import KernelSpec
from qgraph.errors import QGraphError

isas = pytest.mark.parametrize("isa", native_isas(), ids=lambda i: i.name)
SPEC = KernelSpec.make("matmul_dynamic", m_block=32, n_block=32)

# B0, B1, M, K, N: K = 300 is more than one K-slice, K = 0 an empty sum.
SIZES = ((1, 1, 1, 1, 1), (2, 3, 5, 7, 3), (1, 2, 17, 300, 33), (1, 1, 9, 0, 5), (2, 1, 70, 64, 64))


def _strided(rng: np.random.Generator, shape: tuple[int, ...], transposed: bool) -> np.ndarray:
    """A random array of `shape` whose last two axes may lie transposed in memory."""
    stored = (*shape[:2], shape[3], shape[2]) if transposed else shape
    a = rng.standard_normal(stored).astype(np.float32)
    return a.swapaxes(2, 3) if transposed else a


def _run(isa: Isa, spec: KernelSpec, a: np.ndarray, b: np.ndarray, **how: object) -> np.ndarray:
    B0, B1 = max(a.shape[0], b.shape[0]), max(a.shape[1], b.shape[1])
    M, K, N = a.shape[2], a.shape[3], b.shape[3]
    y = np.full((B0, B1, M, N), np.nan, np.float32)

    def strides(x: np.ndarray) -> list[int]:
        outer = [0 if x.shape[i] == 1 else x.strides[i] // 4 for i in (0, 1)]
        return outer + [x.strides[i] // 4 for i in (2, 3)]

    def base(x: np.ndarray) -> np.ndarray:
        return x if x.flags.c_contiguous else x.swapaxes(2, 3)

    blocks = B0 * B1 * -(-M // spec["m_block"]) * -(-N // spec["n_block"])
    args = [M, K, N, B1, *strides(a), *strides(b), *(s // 4 for s in y.strides[:3])]
    compile_kernel(spec, isa)(y, base(a), base(b), *args, blocks=blocks, **how)  # type: ignore[arg-type]
    return y


def _close(got: np.ndarray, a: np.ndarray, b: np.ndarray) -> bool:
    want = a.astype(np.float64) @ b.astype(np.float64)
    return bool(np.linalg.norm(got - want) <= 1e-6 * np.linalg.norm(want))


@isas
@pytest.mark.parametrize("transpose_a", [False, True])
@pytest.mark.parametrize("transpose_b", [False, True])
def test_sizes_and_orders_stay_in_their_buffers(isa: Isa, transpose_a: bool, transpose_b: bool) -> None:
    for B0, B1, M, K, N in SIZES:
        rng = np.random.default_rng(M)
        a = _strided(rng, (B0, B1, M, K), transpose_a)
        b = _strided(rng, (B0, B1, K, N), transpose_b)
        assert _close(_run(isa, SPEC, a, b, guard=True), a, b), (B0, B1, M, K, N)


@isas
def test_broadcast_batches(isa: Isa) -> None:
    rng = np.random.default_rng(0)
    for batch_a, batch_b in (((1, 1), (2, 3)), ((2, 1), (1, 3)), ((2, 3), (2, 1))):
        a, b = _strided(rng, (*batch_a, 9, 20), False), _strided(rng, (*batch_b, 20, 40), False)
        assert _close(_run(isa, SPEC, a, b, guard=True), a, b)


@isas
@pytest.mark.parametrize(("m_block", "n_block"), [(1, 16), (7, 48), (64, 512)])
def test_block_sizes_and_splits(isa: Isa, m_block: int, n_block: int) -> None:
    rng = np.random.default_rng(0)
    spec = KernelSpec.make("matmul_dynamic", m_block=m_block, n_block=n_block)
    a, b = _strided(rng, (2, 1, 23, 40), False), _strided(rng, (2, 1, 40, 100), True)
    whole = _run(isa, spec, a, b, guard=True)
    assert _close(whole, a, b)
    for split in ((1, 5), (4, 1, 1, 3)):
        np.testing.assert_array_equal(_run(isa, spec, a, b, split=split), whole)


@isas
def test_a_bad_row_spoils_only_itself(isa: Isa) -> None:
    rng = np.random.default_rng(0)
    a, b = _strided(rng, (1, 1, 13, 20), False), _strided(rng, (1, 1, 20, 35), False)
    clean = _run(isa, SPEC, a, b)
    a[0, 0, 7, 19] = np.nan
    got = _run(isa, SPEC, a, b)
    assert np.isnan(got[0, 0, 7]).all()
    np.testing.assert_array_equal(np.delete(got, 7, axis=2), np.delete(clean, 7, axis=2))


def test_every_isa_builds() -> None:
    for isa in ISAS.values():
        assert link_kernel(SPEC, isa).entries == {SPEC.symbol: 0}


def test_bad_parameters_are_refused() -> None:
    with pytest.raises(QGraphError, match="cannot build"):
        link_kernel(KernelSpec.make("matmul_dynamic", m_block=8, n_block=24), ISAS["x86-64-v3"])
