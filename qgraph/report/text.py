"""The lines a terminal shows of a report."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator

from qgraph.evaluate.verify import Verification
from qgraph.report.document import CompileReport
from qgraph.report.layers import LayerReport, stored_weights

Row = tuple[str, str]


def summary(report: CompileReport) -> list[Row]:
    """(label, text) rows: layers, embeddings, sizes, bits, the worst layers, kernels, verification."""
    return list(_rows(report))


def _rows(report: CompileReport) -> Iterator[Row]:
    quantized = report.quantized
    for label, kind, thing in (
        ("layers", "linear", "linear layer"),
        ("embeddings", "embedding", "embedding"),
    ):
        layers = report.of_kind(kind)
        if layers or kind == "linear":
            formats = Counter(layer.scheme for layer in layers if layer.scheme)
            yield label, _quantized(formats, len(layers), thing, report.config["scheme"])
    if quantized and report.config.get("solver"):
        yield "solver", report.config["solver"]
        yield "calibration", _calibration(report)
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
        yield "bits/weight", _bits(report.bits_per_weight, quantized)
    worst = sorted((x for x in quantized if x.sqnr_db is not None), key=lambda x: (x.sqnr_db, x.name))[:3]
    if worst:
        yield "worst SQNR", ", ".join(f"{layer.name} {layer.sqnr_db:.2f} dB" for layer in worst)
    loud = sorted(
        (x for x in quantized if x.output_error is not None), key=lambda x: (-(x.output_error or 0), x.name)
    )[:3]
    if loud:
        yield "worst output", ", ".join(f"{layer.name} {_percent(layer.output_error)}" for layer in loud)
    for kernel, count in Counter((x.kernel, x.compute) for x in report.layers if x.kernel).items():
        yield "kernels", f"{count} x {kernel[0]}: {kernel[1]}"
    if report.isas:
        yield "code", ", ".join(report.isas)
    if "lowbit_onnx" in sizes:
        yield "ONNX file", _before_after(sizes["original"], sizes["lowbit_onnx"])
    if "artifact" in sizes:
        yield "artifact", _before_after(sizes["original"], sizes["artifact"])
    if "library" in sizes:
        yield "library", _before_after(sizes["original"], sizes["library"])
    if "artifact_weights" in sizes:
        yield "artifact", f"{size(sizes['artifact_weights'])} of weights, and the code of its kernels"
    for export in report.exports:
        yield "export", f"{export.name}: {size(export.nbytes)}, {_count(export.layers, 'low-bit layer')}"
        for reason, count in Counter(reason for _, reason in export.notes).items():
            yield "", f"{_count(count, 'layer')} in float: {reason}"
    yield from _checks(report.verification, "")
    for export in report.exports:
        yield from _checks(export.verification, f"{export.name}: ")


def _checks(check: Verification | None, what: str) -> Iterator[Row]:
    if check is not None and check.status == "skipped":
        yield "verify", f"{what}skipped: {check.reason}"
    elif check is not None:
        errors = [f"{worst:.1e} (allowed {limit:g})" for limit, worst in check.worst_by_limit().items()]
        inputs = len({tuple(c.dims.items()) for c in check.comparisons})
        if len(errors) > 1:
            errors[-1] += " where activations are rounded"
        where = f" ({', '.join(check.devices)})" if any(d != "cpu" for d in check.devices) else ""
        yield (
            "verify",
            (
                f"{what}agrees with ONNX's reference evaluator on {inputs} inputs{where}: "
                f"relative error {'; '.join(errors)}"
            ),
        )
        if check.reason:
            yield "verify", f"{what}not on every device: {check.reason}"


def _calibration(report: CompileReport) -> str:
    data = report.calibration
    if data is None:
        return "none: by the weights alone"
    if data["source"] is None:
        return f"when it was quantized, on data with the SHA-256 {data['sha256']}"
    text = f"{_count(data['samples'], 'sample')} ({_count(data['tokens'], 'token')}) of {data['source']}"
    widest = max((x.shape[0] for x in report.of_kind("linear") if x.scheme), default=0)
    few = f": FEW for a layer of {widest} inputs, give as many tokens or more"
    return text + (few if data["tokens"] < widest else "")


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"


def _bits(bits: float, quantized: list[LayerReport]) -> str:
    """Of the format, and of the files where these take more or less."""
    text = f"{bits:.3f} of what is quantized, scales counted"
    stored = stored_weights(quantized)
    elements = sum(layer.elements for layer in stored)
    for what, total in (
        ("the artifact", sum(layer.artifact_bits * layer.elements for layer in stored)),
        ("the ONNX file", sum(layer.onnx_bits * layer.elements for layer in stored)),
    ):
        if total and abs(total / elements - bits) > 0.01 * bits:
            text += f"; {total / elements:.3f} in {what}"
    return text


def _quantized(formats: Counter[str], total: int, thing: str, scheme: str) -> str:
    all_of_them, count = _count(total, thing), sum(formats.values())
    if not total or (scheme == "none" and not count):
        return f"{all_of_them}, none quantized"
    if not count:
        return f"{all_of_them} stay{'s' if total == 1 else ''} float"
    if len(formats) == 1:
        (format,) = formats
        with_activations = thing == "linear layer" and scheme.startswith(f"{format}-w")
        return f"{count} of {all_of_them} quantized to {scheme if with_activations else format}"
    return f"{count} of {all_of_them} quantized: " + ", ".join(f"{n} to {f}" for f, n in formats.items())


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


def _percent(part: float | None) -> str:
    percent = 100 * (part or 0)
    return f"{percent:.0f} %" if percent >= 99.5 else f"{percent:.2g} %"


def _some(names: list[str], limit: int = 3) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
