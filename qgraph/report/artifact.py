"""What an artifact holds, read from the file alone: no code of it is run, and it may be for another
machine."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qgraph.errors import InputError, UnsupportedError

FORMAT_VERSION = "1"
_PLANS = {"cpu": "qgraph.plan", "cuda": "qgraph.plan.cuda"}


@dataclass(frozen=True)
class ArtifactInfo:
    """The content of a `.qg` file whose hashes are all right; terms of runtime/FORMAT.md.

    Attributes:
        nbytes: of the file.
        metadata: without the hashes.
        plans: "cpu" or "cuda" -> the plan as it stands in the file; at least one.
        tensors: name -> (safetensors dtype, shape, bytes), without pads and root.
    """

    nbytes: int
    metadata: Mapping[str, str]
    plans: Mapping[str, Mapping[str, Any]]
    tensors: Mapping[str, tuple[str, tuple[int, ...], int]]

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
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or not 0 < length <= len(data) - 40:
        raise InputError(f"{path}: not a qgraph artifact, or truncated")
    head, body = data[: 8 + length], memoryview(data)[8 + length :]
    if hashlib.sha256(head).digest() != data[-32:]:
        raise InputError(f"{path}: not a qgraph artifact, or damaged: the hash of its header does not match")
    try:
        return _parse(json.loads(head[8:]), body, len(data))
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: damaged artifact: {error}") from error


def _parse(header: dict[str, Any], body: memoryview, nbytes: int) -> ArtifactInfo:
    metadata: dict[str, str] = header.pop("__metadata__")
    if metadata["qgraph.format"] != FORMAT_VERSION:
        raise UnsupportedError(
            f"artifact format {metadata['qgraph.format']}: this version reads {FORMAT_VERSION}"
        )
    tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        if name == "qgraph.root" or name.startswith("qgraph.pad."):
            continue
        if hashlib.sha256(body[begin:end]).hexdigest() != metadata.pop(f"sha256:{name}"):
            raise ValueError(f"the hash of tensor {name} does not match")
        tensors[name] = (entry["dtype"], tuple(entry["shape"]), end - begin)
    plans = {}
    for device, name in _PLANS.items():
        if name in header:
            begin, end = header[name]["data_offsets"]
            plans[device] = json.loads(bytes(body[begin:end]))
    if not plans:
        raise ValueError(f"there is no tensor '{_PLANS['cpu']}'")
    return ArtifactInfo(nbytes, metadata, plans, tensors)
