"""The models of the golden artifacts, and what they become. Run it to write a new set:

    python tests/golden/golden_models.py tests/golden/<version of qgraph>

README.md says when. Models, weights and inputs are the same on every machine; the code in the files is what
the compiler at hand makes of them.
"""

from __future__ import annotations

import hashlib
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
from onnx import numpy_helper

import qgraph

Feeds = dict[str, np.ndarray]
VOCABULARY, WIDTH, OUT = 13, 40, 24
HEADS, HEAD_WIDTH = 2, 8

# Lookup, norm and a layer: the lookup checks its indices, rows up to eight and more go different ways.
_ENCODER = """(int64[batch, sequence] ids) => (float[batch, sequence, 24] y) {
  x = Gather(table, ids)
  n = LayerNormalization(x, gain, shift)
  [up] a = MatMul(n, w)
  [bias] b = Add(a, c)
  [act] y = Gelu(b)
}"""
# A layer alone: its input is rounded, and a last bit before that would count.
_LAYER = """(float[batch, 40] x) => (float[batch, 24] y) { [up] a = MatMul(x, w) [bias] y = Add(a, c) }"""
# Attention to all tokens so far, which are the session's state.
_DECODER = """(int64[batch, sequence] input_ids,
  float[batch, 2, past, 8] past_key, float[batch, 2, past, 8] past_value
) => (float[batch, sequence, 16] hidden, float[batch, 2, total, 8] present_key,
  float[batch, 2, total, 8] present_value) {
  x = Gather(tokens, input_ids)
  h = Reshape(x, by_head)
  t = Transpose<perm = [0, 2, 1, 3]>(h)
  y, present_key, present_value = Attention<is_causal = 1>(t, t, t, , past_key, past_value)
  u = Transpose<perm = [0, 2, 1, 3]>(y)
  hidden = Reshape(u, flat)
}"""


def _weights(names: str) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    every = {
        "table": rng.standard_normal((VOCABULARY, WIDTH)),
        "gain": np.linspace(0.5, 2, WIDTH),
        "shift": np.linspace(-1, 1, WIDTH),
        "w": rng.standard_normal((WIDTH, OUT)) / WIDTH**0.5,
        "c": rng.standard_normal(OUT),
        "tokens": rng.standard_normal((VOCABULARY, HEADS * HEAD_WIDTH)),
    }
    return {name: every[name].astype(np.float32) for name in names.split()}


def _ids(shape: tuple[int, int]) -> np.ndarray:
    return np.random.default_rng(sum(shape)).integers(0, VOCABULARY, shape)


def _rows(count: int) -> np.ndarray:
    return np.random.default_rng(count).standard_normal((count, WIDTH)).astype(np.float32)


@dataclass(frozen=True)
class Golden:
    """A model, how it is compiled, and the runs of one session: a decoder's go on from one another."""

    graph: str
    weights: Mapping[str, np.ndarray]
    options: Mapping[str, Any]
    runs: list[Feeds] = field(default_factory=list)

    def save(self, path: Path) -> Path:
        model = onnx.parser.parse_model(f'<ir_version: 11, opset_import: ["" : 23]> golden {self.graph}')
        model.graph.initializer.extend(numpy_helper.from_array(a, n) for n, a in self.weights.items())
        onnx.save(model, path)
        return path

    def compile(self, folder: Path, **options: Any) -> Path:
        """Compile it in `folder`; the path of the artifact."""
        source = self.save(folder / "model.onnx")
        result = qgraph.compile(source, output=folder / "golden", onnx=False, **self.options, **options)
        assert result.artifact is not None
        return result.artifact


def _encoder(scheme: str, **options: Any) -> Golden:
    whole = {"scheme": scheme, "include": ("up",), "strict": True, **options}
    runs = [{"ids": _ids(shape)} for shape in ((1, 3), (2, 9))]
    return Golden(_ENCODER, _weights("table gain shift w c"), whole, runs)


def _decoder() -> Golden:
    shapes = {"by_head": np.array([0, 0, HEADS, HEAD_WIDTH]), "flat": np.array([0, 0, HEADS * HEAD_WIDTH])}
    runs = [{"input_ids": _ids((2, n))} for n in (5, 1, 1)]
    return Golden(_DECODER, _weights("tokens") | shapes, {"scheme": "none"}, runs)


_INT8 = {"scheme": "int8-w8a8", "include": ("up",), "strict": True}
MODELS: dict[str, Callable[[], Golden]] = {
    "encoder-nvfp4": lambda: _encoder("nvfp4"),
    "encoder-nvfp4-aarch64": lambda: _encoder("nvfp4", target="aarch64-linux"),
    "encoder-ternary": lambda: _encoder("ternary"),
    "layer-int8-w8a8": lambda: Golden(_LAYER, _weights("w c"), _INT8, [{"x": _rows(n)} for n in (3, 20)]),
    "decoder": _decoder,
}
SIGNED = "encoder-ternary"  # once more, with a signature
# Where the outputs of files that this machine cannot run come from.
SAME_OUTPUTS = {"encoder-nvfp4-aarch64": "encoder-nvfp4"}


def run(path: Path, runs: list[Feeds], **options: Any) -> list[Feeds]:
    """The outputs of every run, in one session."""
    with qgraph.load(path, **options) as model:
        session = model.session()
        return [session.run(feeds) for feeds in runs]


def save_runs(path: Path, inputs: list[Feeds], outputs: list[Feeds]) -> None:
    """As `in.<run>.<name>` and `out.<run>.<name>`."""
    arrays = {
        f"{side}.{i}.{name}": array
        for side, runs in (("in", inputs), ("out", outputs))
        for i, tensors in enumerate(runs)
        for name, array in tensors.items()
    }
    np.savez_compressed(path, **arrays)  # type: ignore[arg-type]


def load_runs(path: Path) -> tuple[list[Feeds], list[Feeds]]:
    """What `save_runs` was given."""
    found: dict[str, dict[int, Feeds]] = {"in": {}, "out": {}}
    with np.load(path) as file:
        for key in file.files:
            side, index, name = key.split(".", 2)
            found[side].setdefault(int(index), {})[name] = file[key]
    inputs, outputs = ([runs[i] for i in range(len(runs))] for runs in found.values())
    return inputs, outputs


def write_key(folder: Path) -> tuple[Path, Path]:
    """The pair that golden artifacts are signed with, no secret: `golden.pem`, `golden.pub`."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    key = Ed25519PrivateKey.from_private_bytes(hashlib.sha256(b"golden artifacts of qgraph").digest())
    private, public = folder / "golden.pem", folder / "golden.pub"
    pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    private.write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain))
    info = serialization.PublicFormat.SubjectPublicKeyInfo
    public.write_bytes(key.public_key().public_bytes(pem, info))
    return private, public


def write_set(folder: Path) -> None:
    """Compile all models, and run them, into a folder that must be new."""
    from qgraph.signing import sign

    folder.mkdir(parents=True)
    for name, make in MODELS.items():
        golden = make()
        with tempfile.TemporaryDirectory() as scratch:
            golden.compile(Path(scratch)).replace(folder / f"{name}.qg")
    for name, make in MODELS.items():
        runs = make().runs
        save_runs(folder / f"{name}.npz", runs, run(folder / f"{SAME_OUTPUTS.get(name, name)}.qg", runs))
    with tempfile.TemporaryDirectory() as scratch:
        private, public = write_key(Path(scratch))
        sign(folder / f"{SIGNED}.qg", private, folder / f"{SIGNED}.signed.qg")
        (folder / public.name).write_bytes(public.read_bytes())


if __name__ == "__main__":
    write_set(Path(sys.argv[1]))
