"""Writes a model to disk, whole or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import onnx_ir as ir

from qgraph.atomic import atomic_directory
from qgraph.passes.base import all_graphs

# Protobuf holds at most 2^31 - 1 bytes. The graph itself and its metadata get the difference.
EXTERNAL_DATA_FROM = 1_900_000_000


def save_lowbit(
    model: ir.Model, path: str | os.PathLike[str], *, external_data_from: int = EXTERNAL_DATA_FROM
) -> list[Path]:
    """Writes `model` to `path`, and from `external_data_from` bytes of weights on their data to
    `<path>.data`.

    Returns the files written, the model first. Weights that lie in external files of the source are copied,
    so the result refers to nothing but itself. The model is not changed. Both files appear whole or not at
    all; only a crash between their two renames can leave a new `<path>.data` beside an old model.

    Raises ResourceError when the disk, its permissions or the path do not allow it.
    """
    path = Path(path)
    tensors = [v.const_value for graph in _graphs(model) for v in graph.initializers.values()]
    nbytes = sum(tensor.nbytes for tensor in tensors if tensor is not None)
    data = f"{path.name}.data" if nbytes >= external_data_from else None
    with atomic_directory(path) as directory, tensors_in_memory(model):
        ir.save(model, directory / path.name, format="protobuf", external_data=data)
    return [path] if data is None else [path, path.parent / data]


@contextlib.contextmanager
def tensors_in_memory(model: ir.Model) -> Iterator[None]:
    """Within the block, weights in external files look like weights in memory. They stay mapped, not read."""
    replaced = []
    for graph in _graphs(model):
        for value in graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                replaced.append((value, value.const_value))
                value.const_value = ir.Tensor(
                    value.const_value.numpy(), dtype=value.const_value.dtype, name=value.const_value.name
                )
    try:
        yield
    finally:
        for value, tensor in replaced:
            value.const_value = tensor


def _graphs(model: ir.Model) -> list[ir.Graph]:
    return [graph for graph in all_graphs(model) if isinstance(graph, ir.Graph)]
