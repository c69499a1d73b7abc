"""The container of an artifact: tensors and metadata -> the bytes of runtime/FORMAT.md."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

ALIGN = 64
FORMAT_VERSION = "1"

# Element types of the container (safetensors' names) for the plan's.
_CONTAINER_DTYPE = {
    "f32": "F32",
    "f64": "F64",
    "f16": "F16",
    "bf16": "BF16",
    "i64": "I64",
    "i32": "I32",
    "i16": "I16",
    "i8": "I8",
    "u8": "U8",
    "u32": "U32",
    "bool": "BOOL",
}


@dataclass(frozen=True)
class Tensor:
    """A tensor of the container: element type in the plan's terms, shape, and its bytes as an array."""

    name: str
    dtype: str
    data: np.ndarray

    @property
    def raw(self) -> memoryview:
        return np.ascontiguousarray(self.data).reshape(-1).view(np.uint8).data


def raw_tensor(name: str, data: bytes) -> Tensor:
    """Bytes as a U8 tensor."""
    return Tensor(name, "u8", np.frombuffer(data, np.uint8))


def _layout(tensors: list[Tensor], metadata: Mapping[str, str]) -> tuple[bytes, list[Tensor]]:
    """The length field and header, and the tensors with the pads between them."""
    listed: list[Tensor] = []
    entries: dict[str, Any] = {}
    at = 0

    def add(tensor: Tensor) -> None:
        nonlocal at
        size = tensor.data.nbytes
        entries[tensor.name] = {
            "dtype": _CONTAINER_DTYPE[tensor.dtype],
            "shape": list(tensor.data.shape),
            "data_offsets": [at, at + size],
        }
        listed.append(tensor)
        at += size

    hashes = {}
    for tensor in tensors:
        add(tensor)
        hashes[f"sha256:{tensor.name}"] = hashlib.sha256(tensor.raw).hexdigest()
        if at % ALIGN:
            add(raw_tensor(f"qgraph.pad.{len(listed)}", bytes(-at % ALIGN)))
    entries["qgraph.root"] = {"dtype": "U8", "shape": [32], "data_offsets": [at, at + 32]}
    full = {"qgraph.format": FORMAT_VERSION, **metadata, **hashes}
    header = json.dumps(
        {"__metadata__": dict(sorted(full.items())), **entries}, separators=(",", ":")
    ).encode()
    header += b" " * (-(8 + len(header)) % ALIGN)
    return len(header).to_bytes(8, "little") + header, listed


def serialize(tensors: list[Tensor], metadata: Mapping[str, str]) -> Iterator[bytes | memoryview]:
    """The artifact's bytes, piece by piece."""
    head, listed = _layout(tensors, metadata)
    yield head
    for tensor in listed:
        yield tensor.raw
    yield hashlib.sha256(head).digest()


def parse(data: memoryview) -> tuple[list[Tensor], dict[str, str]]:
    """Tensors, in file order, and metadata that `serialize` gives `data` for. Tensors are views of it, hashes
    are not compared."""
    start = 8 + int.from_bytes(data[:8], "little")
    entries = json.loads(bytes(data[8:start]))
    metadata = {
        key: value
        for key, value in entries.pop("__metadata__").items()
        if key != "qgraph.format" and not key.startswith("sha256:")
    }
    dtypes = {container: ours for ours, container in _CONTAINER_DTYPE.items()}
    tensors = []
    for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        if name == "qgraph.root" or name.startswith("qgraph.pad."):
            continue
        begin, end = entry["data_offsets"]
        item = (end - begin) // max(1, math.prod(entry["shape"]))
        raw = np.frombuffer(data, f"V{max(1, item)}", math.prod(entry["shape"]), start + begin)
        tensors.append(Tensor(name, dtypes[entry["dtype"]], raw.reshape(entry["shape"])))
    return tensors, metadata


def write(file: IO[bytes], tensors: list[Tensor], metadata: Mapping[str, str]) -> None:
    """Write an artifact to an open file."""
    from qgraph.atomic import write_in_large_pages

    write_in_large_pages(file, serialize(tensors, metadata))


def write_path(path: str | Path, tensors: list[Tensor], metadata: Mapping[str, str]) -> None:
    """Write an artifact to `path`, whole or not at all."""
    from qgraph.atomic import atomic_write

    with atomic_write(path) as temporary, Path(temporary).open("wb") as file:
        write(file, tensors, metadata)
