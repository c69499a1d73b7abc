"""`qgraph bench`: latency, beside ONNX Runtime's; of a decoder with state, how fast it reads and writes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qgraph.cli.console import escape, place, print_json, table
from qgraph.cli.options import device_option, json_option, public_key_option, standard_options, threads_option
from qgraph.cli.tensors import make_feeds, tensor_options
from qgraph.errors import UsageError

if TYPE_CHECKING:
    import numpy as np

    from qgraph.evaluate.latency import Latency
    from qgraph.runtime import Model

    Found = tuple[int, dict[str, Any], str]  # threads, for JSON, as text

_FLOAT = "ONNX Runtime, float"


@click.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option(
    "--onnx", type=click.Path(path_type=Path), help="The float ONNX file, run by ONNX Runtime for comparison."
)
@tensor_options
@click.option(
    "--repeat",
    type=click.IntRange(1),
    help="Timed runs of each.  [default: 50; of a decoder with state 10]",
)
@click.option(
    "--decode",
    type=click.IntRange(1),
    help="Tokens behind each prompt of a decoder with state.  [default: 32]",
)
@threads_option
@device_option
@public_key_option
@json_option
@standard_options
def command(
    artifact: Path,
    onnx: Path | None,
    inputs: tuple[str, ...],
    dims: tuple[str, ...],
    seed: int,
    repeat: int | None,
    decode: int | None,
    threads: int,
    device: str | None,
    public_key: bytes | None,
    as_json: bool,
) -> None:
    """Time the file ARTIFACT (.qg): median and 90th percentile of one run. With --onnx, ONNX Runtime takes
    turns with it in the same process, on the same inputs and number of threads. A decoder with state reads a
    prompt of --dim sequence=N tokens, and --decode tokens behind it, one a run."""
    from qgraph.runtime import load

    with load(artifact, threads=threads, device=device, public_key=public_key) as model:
        if model.has_state and inputs:
            raise UsageError("--input: a decoder with state is timed on seeded tokens: give --dim")
        if decode is not None and not model.has_state:
            raise UsageError(f"--decode: {artifact} has no state to decode with: time runs of it, with --dim")
        feeds = make_feeds(model, inputs, dims, seed)
        if model.has_state:
            found = _time_decoder(model, onnx, feeds, threads, repeat or 10, decode or 32)
        else:
            found = _time_runs(model, onnx, feeds, threads, repeat or 50)
        used, document, text = found
        where = place(model, used)
    if as_json:
        print_json({"threads": used, "device": model.device, **document})
        return
    print(f"{where}; {text}")


def _time_runs(
    model: Model, onnx: Path | None, feeds: dict[str, np.ndarray], threads: int, repeat: int
) -> Found:
    """Times runs on `feeds`; `threads` as the user gives them."""
    from qgraph.evaluate.latency import measure
    from qgraph.evaluate.runners import OnnxRuntimeRunner

    ours, session = f"qgraph ({model.isa})", model.session()
    contenders: dict[str, Callable[[], object]] = {ours: lambda: session.run(feeds)}
    if onnx is not None:
        original = OnnxRuntimeRunner(onnx, threads=_beside(model, session.threads, threads))
        contenders[_FLOAT] = lambda: original.run(feeds)
    found = measure(contenders, repeat)
    shapes = {name: list(array.shape) for name, array in feeds.items()}
    rows = [
        (name, *_times(x), f"{x.min_ms:.3f}", x.runs, _ratio(x, found[ours])) for name, x in found.items()
    ]
    header = ("", "median ms", "p90 ms", "min ms", "runs", "median / ours")
    text = ", ".join(f"{escape(name)} {shape}" for name, shape in shapes.items())
    latency = [{"name": name, **asdict(x)} for name, x in found.items()]
    text += "\n" + table(rows, header, right=range(1, 6))
    return session.threads, {"inputs": shapes, "latency": latency}, text


def _beside(model: Model, used: int, threads: int) -> int:
    """Threads of the engine beside ours: as many, or where ours is on a GPU what the user says."""
    return used if model.device == "cpu" else threads


def _time_decoder(
    model: Model, onnx: Path | None, feeds: dict[str, np.ndarray], threads: int, repeat: int, decode: int
) -> Found:
    """Times a decoder with state on a prompt, and on single tokens behind it."""
    import numpy as np

    from qgraph.evaluate.decoders import Decoder, open_decoder, stateful_decoder
    from qgraph.evaluate.latency import measure_decoding
    from qgraph.evaluate.text_ports import IDS

    if IDS not in feeds:
        raise UsageError(f"{model.path} has no input {IDS}: it is no language model that this can feed")
    prompt, name = feeds[IDS], f"qgraph ({model.isa})"
    batch, sequence = prompt.shape
    tokens = np.resize(prompt, (batch, decode))
    ours = stateful_decoder(model, room=sequence + decode)
    used = ours.threads
    contenders: dict[str, Decoder] = {name: ours}
    if onnx is not None:
        contenders[_FLOAT] = open_decoder(onnx, engine="onnxruntime", threads=_beside(model, used, threads))
    found = measure_decoding(contenders, prompt, tokens, repeat)
    rows = [
        (
            contender,
            f"{x.prompt.median_ms:.3f}",
            f"{1e3 * prompt.size / x.prompt.median_ms:.1f}",
            *_times(x.step),
            f"{1e3 * batch / x.step.median_ms:.1f}",
            _ratio(x.step, found[name].step),
        )
        for contender, x in found.items()
    ]
    header = ("", "prompt ms", "tokens/s", "token ms", "p90 ms", "tokens/s", "token / ours")
    text = f"{batch} x {sequence} tokens, then {decode}, one a run\n" + table(rows, header, right=range(1, 7))

    decoding = [{"name": contender, **asdict(x)} for contender, x in found.items()]
    sizes = {"batch": batch, "prompt_tokens": sequence, "decoded_tokens": decode}
    return used, {**sizes, "decoding": decoding}, text


def _times(x: Latency) -> tuple[str, str]:
    return f"{x.median_ms:.3f}", f"{x.p90_ms:.3f}"


def _ratio(x: Latency, ours: Latency) -> str:
    return f"{x.median_ms / ours.median_ms:.2f}x"
