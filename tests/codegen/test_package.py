"""The container against the safetensors library and the rules of runtime/FORMAT.md."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
from safetensors.numpy import load

from qgraph.codegen.package import Tensor, raw_tensor, serialize, write_path
from qgraph.errors import ResourceError


def sample():
    rng = np.random.default_rng(0)
    return [
        raw_tensor("qgraph.plan", b'{"version":1}'),
        Tensor("w/a", "f32", rng.standard_normal((3, 5)).astype(np.float32)),
        Tensor('w/ünï "quoted"', "u32", rng.integers(0, 2**32, (2, 16), dtype=np.uint32)),
        Tensor("w/empty", "i64", np.zeros((0, 4), np.int64)),
        Tensor("w/b", "bool", np.array([True, False, True])),
    ]


def header(data: bytes):
    length = int.from_bytes(data[:8], "little")
    return length, json.loads(data[8 : 8 + length])


def test_safetensors_reads_it_back():
    data = b"".join(serialize(sample(), {"qgraph.scheme": "nvfp4"}))
    tensors = load(data)
    for tensor in sample():
        np.testing.assert_array_equal(tensors[tensor.name], tensor.data)


def test_every_byte_is_covered():
    data = b"".join(serialize(sample(), {"k": "v"}))
    length, head = header(data)
    start = 8 + length
    assert start % 64 == 0
    assert hashlib.sha256(data[:start]).digest() == data[-32:]
    meta = head.pop("__metadata__")
    assert meta["qgraph.format"] == "1" and meta["k"] == "v"
    at = 0
    names = list(head)
    assert names[-1] == "qgraph.root"
    for name in names:
        begin, end = head[name]["data_offsets"]
        assert begin == at
        at = end
        body = data[start + begin : start + end]
        if name.startswith("qgraph.pad."):
            assert not any(body)
        elif name != "qgraph.root":
            assert (start + begin) % 64 == 0
            assert meta[f"sha256:{name}"] == hashlib.sha256(body).hexdigest()
    assert start + at == len(data)


def test_same_input_same_bytes():
    assert b"".join(serialize(sample(), {"a": "1", "b": "2"})) == b"".join(
        serialize(sample(), {"b": "2", "a": "1"})
    )


def test_failure_leaves_nothing(tmp_path):
    with pytest.raises(ResourceError):
        write_path(tmp_path / "missing" / "x.qg", sample(), {})
    target = tmp_path / "x.qg"
    write_path(target, sample(), {})
    assert [p.name for p in tmp_path.iterdir()] == ["x.qg"]
