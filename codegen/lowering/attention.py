"""Attention-23: one kernel that reads Q, K, V where they lie and never stores the scores."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import sympy

from qgraph.codegen.dims import Dim, ceildiv, equal, is_one, product, static
from qgraph.codegen.lowering.context import Arg, Lowering, Step, lowers, unsupported
from qgraph.codegen.lowering.state import State
from qgraph.codegen.memory import View
from qgraph.codegen.spec import KernelSpec, attention_scratch

_MAX_HEAD_DIM = 256
_CHUNK = 256  # keys that one block of a decode step reads


def _heads(low: Lowering, node: ir.Node, value: ir.Value, heads: int) -> View:
    """Q, K or V as [batch, heads, length, head_dim] with neighbouring elements of a head side by side."""
    view = low.view(value)
    if view.rank == 3:
        batch, length, width = view.shape
        if not heads:
            raise unsupported(node, "3-D inputs need the attributes q_num_heads and kv_num_heads")
        split = view.reshape((batch, length, sympy.Integer(heads), sympy.expand(width / heads)))
        if split is None:
            return _heads_of_copy(low, view, heads, value)
        view = split.transpose((0, 2, 1, 3))
    if static(view.strides[-1]) != 1 and view.shape[-1] != 1:
        view = low.copy(view, f"{value.name}/copy")
    return view


def _heads_of_copy(low: Lowering, view: View, heads: int, value: ir.Value) -> View:
    batch, length, width = view.shape
    dense = low.copy(view, f"{value.name}/copy")
    split = dense.reshape((batch, length, sympy.Integer(heads), sympy.expand(width / heads)))
    assert split is not None, "a dense view takes any shape"
    return split.transpose((0, 2, 1, 3))


def _append(low: Lowering, node: ir.Node, state: State, new: ir.Value, heads: int) -> View:
    """All that `state` holds, the new tokens written behind the others if they are not yet there."""
    if state.scale is None:
        state.store(low, _heads(low, node, new, heads), f"{new.name}/append")
    return state.held(state.buffer)


def _mask(low: Lowering, node: ir.Node, value: ir.Value, scores: tuple[Dim, ...]) -> View:
    """The mask broadcast to the scores' shape."""
    view = low.view(value)
    wanted = scores[len(scores) - view.rank :]
    if not all(is_one(d) or equal(d, w) for d, w in zip(view.shape, wanted, strict=True)):
        raise unsupported(node, f"mask of shape {list(view.shape)} for scores of shape {list(scores)}")
    # A last axis shorter than the keys is padded with "do not attend", not broadcast, even if it is 1.
    if not equal(view.shape[-1], scores[-1]):
        raise unsupported(node, f"a mask for {view.shape[-1]} of {scores[-1]} keys is not supported yet")
    return view.expand(scores)


@dataclass(frozen=True)
class _Call:
    """What the kernels of attention are given: y, q, k, v [batch, heads, tokens, size of a head], the scales
    of k and v if these are int8 codes, the mask as wide as the scores, and what all their specs say."""

    name: str
    y: View
    q: View
    k: View
    v: View
    scales: tuple[View, ...]
    mask: tuple[View, ...]
    params: dict[str, Any]

    @property
    def group(self) -> int:
        return int(self.q.shape[1] / self.k.shape[1])

    def scale_strides(self) -> list[Dim]:
        return [stride for view in self.scales[:1] for stride in view.strides[:2]]

    def emit_many(self, low: Lowering, causal: bool, past: Dim, runs: Dim) -> Step:
        """Any number of queries; nothing where `runs` is 0 and not 1."""
        batch, heads, sq, _ = self.q.shape
        q_block = low.device.queries(max(self.params["head_dim"], self.params["value_dim"]))
        params = {**self.params, "causal": causal, "q_block": q_block}
        coded: list[Arg | View] = []
        if self.scales:
            params["cache"] = "i8"
            coded = [*self.scales]
            if low.device.scratch:
                coded.append(("scratch", attention_scratch(params["head_dim"], params["value_dim"])))
        kept = 2 if self.scales else 3  # strides of k and v that the kernel takes
        args = [
            self.y,
            self.q,
            self.k,
            self.v,
            *coded,
            *self.mask,
            heads,
            self.group,
            sq,
            self.k.shape[2],
            past,
        ]
        args += [*self.q.strides[:3], *self.k.strides[:kept], *self.v.strides[:kept], *self.scale_strides()]
        args += [stride for view in self.mask for stride in view.strides] + [*self.y.strides[:3]]
        blocks = product((batch, heads)) * ceildiv(sq, q_block) * runs
        return low.emit(self.name, KernelSpec.make("attention", **params), args, blocks)

    def emit_single(self, low: Lowering, runs: Dim) -> Step:
        """One query, which attends all keys; nothing where `runs` is 0 and not 1."""
        (batch, hkv, total, _), dv = self.k.shape, self.params["value_dim"]
        chunks = ceildiv(total, _CHUNK)
        part = low.temp("f32", (batch, hkv, chunks, sympy.Integer(self.group), sympy.Integer(dv + 2)))
        coded = {"group": self.group, "chunk": _CHUNK, "cache": "i8" if self.scales else "f32"}
        spec = KernelSpec.make("attention_decode", **self.params, **coded)
        ends = self.y.strides[:2]
        args = [self.y, part, self.q, self.k, self.v, *self.scales, *self.mask, total, chunks, hkv]
        args += [*self.q.strides[:2], *self.k.strides[:2], *self.v.strides[:2], *self.scale_strides()]
        args += [view.strides[i] for view in self.mask for i in (0, 1, 3)] + [*ends]
        step = low.emit(self.name, spec, args, product((batch, hkv)) * chunks * runs)
        spec = KernelSpec.make("attention_merge", value_dim=dv, group=self.group)
        blocks = product(self.q.shape[:2]) * sympy.Min(1, chunks - 1) * runs
        low.emit(f"{self.name}/merge", spec, [self.y, part, chunks, hkv, *ends], blocks)
        return step


# `qk_matmul_output_mode` shapes an output that is refused below; the softmax is always computed in float32.
@lowers(
    "Attention",
    attributes="q_num_heads kv_num_heads scale softcap is_causal qk_matmul_output_mode softmax_precision",
)
def attention(low: Lowering, node: ir.Node) -> None:
    """Scaled dot-product attention over 3-D or 4-D inputs, grouped heads, a boolean or additive mask."""
    attrs = node.attributes
    inputs = list(node.inputs) + [None] * (6 - len(node.inputs))
    q_value, k_value, v_value, mask_value = inputs[:4]
    if q_value is None or k_value is None or v_value is None:
        raise unsupported(node, "Q, K and V are needed")
    states = [low.states[v] for v in inputs[4:6] if v is not None]
    if not states and any(low.uses[v] for v in node.outputs[1:3]):
        raise unsupported(node, "present key and value without a past")
    if any(low.uses[v] for v in node.outputs[3:]):
        raise unsupported(node, f"output '{node.outputs[3].name}' is not supported yet")
    if low.dtype(q_value) != "f32":
        raise unsupported(node, f"data type {low.dtype(q_value)}; supported is f32")
    flat = len(low.shape(q_value)) == 3
    q = _heads(low, node, q_value, attrs.get_int("q_num_heads", 0))
    grouped = attrs.get_int("kv_num_heads", 0)
    past: Dim = sympy.Integer(0)
    scales: tuple[View, ...] = ()
    if states:
        past, scales = states[0].past, tuple(state.held(state.scale) for state in states if state.scale)
        if len(scales) == 1:
            raise unsupported(node, "of keys and values one is rounded to int8, the other is not")
        k, v = (
            _append(low, node, state, value, grouped)
            for state, value in zip(states, (k_value, v_value), strict=True)
        )
    else:
        k, v = (_heads(low, node, value, grouped) for value in (k_value, v_value))
    batch, heads, sq, head_dim = q.shape
    kv_heads, sk, value_dim = k.shape[1], k.shape[2], v.shape[3]
    d, dv, h, hkv = static(head_dim), static(value_dim), static(heads), static(kv_heads)
    if d is None or dv is None or h is None or hkv is None or h % hkv:
        raise unsupported(
            node, f"head sizes must be constant and the {heads} query heads a multiple of {kv_heads}"
        )
    if max(d, dv) > _MAX_HEAD_DIM:
        raise unsupported(node, f"head size {max(d, dv)}; kernels go up to {_MAX_HEAD_DIM}")
    scale = attrs.get_float("scale", 0.0) or 1.0 / math.sqrt(d)

    mask: tuple[View, ...] = ()
    kind = "none"
    if mask_value is not None:
        kind = low.dtype(mask_value)
        if kind not in ("bool", "f32"):
            raise unsupported(node, f"mask of type {kind}")
        mask = (_mask(low, node, mask_value, (batch, heads, sq, sk)),)

    # The heads of one token side by side: the transposition that follows then costs nothing.
    result = node.outputs[0]
    by_token = (batch, sq, heads, value_dim)
    if result not in low.outputs:
        by_head = low.temp("f32", by_token).transpose((0, 2, 1, 3))
    elif flat:
        split = View.of(low.outputs[result]).reshape(by_token)
        assert split is not None, "an output is dense"
        by_head = split.transpose((0, 2, 1, 3))
    else:
        by_head = View.of(low.outputs[result])
    params = {
        "head_dim": d,
        "value_dim": dv,
        "mask": kind,
        "scale": float(scale),
        "softcap": float(attrs.get_float("softcap", 0.0)),
    }
    call = _Call(node.name or "Attention", by_head, q, k, v, scales, mask, params)
    # 1 in a run with one query, which has a kernel of its own, else 0. A step of no blocks is skipped.
    single = sympy.Max(0, 2 - sq) if states else sympy.Integer(0)
    many = sympy.Min(1, sq - 1) if states else sympy.Integer(1)
    if single != 0:
        step = call.emit_single(low, single)
    if many != 0:
        step = call.emit_many(low, bool(attrs.get_int("is_causal", 0)), past, many)
    low.layers.append((node, step))
    if flat:
        merged = by_head.transpose((0, 2, 1, 3)).reshape((batch, sq, sympy.expand(heads * value_dim)))
        assert merged is not None, "the heads of a token lie side by side"
        low.bind(node, merged)
    else:
        low.bind(node, by_head)
