"""`--export ort-cpu` in stock ONNX Runtime, beside float64 products with the weights as their formats
define them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from lowbit_models import (
    ACT_SCALE,
    dense,
    export_to,
    linear_model,
    lookup_model,
    random_weight,
    relative_error,
)

from qgraph.evaluate.runners import OnnxRuntimeRunner
from qgraph.export.nbits import round_blocks
from qgraph.formats.activations import dynamic_int8, dynamic_nvfp4
from qgraph.passes.lowbit_weights import FORMS

SHAPES = [(256, 34), (200, 33), (40, 5)]


def run(path: Path, **feeds: np.ndarray) -> dict[str, np.ndarray]:
    onnx.checker.check_model(onnx.load(path), full_check=True)
    return OnnxRuntimeRunner(path, threads=1).run(feeds)


def levels(path: Path) -> list[int]:
    """accuracy_level of every product."""
    nodes = [node for node in onnx.load(path).graph.node if node.op_type == "MatMulNBits"]
    return [next(a.i for a in node.attribute if a.name == "accuracy_level") for node in nodes]


def activations(*shape: int, seed: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("format", FORMS)
def test_products_are_exact(format: str, tmp_path: Path) -> None:
    for K, N in SHAPES:
        weights = [random_weight(format, K, N, seed) for seed in (0, 1)]
        context = export_to(tmp_path / "m.onnx", "ort-cpu", linear_model(weights))
        assert context.done == ["layer0", "layer1"] and not context.notes and not context.rounds
        assert set(levels(tmp_path / "m.onnx")) == {0}
        for lead in ((1, 1), (2, 9)):
            x = activations(*lead, K)
            found = run(tmp_path / "m.onnx", x=x)
            for i, q in enumerate(weights):
                assert relative_error(found[f"y{i}"], x.astype(np.float64) @ dense(q)) < 2e-6


def test_sums_of_blocks_are_shared(tmp_path: Path) -> None:
    weights = [random_weight("ternary", 200, 8, seed) for seed in (0, 1, 2)]
    export_to(tmp_path / "m.onnx", "ort-cpu", linear_model(weights))
    ops = [node.op_type for node in onnx.load(tmp_path / "m.onnx").graph.node]
    assert ops.count("ReduceSum") == 1 and ops.count("MatMulNBits") == ops.count("MatMul") == 3


@pytest.mark.parametrize("lead", [(), (4,), (2, 1, 3, 5)])
def test_any_rank(lead: tuple[int, ...], tmp_path: Path) -> None:
    q = random_weight("int2", 40, 6)
    export_to(tmp_path / "m.onnx", "ort-cpu", linear_model([q], lead=lead))
    x = activations(*lead, 40)
    assert relative_error(run(tmp_path / "m.onnx", x=x)["y0"], x.astype(np.float64) @ dense(q)) < 2e-6


def test_weights_that_are_shared_are_written_once(tmp_path: Path) -> None:
    q = random_weight("nvfp4", 64, 32)
    model = linear_model([q])
    export_to(tmp_path / "one.onnx", "ort-cpu", linear_model([q]))
    twice = linear_model([q, q])
    first, second = twice.graph[0], twice.graph[1]
    for i in range(1, 4):
        second.replace_input_with(i, first.inputs[i])
    export_to(tmp_path / "two.onnx", "ort-cpu", twice)
    assert len(model.graph.initializers) == 3
    sizes = [(tmp_path / name).stat().st_size for name in ("one.onnx", "two.onnx")]
    assert sizes[1] < 1.5 * sizes[0]


@pytest.mark.parametrize("format", ["nvfp4", "int4", "int8", "ternary"])
def test_int8_activations(format: str, tmp_path: Path) -> None:
    """ONNX Runtime's own rounding, which is finer than that by tokens; `exact` shows the weights are
    right."""
    for K, N in SHAPES:
        q = random_weight(format, K, N)
        path = tmp_path / "m.onnx"
        context = export_to(path, "ort-cpu", linear_model([q], "int8"))
        assert levels(path) == [4] and "x/int8" in context.rounds
        x = activations(2, 7, K)
        found = run(path, x=x)["y0"]
        exact = x.astype(np.float64) @ dense(q)
        assert 1e-4 < relative_error(found, exact) < 0.02
        block = context.rounds["x/int8"]
        assert (block is None) == (format == "ternary")
        if block is not None:
            rounded = round_blocks(x, block).astype(np.float64) @ dense(q)
            assert relative_error(found, rounded) < 1e-5
        export_to(path, "ort-cpu", linear_model([q], "int8"), exact=True)
        rounded = dynamic_int8(x).astype(np.float64) @ dense(q)
        assert relative_error(run(path, x=x)["y0"], rounded) < 2e-6


def test_layers_of_different_blocks_share_an_input(tmp_path: Path) -> None:
    """Each rounds by its own blocks, so no one rounding describes both."""
    weights = [random_weight("nvfp4", 64, 8), random_weight("int4", 64, 8)]
    context = export_to(tmp_path / "m.onnx", "ort-cpu", linear_model(weights, "int8"))
    assert context.rounds == {"x/int8": None}
    x = activations(2, 7, 64)
    found = run(tmp_path / "m.onnx", x=x)
    for i, q in enumerate(weights):
        assert relative_error(found[f"y{i}"], x.astype(np.float64) @ dense(q)) < 0.02


def test_nvfp4_activations_are_rounded_to_the_bit(tmp_path: Path) -> None:
    for K in (64, 40, 7):
        model = linear_model([random_weight("nvfp4", K, 5)], "nvfp4")
        model.graph.outputs.append(model.graph[0].outputs[0])
        export_to(tmp_path / "m.onnx", "ort-cpu", model)
        x = activations(3, 50, K) * np.float32(10) ** np.random.default_rng(0).integers(-4, 3, (3, 50, 1))
        x = x.astype(np.float32)
        # Quarters, which all ties are among, in blocks whose scale is 1.
        x[0, 0] = np.resize(np.arange(-24, 25) / np.float32(4), K)
        x[0, 0, ::4] = 6
        x[0, 1] = 0
        found = run(tmp_path / "m.onnx", x=x)
        wanted = dynamic_nvfp4(x, ACT_SCALE)
        assert np.array_equal(found["x/nvfp4"].view(np.int32), wanted.view(np.int32))


@pytest.mark.parametrize("layer", [True, False])
@pytest.mark.parametrize("format", FORMS)
def test_columns_of_a_tied_weight(format: str, layer: bool, tmp_path: Path) -> None:
    for K, N in SHAPES:
        q = random_weight(format, K, N)
        context = export_to(tmp_path / "m.onnx", "ort-cpu", lookup_model(q, columns=True, layer=layer))
        assert "lookup" in context.done
        ids = np.array([[0, N - 1, 2], [1, 1, 3]])
        feeds = {"x": activations(1, 1, K)} if layer else {}
        found = run(tmp_path / "m.onnx", ids=ids, **feeds)["rows"]
        assert relative_error(found, dense(q)[:, ids]) < 2e-7


@pytest.mark.parametrize("H", [64, 40, 33])
def test_tables(H: int, tmp_path: Path) -> None:
    q = random_weight("nvfp4", H, 50)
    context = export_to(tmp_path / "m.onnx", "ort-cpu", lookup_model(q, columns=False))
    assert context.done == ["lookup"]
    ids = np.array([[0, 49], [7, 7]])
    found = run(tmp_path / "m.onnx", ids=ids)["rows"]
    assert np.array_equal(found, q.dequantize().T[ids])
