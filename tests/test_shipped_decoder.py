"""The decoder that travels with qgraph, from export to text: float to the token, NVFP4 close."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

os.environ["ORT_DISABLE_TELEMETRY"] = "1"

import pytest

import qgraph
from qgraph.evaluate.decoders import open_text_runner
from qgraph.evaluate.perplexity import Comparison, compare, split_windows
from qgraph.evaluate.tokenizer import leading_tokens, load_tokenizer, read_documents
from qgraph.models import get_model
from qgraph.pipeline import CompileResult

PROMPT = "Once upon a time, there was a little girl"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    return get_model("tinystories").export(tmp_path_factory.mktemp("shipped") / "tinystories.onnx")


@pytest.fixture(scope="module")
def exact(original: Path) -> CompileResult:
    return qgraph.compile(original, scheme="none", onnx=False)


@pytest.fixture(scope="module")
def small(original: Path) -> CompileResult:
    return qgraph.compile(original, scheme="nvfp4", embeddings="nvfp4", strict=True)


def written(model: Path | None, tokens: int) -> tuple[int, ...]:
    assert model is not None
    with qgraph.open_generator(model, get_model("tinystories").tokenizer_path(), room=256) as generator:
        return generator.generate(PROMPT, max_tokens=tokens)[0].ids


def on_held_out_text(model: Path | None, original: Path) -> Comparison:
    from qgraph.models.tinystories import HELD_OUT, SEPARATOR

    tokenizer = load_tokenizer(get_model("tinystories").tokenizer_path())
    documents = read_documents(HELD_OUT, tokenizer, separator=SEPARATOR)
    windows = split_windows(documents, length=512, stride=256, prefix=leading_tokens(tokenizer))
    assert model is not None
    return compare(open_text_runner(model), open_text_runner(original), windows)


def test_greedy_text_is_that_of_onnxruntime(original: Path, exact: CompileResult) -> None:
    assert exact.report.verification.status == "passed"
    found = written(exact.artifact, 64)
    assert len(found) == 64
    assert found == written(original, 64)


def test_nvfp4_is_close_to_float(original: Path, exact: CompileResult, small: CompileResult) -> None:
    """Without calibration, and with its table in 4 bits."""
    same = on_held_out_text(exact.artifact, original)
    assert same.model.perplexity == pytest.approx(same.reference.perplexity, rel=1e-4)
    found = on_held_out_text(small.artifact, original)
    assert found.model.tokens > 1500
    assert 1 < found.model.perplexity / found.reference.perplexity < 1.03
    assert found.kl_divergence < 0.03


def test_a_tied_table_has_8_bits_unless_told(original: Path, tmp_path: Path) -> None:
    def formats(**options: object) -> set[tuple[str, str]]:
        found = qgraph.compile(original, output=tmp_path / "dry", dry_run=True, solver="rtn", **options)
        return {(layer.kind, layer.scheme) for layer in found.report.layers}

    both = {("linear", "int8"), ("embedding", "int8")}
    assert formats(scheme="nvfp4") == both | {("linear", "nvfp4")}
    assert formats(scheme="nvfp4-w4a8") == both | {("linear", "nvfp4")}
    assert formats(scheme="ternary", embeddings="float") == {
        ("linear", "ternary"),
        ("linear", ""),
        ("embedding", ""),
    }
    named = qgraph.compile(
        original, output=tmp_path / "dry", dry_run=True, scheme="none", layers=["*lm_head*=int8"]
    )
    assert {layer.kind for layer in named.report.quantized} == {"linear", "embedding"}
    assert len(named.report.quantized) == 2


def test_a_tied_table_is_stored_once(original: Path, small: CompileResult) -> None:
    assert small.artifact is not None
    weights = 4.5 / 8 * 3.67e6  # all of them, the table counted once
    code = 300_000
    assert small.artifact.stat().st_size < weights + code
    assert original.stat().st_size > 6 * small.artifact.stat().st_size
    assert {layer.scheme for layer in small.report.layers} == {"nvfp4"}


def test_c_example_writes_the_same_tokens(exact: CompileResult, tmp_path: Path) -> None:
    """runtime/examples/generate.c, token for token as they come, the cache in its session."""
    from qgraph.runtime.build import ROOT, library

    built, program = library(), tmp_path / "generate"
    options = ["-std=c99", "-pedantic", f"-I{ROOT / 'include'}", f"-Wl,-rpath,{built.parent}"]
    compiler = os.environ.get("CC", "cc").split()
    source = ROOT / "examples" / "generate.c"
    subprocess.run([*compiler, *options, str(source), str(built), "-o", str(program)], check=True)
    tokenizer = load_tokenizer(get_model("tinystories").tokenizer_path())
    prompt = [str(token) for token in tokenizer.encode(PROMPT).ids]
    assert exact.artifact is not None
    command = [program, "--capacity", "256", exact.artifact, "64", *prompt]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True)
    assert tuple(map(int, done.stdout.split())) == written(exact.artifact, 64)
