"""The report: sums, reasons, and what it says of layers that got less than was asked for."""

from __future__ import annotations

import json

import numpy as np
import onnx_ir as ir

from qgraph.evaluate.verify import Comparison, Verification
from qgraph.report import CompileReport, LayerReport
from qgraph.report.layers import layers_of
from qgraph.report.text import size, summary

LAYERS = [
    LayerReport("a", "a.w", (64, 32), "nvfp4", "", 4.5, 20.0, "matmul_nvfp4", "W4A16"),
    LayerReport("b", "b.w", (32, 64), "nvfp4", "", 4.6, 10.0, "matmul_f32", "float32"),
    LayerReport("c", "c.w", (8, 8), "", "too small", 32.0, None, "matmul_f32", "float32"),
    LayerReport("d", "d.w", (8, 4), "", "too small", 32.0, None, "matmul_f32", "float32"),
]


def make_report() -> CompileReport:
    report = CompileReport("0.1.0", {"name": "m.onnx", "sha256": "00"}, {"scheme": "nvfp4"}, LAYERS)
    report.sizes = {"original": 20_000, "linear_float": 16_768, "linear_stored": 2_714, "artifact": 8_000}
    return report


def test_bits_are_weighted_by_elements() -> None:
    found = make_report().to_json()["summary"]
    assert found["bits_per_weight"] == 4.55
    assert abs(found["bits_per_weight_all_linear"] - (4.55 * 4096 + 32 * 96) / 4192) < 1e-12


def test_embeddings_count_by_themselves() -> None:
    """Tables are in no figure of the linear layers; a tied one is stored once, as the layer's weight."""
    report = make_report()
    report.set_layers(
        [
            LayerReport("e", "e.w", (100, 64), "nvfp4", "", 4.5, 21.0, "gather_nvfp4", "rows", "embedding"),
            LayerReport("t", "c.w", (8, 8), "", "tied to c", 32.0, None, "gather", "float32", "embedding"),
            *LAYERS,
        ]
    )
    found = report.to_json()
    linear = {"linear_float": 4 * (4096 + 96), "linear_stored": 1152 + 1178 + 4 * 96}
    assert found["sizes"].items() >= (linear | {"embedding_float": 25600, "embedding_stored": 3600}).items()
    assert found["summary"]["linear_layers"] == 4 and found["summary"]["quantized_layers"] == 2
    assert found["summary"]["embeddings"] == 2 and found["summary"]["quantized_embeddings"] == 1
    bits = 4.55 * 4096 + 32 * 96
    assert abs(found["summary"]["bits_per_weight"] - (4.55 * 4096 + 4.5 * 6400) / 10496) < 1e-12
    assert abs(found["summary"]["bits_per_weight_all_linear"] - bits / 4192) < 1e-12
    assert abs(found["summary"]["bits_per_weight_all"] - (bits + 4.5 * 6400) / 10592) < 1e-12
    rows = summary(report)
    assert ("layers", "2 of 4 linear layers quantized to nvfp4") in rows
    assert ("embeddings", "1 of 2 embeddings quantized to nvfp4") in rows
    assert ("weights", "25.6 kB -> 3.6 kB (7.11x smaller) (embeddings)") in rows


def test_a_weight_that_is_stored_twice_counts_twice() -> None:
    report = make_report()
    report.set_layers(
        [
            LayerReport("head", "w", (64, 100), "nvfp4", "", 4.5, 21.0),
            LayerReport("lookup", "w", (64, 100), "", "tied to head", 32.0, None, kind="embedding"),
        ]
    )
    assert report.sizes["embedding_float"] == 0 and report.sizes["embedding_stored"] == 4 * 6400
    assert report.to_json()["summary"]["bits_per_weight_all"] == 36.5


def test_realised_is_what_the_kernel_reads() -> None:
    assert [layer.realised for layer in LAYERS] == [True, False, False, False]


def test_summary_groups_reasons_and_names_the_worst() -> None:
    rows = dict(reversed(summary(make_report())))
    assert rows["layers"] == "2 of 4 linear layers quantized to nvfp4"
    assert rows["kept"] == "2 in float: c, d (too small)"
    assert rows["worst SQNR"] == "b 10.00 dB, a 20.00 dB"
    assert rows["artifact"] == "20.0 kB -> 8.0 kB (2.50x smaller)"
    kernels = [text for label, text in summary(make_report()) if label == "kernels"]
    assert kernels == ["1 x matmul_nvfp4: W4A16", "3 x matmul_f32: float32"]


def test_verification_in_the_document() -> None:
    report = make_report()
    assert report.to_json()["verification"] is None
    report.verification = Verification("skipped", "--no-verify")
    assert "worst_rel_error" not in report.to_json()["verification"]
    report.verification = Verification("passed", "", 1e-4, [Comparison({"b": 1}, {"y": 1e-6, "z": 2e-6})])
    assert report.to_json()["verification"]["worst_rel_error"] == 2e-6


def test_document_is_json_even_without_any_error() -> None:
    """A weight that its format holds exactly has an infinite SQNR, which JSON cannot say: null."""
    report = make_report()
    report.layers = [LayerReport("a", "w", (16, 16), "nvfp4", "", 4.5, float("inf"))]
    text = json.dumps(report.to_json(), allow_nan=False)
    assert json.loads(text)["layers"][0]["sqnr_db"] is None


def test_sizes_for_readers() -> None:
    assert [size(n) for n in (0, 999, 1000, 45_812_345, 7_310_000_000)] == [
        "0 B",
        "999 B",
        "1.0 kB",
        "45.8 MB",
        "7.31 GB",
    ]


def test_a_weight_without_elements() -> None:
    """It stays in float, and nothing is divided by its size."""
    weight = ir.Value(name="w", shape=ir.Shape((0, 8)), const_value=ir.tensor(np.zeros((0, 8), np.float32)))
    product = ir.node("MatMul", [ir.Value(name="x"), weight], name="layer")
    graph = ir.Graph([], product.outputs, nodes=[product], initializers=[weight])
    (found,) = layers_of(ir.Model(graph, ir_version=10))
    assert found.shape == (0, 8) and not found.scheme and found.nbytes == 0


def test_an_error_of_a_hundred_percent() -> None:
    lost = LayerReport("a", "a.w", (64, 32), "int4", "", 4.6, 0.0, output_error=1.0)
    report = make_report()
    report.set_layers([lost])
    assert ("worst output", "a 100 %") in summary(report)
