"""Artifacts that travel light: compressed, and without the weights that can be made up where they are run.

A skeleton is the container of runtime/FORMAT.md, gzipped, in which a tensor that was left out has a first
axis of 0 before its shape: dtype, shape, name and place remain. `fill` makes a full artifact of it, with
seeded content (gpu_weights.py): as fast as the original, and worth nothing else. numpy only.
"""

from __future__ import annotations

import copy
import gzip
import io
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from gpu_weights import can_be_made_up, made_up

from qgraph.codegen import package
from qgraph.codegen.package import Tensor

LARGE = 1 << 16  # bytes from which on a weight is left out
LARGE_TABLE = 8 << 20  # the same of float32: rotary tables have to be what they are
PLANS = ("qgraph.plan", "qgraph.plan.cuda")
_DTYPES: dict[str, tuple[str, Any]] = {
    "F32": ("f32", np.float32),
    "F64": ("f64", np.float64),
    "F16": ("f16", np.float16),
    "BF16": ("bf16", ml_dtypes.bfloat16),
    "I64": ("i64", np.int64),
    "I32": ("i32", np.int32),
    "I16": ("i16", np.int16),
    "I8": ("i8", np.int8),
    "U8": ("u8", np.uint8),
    "U32": ("u32", np.uint32),
    "BOOL": ("bool", np.bool_),
}

Content = tuple[list[Tensor], dict[str, str]]


def read(data: bytes | np.ndarray) -> Content:
    """Tensors in file order and metadata of a container, without pads, root and hashes; verifies nothing."""
    view = memoryview(data).cast("B")
    base = 8 + int.from_bytes(view[:8], "little")
    header = json.loads(bytes(view[8:base]))
    metadata = header.pop("__metadata__")
    tensors = []
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        if name == "qgraph.root" or name.startswith("qgraph.pad."):
            continue
        start, end = entry["data_offsets"]
        dtype, numpy_dtype = _DTYPES[entry["dtype"]]
        array = np.frombuffer(view[base + start : base + end], numpy_dtype).reshape(entry["shape"])
        tensors.append(Tensor(name, dtype, array))
    kept = {k: v for k, v in metadata.items() if not k.startswith("sha256:") and k != "qgraph.format"}
    return tensors, kept


def read_artifact(path: Path) -> Content:
    """`read` of a file, which is mapped."""
    return read(np.memmap(path, np.uint8, "r"))


def strip(artifact: Path, skeleton: Path, *, isas: Collection[str] = (), weights: bool = False) -> Path:
    """Write the skeleton of an artifact; isas: the code variants to keep, none is all; weights: keep all."""
    tensors, metadata = read_artifact(artifact)
    kept = []
    for tensor in tensors:
        if tensor.name in PLANS:
            plan = json.loads(tensor.raw.tobytes())
            plan["variants"] = [v for v in plan["variants"] if not isas or v["isa"] in isas]
            tensor = package.raw_tensor(tensor.name, json.dumps(plan, separators=(",", ":")).encode())
        elif tensor.name.startswith("qgraph.code."):
            if isas and tensor.name.removeprefix("qgraph.code.") not in isas:
                continue
        elif not weights and _left_out(tensor):
            tensor = Tensor(tensor.name, tensor.dtype, np.empty((0, *tensor.data.shape), tensor.data.dtype))
        kept.append(tensor)
    buffer = io.BytesIO()
    package.write(buffer, kept, metadata)
    with skeleton.open("wb") as file, gzip.GzipFile("", "wb", 6, file, mtime=0) as packed:
        packed.write(buffer.getvalue())
    return skeleton


def _left_out(tensor: Tensor) -> bool:
    least = LARGE_TABLE if tensor.dtype == "f32" else LARGE
    return tensor.data.nbytes > least and can_be_made_up(tensor.name, tensor.data.dtype)


def fill(skeleton: Path) -> Content:
    """The tensors and metadata of a full artifact."""
    tensors, metadata = read(gzip.decompress(skeleton.read_bytes()))
    scheme = metadata.get("qgraph.scheme", "")
    names = frozenset(tensor.name for tensor in tensors)
    return [_filled(tensor, scheme, names) for tensor in tensors], metadata


def _filled(tensor: Tensor, scheme: str, names: frozenset[str]) -> Tensor:
    shape = tensor.data.shape
    if not tensor.name.startswith("w/") or not shape or shape[0] != 0:
        return tensor
    data = made_up(tensor.name, shape[1:], tensor.data.dtype, scheme, names)
    return Tensor(tensor.name, tensor.dtype, data)


def side_by_side(tensors: list[Tensor], layers: int, passes: int) -> list[Tensor]:
    """The artifact of one linear layer as that of `layers` of them, all done `passes` times over.

    Every layer has weights of its own (those of the first, their tiles turned around) and reads the input of
    the one. Each time it is done it has an output of its own, `<pass>/<layer>/<output>`. This is the artifact
    of the ONNX model with these nodes and weights (tests/benchmarks/test_gpu_benchmark.py).
    """
    made = []
    for tensor in tensors:
        if tensor.name in PLANS:
            plan = _plan_side_by_side(json.loads(tensor.raw.tobytes()), layers, passes)
            made.append(package.raw_tensor(tensor.name, json.dumps(plan, separators=(",", ":")).encode()))
        elif not tensor.name.startswith("w/"):
            made.append(tensor)
    weights = [tensor for tensor in tensors if tensor.name.startswith("w/")]
    return made + [
        Tensor(_of_layer(w.name, i), w.dtype, np.roll(w.data, i, axis=0))
        for i in range(layers)
        for w in weights
    ]


def _of_layer(tensor: str, layer: int) -> str:
    return f"w/{layer}/{tensor.removeprefix('w/')}"


def _plan_side_by_side(plan: dict[str, Any], layers: int, passes: int) -> dict[str, Any]:
    one = copy.deepcopy(plan)
    values = [value for value in one["values"] if value["kind"] not in ("weight", "output")]
    shared = [i for i, value in enumerate(one["values"]) if value["kind"] not in ("weight", "output")]
    where = {old: new for new, old in enumerate(shared)}  # values that all layers have in common
    weights = []
    for layer in range(layers):
        own = dict(where)
        for i, value in enumerate(one["values"]):
            if value["kind"] == "weight":
                own[i] = len(values)
                values.append({**value, "tensor": _of_layer(value["tensor"], layer)})
        weights.append(own)
    outputs, steps = [], []
    for turn in range(passes):
        for layer in range(layers):
            own = dict(weights[layer])
            for output in one["outputs"]:
                own[output["value"]] = len(values)
                outputs.append({"name": f"{turn}/{layer}/{output['name']}", "value": len(values)})
                values.append(one["values"][output["value"]])
            for step in one["steps"]:
                args = [["v", own[a[1]], *a[2:]] if a[0] == "v" else a for a in step["args"]]
                steps.append({**step, "name": f"{turn}/{layer}/{step['name']}", "args": args})
    inputs = [{**given, "value": where[given["value"]]} for given in one["inputs"]]
    return {**one, "values": values, "inputs": inputs, "outputs": outputs, "steps": steps}
