"""What happened to every linear layer and embedding, read from the low-bit model itself."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import onnx_ir as ir

# operator -> format that it rounds activations to
_ROUNDINGS = {("ai.qgraph", "DynamicQDQNVFP4"): "nvfp4", ("ai.qgraph", "DynamicQDQInt8"): "int8"}


@dataclass(frozen=True)
class LayerReport:
    """One linear layer, or one lookup in a table.

    Attributes:
        name: its node.
        weight: the initializer it had in the original.
        shape: (K, N) of that weight; (V, H) of a table.
        scheme: how it is stored, empty for float.
        kept: why it was left in float, empty when it was not.
        bits_per_weight: all scales counted; 32 for float32.
        sqnr_db: signal to quantization noise of the weight in dB; None for float.
        output_error: what rounding the weight costs at the output, E|x W - x W'|^2 / E|x W|^2 over the
            calibration data (W as the solver got it); None without.
        activations: what its input is rounded to: `float32` (not at all), `nvfp4`, `int8`.
        onnx_bits: bits a weight that its initializers take in the low-bit ONNX file; 0 for float.
        artifact_bits: the same of what its kernel reads in the artifact, padding counted; 0 until that is
            built.
        kernel: the kernel that runs it, and `compute` its precision; empty until an artifact is built.
        kind: `linear` or `embedding`.
    """

    name: str
    weight: str
    shape: tuple[int, int]
    scheme: str
    kept: str
    bits_per_weight: float
    sqnr_db: float | None
    kernel: str = ""
    compute: str = ""
    kind: str = "linear"
    output_error: float | None = None
    activations: str = "float32"
    onnx_bits: float = 0.0
    artifact_bits: float = 0.0

    @property
    def elements(self) -> int:
        """Number of weights."""
        return self.shape[0] * self.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of the weight as stored, scales included."""
        return round(self.bits_per_weight * self.elements / 8)

    @property
    def realised(self) -> bool:
        """Whether the kernel reads the low-bit weight itself: kernels are named after the format they
        read."""
        from qgraph.formats import FORMATS

        return bool(self.scheme) and FORMATS[self.scheme].suffix in self.kernel.split("_")

    def to_json(self) -> dict[str, Any]:
        """All fields; a float or exact layer has no SQNR that JSON could say."""
        finite = self.sqnr_db is not None and math.isfinite(self.sqnr_db)
        return {**asdict(self), "sqnr_db": self.sqnr_db if finite else None}


def layers_of(
    model: ir.Model, kernels: Mapping[str, tuple[str, str, int]] | None = None
) -> list[LayerReport]:
    """The linear layers and embeddings of `model` in graph order: quantized ones, MatMuls with a constant
    right operand, and lookups in a constant matrix of floats.

    `kernels` maps a node's name to (kernel, compute, bytes of its weight).
    """
    found = []
    for node in model.graph:
        weight = _weight(node)
        if weight is None or weight.shape is None or len(weight.shape) != 2:
            continue
        props = node.metadata_props
        scheme = props.get("qgraph.scheme") or _format(node)
        sqnr = props.get("qgraph.sqnr_db")
        error = props.get("qgraph.output_error")
        bits = props.get("qgraph.bits_per_weight")
        kernel, compute, nbytes = (kernels or {}).get(str(node.name), ("", "", 0))
        rows, columns = (int(dim) for dim in weight.shape)  # type: ignore[arg-type]
        elements = max(1, rows * columns)  # one without elements stays in float
        lookup = node.op_type == "Gather" or node.op_type.startswith("QGather")
        found.append(
            LayerReport(
                name=str(node.name),
                weight=props.get("qgraph.source_weight", str(weight.name)),
                shape=(rows, columns),
                scheme=scheme,
                kept="" if scheme else props.get("qgraph.kept", "not considered"),
                bits_per_weight=float(bits) if bits else _bits(scheme, weight, lookup),
                sqnr_db=float(sqnr) if sqnr else None,
                output_error=float(error) if error else None,
                kernel=kernel,
                compute=compute,
                kind="embedding" if lookup else "linear",
                activations=_activations(node),
                onnx_bits=8 * _stored(node) / elements if scheme else 0.0,
                artifact_bits=8 * nbytes / elements,
            )
        )
    return found


def _activations(node: ir.Node) -> str:
    """The format of the layer's input, by the node that it comes from; one written out in standard operators
    says it in its metadata."""
    source = node.inputs[0].producer() if node.inputs[0] is not None else None
    if source is None:
        return "float32"
    found = _ROUNDINGS.get((source.domain, source.op_type))
    return found or source.metadata_props.get("qgraph.activations", "float32")


def stored_weights(layers: Iterable[LayerReport]) -> list[LayerReport]:
    """One layer for each weight that is stored: what layers share counts once, a weight that is stored both
    quantized and in float twice."""
    return list({(layer.weight, layer.scheme): layer for layer in layers}.values())


def weight_bytes(layers: Iterable[LayerReport]) -> tuple[int, int]:
    """Bytes of the weights of `layers` in the original, and as stored. What was quantized was float32."""
    stored = stored_weights(layers)
    original = {layer.weight: 4 * layer.elements if layer.scheme else layer.nbytes for layer in stored}
    return sum(original.values()), sum(layer.nbytes for layer in stored)


def _bits(scheme: str, weight: ir.Value, lookup: bool) -> float:
    """Bits a weight, where the node does not say: a file of another tool, or a layer in float."""
    if scheme:
        from qgraph.formats import FORMATS

        K, N = (int(dim) for dim in weight.shape[:: -1 if lookup else 1])  # type: ignore[index,arg-type]
        return 8 * FORMATS[scheme].nbytes(K, N) / (K * N)
    return 8.0 * weight.dtype.itemsize if weight.dtype else 32.0


def _stored(node: ir.Node) -> int:
    """Bytes of the constants that a low-bit operator reads."""
    tensors = (value.const_value for value in node.inputs if value is not None)
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def _format(node: ir.Node) -> str:
    """The format of the weight that a low-bit operator reads, by whose name it goes; empty for other
    nodes."""
    from qgraph.formats import FORMATS

    if node.domain != "ai.qgraph":
        return ""
    titles = {spec.title: spec.name for spec in FORMATS.values()}
    for kind in ("QLinear", "QGatherColumns", "QGather"):
        if node.op_type.removeprefix(kind) in titles:
            return titles[node.op_type.removeprefix(kind)]
    return ""


def _weight(node: ir.Node) -> ir.Value | None:
    """The stored matrix, float or codes, that `node` multiplies with or looks up in, else None."""
    if _format(node):
        return node.inputs[1]
    if node.domain != "" or node.op_type not in ("MatMul", "Gather"):
        return None
    if "qgraph.rotation" in node.metadata_props:  # a step of the layer after it, by a matrix of +-2^-k
        return None
    weight = node.inputs[0 if node.op_type == "Gather" else 1]
    producer = weight.producer() if weight is not None else None
    if producer is not None and producer.op_type == "DequantizeLinear":
        weight = producer.inputs[0]
    if weight is None or not weight.is_initializer():
        return None
    picks_integers = node.op_type == "Gather" and not (weight.dtype and weight.dtype.is_floating_point())
    return None if picks_integers else weight
