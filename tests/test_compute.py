"""`--compute`: what products of many rows round float activations to, through the whole chain."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest

import qgraph
from qgraph.codegen.digits import FEW_ROWS
from qgraph.errors import BudgetError, UsageError
from qgraph.evaluate.verify import REL_ERROR_LIMIT, ROUNDED_LIMITS, verify
from qgraph.report.artifact import read_artifact

for folder in ("cli", "evaluate"):
    sys.path.insert(0, str(Path(__file__).parent / folder))

from cli_harness import qgraph as command  # noqa: E402
from test_verify import one_number_off  # noqa: E402
from tiny_decoder import save_decoder  # noqa: E402
from tiny_model import save_tiny  # noqa: E402


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("compute") / "tiny.onnx", layers=1)


def compiled(model: Path, folder: Path, **options: Any) -> qgraph.pipeline.CompileResult:
    folder.mkdir(exist_ok=True)
    return qgraph.compile(model, output=folder / "out", **options)


def ids(tokens: int) -> dict[str, np.ndarray]:
    found = np.random.default_rng(tokens).integers(0, 97, (1, tokens))
    return {"input_ids": found, "attention_mask": np.ones_like(found)}


@pytest.mark.parametrize(
    ("scheme", "compute"), [("nvfp4", "int16"), ("nvfp4", "int8"), ("ternary", "int8"), ("int4", "int16")]
)
def test_many_rows_are_rounded_and_few_are_not(tiny: Path, tmp_path: Path, scheme: str, compute: str) -> None:
    exact = compiled(tiny, tmp_path / "exact", scheme=scheme)
    result = compiled(tiny, tmp_path / "fewer", scheme=scheme, compute=compute)
    assert result.artifact is not None and exact.artifact is not None
    assert read_artifact(result.artifact).metadata["qgraph.compute"] == compute
    found = result.report.verification
    assert found is not None
    few, many = (found.worst_by_limit()[limit] for limit in (REL_ERROR_LIMIT, ROUNDED_LIMITS[compute]))
    assert 0 < few < 1e-5
    assert 2e-6 < many < (5e-2 if compute == "int8" else 5e-4)
    bits = 8 if compute == "int8" else 16
    for layer in result.report.quantized:
        assert layer.realised
        where = "" if compute == "int8" else " (x86-64-v3: float32)"
        assert layer.compute.endswith(f"and sums; of more than 8 rows activations of {bits} bits{where}")
    with result.load() as rounded, exact.load() as plain:
        for tokens in (1, 8, 9):
            (a,), (b,) = (m.run(ids(tokens)).values() for m in (rounded, plain))
            assert np.array_equal(a, b) == (tokens < 9)


def test_a_wrong_weight_is_found_by_few_rows(tiny: Path, tmp_path: Path) -> None:
    result = compiled(tiny, tmp_path, compute="int8", verify=False)
    assert result.artifact is not None and result.onnx is not None
    changed = one_number_off(result.onnx, "layer.0.up.weight.global_scale", tmp_path)
    with pytest.raises(BudgetError, match=r"at batch=1 sequence=1 .* allowed is 0\.0001"):
        verify(result.artifact, changed, compute="int8", exact_rows=FEW_ROWS)
    assert verify(result.artifact, result.onnx, compute="int8", exact_rows=FEW_ROWS).status == "passed"


def test_generation_is_exact_behind_the_same_cache(tmp_path: Path) -> None:
    """A prompt is rounded, and a step is not: behind a prompt read in steps of one token nothing is."""
    model = save_decoder(tmp_path / "decoder.onnx", cache=True, layers=1)
    exact, result = (
        compiled(model, tmp_path / name, compute=name, kv_cache="int8", verify=name == "int8")
        for name in ("f32", "int8")
    )
    assert result.report.verification is not None and result.report.verification.status == "passed"
    tokens = np.random.default_rng(0).integers(0, 20, (1, 12))

    def logits(built: qgraph.pipeline.CompileResult, pieces: list[int]) -> np.ndarray:
        with built.load() as loaded, loaded.session() as session:
            start, last = 0, None
            for size in pieces:
                feeds = {"input_ids": tokens[:, start : start + size]}
                feeds["attention_mask"] = np.ones((1, start + size), np.int64)
                feeds["position_ids"] = np.arange(start, start + size)[None]
                last = session.run(feeds)
                start += size
            assert last is not None
            return last["logits"][:, -1]

    assert np.array_equal(logits(exact, [1] * 12), logits(result, [1] * 12))
    rounded, plain = logits(result, [11, 1]), logits(exact, [11, 1])
    assert 0 < np.linalg.norm(rounded - plain) < 0.1 * np.linalg.norm(plain)


def test_check_allows_what_the_artifact_was_made_to_do(tiny: Path, tmp_path: Path) -> None:
    result = compiled(tiny, tmp_path, compute="int8", verify=False)
    assert result.artifact is not None and result.onnx is not None
    wanted = ("check", result.artifact, "--lowbit", result.onnx, "--dim", "sequence=20")
    assert command(*wanted).code == 0
    refused = command(*wanted, "--max-rel-error", "1e-4")
    assert refused.code == 5 and "relative error 0.0001 against lowbit" in refused.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compute": "exact"}, "compute 'exact'.*f32, bf16, int16, int8"),
        ({"compute": "bf16", "scheme": "ternary"}, "compute 'bf16' changes nothing here.*only NVFP4 does"),
        ({"compute": "bf16", "target": "aarch64-linux"}, "aarch64-linux has no kernels for it"),
        ({"compute": "int8", "scheme": "nvfp4-w4a8"}, "scheme 'nvfp4-w4a8' rounds them itself"),
        ({"compute": "int8", "target": "aarch64-linux"}, "aarch64-linux has no kernels for it"),
        ({"compute": "int8", "target": "cuda"}, "cuda has no kernels for it; choose f32 or bf16"),
        ({"compute": "int8", "scheme": "int3"}, "compute 'int8' changes nothing here"),
        ({"compute": "int16", "scheme": "ternary", "packing": "small"}, "'int16' changes nothing here"),
        ({"compute": "int8", "scheme": "none"}, "compute 'int8' changes nothing here"),
    ],
)
def test_what_it_is_not_for(tiny: Path, tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        compiled(tiny, tmp_path, **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("scheme", ["nvfp4-w4a8", "int8-w8a8"])
def test_rounded_activations_are_not_rounded_once_more(tiny: Path, tmp_path: Path, scheme: str) -> None:
    lowbit = compiled(tiny, tmp_path, scheme=scheme, verify=False).onnx
    assert lowbit is not None
    with pytest.raises(UsageError, match="compute 'int8' changes nothing here"):
        qgraph.build(lowbit, output=tmp_path / "again", compute="int8")


def test_one_dim_alone_reaches_the_kernels_of_many_rows(tmp_path: Path) -> None:
    weight = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    graph = onnx.parser.parse_graph("g (float[rows, 64] x) => (float[rows, 64] y) { y = MatMul(x, W) }")
    graph.initializer.append(onnx.numpy_helper.from_array(weight, "W"))
    onnx.save(onnx.helper.make_model(graph), tmp_path / "model.onnx")
    found = compiled(tmp_path / "model.onnx", tmp_path, compute="int8", include=["W"]).report.verification
    assert found is not None
    assert max(case.dims["rows"] for case in found.comparisons) > FEW_ROWS
    assert found.worst_by_limit()[ROUNDED_LIMITS["int8"]] > REL_ERROR_LIMIT  # so the rounding did happen
