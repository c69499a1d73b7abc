"""`qgraph eval`: a model's score on labelled data."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qgraph.cli.console import make_progress, print_json, table
from qgraph.cli.options import device_option, json_option, quiet_option, standard_options, threads_option

if TYPE_CHECKING:
    from qgraph.evaluate.runners import Runner
    from qgraph.evaluate.sts import Pair, SentenceTokenizer, StsResult
    from qgraph.progress import Progress

_PATH = click.Path(path_type=Path)


@click.group()
def command() -> None:
    """Measure an artifact or an ONNX file on a task."""


@command.command()
@click.argument("model", type=_PATH)
@click.option("--data", type=_PATH, required=True, help="CSV of sentence,sentence,score without a header.")
@click.option("--tokenizer", type=_PATH, required=True, help="The model's tokenizer.json.")
@click.option("--against", type=_PATH, help="Another model to score beside it, usually the float ONNX file.")
@click.option("--output", default="last_hidden_state", show_default=True, help="The output that is pooled.")
@click.option(
    "--max-length", type=click.IntRange(2), default=256, show_default=True, help="Tokens a sentence."
)
@click.option("--limit", type=click.IntRange(2), help="Only the first so many pairs.")
@click.option("--batch", type=click.IntRange(1), default=32, show_default=True, help="Sentences a run.")
@threads_option
@device_option
@quiet_option
@json_option
@standard_options
def sts(
    model: Path,
    data: Path,
    tokenizer: Path,
    against: Path | None,
    output: str,
    max_length: int,
    limit: int | None,
    batch: int,
    threads: int,
    device: str | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Semantic textual similarity: Spearman's correlation between the cosine of two sentences' mean-pooled
    embeddings and the ratings in --data. MODEL is an artifact (.qg) or an ONNX file, which ONNX Runtime runs.
    With --against, also the mean cosine between the two models' embeddings of the same sentence."""
    from qgraph.evaluate.runners import open_runner
    from qgraph.evaluate.similarity import cosine
    from qgraph.evaluate.sts import SentenceTokenizer, read_pairs

    pairs = read_pairs(data, limit)
    tokenize = SentenceTokenizer(tokenizer, max_length=max_length)
    results: list[tuple[Path, StsResult]] = []
    with make_progress(quiet) as progress:
        for path in (model, against):
            if path is not None:
                runner = open_runner(path, threads=threads, device=_device(path, device, path is model))
                results.append((path, _score(runner, tokenize, pairs, output, batch, progress)))
    found: dict[str, Any] = {
        "pairs": len(pairs),
        "models": [{"path": str(path), "spearman": result.spearman} for path, result in results],
    }
    if against is not None:
        found["mean_cosine"] = float(cosine(results[0][1].embeddings, results[1][1].embeddings).mean())
        found["spearman_difference"] = results[0][1].spearman - results[1][1].spearman
    if as_json:
        print_json(found)
        return
    rows = [(path, f"Spearman {result.spearman:.4f}") for path, result in results]
    print(table([("pairs", len(pairs)), *rows]))
    if against is not None:
        print(f"difference {found['spearman_difference']:+.4f}; mean cosine {found['mean_cosine']:.4f}")


def _device(path: Path, device: str | None, asked: bool) -> str | None:
    """Where a model runs: --device is for MODEL, and for another one if that is an artifact, too."""
    return device if asked or path.suffix == ".qg" else None


def _score(
    runner: Runner,
    tokenize: SentenceTokenizer,
    pairs: list[Pair],
    output: str,
    batch: int,
    progress: Progress,
) -> StsResult:
    from qgraph.evaluate.sts import evaluate_sts

    progress.phase(runner.name)
    return evaluate_sts(
        runner,
        tokenize,
        pairs,
        output=output,
        batch=batch,
        on_batch=lambda done, total: progress.step(done, total, f"{done} of {total} sentences"),
    )


@command.command()
@click.argument("model", type=_PATH)
@click.option("--text", type=_PATH, required=True, help="The text, UTF-8.")
@click.option("--tokenizer", type=_PATH, required=True, help="The model's tokenizer.json.")
@click.option("--against", type=_PATH, help="Another model to score beside it, usually the float ONNX file.")
@click.option("--length", type=click.IntRange(2), default=512, show_default=True, help="Tokens a window.")
@click.option(
    "--stride",
    type=click.IntRange(1),
    help="Between the starts of windows. Default: half of --length.",
)
@click.option("--separator", default="", help="What stands between documents, such as '<|endoftext|>'.")
@click.option(
    "--bos",
    type=click.Choice(["document", "window", "none"]),
    default="document",
    show_default=True,
    help="What begins with the tokenizer's BOS.",
)
@click.option("--limit", type=click.IntRange(1), help="Only the first so many predicted tokens.")
@click.option("--output", default="logits", show_default=True, help="The output that holds the logits.")
@click.option("--batch", type=click.IntRange(1), default=8, show_default=True, help="Windows a run.")
@click.option(
    "--engine",
    type=click.Choice(["qgraph", "onnxruntime", "ort", "reference"]),
    help="What runs MODEL: ort is for files of --export ort. Default: qgraph for an artifact, onnxruntime "
    "for an ONNX file.",
)
@threads_option
@device_option
@quiet_option
@json_option
@standard_options
def perplexity(
    model: Path,
    text: Path,
    tokenizer: Path,
    against: Path | None,
    length: int,
    stride: int | None,
    separator: str,
    bos: str,
    limit: int | None,
    output: str,
    batch: int,
    engine: str | None,
    threads: int,
    device: str | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Perplexity of a causal language model: the exponential of the mean negative log-likelihood of all
    predicted tokens. Each is predicted once, from at least --length minus --stride tokens before it. MODEL is
    an artifact (.qg) or an ONNX file. With --against, also the mean KL divergence from the other model, and
    the share of positions where both find the same token most likely."""
    from qgraph.errors import UsageError
    from qgraph.evaluate.decoders import open_text_runner
    from qgraph.evaluate.perplexity import compare, split_windows
    from qgraph.evaluate.perplexity import perplexity as measure
    from qgraph.evaluate.tokenizer import leading_tokens, load_tokenizer, read_documents

    tokenize = load_tokenizer(tokenizer)
    prefix = leading_tokens(tokenize)
    if bos == "window" and not prefix:
        raise UsageError(f"--bos window: {tokenizer} puts no BOS before a text")
    windows = split_windows(
        read_documents(text, tokenize, separator=separator),
        length=length,
        stride=length // 2 if stride is None else stride,
        prefix=prefix,
        bos=bos,
        limit=limit,
    )
    room = max((len(window.ids) for window in windows), default=0)
    reading: dict[str, Any] = {"logits": output, "threads": threads, "room": room}
    runner = open_text_runner(model, engine=engine or "", device=device, **reading)
    found: dict[str, Any] = {}
    with make_progress(quiet) as progress:
        progress.phase(runner.name)
        options: dict[str, Any] = {
            "output": output,
            "batch": batch,
            "on_batch": lambda done, total: progress.step(done, total, f"{done} of {total} windows"),
        }
        if against is None:
            results = [(model, measure(runner, windows, **options))]
        else:
            reference = open_text_runner(against, device=_device(against, device, False), **reading)
            both = compare(runner, reference, windows, **options)
            results = [(model, both.model), (against, both.reference)]
            found = {"kl_divergence": both.kl_divergence, "top1_agreement": both.top1_agreement}
    if as_json:
        shared = {"tokens": results[0][1].tokens, "windows": results[0][1].windows}
        models = [{"path": str(path), "perplexity": r.perplexity, "nll": r.nll} for path, r in results]
        print_json({**shared, "models": models, **found})
        return
    rows = [(path, f"perplexity {result.perplexity:.4f}") for path, result in results]
    print(table([("tokens", f"{results[0][1].tokens} in {results[0][1].windows} windows"), *rows]))
    if found:
        print(f"KL divergence {both.kl_divergence:.5f} nats; top-1 agreement {both.top1_agreement:.2%}")
