"""Kernels for tiles (AMX), beside numpy and the kernels that they are forms of."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import amx
import ml_dtypes
import numpy as np
import pytest
from group_cases import GroupMatMul, make_spec, random_weight
from int8_cases import Int8MatMul
from kernel_harness import stack_bytes
from matmul_cases import MatMul, error, make_weight

import qgraph
from qgraph.codegen.int8_input import int8_input
from qgraph.codegen.spec import KernelSpec
from qgraph.codegen.targets import Target
from qgraph.errors import UnsupportedError
from qgraph.formats.group import GROUP_FORMATS

sys.path.insert(0, str(Path(__file__).parents[1] / "cli"))

from tiny_model import save_tiny

pytestmark = amx.required
GROUPS = [spec.name for spec in GROUP_FORMATS if int8_input(spec.name)]
ROWS = (9, 16, 17, 33, 100)


def same_bits(tiles: GroupMatMul | Int8MatMul, base: GroupMatMul | Int8MatMul) -> None:
    for M in (8, *ROWS):
        x, before = tiles.inputs(M), amx.steps()
        if M == 9:
            x[4, 0], x[5] = np.nan, 0
        got = tiles.run(x)
        assert (amx.steps() > before) == (M > 8 or amx.NATIVE)
        np.testing.assert_array_equal(got, base.run(x))


@pytest.mark.parametrize(
    ("weight_format", "digits"), [*((name, 3) for name in GROUPS), ("ternary", 1), ("int4", 2)]
)
def test_digits_give_the_bits_of_vnni(weight_format: str, digits: int) -> None:
    q, fewer = random_weight(weight_format, 172, 49), {} if digits == 3 else {"digits": digits}
    packing = "2bit" if weight_format == "ternary" else ""
    same_bits(*(GroupMatMul(isa, q, packing, **fewer) for isa in (amx.ISA, amx.BASE)))


@pytest.mark.parametrize(
    ("weight_format", "K", "N"),
    [*((name, 172, 49) for name in GROUPS), ("int4", 37, 3), ("ternary", 512, 80)],
)
def test_int8_activations_give_the_bits_of_vnni(weight_format: str, K: int, N: int) -> None:
    same_bits(*(Int8MatMul(isa, weight_format, K, N) for isa in (amx.ISA, amx.BASE)))


def to_bf16(x: np.ndarray) -> np.ndarray:
    return x.astype(ml_dtypes.bfloat16).astype(np.float32)


@pytest.mark.parametrize(("params", "limit"), [({}, 4e-7), ({"digits": 2}, 2e-5), ({"digits": 1}, 4e-3)])
def test_nvfp4_in_parts_of_bfloat16(params: dict[str, int], limit: float) -> None:
    """Three parts are float32, two as good as two digits at least, and so is one."""
    for K, N in ((37, 3), (1100, 49)):
        case = MatMul(amx.ISA, "matmul_nvfp4", make_weight(K, N, 0x20, 0x40), **params)
        base = MatMul(amx.BASE, "matmul_nvfp4", case.weight, **params)
        for M in (8, *ROWS):
            (x, residual), before = case.inputs(M), amx.steps()
            got, want = case.run(x, residual), case.reference(x, residual)
            assert (amx.steps() > before) == (M > 8 or amx.NATIVE)
            if M <= 8:
                np.testing.assert_array_equal(got, base.run(x, residual))
            assert error(got, want) < limit
            if params:
                assert error(got, want) < max(1.1 * error(base.run(x, residual), want), 4e-7)


def test_bf16_is_what_bfloat16_activations_give() -> None:
    for K, N in ((172, 49), (37, 3)):
        case = MatMul(amx.ISA, "matmul_nvfp4", make_weight(K, N, 0x20, 0x40), parts=1)
        exact = MatMul(amx.BASE, "matmul_nvfp4", case.weight, parts=1)
        for M in (8, 9, 40):
            x, residual = case.inputs(M)
            assert error(exact.run(x, residual), exact.reference(x, residual)) < 4e-7
            rounded = x if M <= 8 else to_bf16(x)
            assert error(case.run(x, residual), case.reference(rounded, residual)) < 4e-7


def test_int8_activations_by_nvfp4_are_exact_products() -> None:
    for K, N in ((172, 49), (37, 3)):
        tiles, base = (Int8MatMul(isa, "nvfp4", K, N) for isa in (amx.ISA, amx.BASE))
        for M in (8, *ROWS):
            x, before = tiles.inputs(M), amx.steps()
            x[M // 2], x[1, 0], x[2, 1] = 0, np.nan, np.inf
            got, want = tiles.run(x), base.run(x)
            assert (amx.steps() > before) == (M > 8 or amx.NATIVE)
            if M <= 8:
                np.testing.assert_array_equal(got, want)
            assert np.isnan(got[1:3]).all() and not got[M // 2].any()
            finite = np.delete(np.arange(M), [1, 2])
            assert error(got[finite], tiles.reference(x[finite])) < 4e-7


def bad_rows(x: np.ndarray) -> np.ndarray:
    """Rows with numbers that digits cannot stand for, and one of zeros."""
    x = x.copy()
    x[1, 2], x[4, 0], x[5, -1], x[6], x[7, 1] = np.inf, np.nan, -np.inf, 0, 2.0**120
    x[8].view(np.uint32)[3] = 0x7F800001  # a NaN whose bits are all in the half that a part drops
    return x


@pytest.mark.parametrize("params", [{}, {"digits": 2}, {"parts": 1}])
def test_rows_that_are_not_finite_by_nvfp4(params: dict[str, int]) -> None:
    tiles, base = (
        MatMul(isa, "matmul_nvfp4", make_weight(172, 49, 0x20, 0x40), **params) for isa in (amx.ISA, amx.BASE)
    )
    x, residual = tiles.inputs(40)
    got, want = (case.run(bad_rows(x), residual) for case in (tiles, base))
    finite = np.isfinite(want)
    np.testing.assert_array_equal(got[~finite], want[~finite])
    for row, of, where in zip(got.astype(np.float64), want, finite, strict=True):
        assert error(row[where], of[where].astype(np.float64)) < (1e-2 if params else 6e-7)
    assert np.isfinite(want[[6, 7]]).all() and not got[6].any()


@pytest.mark.parametrize("weight_format", ["ternary", "int4"])
def test_rows_that_are_not_finite_by_groups(weight_format: str) -> None:
    q, packing = random_weight(weight_format, 172, 49), "2bit" if weight_format == "ternary" else ""
    tiles, base = (GroupMatMul(isa, q, packing) for isa in (amx.ISA, amx.BASE))
    x = tiles.inputs(140)  # a second block, of rows that are all in tiles
    np.testing.assert_array_equal(tiles.run(bad_rows(x)), base.run(bad_rows(x)))


def test_numbers_at_both_ends_of_float32() -> None:
    case = MatMul(amx.ISA, "matmul_nvfp4", make_weight(172, 49, 0x20, 0x40))
    x, residual = case.inputs(20)
    for to in (2.0**-140, 2.0**-104, 2.0**-80, 2.0**100, 2.0**124):
        scaled = (x * to).astype(np.float32)
        got, want = case.run(scaled, residual) / to, case.reference(scaled, residual) / to
        # What is below 2^-126 is zero: the inputs' last parts, products and sums.
        size = np.abs(case.weight.value).sum(axis=0).mean()
        allowed = 4e-7 * np.linalg.norm(want) + 2.0**-125 / to * max(size, case.K) * np.sqrt(want.size)
        assert np.linalg.norm(got - want) < allowed, to


EPILOGUES: tuple[tuple[str, ...], ...] = (
    ("bias", "gelu_erf", "residual"),
    ("residual", "relu"),
    ("silu", "factor"),
)


@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_epilogues_follow(epilogue: tuple[str, ...]) -> None:
    case = MatMul(amx.ISA, "matmul_nvfp4", make_weight(48, 49, 0x20, 0x40), epilogue=epilogue)
    x, residual = case.inputs(20)
    assert error(case.run(x, residual), case.reference(x, residual)) < 1e-6


def exact_in_any_split(case: MatMul | Int8MatMul, M: int) -> None:
    """Its bits are the same whichever calls the blocks are done by; nothing beside the buffers is touched."""
    inputs = case.inputs(M)
    args = inputs if isinstance(inputs, tuple) else (inputs,)
    got = case.run(*args)
    np.testing.assert_array_equal(case.run(*args, split=(2, 1), guard=True), got)
    assert error(got, case.reference(*args)) < 4e-7


@pytest.mark.parametrize(("n_block", "m_block"), [(16, 20), (96, 300)])
def test_any_blocks_any_threads_and_nothing_beside_the_buffers(n_block: int, m_block: int) -> None:
    """Chunks of 20 rows, whose second tile begins before the chunk; of 300, which take more than one turn.
    Those of NVFP4 are whole tiles."""
    blocks, whole = ({"n_block": n_block, "m_block": m} for m in (m_block, -(-m_block // 16) * 16))
    q = random_weight("int4", 72, 49)
    for case in (
        MatMul(amx.ISA, "matmul_nvfp4", make_weight(72, 49, 0x20, 0x40), **whole),
        Int8MatMul(amx.ISA, "nvfp4", 72, 49, **whole),
        Int8MatMul(amx.ISA, "int4", 72, 49, weight=q, **blocks),
    ):
        for M in (9, 45, 150):
            exact_in_any_split(case, M)


def test_inputs_in_slabs_by_nvfp4() -> None:
    """More inputs than a core's cache holds of 128 rows: sums go on from y. A chunk of 128 rows decodes the
    weights of a slice while the one before is multiplied."""
    for case in (
        MatMul(amx.ISA, "matmul_nvfp4", make_weight(2700, 49, 0x20, 0x40)),
        MatMul(
            amx.ISA, "matmul_nvfp4", make_weight(2700, 17, 0x20, 0x40), n_block=16, epilogue=("residual",)
        ),
        Int8MatMul(amx.ISA, "nvfp4", 4120, 33),
    ):
        for M in (9, 116, 150):
            exact_in_any_split(case, M)


def test_chunks_of_nvfp4_are_whole_tiles() -> None:
    with pytest.raises(qgraph.QGraphError, match="cannot build"):
        MatMul(amx.ISA, "matmul_nvfp4", make_weight(72, 49), m_block=20)


def test_a_row_does_not_depend_on_the_others() -> None:
    """Of more than eight rows."""
    case = MatMul(amx.ISA, "matmul_nvfp4", make_weight(172, 49, 0x20, 0x40))
    x, residual = case.inputs(45)
    whole = case.run(x, residual)
    for first, count in ((0, 9), (9, 17), (26, 19)):
        some = slice(first, first + count)
        np.testing.assert_array_equal(case.run(x[some].copy(), residual[some].copy()), whole[some])


def test_tiles_are_released_and_the_stack_is_small() -> None:
    assert amx.NATIVE or amx.emulator().amx_released()
    specs = [make_spec(name, "2bit" if name == "ternary" else "", 512, 128, n_block=64) for name in GROUPS]
    specs += [
        KernelSpec.make("matmul_nvfp4", k=4096, n=128, n_block=64, m_block=128, epilogue=("bias", "gelu_erf"))
    ]
    for spec in specs:
        assert stack_bytes(spec, amx.ISA) <= 64 << 10


@pytest.mark.parametrize(
    ("scheme", "compute"),
    [("nvfp4", "f32"), ("nvfp4", "bf16"), ("nvfp4-w4a8", "f32"), ("ternary-w2a8", "f32")],
)
def test_a_model_runs_in_tiles(
    scheme: str, compute: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An artifact that says of its variant for tiles that it needs what this CPU has: on 1 and 2 threads."""
    here = replace(amx.ISA, features=amx.BASE.features)
    monkeypatch.setattr(
        "qgraph.codegen.artifact.parse_target", lambda name: Target(name, (here, amx.BASE), cuda=False)
    )
    tiny = save_tiny(tmp_path / "tiny.onnx", layers=1)
    path = qgraph.compile(
        tiny, output=tmp_path / "out", scheme=scheme, compute=compute, verify=False
    ).artifact
    assert path is not None
    amx.install()
    ids = np.random.default_rng(0).integers(0, 97, (2, 20))
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    found = {}
    for isa, threads in ((None, 1), (None, 2), (amx.BASE.name, 1)):
        before = amx.steps()
        with qgraph.load(path, isa=isa, threads=threads) as model:
            assert model.isa == (isa or amx.ISA.name)
            found[isa, threads] = model.run(feeds)
        assert (amx.steps() > before) == (isa is None or amx.NATIVE)
    for name, want in found[amx.BASE.name, 1].items():
        got = found[None, 1][name]
        np.testing.assert_array_equal(got, found[None, 2][name])
        difference = error(got, want)
        assert difference < (2e-2 if compute == "bf16" else 1e-5)
        assert difference > (1e-4 if compute == "bf16" else -1)


@pytest.mark.skipif(amx.NATIVE, reason="this CPU has AMX")
def test_a_cpu_without_tiles_takes_the_other_variant(tmp_path: Path) -> None:
    path = qgraph.compile(save_tiny(tmp_path / "tiny.onnx", layers=1), verify=False).artifact
    assert path is not None
    with qgraph.load(path) as model:
        assert model.isa == amx.BASE.name
    with pytest.raises(UnsupportedError, match="cannot run variant 'x86-64-v4-amx': it needs amx-tile"):
        qgraph.load(path, isa=amx.ISA.name)
