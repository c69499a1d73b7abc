"""matmul_nvfp4 and matmul_f32 against numpy in float64: shapes that break tiling, numbers that break
decoding."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from kernel_harness import link_kernel, native_isas, stack_bytes
from matmul_cases import ACTIVATIONS, MatMul, Weight, error, make_weight

from qgraph.codegen.isa import ISAS, Isa
from qgraph.codegen.spec import KernelSpec
from qgraph.codegen.tiles import symbol
from qgraph.errors import QGraphError

OPS = ("matmul_nvfp4", "matmul_f32")
ROWS = (1, 2, 3, 5, 8, 17, 129)
# Every K and every N of interest, each with an awkward partner; the last panel is partial in most.
SHAPES = ((1, 1), (7, 33), (16, 16), (24, 17), (100, 384), (172, 3), (384, 33), (1536, 384))

isas = pytest.mark.parametrize("isa", native_isas(), ids=lambda i: i.name)
ops = pytest.mark.parametrize("op", OPS)


@isas
@pytest.mark.parametrize(
    ("op", "K", "N"),
    [("matmul_nvfp4", *s) for s in SHAPES] + [("matmul_f32", *s) for s in SHAPES[1::2]],
)
def test_shapes_stay_in_their_buffers(isa: Isa, op: str, K: int, N: int) -> None:
    case = MatMul(isa, op, make_weight(K, N))
    for M in ROWS:
        x, residual = case.inputs(M)
        got = case.run(x, residual, guard=True)
        assert error(got, case.reference(x, residual)) < 1e-6, M


@isas
@pytest.mark.parametrize(("n_block", "m_block"), [(16, 1), (48, 5), (512, 128)])
def test_block_sizes(isa: Isa, n_block: int, m_block: int) -> None:
    case = MatMul(isa, "matmul_nvfp4", make_weight(40, 113), n_block, m_block)
    for M in (1, 6, 19):
        x, residual = case.inputs(M)
        assert error(case.run(x, residual, guard=True), case.reference(x, residual)) < 1e-6, M


@isas
@ops
def test_any_split_of_the_blocks_gives_the_same_bits(isa: Isa, op: str) -> None:
    """And the epilogue order is kept: the residual comes after the activation."""
    case = MatMul(isa, op, make_weight(384, 113), m_block=16, epilogue=("bias", "gelu_erf", "residual"))
    for M in (1, 37):
        x, residual = case.inputs(M)
        whole = case.run(x, residual)
        assert error(whole, case.reference(x, residual)) < 1e-6
        for split in ((1,) * 12, (5, 2), (1, 7), (3, 1, 4)):
            np.testing.assert_array_equal(case.run(x, residual, split=split), whole)


EPILOGUES = (
    ("bias",),
    ("bias", "residual"),
    ("residual", "relu"),
    ("silu", "factor"),
    ("factor", "residual"),  # not in the order that kernels take their operands
    *(("bias", a) for a in ACTIVATIONS),
)


@pytest.mark.parametrize("isa", native_isas()[:1], ids=lambda i: i.name)  # the split test has the others
@pytest.mark.parametrize("epilogue", EPILOGUES, ids="+".join)
def test_epilogues(isa: Isa, epilogue: tuple[str, ...]) -> None:
    # K = 600 is more than one K-slice: an epilogue must wait for the last.
    case = MatMul(isa, "matmul_nvfp4", make_weight(600, 37, 0x20, 0x40), m_block=8, epilogue=epilogue)
    for M in (1, 3, 13):
        x, residual = case.inputs(M)
        got, want = case.run(x, residual, guard=True), case.reference(x, residual)
        assert error(got, want) < 1e-6, M


@isas
def test_every_code_and_every_scale_is_decoded_exactly(isa: Isa) -> None:
    """x = rows of the identity: y is the weight, bit for bit, on the paths for 1, 2, 4 and many rows."""
    K, N = 16, 256
    scales = np.arange(256, dtype=np.uint8)
    scales[np.isnan(scales.view(ml_dtypes.float8_e4m3fn).astype(np.float32))] = 0
    for shift in range(16):
        codes = (np.arange(K, dtype=np.uint8)[:, None] + np.full(N, shift, np.uint8)) % 16
        weight = Weight(codes.astype(np.uint8), scales[None], np.array([0.0107], np.float32))
        case = MatMul(isa, "matmul_nvfp4", weight)
        x = np.eye(K, dtype=np.float32)
        for rows in (1, 2, 4, 16):
            for start in range(0, K, rows) if shift == 0 else (shift - shift % rows,):
                got = case.run(np.ascontiguousarray(x[start : start + rows]), x)
                np.testing.assert_array_equal(got, weight.value[start : start + rows])


@isas
def test_zero_scales_and_subnormal_scales(isa: Isa) -> None:
    for low, high in ((0, 1), (0, 8), (0x7E, 0x7F)):  # all zero; zero and the 7 subnormals; 448 only
        case = MatMul(isa, "matmul_nvfp4", make_weight(100, 33, low, high))
        for M in (1, 2, 4, 9):
            x, residual = case.inputs(M)
            assert error(case.run(x, residual), case.reference(x, residual)) < 1e-6


@isas
@ops
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_bad_row_spoils_only_itself(isa: Isa, op: str, bad: float) -> None:
    # K is no multiple of 16: padding must not turn the infinite row into NaN.
    case = MatMul(isa, op, make_weight(37, 35), epilogue=("bias",))
    nonzero = case.weight.value[36] != 0
    for M in (1, 2, 3, 4, 5, 13):
        x, residual = case.inputs(M)
        clean = case.run(x, residual)
        x[M // 2, 36] = bad
        got = case.run(x, residual)
        others = np.arange(M) != M // 2
        np.testing.assert_array_equal(got[others], clean[others])
        want = case.reference(x, residual)[M // 2]
        np.testing.assert_array_equal(got[M // 2][nonzero], want[nonzero])
        assert np.isnan(got[M // 2][~nonzero]).all()  # 0 * inf


@ops
def test_every_isa_builds(op: str) -> None:
    spec = KernelSpec.make(op, k=100, n=33, n_block=32, m_block=128, epilogue=("bias", "gelu_erf"))
    for isa in ISAS.values():
        assert link_kernel(spec, isa).entries == {symbol(spec, isa): 0}


def test_locals_fit_the_stack() -> None:
    spec = KernelSpec.make("matmul_nvfp4", k=1536, n=384, n_block=48, m_block=16, epilogue=("gelu_erf",))
    for isa in ISAS.values():
        assert 0 < stack_bytes(spec, isa) <= 64 * 1024


def test_bad_parameters_are_refused() -> None:
    for wrong in ({"n_block": 24}, {"n_block": 1024}, {"epilogue": ("swish",)}, {"k": 0}):
        params = {"k": 8, "n": 8, "n_block": 16, "m_block": 8, "epilogue": ()} | wrong
        with pytest.raises(QGraphError, match="cannot build"):
            link_kernel(KernelSpec.make("matmul_f32", **params), ISAS["x86-64-v3"])
