"""E2M1 and its ONNX packing, bit for bit against ml_dtypes and ONNX."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

from qgraph.errors import InputError
from qgraph.formats import e2m1
from qgraph.formats.packing import pack_bits, unpack_bits


def reference_codes(x: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):  # NaN
        return x.astype(ml_dtypes.float4_e2m1fn).view(np.uint8)


def test_values_are_those_of_ml_dtypes():
    codes = np.arange(16, dtype=np.uint8)
    reference = codes.view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    assert e2m1.decode(codes).tobytes() == reference.tobytes()  # bytes: tells -0 from 0


@pytest.mark.parametrize("scale", [1e-40, 1e-3, 0.1, 1.0, 3.0, 100.0, 1e30])
def test_random_numbers(scale: float):
    x = (np.random.default_rng(0).standard_normal(100_003) * scale).astype(np.float32)
    assert np.array_equal(e2m1.encode(x), reference_codes(x))


def test_every_neighbourhood_of_a_tie():
    """The midpoints and the values, each with the float32 numbers just below and above, of both signs."""
    points = np.array([0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8], np.float32)
    below, above = np.nextafter(points, np.float32(-np.inf)), np.nextafter(points, np.float32(np.inf))
    x = np.concatenate([points, below, above])
    x = np.concatenate([x, -x])
    assert np.array_equal(e2m1.encode(x), reference_codes(x))


def test_special_numbers():
    x = np.array([0.0, -0.0, -1e-45, 1e-45, np.inf, -np.inf, np.nan, -np.nan, 3.4e38, -3.4e38], np.float32)
    assert np.array_equal(e2m1.encode(x), reference_codes(x))


def test_every_float16_pattern():
    x = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
    assert np.array_equal(e2m1.encode(x), reference_codes(x))


def test_round_magnitudes_is_decode_of_encode():
    x = np.abs(np.random.default_rng(1).standard_normal((16, 1000), dtype=np.float32) * 4)
    rounded = x.copy()
    e2m1.round_magnitudes(rounded, np.empty_like(x))
    assert np.array_equal(rounded, e2m1.decode(e2m1.encode(x)))


def test_encode_leaves_its_argument_alone_and_takes_any_layout():
    x = np.random.default_rng(2).standard_normal((40, 30), dtype=np.float32)
    before = x.copy()
    assert np.array_equal(e2m1.encode(x.T), reference_codes(x.T.copy()))
    assert np.array_equal(x, before)
    assert e2m1.encode(x[:0]).shape == (0, 30)


@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (3, 5), (16, 7), (17, 33), (64, 64), (5,)])
def test_packing_is_onnx_packing(shape: tuple[int, ...]):
    codes = np.random.default_rng(3).integers(0, 16, shape).astype(np.uint8)
    packed = pack_bits(codes, 4)
    tensor = onnx.helper.make_tensor("w", TensorProto.FLOAT4E2M1, shape, packed.tobytes(), raw=True)
    assert np.array_equal(numpy_helper.to_array(tensor).view(np.uint8), codes)
    reference = numpy_helper.from_array(codes.view(ml_dtypes.float4_e2m1fn))
    assert packed.tobytes() == reference.raw_data
    assert np.array_equal(unpack_bits(packed, shape, 4), codes)


def test_unpacking_refuses_a_wrong_size():
    with pytest.raises(InputError, match="cannot hold"):
        unpack_bits(np.zeros(3, np.uint8), (2, 2), 4)
