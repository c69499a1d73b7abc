"""Kernels of group-quantized weights against numpy in float64."""

from __future__ import annotations

import re

import numpy as np
import pytest
from emulated import emulated_with
from group_cases import CASES, NAMES, GroupMatMul, block_sums, make_spec, packed, random_weight
from kernel_harness import compile_kernel, innermost_loops, link_kernel, native_isas
from matmul_cases import digits_of, error

from qgraph.codegen.isa import ISAS, Isa
from qgraph.codegen.kernels import build_kernel
from qgraph.codegen.tvm_backend import compile_text
from qgraph.errors import QGraphError
from qgraph.formats import FORMATS, QTensor

ROWS = (1, 2, 3, 5, 17, 130)  # each path, the last with a second chunk of rows
# Of each: a shape that ends within a block and within a tile; then, on the best ISA only, a K of less than a
# block, and of whole ones.
SHAPES = {
    "ternary-2bit": ((172, 33), (1, 3), (384, 64)),
    "ternary-base3": ((200, 49), (31, 1), (384, 64)),
    "int2": ((129, 33), (31, 17)),
    "int3": ((200, 33), (127, 5)),
    "int4": ((172, 49), (31, 16)),
    "int4-sym": ((129, 33), (1, 1)),
    "int8": ((172, 33), (31, 3)),
}

isas = pytest.mark.parametrize("isa", native_isas(), ids=lambda i: i.name)
cases = pytest.mark.parametrize(("weight_format", "packing"), CASES, ids=NAMES)


def ragged(weight_format: str, packing: str) -> tuple[int, int]:
    """The shape of a case that ends within a block and within a tile."""
    return SHAPES[f"{weight_format}-{packing}".strip("-")][0]


@isas
@cases
def test_shapes_stay_in_their_buffers(isa: Isa, weight_format: str, packing: str) -> None:
    shapes = SHAPES[f"{weight_format}-{packing}".strip("-")]
    for K, N in shapes if isa is native_isas()[0] else shapes[:1]:
        case = GroupMatMul(isa, random_weight(weight_format, K, N), packing)
        for M in ROWS:
            x = case.inputs(M)
            got = case.run(x, guard=True)
            assert error(got, case.reference(x)) < 1e-6, (K, N, M)
            np.testing.assert_array_equal(case.run(x, split=(1, 2)), got)


@isas
@cases
def test_every_code_is_decoded_exactly(isa: Isa, weight_format: str, packing: str) -> None:
    """x = rows of the identity: y is the weight, bit for bit, on the paths for 1, 2, 4 and many rows."""
    K, N = ragged(weight_format, packing)
    case = GroupMatMul(isa, random_weight(weight_format, K, N), packing)
    want = case.q.dequantize()
    x = np.eye(K, dtype=np.float32)
    np.testing.assert_array_equal(case.run(x), want)
    for rows in (1, 2, 4):
        got = np.concatenate([case.run(np.ascontiguousarray(x[i : i + rows])) for i in range(0, K, rows)])
        np.testing.assert_array_equal(got, want)


@isas
@cases
def test_scales_at_the_ends_of_float16(isa: Isa, weight_format: str, packing: str) -> None:
    """The smallest subnormal, the largest number, and blocks that are zero."""
    K, N = ragged(weight_format, packing)
    q = random_weight(weight_format, K, N)
    spec = FORMATS[weight_format]
    scale, codes, offset = q.block_scale.copy(), q.codes.copy(), q.block_offset
    scale[:, ::3] = 2.0**-24
    scale[:, 1::3] = 65504
    zero = slice(2, N, 3)
    if spec.offset == "zero_point":
        codes[:, zero] = np.repeat(offset[:, zero], spec.block, axis=0)[:K]
    else:
        codes[:, zero] = int(-spec.values[0])
    if spec.offset == "mean":
        offset = np.where(np.arange(N) % 3 == 2, 0, -offset.astype(np.float32) * 600).astype(np.float16)
    q = QTensor(weight_format, (K, N), codes, scale, block_offset=offset)
    case = GroupMatMul(isa, q, packing)
    for M in ROWS[:5]:
        x = case.inputs(M)
        got, want = case.run(x), case.reference(x)
        assert not want[:, zero].any() and not got[:, zero].any()
        for columns in (slice(0, N, 3), slice(1, N, 3)):
            assert error(got[:, columns], want[:, columns]) < 1e-6, M


@isas
@cases
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_bad_row_spoils_only_itself(isa: Isa, weight_format: str, packing: str, bad: float) -> None:
    """An infinity goes through the weight that it meets, as if that were multiplied by: a mean does not make
    it NaN."""
    K, N = ragged(weight_format, packing)
    case = GroupMatMul(isa, random_weight(weight_format, K, N), packing)
    for M in (1, 2, 3, 4, 5, 13):
        x = case.inputs(M)
        clean = case.run(x)
        x[M // 2, K - 1] = bad
        got, others = case.run(x), np.arange(M) != M // 2
        np.testing.assert_array_equal(got[others], clean[others])
        np.testing.assert_array_equal(got[M // 2], case.reference(x)[M // 2])


@isas
@pytest.mark.parametrize("K", [1, 31, 128, 200, 384])
def test_block_sums(isa: Isa, K: int) -> None:
    x = np.random.default_rng(K).standard_normal((5, K)).astype(np.float32)
    x[3, K - 1] = np.inf
    want = np.stack([x[:, b : b + 128].astype(np.float64).sum(axis=1) for b in range(0, K, 128)], axis=1)
    got = block_sums(isa, x, 128, guard=True, split=(2, 1))
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


@emulated_with("weight_format,packing", CASES, [("ternary", "base3"), ("int3", ""), ("int4", "")])
def test_others(isa: Isa, weight_format: str, packing: str) -> None:
    K, N = ragged(weight_format, packing)
    spec = make_spec(weight_format, packing, K, N)
    q = random_weight(weight_format, K, N)
    for M in (1, 3, 9):
        x = np.random.default_rng(M).standard_normal((M, K)).astype(np.float32)
        digits = digits_of(native_isas()[0], weight_format, x, packing)
        sums = []
        if FORMATS[weight_format].offset == "mean" and not digits:
            sums = [np.add.reduceat(x, range(0, K, FORMATS[weight_format].block), axis=1)]
        got = np.zeros((M, N), np.float32)
        operands = [x, *digits, *packed(q, packing), *sums, M]
        compile_kernel(spec, isa)(got, *operands, blocks=-(-N // 32), guard=True)
        assert error(got, x.astype(np.float64) @ q.dequantize()) < 1e-6, M


@pytest.mark.parametrize(
    ("weight_format", "packing"), [c for c in CASES if c[0] in ("int2", "int3", "int4") or c[1] == "base3"]
)
def test_sums_of_many_rows_stay_in_registers(weight_format: str, packing: str) -> None:
    """AVX2 has 16 registers; the loop over the decoded panel takes 15. Constants of a decoder that LLVM keeps
    across it (the other formats have none) would make it spill, and take three times as long."""
    spec, isa = make_spec(weight_format, packing, 256, 64), ISAS["x86-64-v3"]
    text = compile_text({spec.symbol: build_kernel(spec, isa)}, isa)
    panel = [body for body in innermost_loops(text) if sum("vfmadd" in i for i in body) == 12]
    panel = [body for body in panel if sum("vbroadcastss" in i for i in body) == 6]
    assert panel and not [i for body in panel for i in body if "rsp" in i]
    assert 0 < max(map(int, re.findall(r"subq\s+\$(\d+), %rsp", text))) <= 64 * 1024


def test_bad_parameters_are_refused() -> None:
    for wrong, message in (({"block": 40}, "multiple of 32"), ({"n_block": 128}, "cannot build")):
        with pytest.raises(QGraphError, match=message):
            link_kernel(make_spec("int2", "", 128, 16, **wrong), ISAS["x86-64-v3"])
