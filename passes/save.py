"""Writes a model to disk."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import onnx_ir as ir

from qgraph.passes.base import all_graphs

EXTERNAL_DATA_FROM = 1 << 30  # bytes of weights: protobuf ends at 2 GiB


def save_lowbit(
    model: ir.Model, path: str | os.PathLike[str], *, external_data_from: int | None = None
) -> list[Path]:
    """Writes `model` to `path`, and from `external_data_from` bytes of weights on their data to
    `<path>.data`; by default from EXTERNAL_DATA_FROM on.

    Returns the files written, the model first. Weights that lie in external files of the source are copied,
    so the result refers to nothing but itself. The model is not changed. Files that are there go first: not
    written over, as tensors may still be mapped from them. Who wants all or nothing gives a path in an
    `atomic_directory`.
    """
    path = Path(path)
    data = path.with_name(f"{path.name}.data")
    tensors = [v.const_value for graph in _graphs(model) for v in graph.initializers.values()]
    nbytes = sum(tensor.nbytes for tensor in tensors if tensor is not None)
    large = nbytes >= (EXTERNAL_DATA_FROM if external_data_from is None else external_data_from)
    for old in (path, data):
        old.unlink(missing_ok=True)
    with _tensors_in_memory(model):
        ir.save(model, path, format="protobuf", external_data=data.name if large else None)
    return [path, data] if large else [path]


@contextlib.contextmanager
def _tensors_in_memory(model: ir.Model) -> Iterator[None]:
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
