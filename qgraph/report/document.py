"""The report of a compile as data, and as the JSON document that docs/cli.md describes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from qgraph.evaluate.verify import Verification
from qgraph.report.layers import LayerReport, stored_weights, weight_bytes

REPORT_VERSION = 1  # of the JSON document; a field may be added within a version, not changed or removed


@dataclass(frozen=True)
class ExportReport:
    """What was written for another engine.

    Attributes:
        name: of the engine (`qgraph.export.EXPORTS`).
        nbytes: of the file, external data included.
        layers: how many layers and lookups the engine computes from low-bit weights.
        notes: (node, reason) of those that it computes in float.
        verification: None where the machine's CPU cannot run the file.
    """

    name: str
    nbytes: int
    layers: int
    notes: list[tuple[str, str]]
    verification: Verification | None = None

    def to_json(self) -> dict[str, Any]:
        """All fields."""
        notes = [{"node": node, "reason": reason} for node, reason in self.notes]
        return {**asdict(self), "notes": notes, "verification": verification_json(self.verification)}


@dataclass
class CompileReport:
    """What a compile did.

    Attributes:
        version: of qgraph.
        model: `name`, `sha256`, `nbytes` of the original.
        config: the fields of the CompileConfig.
        calibration: `source` (the file's name), `sha256` (of what was used of it), `samples`, `tokens`; None
            where nothing was calibrated.
        layers: every linear layer and embedding.
        sizes: bytes: `original`, `linear_float` and `linear_stored` (weights of the linear layers before and
            after), `embedding_float` and `embedding_stored` (tables that are no linear layer's weight, too),
            `lowbit_onnx`, `artifact` and `library` where made, `artifact_weights` in a dry run.
        decisions: what passes left alone or assumed, and why: `pass: node: reason`.
        isas: code variants in the artifact.
        verification: None when no artifact was built.
        seconds: wall time by phase.
        files: what was written, by kind: `onnx`, `artifact`, `library`, `header`, `report`, names of exports.
        exports: what was written for other engines.
    """

    version: str
    model: dict[str, Any]
    config: dict[str, Any]
    layers: list[LayerReport] = field(default_factory=list)
    sizes: dict[str, int] = field(default_factory=dict)
    decisions: list[str] = field(default_factory=list)
    isas: list[str] = field(default_factory=list)
    verification: Verification | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    calibration: dict[str, Any] | None = None
    exports: list[ExportReport] = field(default_factory=list)

    @property
    def quantized(self) -> list[LayerReport]:
        """The layers stored in a low-bit format."""
        return [layer for layer in self.layers if layer.scheme]

    def of_kind(self, kind: str) -> list[LayerReport]:
        """The layers of that kind: `linear` or `embedding`."""
        return [layer for layer in self.layers if layer.kind == kind]

    @property
    def bits_per_weight(self) -> float | None:
        """Mean over the quantized weights, all scales counted; None when there is none."""
        return mean_bits(self.quantized)

    def set_layers(self, layers: list[LayerReport]) -> None:
        """What is known of the layers now, and the sizes that follow."""
        self.layers = layers
        linear = weight_bytes(self.of_kind("linear"))
        both = weight_bytes(layers)
        for name, of_linear, of_both in zip(("float", "stored"), linear, both, strict=True):
            self.sizes[f"linear_{name}"] = of_linear
            self.sizes[f"embedding_{name}"] = of_both - of_linear

    def recall(self, metadata: Mapping[str, str]) -> None:
        """How the low-bit model was made, where that is not of this run: from the `metadata` of its file, as
        far as this tells. What of `config` decides a low-bit model is then what was in effect."""
        try:
            recipe = dict(json.loads(metadata.get("qgraph.config", "{}")))
        except (ValueError, TypeError, RecursionError):
            recipe = {}
        sha256 = recipe.pop("calibration_sha256", None)
        if sha256 is not None:
            self.calibration = {"source": None, "sha256": sha256, "samples": None, "tokens": None}
        self.config |= {"solver": ""} | {k: v for k, v in recipe.items() if k in self.config}

    def to_json(self) -> dict[str, Any]:
        """The document, keys in a fixed order."""
        return {
            "report_version": REPORT_VERSION,
            "qgraph_version": self.version,
            "model": self.model,
            "config": self.config,
            "calibration": self.calibration,
            "summary": {
                "linear_layers": len(self.of_kind("linear")),
                "quantized_layers": sum(bool(x.scheme) for x in self.of_kind("linear")),
                "embeddings": len(self.of_kind("embedding")),
                "quantized_embeddings": sum(bool(x.scheme) for x in self.of_kind("embedding")),
                "bits_per_weight": self.bits_per_weight,
                "bits_per_weight_all_linear": mean_bits(self.of_kind("linear")),
                "bits_per_weight_all": mean_bits(self.layers),
            },
            "sizes": self.sizes,
            "layers": [layer.to_json() for layer in self.layers],
            "decisions": self.decisions,
            "isas": self.isas,
            "verification": verification_json(self.verification),
            "seconds": {name: round(seconds, 3) for name, seconds in self.seconds.items()},
            "files": self.files,
            "exports": [export.to_json() for export in self.exports],
        }


def mean_bits(layers: Sequence[LayerReport]) -> float | None:
    """Stored bits of all `layers` over their number of weights; what they share counts once."""
    elements = sum({layer.weight: layer.elements for layer in layers}.values())
    bits = sum(layer.bits_per_weight * layer.elements for layer in stored_weights(layers))
    return bits / elements if elements else None


def verification_json(verification: Verification | None) -> dict[str, Any] | None:
    """The document's `verification`."""
    if verification is None:
        return None
    worst = {"worst_rel_error": verification.worst} if verification.comparisons else {}
    return {**asdict(verification), **worst}
