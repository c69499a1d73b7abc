"""E4M3 against ml_dtypes, and saturation against ONNX's QuantizeLinear."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from qgraph.formats import e4m3


def test_every_code_survives():
    codes = np.arange(256, dtype=np.uint8)
    values = e4m3.decode(e4m3.from_codes(codes))
    assert values[e4m3.MAX_CODE] == e4m3.MAX and values[1] == e4m3.SMALLEST and values[e4m3.ONE_CODE] == 1
    assert (np.diff(values[: e4m3.MAX_CODE + 1]) > 0).all()
    finite = np.isfinite(values)
    assert np.array_equal(e4m3.encode(values).view(np.uint8)[finite], codes[finite])
    assert np.isnan(e4m3.encode(values)[~finite].astype(np.float32)).all() and (~finite).sum() == 2


def test_encode_is_ml_dtypes_within_range_and_saturates_beyond():
    x = (np.random.default_rng(0).standard_normal(100_000) * 100).astype(np.float32)
    x = np.concatenate([x, x * 1e-4, x * 1e-8])
    inside = np.abs(x) <= 448
    assert np.array_equal(
        e4m3.encode(x)[inside].view(np.uint8), x[inside].astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    )
    huge = np.array([448.01, 464, 465, 1e30, np.inf], np.float32)
    assert (e4m3.decode(e4m3.encode(huge)) == 448).all()
    assert (e4m3.decode(e4m3.encode(-huge)) == -448).all()


def test_saturation_is_that_of_onnx():
    import onnx
    from onnx.reference import ReferenceEvaluator

    x = np.array([447, 448, 460, 464, 465, 1e5, -1e5, 2**-10, 1.01 * 2**-10, 2**-9, 0.0], np.float32)
    node = onnx.helper.make_node("Cast", ["x"], ["y"], to=onnx.TensorProto.FLOAT8E4M3FN)
    graph = onnx.helper.make_graph(
        [node],
        "cast",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, x.shape)],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT8E4M3FN, x.shape)],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 23)])
    (y,) = ReferenceEvaluator(model).run(None, {"x": x})
    assert np.array_equal(e4m3.encode(x).view(np.uint8), np.asarray(y).view(np.uint8))


def test_nearest_scale_is_a_cast_there_and_back():
    """Of random numbers of every magnitude, and of each tie between two scales and its neighbours."""
    rng = np.random.default_rng(1)
    values = e4m3.decode(e4m3.from_codes(np.arange(e4m3.MAX_CODE + 1, dtype=np.uint8)))
    ties = (values[1:] + values[:-1]) / 2
    x = np.concatenate(
        [
            *(rng.random(20_000, np.float32) * np.float32(10.0**e) for e in range(-5, 5)),
            values,
            ties,
            np.nextafter(ties, np.float32(0)),
            np.nextafter(ties, np.float32(1e9)),
            np.array([0, 1e-45, 1e30, np.inf], np.float32),
        ]
    )
    before = x.copy()
    expected = np.maximum(e4m3.decode(e4m3.encode(x)), np.float32(e4m3.SMALLEST))
    assert np.array_equal(e4m3.nearest_scale(x), expected)
    assert np.array_equal(x, before)
