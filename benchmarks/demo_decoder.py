"""`make demo`, second part: the decoder of models/tinystories in NVFP4 and ternary, beside the float model.

Calibrated on stories that the float model itself writes here, so that nothing is downloaded; perplexity on
stories that it has never seen (models/tinystories/held_out.txt). Every figure is measured in this run.

python benchmarks/demo_decoder.py out/tinystories.onnx
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np

import qgraph
from qgraph.cli.console import make_progress, table
from qgraph.cli.failure import guard
from qgraph.generation import Sampling
from qgraph.models import get_model
from qgraph.report import CompileReport
from qgraph.report.text import size

PROMPT = "Once upon a time, there was a little dog"
SCHEMES = ("none", "nvfp4", "ternary")
WRITTEN = 64  # stories to calibrate on
WRITTEN_TOKENS = 250  # of each, at most
SHOWN_TOKENS = 48
TIMED = (64, 64)  # tokens of a prompt, and behind it
REPEAT = 10


def main(model: Path) -> None:
    """Compile `model` by each scheme; compare sizes, perplexity and speed, and what they write."""
    example = get_model("tinystories")
    tokenizer = example.tokenizer_path()
    from qgraph.evaluate.decoders import open_decoder, open_text_runner
    from qgraph.evaluate.latency import measure_decoding
    from qgraph.evaluate.perplexity import compare
    from qgraph.models.tinystories import HELD_OUT, SEPARATOR

    reports: dict[str, CompileReport] = {}
    files: dict[str, Path] = {"float, ONNX Runtime": model}
    calibration = model.with_name("written.jsonl")
    with make_progress(quiet=False) as progress:
        for scheme in SCHEMES:
            data = {} if scheme == "none" else {"calibration": calibration, "tokenizer": str(tokenizer)}
            result = qgraph.compile(model, scheme=scheme, progress=progress, **data)
            assert result.artifact is not None
            name = "float" if scheme == "none" else scheme
            reports[name], files[name] = result.report, result.artifact
            if scheme == "none":
                write_stories(result.artifact, tokenizer, calibration)

    windows = held_out_windows(tokenizer, HELD_OUT, SEPARATOR)
    float_runner = open_text_runner(model)
    quality = {name: compare(open_text_runner(path), float_runner, windows) for name, path in files.items()}

    rng = np.random.default_rng(0)
    decoders = {name: open_decoder(path, room=sum(TIMED)) for name, path in files.items()}
    vocabulary = decoders["float"].vocabulary
    prompt, tokens = (rng.integers(0, vocabulary, (1, n)) for n in TIMED)
    print("measuring speed", flush=True)
    speed = measure_decoding(decoders, prompt, tokens, REPEAT)
    written = {name: greedy(path, tokenizer) for name, path in files.items()}

    sizes = {name: path.stat().st_size for name, path in files.items()}
    rows = [
        ("file", *(size(n) for n in sizes.values())),
        ("bits a quantized weight", "32", *(_bits(report) for report in reports.values())),
        (
            f"perplexity, {quality['float'].model.tokens} tokens",
            *(f"{q.model.perplexity:.3f}" for q in quality.values()),
        ),
        ("KL from float, nats", *(f"{q.kl_divergence:.4f}" for q in quality.values())),
        ("prompt, tokens/s", *(f"{1e3 * TIMED[0] / s.prompt.median_ms:.0f}" for s in speed.values())),
        ("decode, tokens/s", *(f"{1e3 / s.step.median_ms:.0f}" for s in speed.values())),
    ]
    print(
        f"\n{example.title}; medians of {REPEAT} prompts of {TIMED[0]} tokens and of {TIMED[1]} behind each"
    )
    print(table(rows, ("", *files), right=range(1, len(files) + 1)))
    for name, text in written.items():
        print(f"\n{name}: {text}")

    results = {
        "sizes": sizes,
        "perplexity": {name: asdict(q) for name, q in quality.items()},
        "speed": {name: asdict(s) for name, s in speed.items()},
        "text": written,
    }
    document = model.with_name("demo_decoder.json")
    document.write_text(json.dumps(results, indent=1) + "\n")
    print()
    print(table([("wrote", path) for path in (*files.values(), document) if path != model]))


def write_stories(model: Path, tokenizer: Path, target: Path) -> None:
    """Lets a model write what it is to be calibrated on: one story a line, as JSON."""
    with qgraph.open_generator(model, tokenizer, room=WRITTEN_TOKENS + 8) as generator:
        how = Sampling(temperature=1.0, seed=0)
        stories = generator.generate("", samples=WRITTEN, max_tokens=WRITTEN_TOKENS, sampling=how)
    lines = [json.dumps({"text": story.text.strip()}) for story in stories if story.text.strip()]
    target.write_text("\n".join(lines) + "\n", encoding="utf-8")


def held_out_windows(tokenizer: Path, text: Path, separator: str) -> list:
    """Every story by itself, from its first token."""
    from qgraph.evaluate.perplexity import split_windows
    from qgraph.evaluate.tokenizer import leading_tokens, load_tokenizer, read_documents

    loaded = load_tokenizer(tokenizer)
    documents = read_documents(text, loaded, separator=separator)
    return split_windows(documents, length=512, stride=256, prefix=leading_tokens(loaded))


def greedy(model: Path, tokenizer: Path) -> str:
    """How a model goes on from the prompt, taking the most likely token."""
    with qgraph.open_generator(model, tokenizer, room=128) as generator:
        return PROMPT + generator.generate(PROMPT, max_tokens=SHOWN_TOKENS)[0].text


def _bits(report: CompileReport) -> str:
    return "32" if report.bits_per_weight is None else f"{report.bits_per_weight:.2f}"


if __name__ == "__main__":
    sys.exit(guard(lambda: main(Path(sys.argv[1]))))
