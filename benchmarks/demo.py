"""`make demo`: MiniLM to NVFP4, beside the float model in ONNX Runtime. Every figure is measured in this run.

python benchmarks/demo.py out/minilm.onnx
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

import qgraph
from qgraph.cli.console import make_progress, table
from qgraph.cli.failure import guard
from qgraph.report.text import size, summary

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
    """Compile `model`, compare it with the float model on sentences, time both, print and write the
    results."""
    from qgraph.evaluate.latency import measure
    from qgraph.evaluate.runners import OnnxRuntimeRunner
    from qgraph.evaluate.samples import artifact_ranges, input_specs, make_inputs
    from qgraph.evaluate.similarity import cosine
    from qgraph.evaluate.sts import SentenceTokenizer
    from qgraph.models import get_model

    with make_progress(quiet=False) as progress:
        result = qgraph.compile(model, scheme="nvfp4", progress=progress)
    print()
    print(table(summary(result.report)))

    example = get_model("minilm")
    feeds = SentenceTokenizer(example.tokenizer_path())(SENTENCES)
    loaded = result.load()
    session = loaded.session()
    original = OnnxRuntimeRunner(model, threads=session.threads)
    mask = feeds["attention_mask"]
    ours, theirs = (example.embed(run(feeds)[example.output], mask) for run in (session.run, original.run))
    similarity = cosine(ours, theirs)

    latency = {}
    for batch, sequence in SHAPES:
        dims = {"batch": batch, "sequence": sequence}
        inputs = make_inputs(input_specs(loaded), artifact_ranges(loaded), dims, seed=0)
        latency[f"{batch} x {sequence}"] = measure(
            {"qgraph": lambda x=inputs: session.run(x), "onnxruntime": lambda x=inputs: original.run(x)},
            repeat=20,
        )

    sizes = result.report.sizes
    print(f"\nall-MiniLM-L6-v2 on {session.threads} threads, {loaded.isa}")
    rows = [
        ("file", size(sizes["original"]), size(sizes["artifact"])),
        ("linear layers", size(sizes["linear_float"]), size(sizes["linear_stored"])),
        ("bits per weight", "32", f"{result.report.bits_per_weight:.2f}"),
        ("cosine to the float model", "1", f"{similarity.mean():.4f} (least {similarity.min():.4f})"),
    ]
    rows += [
        (
            f"median latency, {shape}",
            f"{x['onnxruntime'].median_ms:.2f} ms",
            f"{x['qgraph'].median_ms:.2f} ms",
        )
        for shape, x in latency.items()
    ]
    print(table(rows, ("", "ONNX Runtime, float32", "qgraph, NVFP4"), right=(1, 2)))

    results = {
        "threads": session.threads,
        "isa": loaded.isa,
        "sizes": sizes,
        "bits_per_weight": result.report.bits_per_weight,
        "cosine": {
            "mean": float(similarity.mean()),
            "min": float(similarity.min()),
            "sentences": len(SENTENCES),
        },
        "latency": {shape: {name: asdict(t) for name, t in x.items()} for shape, x in latency.items()},
    }
    written = model.with_name("demo.json")
    written.write_text(json.dumps(results, indent=1) + "\n")
    print()
    print(table([("wrote", path) for path in (*result.report.files.values(), written)]))


if __name__ == "__main__":
    sys.exit(guard(lambda: main(Path(sys.argv[1]))))
