"""What an artifact holds, read from the file alone: no code of it is run, and it may be for another
machine."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qgraph import __version__
from qgraph.errors import InputError, UnsupportedError

# What can be read here: (oldest, newest) of runtime/src/version.h, to which a test compares them.
FORMATS = (1, 1)
PLAN_VERSIONS = (1, 1)
SIGNATURE = "qgraph.signature"
_PLANS = {"cpu": "qgraph.plan", "cuda": "qgraph.plan.cuda"}


@dataclass(frozen=True)
class ArtifactInfo:
    """The content of a `.qg` file whose hashes are all right; terms of runtime/FORMAT.md.

    Attributes:
        nbytes: of the file.
        metadata: without the hashes.
        plans: "cpu" or "cuda" -> the plan as it stands in the file; at least one.
        tensors: name -> (safetensors dtype, shape, bytes), without pads, signature and root.
        root: what a signature is of.
        seal: the tensor `qgraph.signature`, public key and signature, which is not verified here; empty
            where the file is not signed.
    """

    nbytes: int
    metadata: Mapping[str, str]
    plans: Mapping[str, Mapping[str, Any]]
    tensors: Mapping[str, tuple[str, tuple[int, ...], int]]
    root: bytes
    seal: bytes = b""

    @property
    def signer(self) -> bytes:
        """The public key in the signature, 32 bytes; empty where the file is not signed."""
        return self.seal[:32]

    @property
    def plan(self) -> Mapping[str, Any]:
        """The first of the plans: inputs, outputs, dims and state are the same in all of them."""
        return next(iter(self.plans.values()))

    @property
    def variants(self) -> list[Mapping[str, Any]]:
        """Of all plans."""
        return [variant for plan in self.plans.values() for variant in plan["variants"]]

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights."""
        return sum(size for name, (_, _, size) in self.tensors.items() if name.startswith("w/"))

    @property
    def code_bytes(self) -> dict[str, int]:
        """Code variant -> bytes."""
        return {v["isa"]: self.tensors[v["code"]][2] for v in self.variants}

    def kernels(self, device: str) -> Counter[str]:
        """Kernel symbol of a plan -> number of steps that call it."""
        plan = self.plans[device]
        return Counter(plan["kernels"][step["kernel"]] for step in plan["steps"])

    def tensors_of(self, side: str) -> list[dict[str, Any]]:
        """`inputs` or `outputs`: name, dtype, shape."""
        values = self.plan["values"]
        return [
            {
                "name": item["name"],
                "dtype": values[item["value"]]["dtype"],
                "shape": values[item["value"]]["shape"],
            }
            for item in self.plan[side]
        ]


def read_artifact(path: Path) -> ArtifactInfo:
    """Read the artifact at `path`.

    Raises InputError when it is missing, damaged or no artifact; UnsupportedError for another format version.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    return parse_artifact(data, path)


def parse_artifact(data: bytes, path: Path) -> ArtifactInfo:
    """The artifact that `data` is the content of; `path` is for messages. Errors as of `read_artifact`."""
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or not 0 < length <= len(data) - 40:
        raise InputError(f"{path}: not a qgraph artifact, or truncated")
    head, body = data[: 8 + length], memoryview(data)[8 + length :]
    root = hashlib.sha256(head).digest()
    if root != data[-32:]:
        raise InputError(f"{path}: not a qgraph artifact, or damaged: the hash of its header does not match")
    try:
        return _parse(json.loads(head[8:]), body, len(data), root)
    except UnsupportedError as error:
        raise UnsupportedError(f"{path}: {error}") from None
    except KeyError as error:
        raise InputError(f"{path}: damaged artifact: it has no {error}") from error
    except (AttributeError, RecursionError, TypeError, ValueError) as error:
        raise InputError(f"{path}: damaged artifact: {error}") from error


def _format(text: str) -> int:
    if not re.fullmatch("[0-9]{1,7}", text):
        raise ValueError(f"'qgraph.format' is {text!r}, not a number")
    return int(text)


def _require_version(what: str, version: int, known: tuple[int, int], writer: str) -> None:
    if type(version) is not int:
        raise TypeError(f"{what} {version!r}, not a number")
    if not re.fullmatch(r"[0-9]+(\.[0-9]+){2}[0-9A-Za-z.+-]{0,20}", writer):
        writer = ""  # files say what they like
    oldest, newest = known
    if oldest <= version <= newest:
        return
    if version > newest:
        todo = f"update qgraph to {writer} or later" if writer else "update qgraph"
    else:
        by = f"qgraph {writer}" if writer else "the qgraph that wrote it"
        todo = f"compile the model again with this qgraph, or use {by}"
    reads = str(newest) if oldest == newest else f"{oldest} to {newest}"
    raise UnsupportedError(f"{what} {version}, this qgraph ({__version__}) reads {reads}: {todo}")


def _parse(header: dict[str, Any], body: memoryview, nbytes: int, root: bytes) -> ArtifactInfo:
    metadata: dict[str, str] = header.pop("__metadata__")
    writer = metadata.get("qgraph.version", "")
    _require_version("artifact of format", _format(metadata["qgraph.format"]), FORMATS, writer)
    tensors, seal, position = {}, b"", 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = entry["data_offsets"]
        if begin != position:
            raise ValueError(f"tensor {name} leaves a hole or overlaps another")
        position = end
        if name.startswith("qgraph.pad."):
            if any(body[begin:end]):
                raise ValueError(f"the padding {name} is not zero")
        elif name == SIGNATURE:
            if (begin, end) != (len(body) - 128, len(body) - 32):
                raise ValueError(f"tensor {name} is not the last but one, of 96 bytes")
            seal = bytes(body[begin:end])
        elif name != "qgraph.root":
            if hashlib.sha256(body[begin:end]).hexdigest() != metadata.pop(f"sha256:{name}"):
                raise ValueError(f"the hash of tensor {name} does not match")
            tensors[name] = (entry["dtype"], tuple(entry["shape"]), end - begin)
    if position != len(body) or header["qgraph.root"]["data_offsets"] != [position - 32, position]:
        raise ValueError("its last tensor is not the root")
    plans = {}
    for device, name in _PLANS.items():
        if name in header:
            begin, end = header[name]["data_offsets"]
            plans[device] = json.loads(bytes(body[begin:end]))
            _require_version("plan of version", plans[device]["version"], PLAN_VERSIONS, writer)
    if not plans:
        raise ValueError(f"there is no tensor '{_PLANS['cpu']}'")
    return ArtifactInfo(nbytes, metadata, plans, tensors, root, seal)
