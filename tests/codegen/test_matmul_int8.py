"""matmul_<format>_a8 against numpy in float64, and against itself: the same bits on any ISA, for any rows."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from emulated import emulated_with
from group_cases import random_weight
from int8_cases import FORMATS_A8, Int8MatMul, make_spec
from kernel_harness import compile_kernel, innermost_loops, link_kernel, native_isas, stack_bytes
from matmul_cases import ACTIVATIONS, Weight, error, factor_of

from qgraph.codegen.isa import ISAS, Isa
from qgraph.codegen.kernels import build_kernel
from qgraph.codegen.tvm_backend import compile_text
from qgraph.errors import QGraphError
from qgraph.formats import FORMATS, QTensor

ROWS = (1, 2, 3, 8, 9, 33)
# One that ends within a block and within a tile; on the best ISA only, less than a block, and whole ones.
SHAPES = ((172, 49), (7, 3), (256, 64))

isas = pytest.mark.parametrize("isa", native_isas(), ids=lambda i: i.name)
formats = pytest.mark.parametrize("weight_format", FORMATS_A8)


@isas
@formats
def test_shapes_stay_in_their_buffers(isa: Isa, weight_format: str) -> None:
    for K, N in SHAPES if isa is native_isas()[0] else SHAPES[:1]:
        case = Int8MatMul(isa, weight_format, K, N)
        for M in ROWS:
            x = case.inputs(M)
            got = case.run(x, guard=True)
            assert error(got, case.reference(x)) < 3e-7, (K, N, M)
            np.testing.assert_array_equal(case.run(x, split=(1, 2)), got)


@formats
def test_a_row_gives_the_same_bits_alone_and_on_every_isa(weight_format: str) -> None:
    K, N = SHAPES[0]
    x = Int8MatMul(native_isas()[0], weight_format, K, N).inputs(33)
    results = []
    for isa in native_isas():
        case = Int8MatMul(isa, weight_format, K, N)
        results.append(case.run(x))
        for M in (1, 2, 4, 7):
            results.append(np.concatenate([case.run(x[i : i + M]) for i in range(0, 33, M)]))
    for got in results[1:]:
        np.testing.assert_array_equal(got, results[0])


@emulated_with("weight_format", FORMATS_A8, ["nvfp4", "int8"])
def test_others_give_the_same_bits(isa: Isa, weight_format: str) -> None:
    K, N = SHAPES[0]
    case = Int8MatMul(native_isas()[0], weight_format, K, N)
    for M in (1, 3, 9):
        x, got = case.inputs(M), np.zeros((M, N), np.float32)
        operands = [*case.quantize(x), *case.packed, M]
        compile_kernel(case.spec, isa)(got, *operands, blocks=-(-N // 32), guard=True)
        np.testing.assert_array_equal(got, case.run(x))


@isas
def test_every_nvfp4_code_and_scale(isa: Isa) -> None:
    """Rows with one code, 127: the weight itself but for the rounding of two products."""
    K, N = 16, 256
    scales = np.arange(256, dtype=np.uint8)
    scales[np.isnan(scales.view(ml_dtypes.float8_e4m3fn).astype(np.float32))] = 0
    x = 127 * np.eye(K, dtype=np.float32)
    for shift in range(16):
        codes = (np.arange(K, dtype=np.uint8)[:, None] + np.full(N, shift, np.uint8)) % 16
        weight = Weight(codes.astype(np.uint8), scales[None], np.array([0.0107], np.float32))
        case = Int8MatMul(isa, "nvfp4", K, N, weight)
        np.testing.assert_allclose(case.run(x), 127 * weight.value.astype(np.float64), rtol=2e-7)


@isas
@formats
def test_every_code_of_the_largest_inputs(isa: Isa, weight_format: str) -> None:
    """Sums as large as they get, of either sign, and every code: nothing overflows 16 bits on the way."""
    K, N = 256, 40
    levels = 16 if weight_format == "nvfp4" else len(FORMATS[weight_format].values)
    codes = np.broadcast_to((np.arange(N) * levels // N).astype(np.uint8), (K, N)).copy()
    codes[:, -1] = 15 if weight_format == "nvfp4" else levels - 1
    if weight_format == "nvfp4":
        blocks = np.full((K // 16, N), 0x38, np.uint8)
        weight: object = Weight(codes, blocks, np.array([1.0], np.float32))
    else:
        q = random_weight(weight_format, K, N)
        weight = QTensor(weight_format, (K, N), codes, q.block_scale, block_offset=q.block_offset)
    case = Int8MatMul(isa, weight_format, K, N, weight)
    x = np.where(np.arange(4)[:, None] % 2 == 0, 1.0, -1.0) * np.ones((4, K)) * 127
    x[2:, ::2] *= -1
    want = case.reference(x.astype(np.float32))
    np.testing.assert_allclose(case.run(x.astype(np.float32)), want, rtol=0, atol=5e-7 * np.abs(want).max())


@isas
@formats
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_row_is_nan_and_spoils_only_itself(isa: Isa, weight_format: str, bad: float) -> None:
    K, N = SHAPES[0]
    case = Int8MatMul(isa, weight_format, K, N)
    for M in (1, 3, 13):
        x = case.inputs(M)
        clean = case.run(x)
        x[M // 2, K - 1] = bad
        got, others = case.run(x), np.arange(M) != M // 2
        np.testing.assert_array_equal(got[others], clean[others])
        assert np.isnan(got[M // 2]).all()


@isas
def test_small_and_large_rows(isa: Isa) -> None:
    """Scales at both ends of float32: the result neither overflows nor vanishes before it has to."""
    case = Int8MatMul(isa, "nvfp4", 172, 49)
    x = case.inputs(4)
    for to in (1e-36, 1e35):
        scaled = (x * to).astype(np.float32)
        assert error(case.run(scaled) / to, case.reference(scaled) / to) < 3e-6


@isas
@pytest.mark.parametrize(("n_block", "m_block"), [(16, 1), (48, 5), (128, 16)])
def test_block_sizes_and_epilogue(isa: Isa, n_block: int, m_block: int) -> None:
    """The residual comes after the activation, what all is multiplied by last."""
    epilogue = ("bias", "gelu_erf", "residual", "factor")
    params = {"n_block": n_block, "m_block": m_block, "epilogue": epilogue}
    case = Int8MatMul(isa, "nvfp4", 40, 113, **params)
    rng = np.random.default_rng(0)
    bias = rng.standard_normal(113).astype(np.float32)
    for M in (1, 19):
        x, residual = case.inputs(M), rng.standard_normal((M, 113)).astype(np.float32)
        operands = bias, residual, factor_of(residual)
        got = case.run(x, *operands, guard=True)
        want = (ACTIVATIONS["gelu_erf"](case.reference(x) + bias) + residual) * factor_of(residual)
        assert error(got, want) < 1e-6
        np.testing.assert_array_equal(case.run(x, *operands, split=(1, 3)), got)


@pytest.mark.parametrize("isa", ISAS.values(), ids=lambda i: i.name)
def test_locals_fit_the_stack(isa: Isa) -> None:
    for weight_format in ("nvfp4", "ternary"):
        spec = make_spec(weight_format, 384, 113, n_block=64, epilogue=("bias", "silu"))
        # What waits between blocks of weights waits in registers, of tiles on the stack.
        assert stack_bytes(spec, isa) <= (64 if isa.base else 8) * 1024


def test_eight_rows_stay_in_registers() -> None:
    """Of AVX-512: a loop over the blocks of one tile, its 8 rows by 4 vectors of weights read from memory as
    they are multiplied, and nothing else there."""
    spec, isa = make_spec("nvfp4", 256, 64), ISAS["x86-64-v4"]
    loops = innermost_loops(compile_text({spec.symbol: build_kernel(spec, isa)}, isa))
    eight = [body for body in loops if sum("vpdpbusd" in i and "1to16" in i for i in body) == 32]
    assert len(eight) == 1 and not [i for i in eight[0] if "mm" in i.split("#")[0] and "rsp" in i]


def test_bad_parameters_are_refused() -> None:
    for wrong in ({"n_block": 24}, {"epilogue": ("swish",)}):
        with pytest.raises(QGraphError, match="cannot build"):
            link_kernel(make_spec("int4", 64, 16, **wrong), ISAS["x86-64-v3"])
