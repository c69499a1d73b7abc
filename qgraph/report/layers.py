"""What happened to every linear layer, read from the low-bit model itself."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import onnx_ir as ir

_FORMATS = {("ai.qgraph", "QLinearNVFP4"): "nvfp4"}  # operator -> format of its weight


@dataclass(frozen=True)
class LayerReport:
    """One linear layer.

    Attributes:
        name: its node.
        weight: the initializer it had in the original.
        shape: (K, N) of that weight.
        scheme: how it is stored, empty for float.
        kept: why it was left in float, empty when it was not.
        bits_per_weight: all scales counted; 32 for float32.
        sqnr_db: signal to quantization noise of the weight in dB; None for float.
        kernel: the kernel that runs it, and `compute` its precision; empty until an artifact is built.
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
        return bool(self.scheme) and self.scheme in self.kernel.split("_")

    def to_json(self) -> dict[str, Any]:
        """All fields; a float or exact layer has no SQNR that JSON could say."""
        finite = self.sqnr_db is not None and math.isfinite(self.sqnr_db)
        return {**asdict(self), "sqnr_db": self.sqnr_db if finite else None}


def layers_of(model: ir.Model, kernels: Mapping[str, tuple[str, str]] | None = None) -> list[LayerReport]:
    """The linear layers of `model` in graph order: quantized ones, and MatMuls with a constant right operand.

    `kernels` maps a node's name to (kernel, compute).
    """
    found = []
    for node in model.graph:
        weight = _weight(node)
        if weight is None or weight.shape is None or len(weight.shape) != 2:
            continue
        props = node.metadata_props
        scheme = props.get("qgraph.scheme") or _FORMATS.get((node.domain, node.op_type), "")
        sqnr = props.get("qgraph.sqnr_db")
        bits = props.get("qgraph.bits_per_weight")
        kernel, compute = (kernels or {}).get(str(node.name), ("", ""))
        K, N = (int(dim) for dim in weight.shape)  # type: ignore[arg-type]
        found.append(
            LayerReport(
                name=str(node.name),
                weight=props.get("qgraph.source_weight", str(weight.name)),
                shape=(K, N),
                scheme=scheme,
                kept="" if scheme else props.get("qgraph.kept", "not considered"),
                bits_per_weight=float(bits) if bits else _bits(scheme, weight, K, N),
                sqnr_db=float(sqnr) if sqnr else None,
                kernel=kernel,
                compute=compute,
            )
        )
    return found


def _bits(scheme: str, weight: ir.Value, K: int, N: int) -> float:
    """Bits a weight, where the node does not say: a file of another tool, or a layer in float."""
    if scheme:
        from qgraph.formats import FORMATS

        return 8 * FORMATS[scheme].nbytes(K, N) / (K * N)
    return 8.0 * weight.dtype.itemsize if weight.dtype else 32.0


def _weight(node: ir.Node) -> ir.Value | None:
    """The stored [K, N] weight, float or codes, that `node` multiplies with, else None."""
    if node.domain == "ai.qgraph":
        return node.inputs[1]
    if node.domain == "" and node.op_type == "MatMul":
        right = node.inputs[1]
        producer = right.producer() if right is not None else None
        if producer is not None and producer.op_type == "DequantizeLinear":
            right = producer.inputs[0]
        if right is not None and right.is_initializer():
            return right
    return None
