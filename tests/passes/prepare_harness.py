"""What the pass tests share: graphs from text, runs through ONNX Runtime, and the checks every pass must
meet."""

from __future__ import annotations

import os

os.environ["ORT_DISABLE_TELEMETRY"] = "1"

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
from onnx import numpy_helper

from qgraph.passes.base import GraphPass
from qgraph.passes.infer_shapes import CHECKS, CONTENT, InferShapes


def parse(text: str, opset: int = 23, imports: str = "", **weights: np.ndarray) -> ir.Model:
    """A model in ONNX's text form, `(float[n, 4] x) => (float[n, 4] y) { ... }`, with initializers."""
    return ir.from_proto(parse_proto(text, opset, imports, **weights))


def parse_proto(text: str, opset: int = 23, imports: str = "", **weights: np.ndarray) -> onnx.ModelProto:
    header = f'<ir_version: 10, opset_import: ["" : {opset}{imports}]>'
    model = onnx.parser.parse_model(f"{header} agraph {text}")
    model.graph.initializer.extend(
        numpy_helper.from_array(np.asarray(value), name) for name, value in weights.items()
    )
    for i, node in enumerate(model.graph.node):
        node.name = node.name or f"n{i}"
    return model


def ops(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def run_ort(model: ir.Model | onnx.ModelProto, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """All outputs, by ONNX Runtime without optimizations."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    proto = ir.to_proto(model) if isinstance(model, ir.Model) else model
    session = ort.InferenceSession(proto.SerializeToString(), options)
    wanted = {i.name for i in session.get_inputs()}
    return session.run(None, {k: v for k, v in feeds.items() if k in wanted})


def feeds_for(model: ir.Model, seed: int = 0, high: int = 4, **dims: int) -> dict[str, np.ndarray]:
    """Random inputs; `dims` gives sizes to named dimensions (3 where not given), ints are below `high`."""
    rng = np.random.default_rng(seed)
    feeds = {}
    for value in model.graph.inputs:
        if value.is_initializer():
            continue
        shape = [size(dim, dims) for dim in value.shape]
        dtype = value.dtype.numpy()
        if np.issubdtype(dtype, np.floating):
            feeds[value.name] = rng.standard_normal(shape).astype(dtype)
        elif dtype == np.bool_:
            feeds[value.name] = rng.integers(0, 2, shape).astype(bool)
        else:
            feeds[value.name] = rng.integers(0, high, shape).astype(dtype)
    return feeds


def size(dim: int | ir.SymbolicDim, dims: Mapping[str, int]) -> int:
    if isinstance(dim, int):
        return dim
    found = dim.evaluate({name: dims.get(name, 3) for name in dim.free_symbols()})
    assert isinstance(found, int), f"{dim} is not known from {dims}"
    return found


def check_pass(
    model: ir.Model,
    *passes: GraphPass,
    infer: bool = True,
    expect_modified: bool = True,
    atol: float = 1e-5,
    **dims: int,
) -> ir.Model:
    """Runs passes and holds them to what every pass promises. Returns the model, changed in place.

    The outputs stay the same through ONNX Runtime; `modified` is true just when the file changed; a second
    run changes nothing.
    """
    before = ir.to_proto(model)
    feeds = feeds_for(model, **dims)
    expected = run_ort(before, feeds)
    if infer:
        InferShapes()(model)
    for step in passes:
        old = ir.to_proto(model).SerializeToString(deterministic=True)
        modified = step(model).modified
        assert modified == (ir.to_proto(model).SerializeToString(deterministic=True) != old), step
        assert modified == expect_modified, step
        if infer:
            InferShapes()(model)
        assert not step(model).modified, f"{step} is not idempotent"
    if infer:
        InferShapes()(model)
    for a, b in zip(expected, run_ort(model, feeds), strict=True):
        np.testing.assert_allclose(a, b, atol=atol, rtol=1e-4)
        assert a.dtype == b.dtype
    return model


def check_shapes(model: ir.Model, bindings: Iterable[Mapping[str, int]], high: int = 4) -> int:
    """Compares every inferred shape, dtype and tracked content with real runs. Returns how many were
    compared.

    All intermediate values become outputs of the model; it runs once for each of `bindings` (name -> size).
    """
    values = [v for node in model.graph for v in node.outputs if v.name]
    proto = ir.to_proto(model)
    del proto.graph.output[:]
    for value in values:
        proto.graph.output.append(onnx.helper.make_tensor_value_info(value.name, int(value.dtype), None))
    compared = 0
    for dims in bindings:
        results = run_ort(proto, feeds_for(model, high=high, **dims))
        for value, array in zip(values, results, strict=True):
            inferred = tuple(size(dim, dims) for dim in value.shape)
            assert inferred == array.shape, (
                f"{value.name} of {value.producer().op_type}: {value.shape}, {dims}"
            )
            assert value.dtype == ir.DataType.from_numpy(array.dtype), value.name
            content = value.meta.get(CONTENT)
            if content is not None:
                for known, real in zip(content.reshape(-1), array.reshape(-1), strict=True):
                    assert known is None or size(known, dims) == int(real), value.name
            compared += 1
        for a, b, message in model.graph.meta[CHECKS]:
            assert size(a, dims) >= size(b, dims), message
    return compared


def refusals(passes: Sequence[GraphPass]) -> list[str]:
    return [str(r) for p in passes for r in p.refusals]
