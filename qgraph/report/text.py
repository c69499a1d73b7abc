"""The lines a terminal shows of a report."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator

from qgraph.report.document import CompileReport
from qgraph.report.layers import LayerReport

Row = tuple[str, str]


def summary(report: CompileReport) -> list[Row]:
    """(label, text) rows: layers, embeddings, sizes, bits, the worst layers, kernels, verification."""
    return list(_rows(report))


def _rows(report: CompileReport) -> Iterator[Row]:
    quantized = report.quantized
    for label, kind, things in (
        ("layers", "linear", "linear layers"),
        ("embeddings", "embedding", "embeddings"),
    ):
        layers = report.of_kind(kind)
        if layers or kind == "linear":
            count = sum(bool(layer.scheme) for layer in layers)
            yield label, _quantized(count, len(layers), things, report.config["scheme"])
    if quantized and report.config.get("solver"):
        yield "solver", f"{report.config['solver']}, {_calibration(report)}"
    reasons: dict[str, list[LayerReport]] = defaultdict(list)
    for layer in report.layers:
        if not layer.scheme:
            reasons[layer.kept].append(layer)
    for reason, layers in reasons.items():
        yield "kept", f"{len(layers)} in float: {_some([layer.name for layer in layers])} ({reason})"
    sizes = report.sizes
    for kind, things in (("linear", "linear layers"), ("embedding", "embeddings")):
        if sizes.get(f"{kind}_float"):
            change = _before_after(sizes[f"{kind}_float"], sizes[f"{kind}_stored"])
            yield "weights", f"{change} ({things})"
    if report.bits_per_weight is not None:
        yield "bits/weight", f"{report.bits_per_weight:.3f} of what is quantized, scales counted"
    worst = sorted((x for x in quantized if x.sqnr_db is not None), key=lambda x: (x.sqnr_db, x.name))[:3]
    if worst:
        yield "worst SQNR", ", ".join(f"{layer.name} {layer.sqnr_db:.2f} dB" for layer in worst)
    loud = sorted(
        (x for x in quantized if x.output_error is not None), key=lambda x: (-(x.output_error or 0), x.name)
    )[:3]
    if loud:
        yield "worst output", ", ".join(f"{layer.name} {layer.output_error:.2%}" for layer in loud)
    for kernel, count in Counter((x.kernel, x.compute) for x in report.layers if x.kernel).items():
        yield "kernels", f"{count} x {kernel[0]}: {kernel[1]}"
    if report.isas:
        yield "code", ", ".join(report.isas)
    if "lowbit_onnx" in sizes:
        yield "ONNX file", _before_after(sizes["original"], sizes["lowbit_onnx"])
    if "artifact" in sizes:
        yield "artifact", _before_after(sizes["original"], sizes["artifact"])
    if "artifact_weights" in sizes:
        yield "artifact", f"{size(sizes['artifact_weights'])} of weights, and the code of its kernels"
    check = report.verification
    if check is not None and check.status == "skipped":
        yield "verify", f"skipped: {check.reason}"
    elif check is not None:
        yield (
            "verify",
            (
                f"agrees with ONNX's reference evaluator on {len(check.comparisons)} inputs: "
                f"relative error {check.worst:.1e} (allowed {check.limit:g})"
            ),
        )


def _calibration(report: CompileReport) -> str:
    data = report.calibration
    if data is None:
        return "from the weights alone: no calibration data"
    return f"calibrated on {data['samples']} samples ({data['tokens']} tokens) of {data['source']}"


def _quantized(count: int, total: int, things: str, scheme: str) -> str:
    if scheme == "none" or not total:
        return f"{total} {things}, none quantized"
    return (
        f"{total} {things} stay float" if not count else f"{count} of {total} {things} quantized to {scheme}"
    )


def _before_after(before: int, after: int) -> str:
    if not after or after == before:
        return size(before)
    change = f" ({before / after:.2f}x smaller)" if before > 1.01 * after else ""
    return f"{size(before)} -> {size(after)}{change}"


def size(nbytes: float) -> str:
    """`nbytes` for a reader, in powers of 1000: `45.8 MB`."""
    for unit in ("B", "kB", "MB"):
        if abs(nbytes) < 1000:
            return f"{nbytes:.0f} B" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.2f} GB"


def _some(names: list[str], limit: int = 3) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
