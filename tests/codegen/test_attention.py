"""attention against the ONNX reference evaluator's Attention-23."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import onnx
import pytest
from emulated import emulated
from kernel_harness import compile_kernel, link_kernel, native_isas, stack_bytes
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from qgraph.codegen.isa import ISAS, Isa
from qgraph.codegen.spec import KernelSpec
from qgraph.errors import QGraphError

isas = pytest.mark.parametrize("isa", native_isas(), ids=lambda i: i.name)


@dataclass(frozen=True)
class Kind:
    """The compile-time side of an attention kernel."""

    head_dim: int
    value_dim: int
    mask: str = "none"
    causal: bool = False
    softcap: float = 0.0
    q_block: int = 32

    @property
    def scale(self) -> float:
        return 0.9 / self.head_dim**0.5

    @property
    def spec(self) -> KernelSpec:
        return KernelSpec.make("attention", scale=self.scale, **self.__dict__)


@cache
def _evaluator(kind: Kind) -> ReferenceEvaluator:
    names = ["Q", "K", "V", "M" if kind.mask != "none" else "", "PK", "PV"]
    mask = TensorProto.BOOL if kind.mask == "bool" else TensorProto.FLOAT
    inputs = [
        helper.make_tensor_value_info(n, mask if n == "M" else TensorProto.FLOAT, None) for n in names if n
    ]
    node = helper.make_node(
        "Attention", names, ["Y"], is_causal=int(kind.causal), scale=kind.scale, softcap=kind.softcap
    )
    output = helper.make_tensor_value_info("Y", TensorProto.FLOAT, None)
    graph = helper.make_graph([node], "attention", inputs, [output])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
    assert onnx.defs.get_schema("Attention", 23).since_version == 23
    return ReferenceEvaluator(model)


def _reference(
    kind: Kind, q: np.ndarray, k: np.ndarray, v: np.ndarray, mask: np.ndarray | None, past: int
) -> np.ndarray:
    """y [B, H, Sq, value_dim]; the first `past` keys come as the cache. Without keys y is 0."""
    if k.shape[2] == 0:
        return np.zeros((*q.shape[:3], v.shape[3]), np.float32)
    feed = {"Q": q, "K": k[:, :, past:], "V": v[:, :, past:], "PK": k[:, :, :past], "PV": v[:, :, :past]}
    if mask is not None:
        # ONNX pads a short last axis with "do not attend"; a broadcast one (stride 0) is the kernel's own.
        feed["M"] = np.broadcast_to(mask, (*mask.shape[:3], k.shape[2]))
    with np.errstate(invalid="ignore", over="ignore"):
        return np.asarray(_evaluator(kind).run(None, feed)[0])


def _strides(a: np.ndarray, order: tuple[int, ...], shape: tuple[int, ...] | None = None) -> list[int]:
    """Element strides of axes `order`; 0 for the axes that are broadcast to `shape`."""
    return [
        0 if shape is not None and a.shape[i] == 1 and shape[i] != 1 else a.strides[i] // a.itemsize
        for i in order
    ]


class Case:
    """Random operands of one call; `seq_first` lays q, k, v, y out as [B, S, H, D], else [B, H, S, D]."""

    def __init__(
        self,
        kind: Kind,
        batch: int,
        heads: tuple[int, int],
        Sq: int,
        Sk: int,
        mask_shape: tuple[int, ...] | None = None,
        past: int = 0,
        seq_first: bool = True,
    ) -> None:
        rng = np.random.default_rng(Sq * 1000 + Sk)
        self.kind, self.heads, self.past, self.seq_first = kind, heads, past, seq_first
        self.shape = (batch, heads[0], Sq, Sk)

        def normal(H: int, S: int, D: int) -> np.ndarray:
            return rng.standard_normal((batch, S, H, D) if seq_first else (batch, H, S, D)).astype(np.float32)

        H, Hk = heads
        self.q = normal(H, Sq, kind.head_dim)
        self.k, self.v = normal(Hk, Sk, kind.head_dim), normal(Hk, Sk, kind.value_dim)
        self.mask = None
        if mask_shape is not None:
            keep = rng.random(mask_shape) < 0.7
            bias = rng.standard_normal(mask_shape).astype(np.float32)
            self.mask = keep if kind.mask == "bool" else np.where(keep, bias, np.float32(-np.inf))

    def bhsd(self, a: np.ndarray) -> np.ndarray:
        return a.swapaxes(1, 2) if self.seq_first else a

    def run(self, isa: Isa, **how: object) -> np.ndarray:
        B, H, Sq, Sk = self.shape
        y = np.full((*self.q.shape[:3], self.kind.value_dim), np.nan, np.float32)
        order = (0, 2, 1) if self.seq_first else (0, 1, 2)
        args: list = [y, self.q, self.k, self.v]
        args += [] if self.mask is None else [self.mask]
        args += [H, H // self.heads[1], Sq, Sk, self.past]
        for a in (self.q, self.k, self.v):
            args += _strides(a, order)
        if self.mask is not None:
            args += _strides(self.mask, (0, 1, 2, 3), self.shape)
        args += _strides(y, order)
        blocks = B * H * -(-Sq // self.kind.q_block)
        compile_kernel(self.kind.spec, isa)(*args, blocks=blocks, **how)  # type: ignore[arg-type]
        return self.bhsd(y)

    def reference(self) -> np.ndarray:
        return _reference(
            self.kind, self.bhsd(self.q), self.bhsd(self.k), self.bhsd(self.v), self.mask, self.past
        )

    def check(self, isa: Isa) -> None:
        got, want = self.run(isa, guard=True), self.reference()
        assert not np.isnan(got).any()
        assert np.linalg.norm(got - want) <= 2e-6 * np.linalg.norm(want), (self.kind, self.shape)


# (batch, (query heads, key heads), Sq, Sk): one query, fewer and more than the lanes, partial tiles, no keys.
SIZES = (
    (1, (1, 1), 1, 1),
    (2, (4, 2), 5, 70),
    (1, (3, 1), 37, 130),
    (2, (2, 2), 9, 0),
    (1, (2, 2), 64, 64),
)


@emulated
def test_on_others(isa: Isa) -> None:
    for sizes in ((1, (2, 1), 1, 70), (1, (2, 1), 21, 70)):
        Case(Kind(32, 33, mask="bool"), *sizes, mask_shape=(1, 1, *sizes[2:])).check(isa)


@isas
@pytest.mark.parametrize(("D", "Dv"), [(1, 1), (17, 64), (96, 33), (256, 256)])
def test_head_dims(isa: Isa, D: int, Dv: int) -> None:
    for seq_first in (False, True):
        for size in SIZES:
            Case(Kind(D, Dv), *size, seq_first=seq_first).check(isa)


@isas
@pytest.mark.parametrize("mask", ["bool", "f32"])
def test_masks_of_every_broadcast(isa: Isa, mask: str) -> None:
    kind = Kind(16, 24, mask)
    for batch, heads, Sq, Sk in SIZES:
        H = heads[0]
        for shape in ((1, 1, 1, Sk), (batch, 1, 1, Sk), (1, H, Sq, 1), (batch, H, Sq, Sk), (1, 1, Sq, Sk)):
            Case(kind, batch, heads, Sq, Sk, shape).check(isa)


@isas
def test_causal_with_and_without_a_past(isa: Isa) -> None:
    kind = Kind(16, 16, causal=True)
    for Sq, past in ((1, 0), (1, 77), (5, 3), (37, 0), (40, 90), (70, 1)):
        Case(kind, 2, (4, 2), Sq, Sq + past, past=past).check(isa)
    Case(kind, 1, (1, 1), 40, 7).check(isa)  # more queries than keys


@isas
def test_causal_mask_and_softcap_together(isa: Isa) -> None:
    kind = Kind(33, 16, "f32", causal=True, softcap=2.0)
    for Sq, past in ((1, 20), (37, 0), (40, 90)):
        Case(kind, 2, (4, 2), Sq, Sq + past, (1, 1, Sq, Sq + past), past=past).check(isa)


@isas
@pytest.mark.parametrize("q_block", [1, 7, 100])
def test_query_blocks_and_splits(isa: Isa, q_block: int) -> None:
    case = Case(Kind(16, 16, "bool", q_block=q_block), 2, (2, 1), 75, 70, (2, 1, 1, 70))
    case.check(isa)
    whole = case.run(isa)
    for split in ((1, 2), (5, 1, 4), (3,)):
        np.testing.assert_array_equal(case.run(isa, split=split), whole)


@isas
@pytest.mark.parametrize("mask", ["bool", "f32"])
def test_a_query_without_keys_gives_zeros(isa: Isa, mask: str) -> None:
    for Sq in (1, 3, 40):
        case = Case(Kind(16, 16, mask), 1, (2, 2), Sq, 70, (1, 1, Sq, 70))
        case.mask[:, :, Sq // 2] = False if mask == "bool" else -np.inf  # type: ignore[index]
        case.q[0, Sq // 2, 0, 3] = np.nan  # not even NaN: the reference decides on the mask alone
        got = case.run(isa)
        np.testing.assert_array_equal(got[:, :, Sq // 2], 0)
        np.testing.assert_array_equal(case.reference()[:, :, Sq // 2], 0)
        assert np.isfinite(got).all()


@isas
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_query_spoils_only_itself(isa: Isa, bad: float) -> None:
    for Sq in (1, 3, 40):
        case = Case(Kind(16, 16), 1, (2, 2), Sq, 70)
        clean = case.run(isa)
        case.q[0, Sq // 2, 1, 5] = bad
        got = case.run(isa)
        others = [(h, i) for h in range(2) for i in range(Sq) if (h, i) != (1, Sq // 2)]
        for h, i in others:
            np.testing.assert_array_equal(got[0, h, i], clean[0, h, i])
        assert np.isnan(got[0, 1, Sq // 2]).all()
        assert np.isnan(case.reference()[0, 1, Sq // 2]).all()


@isas
def test_scores_far_beyond_the_range_of_exp(isa: Isa) -> None:
    """Scores of +-1e4 in an order that makes the running maximum rise in every tile, or fall."""
    for order in (1, -1):
        for Sq in (1, 40):
            case = Case(Kind(16, 16), 1, (1, 1), Sq, 200)
            case.q[:] = 1
            case.k[:] = np.linspace(-700, 700, 200, dtype=np.float32)[::order][None, :, None, None]
            case.check(isa)


def test_locals_fit_the_stack() -> None:
    for isa in ISAS.values():  # with these heads, AVX-512 comes closest to the limit
        assert 0 < stack_bytes(Kind(96, 256, "f32", causal=True).spec, isa) <= 64 * 1024


def test_every_isa_builds() -> None:
    spec = Kind(64, 64, "f32", causal=True, softcap=30.0).spec
    for isa in ISAS.values():
        assert link_kernel(spec, isa).entries == {spec.symbol: 0}


def test_bad_parameters_are_refused() -> None:
    for kind in (Kind(0, 8), Kind(257, 8), Kind(8, 257), Kind(8, 8, "i8"), Kind(8, 8, q_block=0)):
        params = dict(kind.__dict__, scale=1.0)
        with pytest.raises(QGraphError, match="cannot build"):
            link_kernel(KernelSpec.make("attention", **params), ISAS["x86-64-v3"])
