"""Whole models: the CUDA code of an artifact, run by the runtime on the fake driver, beside its CPU code."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from decoders import VOCABULARY, Decoder
from emulated_artifact import emulated
from end_to_end import parse
from fake_cuda import Report

import qgraph
from qgraph.cli import doctor
from qgraph.codegen import build_artifact
from qgraph.codegen.cuda import toolkit
from qgraph.codegen.cuda.arch import ARCHS
from qgraph.codegen.targets import parse_target
from qgraph.errors import QGraphError, ResourceError, UsageError
from qgraph.evaluate.verify import REL_ERROR_LIMIT, ROUNDED_LIMITS, rounded_limit
from qgraph.passes import prepare_model

Run = Callable[..., Report]

# What a decoder goes through: prompts and single tokens, a copy of its state, fewer tokens than there were.
COMPARE = f"""
ids = np.random.default_rng(0).integers(0, {VOCABULARY}, (2, 400))

def feeds(model, session, tokens):
    at = session.length
    positions = np.tile(np.arange(at, at + tokens), (2, 1))
    given = {{"input_ids": ids[:, at : at + tokens], "position_ids": positions}}
    return {{tensor.name: given[tensor.name] for tensor in model.inputs}}

def texts(device):
    model = runtime.load(path, device=device)
    session, found = model.session(capacity=400), []
    def step(session, tokens):
        found.append(session.run(feeds(model, session, tokens))["logits"])
    for tokens in (11, 1, 3, 1, 270, 1, 1):
        step(session, tokens)
    session.truncate(13)
    copy = session.fork()
    step(copy, 2)
    step(session, 1)
    return found

for cpu, gpu in zip(texts("cpu"), texts("cuda"), strict=True):
    error = np.linalg.norm(cpu - gpu) / np.linalg.norm(cpu)
    assert error < limit, (gpu.shape, error)
"""

CASES = {
    "float": ({"scheme": "none"}, 3e-6),
    "nvfp4": ({"scheme": "nvfp4"}, 2e-5),
    # A last bit may decide a rounding, which is a whole step of a cache's codes then.
    "ternary-w2a8, int8 cache": ({"scheme": "ternary-w2a8", "kv_cache": "int8"}, 2e-2),
}


@pytest.mark.parametrize("name", CASES)
def test_a_decoder_gives_what_its_cpu_code_gives(name: str, run: Run, tmp_path: Path) -> None:
    options, limit = CASES[name]
    onnx.save(Decoder(4, 2, 64).model, tmp_path / "model.onnx")
    with emulated():
        result = qgraph.compile(
            tmp_path / "model.onnx", output=tmp_path / "out", target="cpu,cuda", onnx=False, **options
        )
    assert result.report.verification is not None and result.report.verification.devices == ["cpu"]
    assert "libcuda.so.1" in result.report.verification.reason  # so what is about the GPU is not verified
    run(f"path, limit = {str(tmp_path / 'out.qg')!r}, {limit}\n" + COMPARE)


def test_w4a4(run: Run, tmp_path: Path) -> None:
    """A layer whose inputs are rounded to NVFP4: the same bits are multiplied, as FP4 from 9 rows on."""
    rng = np.random.default_rng(0)
    model = parse(
        "(float[rows, 130] x) => (float[rows, 70] y) { y = MatMul(x, w) }",
        {"w": rng.standard_normal((130, 70)).astype(np.float32)},
    )
    onnx.save(model, tmp_path / "model.onnx")
    with emulated():
        result = qgraph.compile(
            tmp_path / "model.onnx",
            output=tmp_path / "out",
            target="cpu,cuda",
            scheme="nvfp4-w4a4",
            calibration=[{"x": rng.standard_normal((64, 130)).astype(np.float32)}],
        )
    assert "FP4 products where it has them" in result.report.layers[0].compute
    run(f"""
models = [runtime.load({str(tmp_path / "out.qg")!r}, device=device) for device in ("cpu", "cuda")]
for rows in (1, 8, 9, 140):
    x = np.random.default_rng(rows).standard_normal((rows, 130)).astype(np.float32)
    cpu, gpu = (model.run({{"x": x}})["y"] for model in models)
    assert np.linalg.norm(cpu - gpu) < 2e-6 * np.linalg.norm(cpu), rows
""")


def test_weights_are_in_the_file_once() -> None:
    model = prepare_model(ir.from_proto(Decoder(4, 2, 64).model))
    with emulated():
        alone, both = (build_artifact(model, target=target) for target in ("cpu", "cuda,cpu"))
    assert both.weight_bytes == alone.weight_bytes
    assert both.isas == [*alone.isas, "cuda-emulated"]
    assert both.metadata["qgraph.target"] == f"{alone.metadata['qgraph.target']},cuda"


@pytest.mark.parametrize("scheme", ["none", "nvfp4-w4a8"])
def test_bf16_is_for_float_activations_and_packed_weights(scheme: str, tmp_path: Path) -> None:
    onnx.save(Decoder(4, 2, 64).model, tmp_path / "model.onnx")
    lowbit = qgraph.quantize(tmp_path / "model.onnx", output=tmp_path / "lowbit", scheme=scheme).onnx
    assert lowbit is not None
    for target in ("cuda", "cpu,cuda"):
        with emulated(), pytest.raises(UsageError, match="compute 'bf16' changes nothing here"):
            qgraph.build(lowbit, output=tmp_path / "out", target=target, compute="bf16")
    assert not (tmp_path / "out.qg").exists()


def test_a_gpu_that_does_not_round_is_held_to_the_limit_of_float32() -> None:
    assert rounded_limit("int8", "cuda:0") == rounded_limit("f32", "cuda:0") == REL_ERROR_LIMIT
    assert rounded_limit("bf16", "cuda:0") == rounded_limit("bf16", "cpu") == ROUNDED_LIMITS["bf16"]
    assert rounded_limit("int8", "cpu") == ROUNDED_LIMITS["int8"]


def test_targets() -> None:
    cpu = f"{platform.machine()}-linux"
    assert (parse_target("cuda,cpu").name, parse_target("cuda").isas) == (f"{cpu},cuda", ())
    with pytest.raises(UsageError, match=r"unknown target 'rocm': choose from .*cuda"):
        parse_target("rocm")
    with pytest.raises(UsageError, match=r"code for one kind of CPU, not for x86_64-linux, aarch64-linux"):
        parse_target("x86_64-linux,aarch64-linux")


@pytest.fixture
def find_compiler() -> Iterator[Callable[[], toolkit.Compiler]]:
    toolkit.find_compiler.cache_clear()
    yield toolkit.find_compiler
    toolkit.find_compiler.cache_clear()


def test_without_a_compiler(
    find_compiler: Callable[[], toolkit.Compiler], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(toolkit.shutil, "which", lambda name: None)
    monkeypatch.setattr(toolkit, "_nvrtc", lambda: None)
    with pytest.raises(ResourceError, match=r"pip install 'qgraph\[cuda\]'"):
        find_compiler()
    assert doctor._cuda_compiler().startswith("none: target cuda needs a compiler")
    (tmp_path / "none.onnx").write_bytes(b"")  # before anything is read, not behind hours of calibration
    with pytest.raises(ResourceError, match="a compiler of CUDA"):
        qgraph.compile(tmp_path / "none.onnx", target="cuda", output=tmp_path / "out")


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("#!/bin/sh\necho first >&2; echo second >&2; exit 1\n", "nvcc: first; second$"),
        ("no program", r"nvcc does not run: Exec format error; install .*"),
    ],
)
def test_an_nvcc_that_does_not_run(
    script: str,
    message: str,
    find_compiler: Callable[[], toolkit.Compiler],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    _nvcc(tmp_path, script, monkeypatch)
    with pytest.raises(ResourceError, match=message):
        find_compiler()


@pytest.mark.parametrize(
    ("works", "error"),
    # Without the C++ compiler that it needs it fails for any text: nothing that is wrong with this one.
    [("false", ResourceError), ("test ! -s $source", QGraphError)],
)
def test_an_nvcc_that_fails(
    works: str,
    error: type[QGraphError],
    find_compiler: Callable[[], toolkit.Compiler],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    script = """#!/bin/sh
case $1 in --*) echo "release 13.0, V13.0.1 sm_80"; exit; esac
for source; do test "$before" = -o && out=$source; before=$source; done
{ WORKS; } && : > $out || { echo "gcc: not found" >&2; echo "nvcc fatal" >&2; exit 1; }
"""
    _nvcc(tmp_path, script.replace("WORKS", works), monkeypatch)
    with pytest.raises(QGraphError, match=r"gcc: not found; nvcc fatal$") as caught:
        find_compiler().compile("text", ARCHS[-1])
    assert type(caught.value) is error


def _nvcc(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a script the nvcc on the PATH."""
    (folder / "nvcc").write_text(script)
    (folder / "nvcc").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
