"""Rows split into digits, bit by bit against numpy, and what products with them promise beyond the others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from emulated import emulated_with
from group_cases import GroupMatMul, make_spec, packed, random_weight
from kernel_harness import compile_kernel, innermost_loops, native_isas
from matmul_cases import MatMul, compact, digits_of, make_weight

from qgraph.codegen.digits import DigitRows, digit_rows, uses_digits
from qgraph.codegen.isa import ISAS, Isa
from qgraph.codegen.kernels import build_kernel
from qgraph.codegen.packing import pack_nvfp4_n16k8
from qgraph.codegen.spec import KernelSpec
from qgraph.codegen.tvm_backend import compile_text
from qgraph.formats import FORMATS

isas = pytest.mark.parametrize("isa", native_isas(), ids=lambda i: i.name)
FORMATS_OF_DIGITS = [name for name in FORMATS if digit_rows(name, "", 16)]
formats = pytest.mark.parametrize("weight_format", FORMATS_OF_DIGITS)


def rows_of(weight_format: str, k: int, digits: int = 3) -> DigitRows:
    found = digit_rows(weight_format, "", k)
    assert found is not None
    return replace(found, digits=digits)


def case_of(isa: Isa, weight_format: str, K: int, N: int, **params: int) -> tuple[Callable, np.ndarray]:
    """A product with a random weight, x -> y, and the weight."""
    if weight_format == "nvfp4":
        weight = make_weight(K, N, 0x30, 0x40)
        case = MatMul(isa, "matmul_nvfp4", weight, **params)
        return lambda x: case.run(x, x), weight.value
    q = random_weight(weight_format, K, N)
    return GroupMatMul(isa, q, "2bit" if weight_format == "ternary" else "", **params).run, q.dequantize()


def split(x: np.ndarray, rows: DigitRows) -> tuple[np.ndarray, np.ndarray]:
    """Three digits: integers [M, B block] and scales [M, B] of rows without NaN and infinities."""
    block, M = rows.input.block, len(x)
    padded = np.zeros((M, rows.blocks, block), np.float32)
    padded.reshape(M, -1)[:, : rows.k] = x
    # The exponent of the largest, one more where its mantissa is close to 2, at least that of 2^-104.
    mantissa, exponent = np.frexp(np.abs(padded).max(axis=2))
    up = exponent - 1 + (mantissa >= 0.9921875)
    scale = np.ldexp(1.0, np.where(mantissa == 0, -104, np.maximum(up, -104)) - 22)
    return np.rint(padded / scale[:, :, None]).reshape(M, -1).astype(np.int64), scale


def read(digits: np.ndarray, rows: DigitRows) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The same as the kernel wrote them, and the four words behind each block."""
    records = digits[:, : rows.flag].reshape(len(digits), rows.blocks, rows.record)
    bytes_ = np.ascontiguousarray(records[:, :, : rows.extra]).view(np.int8)
    planes = bytes_.reshape(len(digits), rows.blocks, rows.digits, rows.input.block).astype(np.int64)
    place = 256 ** np.arange(rows.digits)[::-1, None]
    q = (planes * place).sum(axis=2).reshape(len(digits), -1)
    ordered, fields = np.empty_like(q), rows.input.fields
    for k in range(q.shape[1]):
        byte, field = divmod(k % (4 * fields), fields)
        ordered[:, k] = q[:, k - k % (4 * fields) + 4 * field + byte]
    extra = np.ascontiguousarray(records[:, :, rows.extra :])
    return ordered, extra.view(np.float32)[:, :, rows.SCALE], extra


@isas
@formats
def test_rows_are_split_as_numpy_does(isa: Isa, weight_format: str) -> None:
    for k in (1, 16, 37, 172, 256):
        rows, rng = rows_of(weight_format, k), np.random.default_rng(k)
        x = (rng.standard_normal((5, k)) * 10.0 ** rng.integers(-6, 6, (5, k))).astype(np.float32)
        x[1] = 0
        x[2] = np.float32(2) - np.float32(2.0**-22)  # would round to 2^23
        x[3] *= np.float32(1e-33)  # scales are bounded
        x[4, 0] = -1.9843749
        (digits,) = digits_of(isa, weight_format, x, guard=True, split=(2, 1))
        q, scale, extra = read(digits, rows)
        want, want_scale = split(x, rows)
        np.testing.assert_array_equal(q, want)
        np.testing.assert_array_equal(scale, want_scale.astype(np.float32))
        assert np.abs(q).max() <= 0x7F7F7F and (digits[:, rows.flag] == 1).all()
        sums = q.reshape(5, rows.blocks, -1).sum(axis=2)
        words = extra.astype(np.int64)
        factor = rows.input.factor
        np.testing.assert_array_equal(words[:, :, rows.HIGH] * 65536 + words[:, :, rows.LOW], sums * factor)
        totals = extra.view(np.float32)[:, :, rows.TOTAL]
        np.testing.assert_allclose(totals, sums * factor * want_scale, rtol=2e-7)


@isas
@formats
@pytest.mark.parametrize("count", [1, 2])
def test_many_rows_have_fewer_digits(isa: Isa, weight_format: str, count: int) -> None:
    """A block's largest becomes 127, or 32639, and the others are rounded to nearest. Eight rows, and those
    of an ISA that would not be faster, are as ever."""
    fewer, peak = {"digits": count}, 127 if count == 1 else 32639
    for k in (1, 37, 172):
        rng = np.random.default_rng(k)
        x = (rng.standard_normal((9, k)) * 10.0 ** rng.integers(-6, 6, (9, k))).astype(np.float32)
        x[1], x[2, 0], x[3] = 0, np.nan, x[3] * np.float32(1e-33)
        x[4, :1] = 1.98 * 2.0**100
        (got,) = digits_of(isa, weight_format, x, fewer=fewer, guard=True, split=(2, 1))
        if not uses_digits(isa, count):
            (want,) = digits_of(isa, weight_format, x)
            np.testing.assert_array_equal(np.delete(got, 2, axis=0), np.delete(want, 2, axis=0))
            continue
        rows = rows_of(weight_format, k, count)
        got = compact(got, rows)
        assert got[:, rows.flag].tolist() == [1, 1, 0, *[1] * 6]
        q, scale, extra = read(np.delete(got, [2, 3], axis=0), rows)
        x = np.delete(x, [2, 3], axis=0)
        padded = np.zeros((len(x), rows.blocks * rows.input.block))
        padded[:, :k] = x
        step = np.repeat(scale.astype(np.float64), rows.input.block, axis=1)
        assert (np.abs(q - padded / step) <= 0.5 + 1e-6 * np.abs(q)).all()
        tops = np.abs(padded).reshape(*scale.shape, -1).max(axis=2)
        np.testing.assert_allclose(scale[tops > 0] * peak, tops[tops > 0], rtol=2e-7)
        assert np.abs(q).max() == peak and not q[1].any()
        sums = q.reshape(*scale.shape, -1).sum(axis=2) * rows.input.factor
        np.testing.assert_array_equal(extra[:, :, rows.LOW], sums)
        assert not extra[:, :, rows.HIGH].any()
        np.testing.assert_allclose(extra.view(np.float32)[:, :, rows.TOTAL], sums * scale, rtol=2e-7)
        few, all_ = (digits_of(isa, weight_format, x[:8], fewer=f)[0] for f in (fewer, None))
        np.testing.assert_array_equal(few, all_)


@isas
@formats
@pytest.mark.parametrize("count", [1, 2])
def test_products_of_fewer_digits_are_those_of_the_rounded_rows(
    isa: Isa, weight_format: str, count: int
) -> None:
    """As exact as with three, of what the rows were rounded to; rows that cannot be are done in float32."""
    for K, N in ((172, 49), (37, 3)):
        run, value = case_of(isa, weight_format, K, N, digits=count)
        exact, _ = case_of(isa, weight_format, K, N)
        for M in (9, 33, 130):
            x = np.random.default_rng(M).standard_normal((M, K)).astype(np.float32)
            x[1, 2], x[M - 1, 0] = np.inf, np.nan
            got, want = run(x), exact(x)
            np.testing.assert_array_equal(np.isfinite(got), np.isfinite(want))
            if not uses_digits(isa, count):
                np.testing.assert_array_equal(got, want)
                continue
            rows = rows_of(weight_format, K, count)
            (digits,) = digits_of(isa, weight_format, x, fewer={"digits": count})
            q, scale, _ = read(compact(digits, rows), rows)
            rounded = (q * np.repeat(scale.astype(np.float64), rows.input.block, axis=1))[:, :K]
            whole = np.delete(np.arange(M), [1, M - 1])
            error = np.linalg.norm(got[whole] - rounded[whole] @ value.astype(np.float64))
            assert error < 5e-7 * np.linalg.norm(want[whole])
            lost = np.linalg.norm(got[whole] - want[whole]) / np.linalg.norm(want[whole])
            assert 1e-6 < lost < (2e-2 if count == 1 else 1e-4)
        x = np.random.default_rng(8).standard_normal((8, K)).astype(np.float32)
        np.testing.assert_array_equal(run(x), exact(x))


@isas
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf, 2.0**101, -3e38])
def test_rows_that_cannot_be_split_say_so(isa: Isa, bad: float) -> None:
    for at in (0, 20, 36):
        x = np.random.default_rng(0).standard_normal((3, 37)).astype(np.float32)
        x[1, at], x[2, at] = bad, 1.9 * 2.0**100
        (digits,) = digits_of(isa, "nvfp4", x)
        assert digits[:, rows_of("nvfp4", 37).flag].tolist() == [1, 0, 1]


@isas
def test_numbers_at_both_ends_of_float32(isa: Isa) -> None:
    """Those that cannot be split, and those that are too small to be split well."""
    case = MatMul(isa, "matmul_nvfp4", make_weight(172, 49, 0x20, 0x40))
    for M in (1, 3):
        x, residual = case.inputs(M)
        for to in (2.0**-140, 2.0**-104, 2.0**-80, 2.0**100, 2.0**125):
            scaled = (x * to).astype(np.float32)
            got, want = case.run(scaled, residual) / to, case.reference(scaled, residual) / to
            # Below 2^-104 an input is rounded to 2^-127, a result to 2^-149.
            allowed = 1e-6 + 2.0**-127 / to
            assert np.linalg.norm(got - want) < allowed * np.linalg.norm(want), to


@isas
@formats
def test_large_inputs_cost_what_is_promised(isa: Isa, weight_format: str) -> None:
    """Inputs 1000 times the others: a block's error is of 2^-23 of its largest input, whatever the weights of
    that one are, and the sum over blocks is float32."""
    K, N, block = 512, 33, rows_of(weight_format, 16).input.block
    case, value = case_of(isa, weight_format, K, N)
    x = np.random.default_rng(3).standard_normal((4, K)).astype(np.float32)
    x[:, [7, 300]] *= 1000
    error = np.abs(case(x) - x.astype(np.float64) @ value)
    largest = np.repeat(np.abs(x).reshape(4, -1, block).max(axis=2), block, axis=1)
    # What a mean adds to a weight is multiplied apart: there may be more of both than of their sum.
    size = np.abs(value) + (np.abs(value).mean() if FORMATS[weight_format].offset == "mean" else 0)
    assert (error <= 2.0**-23 * (largest @ size) + 2.0**-22 * (np.abs(x) @ size)).all()


@formats
def test_a_row_gives_the_same_bits_alone(weight_format: str) -> None:
    """With VNNI of any number of rows, and up to eight on AVX2 the same."""
    K, N = 172, 49
    x = np.random.default_rng(0).standard_normal((33, K)).astype(np.float32)
    results = []
    for isa in native_isas():
        run, _ = case_of(isa, weight_format, K, N)
        some = (1, 2, 4, 7) if isa.dot == "maddubs" else (1, 2, 4, 7, 33) if isa.dot == "vnni" else ()
        results += [np.concatenate([run(x[i : i + M]) for i in range(0, 33, M)]) for M in some]
    for got in results[1:]:
        np.testing.assert_array_equal(got, results[0])


@formats
@pytest.mark.parametrize("digits", [3, 2, 1])
def test_the_sums_of_many_rows_stay_in_registers(weight_format: str, digits: int) -> None:
    """Of AVX-512: digits are multiplied from memory, and no vector of sums is put aside for others."""
    isa, fewer = ISAS["x86-64-v4"], {} if digits == 3 else {"digits": digits}
    if weight_format == "nvfp4":
        spec = KernelSpec.make("matmul_nvfp4", k=512, n=64, n_block=32, m_block=128, epilogue=(), **fewer)
    else:
        spec = make_spec(weight_format, "2bit" if weight_format == "ternary" else "", 512, 64, **fewer)
    loops = innermost_loops(compile_text({spec.symbol: build_kernel(spec, isa)}, isa))
    found = [body for body in loops if sum("vpdpbusd" in i and "1to16" in i for i in body) >= 48]
    assert found and not [i for body in found for i in body if "zmm" in i and "rsp" in i]


@emulated_with("weight_format", ["nvfp4", "ternary"], ["nvfp4"])
def test_others_take_floats_and_the_sums_of_digits(isa: Isa, weight_format: str) -> None:
    """The digits are made elsewhere; of a row that has none, nothing is taken from them."""
    K, N = 172, 49
    x = np.random.default_rng(0).standard_normal((3, K)).astype(np.float32)
    x[1, K - 1] = np.inf
    digits = digits_of(native_isas()[0], weight_format, x)
    if weight_format == "nvfp4":
        weight = make_weight(K, N, 0x30, 0x40)
        spec, value = MatMul(native_isas()[0], "matmul_nvfp4", weight).kernel.spec, weight.value
        operands = [*pack_nvfp4_n16k8(weight.codes, weight.block_scale), weight.global_scale]
    else:
        q = random_weight(weight_format, K, N)
        spec, value, operands = make_spec(weight_format, "2bit", K, N), q.dequantize(), packed(q, "2bit")
    with np.errstate(invalid="ignore"):
        want = x.astype(np.float64) @ value.astype(np.float64)
    for first, M in ((0, 3), (1, 1)):
        some = [x[first : first + M].copy(), digits[0][first : first + M].copy()]
        got = np.zeros((M, N), np.float32)
        compile_kernel(spec, isa)(got, *some, *operands, M, blocks=-(-N // 32), guard=True)
        for row, expected in zip(got, want[first:], strict=False):
            finite = np.isfinite(expected)
            np.testing.assert_array_equal(row[~finite], expected[~finite])
            assert np.linalg.norm(row[finite] - expected[finite]) <= 1e-6 * np.linalg.norm(expected[finite])
