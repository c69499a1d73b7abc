"""Small decoders with a cache, and ONNX's reference evaluator that runs them step by step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import onnx
import onnx_ir as ir
from end_to_end import parse
from onnx.reference import ReferenceEvaluator

from qgraph.codegen import Artifact, build_artifact
from qgraph.passes import prepare_model

VOCABULARY, HIDDEN, LONGEST = 29, 24, 400


@dataclass(frozen=True)
class Decoder:
    """One attention layer between an embedding and a feed-forward layer, with rotary embeddings of k where
    `rotary`, and a mask that hides padding where `masked`."""

    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    rotary: bool = True
    masked: bool = False

    @cached_property
    def weights(self) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(7)
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        shapes = {
            "table": (VOCABULARY, HIDDEN), "wq": (HIDDEN, q), "wk": (HIDDEN, kv), "wv": (HIDDEN, kv),
            "wo": (q, HIDDEN), "up": (HIDDEN, 40), "down": (40, HIDDEN), "head": (HIDDEN, VOCABULARY),
        }  # fmt: skip
        made = {name: rng.standard_normal(s).astype(np.float32) / s[0] ** 0.5 for name, s in shapes.items()}
        angles = np.arange(LONGEST)[:, None] / 50.0 ** np.linspace(0, 1, self.head_dim // 2)
        return made | {
            "gain": np.linspace(0.5, 2, HIDDEN, dtype=np.float32),
            "cosines": np.cos(angles).astype(np.float32),
            "sines": np.sin(angles).astype(np.float32),
            "by_head": np.array([0, 0, self.heads, self.head_dim]),
            "by_kv_head": np.array([0, 0, self.kv_heads, self.head_dim]),
            "flat": np.array([0, 0, q]),
            "one_two": np.array([1, 2]),
            "one": np.array([1]),
        }

    @cached_property
    def model(self) -> onnx.ModelProto:
        state = f"float[batch, {self.kv_heads}, {{}}, {self.head_dim}]"
        past, total = state.format("past"), state.format("total")
        turned = "{0}r = RotaryEmbedding({0}t, cosines, sines, position_ids)"
        same = "{0}r = Identity({0}t)"
        rotate = (turned if self.rotary else same).format
        mask = (
            "keep = Cast<to = 9>(attention_mask) wide = Unsqueeze(keep, one_two)"
            "b = Shape<start = 0, end = 1>(input_ids) s = Shape<start = 1, end = 2>(input_ids)"
            "t = Shape<start = 1, end = 2>(attention_mask) full = Concat<axis = 0>(b, one, s, t)"
            "mask = Expand(wide, full)"
        )
        used = dict(self.weights)
        for name in () if self.masked else ("one_two", "one"):
            del used[name]
        for name in () if self.rotary else ("cosines", "sines"):
            del used[name]
        return parse(
            f"""(int64[batch, sequence] input_ids,
                {"int64[batch, total] attention_mask," if self.masked else ""}
                {"int64[batch, sequence] position_ids," if self.rotary else ""}
                {past} past_key, {past} past_value)
             => (float[batch, sequence, {VOCABULARY}] logits, {total} present_key, {total} present_value) {{
                x = Gather(table, input_ids)
                q = MatMul(x, wq) k = MatMul(x, wk) v = MatMul(x, wv)
                qh = Reshape(q, by_head) kh = Reshape(k, by_kv_head) vh = Reshape(v, by_kv_head)
                qt = Transpose<perm = [0, 2, 1, 3]>(qh) kt = Transpose<perm = [0, 2, 1, 3]>(kh)
                vt = Transpose<perm = [0, 2, 1, 3]>(vh) {rotate("q")} {rotate("k")}
                {mask if self.masked else ""}
                y, present_key, present_value = Attention<is_causal = 1>(
                    qr, kr, vt, {"mask" if self.masked else ""}, past_key, past_value)
                yt = Transpose<perm = [0, 2, 1, 3]>(y) yf = Reshape(yt, flat) o = MatMul(yf, wo) h = Add(x, o)
                n = RMSNormalization(h, gain) u = MatMul(n, up) g = Gelu(u) d = MatMul(g, down) z = Add(h, d)
                logits = MatMul(z, head)
             }}""",
            used,
        )

    def prepared(self) -> ir.Model:
        return prepare_model(ir.from_proto(self.model))

    def artifact(self) -> Artifact:
        return build_artifact(self.prepared())

    def feeds(self, ids: np.ndarray, pads: Sequence[int], start: int, stop: int) -> dict[str, np.ndarray]:
        """Of the tokens start .. stop - 1; row i begins with pads[i] of padding."""
        feeds = {"input_ids": ids[:, start:stop]}
        lead = np.asarray(pads)[:, None]
        if self.masked:
            feeds["attention_mask"] = (np.arange(stop)[None] >= lead).astype(np.int64)
        if self.rotary:
            feeds["position_ids"] = np.maximum(np.arange(start, stop)[None] - lead, 0)
        return feeds

    def reference(self, ids: np.ndarray, pads: Sequence[int], cuts: Sequence[int]) -> list[np.ndarray]:
        """Logits of every run; the runs end at `cuts`."""
        evaluator = ReferenceEvaluator(self.model)
        past = [np.zeros((len(ids), self.kv_heads, 0, self.head_dim), np.float32)] * 2
        start, found = 0, []
        for stop in cuts:
            feeds = self.feeds(ids, pads, start, stop) | dict(
                zip(("past_key", "past_value"), past, strict=True)
            )
            logits, *past = evaluator.run(None, feeds)
            found.append(np.asarray(logits))
            start = stop
        return found


def tokens(batch: int, length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCABULARY, (batch, length))


def close(got: np.ndarray, want: np.ndarray, tolerance: float = 3e-6) -> None:
    assert got.shape == want.shape
    assert np.abs(got - want).max() <= tolerance * np.abs(want).max()
