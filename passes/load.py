"""Reads an ONNX file that may be damaged or hostile.

Nothing outside the model's directory is opened. The one exception is the layout of download caches, where
`model.onnx` and its data are links into one sibling folder: external data may lie in the directory of the
given path or in the directory the given path really leads to.
"""

from __future__ import annotations

import math
import os
import stat
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING

import onnx_ir as ir

from qgraph.errors import InputError, QGraphError, ResourceError
from qgraph.passes.base import printable, top_graphs
from qgraph.passes.hold_outputs import Signature, require_agreement
from qgraph.passes.structure import check_structure

if TYPE_CHECKING:
    import onnx

_EXTERNAL_KEYS = {"location", "offset", "length", "checksum"}


def load_model(path: str | os.PathLike) -> ir.Model:
    """Loads and checks an ONNX model; weights in external files are mapped, not read.

    Raises:
        InputError: missing, empty, truncated or malformed file; external data missing or outside its
        directory. UnsupportedError: a newer opset, sparse tensors.
        ResourceError: the file cannot be read.
    """
    file = Path(path)
    shown = printable(file)
    try:
        proto = _parse(file)
        check_structure(proto)
        base, real = file.parent.resolve(), file.resolve().parent
        external = {
            _location(t): _external(t, base, real) for t in _tensors(proto) if t.data_location == t.EXTERNAL
        }
        return _deserialize(proto, external)
    except QGraphError as error:
        raise type(error)(f"{shown}: {error}") from error.__cause__


def _parse(file: Path) -> onnx.ModelProto:
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        info = file.stat()
        if not stat.S_ISREG(info.st_mode):
            raise InputError("not a file; pass the path of an .onnx file")
        if info.st_size == 0:
            raise InputError("the file is empty")
        data = file.read_bytes()
    except FileNotFoundError:
        raise InputError("no such file") from None
    except (NotADirectoryError, ValueError):
        raise InputError("not a usable path") from None
    except OSError as error:
        raise ResourceError(f"cannot be read ({error.strerror})") from None
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(data)
    except (DecodeError, ValueError):
        if len(data) >= 2**31:
            raise InputError("protobuf holds at most 2 GiB; save the model with external data") from None
        raise InputError("not an ONNX model, or truncated") from None
    return proto


def _deserialize(proto: onnx.ModelProto, external: dict[str, Path]) -> ir.Model:
    try:
        model = ir.serde.deserialize_model(proto)
        model.graph.sort()
        for function in model.functions.values():
            function.sort()
    except (ir.serde.SerdeError, ValueError, TypeError, KeyError, AttributeError) as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise InputError(printable(cause)) from error
    _restore_inputs(model, proto)
    _bind_external(model, external)
    return model


def _restore_inputs(model: ir.Model, proto: onnx.ModelProto) -> None:
    """Gives inputs that are outputs too the types of their own declarations, which those of the outputs have
    replaced. The two must agree."""
    declared = {info.name: info.type for info in proto.graph.input}
    for value in model.graph.inputs:
        if value.is_graph_output() and value.name in declared:
            promise = Signature.of(value)
            value.type = ir.serde.deserialize_type_proto_for_type(declared[value.name])
            value.shape = ir.serde.deserialize_type_proto_for_shape(declared[value.name])
            require_agreement(promise, Signature.of(value))


def _tensors(proto: onnx.ModelProto):
    """Every tensor of the file: initializers and attributes, in all graphs and functions."""
    graphs = [proto.graph]
    nodes = [n for f in proto.functions for n in f.node]
    while graphs or nodes:
        if graphs:
            graph = graphs.pop()
            yield from graph.initializer
            nodes.extend(graph.node)
            continue
        for attribute in nodes.pop().attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            if attribute.HasField("g"):
                graphs.append(attribute.g)
            graphs.extend(attribute.graphs)


def _location(tensor: onnx.TensorProto) -> str:
    return next((e.value for e in tensor.external_data if e.key == "location"), "")


def _external(tensor: onnx.TensorProto, base: Path, real: Path) -> Path:
    """The real path of a tensor's data file, proven to lie in an allowed directory and to hold enough
    bytes."""
    where = f"external data of tensor '{printable(tensor.name)}'"
    entries = {e.key: e.value for e in tensor.external_data}
    location = _location(tensor)
    if unknown := set(entries) - _EXTERNAL_KEYS:
        raise InputError(f"{where} has an unknown key '{printable(min(unknown))}'")
    windows, posix = PureWindowsPath(location), PurePosixPath(location)
    if (
        not location
        or "\0" in location
        or posix.is_absolute()
        or windows.is_absolute()
        or windows.drive
        or ".." in posix.parts
        or ".." in windows.parts
    ):
        raise InputError(
            f"{where} is at '{printable(location)}', which is not a path below the model's directory"
        )
    try:
        resolved = (base / location).resolve(strict=True)
        info = resolved.stat()
    except (OSError, RuntimeError):
        raise InputError(f"{where} is missing: '{printable(location)}' beside the model") from None
    if not (resolved.is_relative_to(base) or resolved.is_relative_to(real)):
        raise InputError(f"{where} leads outside the model's directory ('{printable(location)}')")
    if not stat.S_ISREG(info.st_mode):
        raise InputError(f"{where} ('{printable(location)}') is not a regular file")
    if info.st_nlink > 1:
        raise InputError(
            f"{where} ('{printable(location)}') is a hard link, which may lead anywhere; copy the file"
        )
    try:
        offset = int(entries.get("offset", "0"))
        needed = math.ceil(math.prod(tensor.dims) * ir.DataType(tensor.data_type).bitwidth / 8)
        length = int(entries.get("length", str(needed)))
    except (ValueError, TypeError, KeyError):
        raise InputError(f"{where} has a malformed offset or length") from None
    if offset < 0 or length != needed or offset + length > info.st_size:
        raise InputError(
            f"{where}: {needed} bytes of shape {list(tensor.dims)} are not at offset {offset}, length "
            f"{length} "
            f"of '{printable(location)}' ({info.st_size} bytes); the data file is damaged or belongs to "
            "another model"
        )
    return resolved


def _bind_external(model: ir.Model, files: dict[str, Path]) -> None:
    """Points external tensors at the files that were checked, so that links are not followed a second
    time."""

    def bound(tensor: ir.ExternalTensor) -> ir.ExternalTensor:
        file = files[str(tensor.location)]
        return ir.ExternalTensor(
            file.name,
            tensor.offset,
            tensor.length,
            tensor.dtype,
            shape=tensor.shape,
            name=tensor.name,
            doc_string=tensor.doc_string,
            base_dir=str(file.parent),
        )

    for graph in model.graphs():
        for value in graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                value.const_value = bound(value.const_value)
    for top in top_graphs(model):
        for node in top.all_nodes():
            for name, attribute in list(node.attributes.items()):
                if attribute.type == ir.AttributeType.TENSOR and isinstance(
                    attribute.value, ir.ExternalTensor
                ):
                    node.attributes[name] = ir.AttrTensor(name, bound(attribute.value))
