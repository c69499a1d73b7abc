"""`make demo`: MiniLM to NVFP4, beside the float model in ONNX Runtime. Every figure is measured in this run.

Calibrated on the sentences in benchmarks/sentences.txt, compared on others.

python benchmarks/demo.py out/minilm.onnx
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from machine import processor

import qgraph
from qgraph.cli.console import make_progress, table
from qgraph.cli.failure import guard
from qgraph.models import get_model
from qgraph.report import CompileReport
from qgraph.report.text import size, summary

CALIBRATION = Path(__file__).parent / "sentences.txt"
SENTENCES = (
    "A man is playing a guitar on the stage.",
    "Someone plays an instrument in front of an audience.",
    "The cat sleeps on the warm windowsill.",
    "Heavy rain is expected in the north tomorrow.",
    "The weather forecast warns of storms.",
    "She bought two kilograms of apples at the market.",
    "Compilers translate programs from one language to another.",
    "A quantized network stores its weights in a few bits.",
    "The train to the coast leaves at half past seven.",
    "He forgot his umbrella on the train.",
    "Bread, cheese and a glass of wine were on the table.",
    "The committee will publish its report in spring.",
)
SHAPES = ((1, 16), (1, 128), (8, 128))  # batch, sequence


def main(model: Path) -> None:
    """Compile `model` twice, with float and with 4-bit embeddings; compare both with the float model on
    sentences, time all three, print and write the results."""
    example = get_model("minilm")
    data = {"calibration": CALIBRATION, "tokenizer": str(example.tokenizer_path())}
    from qgraph.evaluate.latency import Latency, measure
    from qgraph.evaluate.runners import OnnxRuntimeRunner
    from qgraph.evaluate.samples import artifact_ranges, input_specs, make_inputs
    from qgraph.evaluate.similarity import cosine
    from qgraph.evaluate.sts import SentenceTokenizer

    with make_progress(quiet=False) as progress:
        result = qgraph.compile(model, scheme="nvfp4", progress=progress, **data)
        print()
        print(table(summary(result.report)))
        print("\nonce more, with --embeddings nvfp4", flush=True)
        small = qgraph.compile(
            model,
            scheme="nvfp4",
            embeddings="nvfp4",
            output=model.with_name("minilm.nvfp4e"),
            progress=progress,
            **data,
        )

    loaded = result.load()
    session, session_small = loaded.session(), small.load().session()
    original = OnnxRuntimeRunner(model, threads=session.threads)
    contenders = {"onnxruntime": original.run, "nvfp4": session.run, "nvfp4_embeddings": session_small.run}

    feeds = SentenceTokenizer(example.tokenizer_path())(SENTENCES)
    mask = feeds["attention_mask"]
    embedded = {name: example.embed(run(feeds)[example.output], mask) for name, run in contenders.items()}
    similarity = {name: cosine(e, embedded["onnxruntime"]) for name, e in embedded.items()}

    print("measuring latency", flush=True)
    latency: dict[str, dict[str, Latency]] = {}
    for batch, sequence in SHAPES:
        dims = {"batch": batch, "sequence": sequence}
        inputs = make_inputs(input_specs(loaded), artifact_ranges(loaded), dims, seed=0)
        latency[f"{batch} x {sequence}"] = measure(
            {name: lambda run=run, x=inputs: run(x) for name, run in contenders.items()}, repeat=20
        )

    reports = {"nvfp4": result.report, "nvfp4_embeddings": small.report}
    first = result.report.sizes
    rows = [
        ("file", size(first["original"]), *(size(r.sizes["artifact"]) for r in reports.values())),
        ("  linear layers", size(first["linear_float"]), *_stored(reports, "linear")),
        ("  embeddings", size(first["embedding_float"]), *_stored(reports, "embedding")),
        ("bits a quantized weight", "32", *(f"{r.bits_per_weight:.2f}" for r in reports.values())),
        (
            f"cosine of {len(SENTENCES)} embeddings to float's",
            *(f"{c.mean():.4f} (least {c.min():.4f})" for c in similarity.values()),
        ),
    ]
    rows += [
        (f"latency, {shape}: median (least)", *(f"{t.median_ms:.2f} ({t.min_ms:.2f}) ms" for t in x.values()))
        for shape, x in latency.items()
    ]
    machine = f"{processor()}, {session.threads} threads, {loaded.isa}"
    print(f"\nall-MiniLM-L6-v2 on {machine}; ONNX Runtime {version('onnxruntime')}")
    columns = ("", "ONNX Runtime, float32", "qgraph, nvfp4", "qgraph, embeddings too")
    print(table(rows, columns, right=(1, 2, 3)))
    print("Latencies of a busy machine are far above the least ones, and not comparable.")

    results = {
        "machine": machine,
        "sizes": {name: report.sizes for name, report in reports.items()},
        "bits_per_weight": {name: report.bits_per_weight for name, report in reports.items()},
        "cosine": {name: {"mean": float(c.mean()), "min": float(c.min())} for name, c in similarity.items()},
        "latency": {shape: {name: asdict(t) for name, t in x.items()} for shape, x in latency.items()},
    }
    written = model.with_name("demo.json")
    written.write_text(json.dumps(results, indent=1) + "\n")
    files = (*result.report.files.values(), *small.report.files.values(), written)
    print()
    print(table([("wrote", path) for path in files]))


def _stored(reports: dict[str, CompileReport], kind: str) -> list[str]:
    return [size(report.sizes[f"{kind}_stored"]) for report in reports.values()]


if __name__ == "__main__":
    sys.exit(guard(lambda: main(Path(sys.argv[1]))))
