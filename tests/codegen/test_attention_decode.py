"""attention_decode and attention_merge against softmax in float64, and what they read of int8 states."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from kernel_harness import compile_kernel, link_kernel, native_isas, stack_bytes

from qgraph.codegen.isa import ISAS, Isa
from qgraph.codegen.spec import KernelSpec, attention_scratch
from qgraph.errors import QGraphError
from qgraph.formats.activations import dynamic_int8

isas = pytest.mark.parametrize("isa", native_isas(), ids=lambda i: i.name)

SCALE = 0.2
CHUNK = 128
UNUSED = 3  # tokens that a state has room for beyond those held


@dataclass(frozen=True)
class Kind:
    """The compile-time side of a kernel."""

    head_dim: int
    value_dim: int
    group: int = 1
    mask: str = "none"
    softcap: float = 0.0
    cache: str = "f32"
    chunk: int = CHUNK

    @property
    def spec(self) -> KernelSpec:
        return KernelSpec.make("attention_decode", scale=SCALE, **self.__dict__)

    @property
    def merge(self) -> KernelSpec:
        return KernelSpec.make("attention_merge", value_dim=self.value_dim, group=self.group)


class Case:
    """Random operands of one call over `held` tokens; what the state has room for beyond them is NaN."""

    def __init__(self, kind: Kind, batch: int, kv_heads: int, held: int, wide_mask: bool = False) -> None:
        rng = np.random.default_rng(held)
        self.kind, self.sizes = kind, (batch, kv_heads, held)
        self.heads, self.room = kv_heads * kind.group, held + UNUSED
        self.q = rng.standard_normal((batch, self.heads, kind.head_dim)).astype(np.float32)
        self.k, self.v = (
            rng.standard_normal((batch, kv_heads, self.room, width)).astype(np.float32)
            for width in (kind.head_dim, kind.value_dim)
        )
        self.k[:, :, held:], self.v[:, :, held:] = np.nan, np.nan
        self.mask = None
        if kind.mask != "none":
            keep = rng.random((batch, self.heads if wide_mask else 1, held)) < 0.7
            bias = rng.standard_normal(keep.shape).astype(np.float32)
            self.mask = keep if kind.mask == "bool" else np.where(keep, bias, np.float32(-np.inf))

    def _stored(self, a: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """As int8 codes and scales."""
        scale = np.maximum(np.abs(a).max(-1) / np.float32(127), np.float32(2.0**-126))
        with np.errstate(invalid="ignore"):
            return np.rint(np.nan_to_num(a / scale[..., None])).astype(np.int8), scale

    def run(self, isa: Isa, guard: bool = False, **how: object) -> np.ndarray:
        kind, (batch, kv_heads, held) = self.kind, self.sizes
        chunks = -(-held // kind.chunk)
        y = np.full((batch, self.heads, kind.value_dim), np.nan, np.float32)
        part = np.full((batch, kv_heads, chunks, kind.group, kind.value_dim + 2), np.nan, np.float32)
        args: list = [y, part, self.q]
        if kind.cache == "i8":
            (k, k_scale), (v, v_scale) = self._stored(self.k), self._stored(self.v)
            args += [k, v, k_scale, v_scale]
        else:
            args += [self.k, self.v]
        args += [] if self.mask is None else [self.mask]
        args += [held, chunks, kv_heads, self.heads * kind.head_dim, kind.head_dim]
        for width in (kind.head_dim, kind.value_dim, *([1] if kind.cache == "i8" else [])):
            args += [kv_heads * self.room * width, self.room * width]
        if self.mask is not None:
            wide = self.mask.shape[1] > 1
            args += [self.mask.shape[1] * held, held if wide else 0, 1]
        ends = [self.heads * kind.value_dim, kind.value_dim]
        compile_kernel(kind.spec, isa)(*args, *ends, blocks=batch * kv_heads * chunks, guard=guard, **how)  # type: ignore[arg-type]
        if chunks == 1:
            assert np.isnan(part).all()  # not touched
        else:
            merge = [y, part, chunks, kv_heads, *ends]
            compile_kernel(kind.merge, isa)(*merge, blocks=batch * self.heads, guard=guard, **how)  # type: ignore[arg-type]
        return y

    def reference(self) -> np.ndarray:
        kind, (batch, kv_heads, held) = self.kind, self.sizes
        k, v = self.k[:, :, :held], self.v[:, :, :held]
        if kind.cache == "i8":
            k, v = dynamic_int8(k), dynamic_int8(v)
        q = self.q.reshape(batch, kv_heads, kind.group, -1).astype(np.float64)
        scores = np.einsum("bhgd,bhtd->bhgt", q, k) * SCALE
        if kind.softcap:
            scores = kind.softcap * np.tanh(scores / kind.softcap)
        if self.mask is not None:
            bias = self.mask if kind.mask == "f32" else np.where(self.mask, 0, -np.inf)
            scores += np.broadcast_to(bias, (batch, self.heads, held)).reshape(scores.shape)
        top = scores.max(-1, keepdims=True)
        weights = np.exp(scores - np.where(np.isfinite(top), top, 0))
        total = weights.sum(-1, keepdims=True)
        weights /= np.where(total == 0, 1, total)
        return np.einsum("bhgt,bhtd->bhgd", weights, v).reshape(batch, self.heads, -1)

    def check(self, isa: Isa) -> None:
        got, want = self.run(isa, guard=True), self.reference()
        assert not np.isnan(got).any()
        assert np.abs(got - want).max() <= 2e-6 * np.abs(want).max(), (self.kind, self.sizes)


# (batch, key heads, tokens): one, fewer and more than a tile, a chunk, and several that end anywhere.
SIZES = ((1, 1, 1), (2, 3, 17), (1, 2, CHUNK), (2, 1, CHUNK + 1), (1, 2, 3 * CHUNK - 5))


@isas
@pytest.mark.parametrize("cache", ["f32", "i8"])
@pytest.mark.parametrize(("D", "Dv", "G"), [(1, 1, 1), (32, 64, 2), (80, 33, 1), (128, 128, 4), (17, 256, 7)])
def test_head_dims_and_groups(isa: Isa, D: int, Dv: int, G: int, cache: str) -> None:
    for size in SIZES:
        Case(Kind(D, Dv, G, cache=cache), *size).check(isa)


@isas
@pytest.mark.parametrize("cache", ["f32", "i8"])
@pytest.mark.parametrize("mask", ["bool", "f32"])
def test_masks(isa: Isa, mask: str, cache: str) -> None:
    kind = Kind(16, 24, 3, mask, softcap=2.0 if mask == "f32" else 0.0, cache=cache)
    for size in SIZES:
        for wide in (False, True):
            Case(kind, *size, wide_mask=wide).check(isa)


@isas
@pytest.mark.parametrize("mask", ["bool", "f32"])
def test_a_query_without_keys_gives_zeros(isa: Isa, mask: str) -> None:
    for held in (5, CHUNK + 9):
        case = Case(Kind(16, 24, 3, mask), 2, 2, held, wide_mask=True)
        assert case.mask is not None
        case.mask[1, 4] = False if mask == "bool" else -np.inf
        got = case.run(isa)
        np.testing.assert_array_equal(got[1, 4], 0)
        assert np.isfinite(got).all() and np.any(got[1, 3])


@isas
def test_only_one_chunk_has_keys(isa: Isa) -> None:
    case = Case(Kind(16, 24, 3, "bool"), 1, 1, 3 * CHUNK, wide_mask=True)
    assert case.mask is not None
    case.mask[...] = False
    case.mask[:, :, CHUNK + 3 : CHUNK + 7] = True
    case.check(isa)


@isas
def test_neither_splits_nor_other_heads_change_a_result(isa: Isa) -> None:
    case = Case(Kind(33, 20, 2), 2, 2, 2 * CHUNK + 7)
    whole = case.run(isa)
    for split in ((1, 2), (5, 1, 4)):
        np.testing.assert_array_equal(case.run(isa, split=split), whole)
    case.q[0, 1, 3] = np.nan
    spoilt = case.run(isa)
    assert np.isnan(spoilt[0, 1]).all()
    spoilt[0, 1] = whole[0, 1]
    np.testing.assert_array_equal(spoilt, whole)


@isas
def test_scores_far_beyond_the_range_of_exp(isa: Isa) -> None:
    for order in (1, -1):
        case = Case(Kind(16, 16), 1, 1, 2 * CHUNK)
        case.q[:] = 1
        ramp = np.linspace(-2000, 2000, 2 * CHUNK, dtype=np.float32)[::order]
        case.k[:, :, : 2 * CHUNK] = ramp[None, None, :, None]
        case.check(isa)


@isas
@pytest.mark.parametrize("n", [1, 16, 33, 100])
def test_stored_rows_are_those_of_dynamic_int8(isa: Isa, n: int) -> None:
    """Bit for bit, of rows that lie by token, in a state that has other tokens before and behind them."""
    batch, heads, new, room, past = 2, 3, 4, 9, 2
    rng = np.random.default_rng(n)
    x = (
        rng.standard_normal((batch, new, heads, n)) * 10.0 ** rng.integers(-30, 30, (batch, new, heads, 1))
    ).astype(np.float32)
    x[0, 0, 0, -1], x[0, 0, 1, 0], x[0, 1, 0] = np.inf, np.nan, 0
    codes = np.full((batch, heads, room, n), 77, np.int8)
    scale = np.full((batch, heads, room), 7, np.float32)
    flat_codes, flat_scale = codes.reshape(-1), scale.reshape(-1)
    args = [flat_codes[past * n :], flat_scale[past:], x, n, heads, new, new * heads * n, n, heads * n]
    args += [heads * room * n, room * n, heads * room, room]
    compile_kernel(KernelSpec.make("store_int8"), isa)(
        *args, blocks=batch * heads * new, guard=True, split=(3, 1)
    )
    with np.errstate(invalid="ignore"):
        got = (codes * scale[..., None])[:, :, past : past + new]
    want = dynamic_int8(np.ascontiguousarray(x.swapaxes(1, 2)))
    np.testing.assert_array_equal(got, want)
    assert np.abs(codes[:, :, past : past + new].astype(int)).max() <= 127
    for outside in (np.s_[:, :, :past], np.s_[:, :, past + new :]):
        assert (codes[outside] == 77).all() and (scale[outside] == 7).all()


@isas
@pytest.mark.parametrize(("S", "D", "Dv"), [(1, 80, 17), (3, 33, 64), (40, 32, 48)])
def test_attention_over_codes_is_attention_over_what_they_stand_for(
    isa: Isa, S: int, D: int, Dv: int
) -> None:
    held, heads = 70 + S, 2
    rng = np.random.default_rng(S)
    params = {"head_dim": D, "value_dim": Dv, "mask": "none", "causal": True, "scale": SCALE, "softcap": 0.0}
    q = rng.standard_normal((heads, S, D)).astype(np.float32)
    stored = []
    for width in (D, Dv):
        codes = rng.integers(-127, 128, (heads, held, width)).astype(np.int8)
        scale = rng.random((heads, held)).astype(np.float32) / 100
        stored.append((codes, scale, codes * scale[..., None]))
    (k, k_scale, k_float), (v, v_scale, v_float) = stored
    counts, q_strides = [heads, 1, S, held, held - S], [heads * S * D, S * D, D]
    k_strides, v_strides = [heads * held * D, held * D, D], [heads * held * Dv, held * Dv, Dv]
    y_strides = [heads * S * Dv, S * Dv, Dv]
    want, got = (np.full((heads, S, Dv), np.nan, np.float32) for _ in range(2))
    blocks = heads * -(-S // 32)
    compile_kernel(KernelSpec.make("attention", q_block=32, **params), isa)(
        want, q, k_float, v_float, *counts, *q_strides, *k_strides, *v_strides, *y_strides, blocks=blocks
    )
    scratch = np.zeros(attention_scratch(D, Dv) // 4, np.float32)
    compile_kernel(KernelSpec.make("attention", q_block=32, cache="i8", **params), isa)(
        *(got, q, k, v, k_scale, v_scale, scratch, *counts, *q_strides, *k_strides[:2], *v_strides[:2]),
        *(heads * held, held, *y_strides),
        blocks=blocks,
        guard=True,
    )
    np.testing.assert_array_equal(got, want)


def test_every_isa_builds_and_its_locals_fit_the_stack() -> None:
    kind = Kind(256, 256, 8, "f32", softcap=30.0, cache="i8")
    for isa in ISAS.values():
        assert link_kernel(kind.spec, isa).entries == {kind.spec.symbol: 0}
        assert link_kernel(kind.merge, isa).entries == {kind.merge.symbol: 0}
        assert 0 < stack_bytes(kind.spec, isa) <= 64 * 1024


def test_bad_parameters_are_refused() -> None:
    for kind in (
        Kind(0, 8),
        Kind(257, 8),
        Kind(8, 257),
        Kind(8, 8, 0),
        Kind(8, 8, mask="i8"),
        Kind(8, 8, chunk=100),
    ):
        with pytest.raises(QGraphError, match="cannot build"):
            link_kernel(kind.spec, ISAS["x86-64-v3"])
