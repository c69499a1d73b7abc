"""benchmarks/models.py on a tiny Llama: what it prints and writes. Times are not looked at."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import llama_shapes  # noqa: E402

# By its path: the repository has a folder of that name.
_spec = importlib.util.spec_from_file_location("models_benchmark", BENCHMARKS / "models.py")
assert _spec and _spec.loader
models = sys.modules[_spec.name] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(models)

TINY = llama_shapes.LlamaShape(layers=2, width=64, inner=96, heads=4, kv_heads=2, vocabulary=200)
LLAMA_BENCH = """#!{python}
import json, sys
given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
assert given["-o"] == "json", given
turns = int(given["-r"])
print(json.dumps([
    {{"n_prompt": int(given["-p"]), "n_gen": 0, "samples_ns": [8_000_000] * turns}},
    {{"n_prompt": 0, "n_gen": int(given["-n"]), "samples_ns": [6_000_000] * turns}},
]))
"""


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the export of a tiny Llama, which takes the place of llama-134m."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("work")
    (folder / "llama-134m").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(llama_shapes.SHAPES, "llama-134m", TINY)
        llama_shapes.export(TINY, folder / "llama-134m" / "llama-134m.onnx")
        yield folder


def test_a_decoder_beside_its_peers(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program, gguf, found = (tmp_path / name for name in ("llama-bench", "tiny.gguf", "found.json"))
    program.write_text(LLAMA_BENCH.format(python=sys.executable))
    program.chmod(0o700)
    gguf.write_bytes(b"GGUF")
    options = "llama-134m --schemes nvfp4 --in-ort --threads 1 --prefill 8 --decode 3 --rounds 2 --repeats 2"
    models.main(f"{options} --llama-bench {program} --gguf {gguf} --work {work} --json {found}".split())
    printed = capsys.readouterr().out
    assert "### llama-134m" in printed
    assert "| 1 | llama.cpp tiny | 0.0 | 1000.0 | 1000.0 |  | 0% | 500.0 | 500.0 |  | 0% |" in printed
    assert "times as fast as" in printed
    measured = {one["name"]: one for one in json.loads(found.read_text())["models"]["llama-134m"]}
    assert list(measured) == [
        "qgraph nvfp4",
        "qgraph nvfp4 in ONNX Runtime",
        "ONNX Runtime float32",
        "ONNX Runtime int4, int8 x",
        "llama.cpp tiny",
    ]
    ours = measured["qgraph nvfp4"]
    assert ours["cache"] == 2 * 2 * 2 * 16 * 11 * 4  # keys and values, layers, heads, width, tokens, bytes
    assert [len(times) for times in ours["repeats"]["prefill 8"]] == [2, 2]
    assert [len(times) for times in ours["repeats"]["decode 3"]] == [6, 6]
    assert len(ours["cpu"]["decode 3"]) == 12
    assert 0 < ours["load"] < ours["first"]
    assert ours["memory"] > ours["nbytes"]
    weights = measured["ONNX Runtime float32"]["nbytes"]
    parameters = 2 * 200 * 64 + 2 * (3 * 64 * 96 + 2 * 64 * 64 + 2 * 32 * 64)
    assert 4 * parameters < weights < 4 * parameters + 200_000
    assert measured["ONNX Runtime int4, int8 x"]["nbytes"] < weights


def test_external_weights_are_the_module_s(work: Path) -> None:
    """What is exported with its weights beside it computes what torch does."""
    import torch
    from transformers import LlamaForCausalLM

    from qgraph.evaluate.decoders import open_decoder

    torch.manual_seed(llama_shapes.SEED)
    module = LlamaForCausalLM(TINY.config()).eval()
    ids = np.arange(5).reshape(1, 5)
    with torch.no_grad():
        expected = module(torch.from_numpy(ids)).logits.numpy()
    np.testing.assert_allclose(
        open_decoder(work / "llama-134m" / "llama-134m.onnx").feed(ids), expected, rtol=1e-4, atol=1e-5
    )


def test_a_broken_model_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "broken.qg").write_bytes(b"nothing")
    with pytest.raises(RuntimeError, match="ended with 1"):
        models.Worker(tmp_path / "broken.qg", 1, kind="encoder")
    assert "broken.qg" in capfd.readouterr().err


def test_an_unknown_model_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        models.main(["bert"])
    assert "unknown model bert; known: minilm, llama-134m, llama-1b" in capsys.readouterr().err
