"""`qgraph bench`: latency, beside ONNX Runtime's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import click

from qgraph.cli.console import escape, print_json, table
from qgraph.cli.options import json_option, standard_options, threads_option
from qgraph.cli.tensors import make_feeds, tensor_options


@click.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option(
    "--onnx", type=click.Path(path_type=Path), help="The float ONNX file, run by ONNX Runtime for comparison."
)
@tensor_options
@click.option("--repeat", type=click.IntRange(1), default=50, show_default=True, help="Timed runs of each.")
@click.option("--profile", is_flag=True, help="Also list the steps of one run that took longest.")
@threads_option
@json_option
@standard_options
def command(
    artifact: Path,
    onnx: Path | None,
    inputs: tuple[str, ...],
    dims: tuple[str, ...],
    seed: int,
    repeat: int,
    profile: bool,
    threads: int,
    as_json: bool,
) -> None:
    """Time the file ARTIFACT (.qg): median and 90th percentile of one run. With --onnx, ONNX Runtime takes
    turns with it in the same process, on the same inputs and number of threads."""
    from qgraph.evaluate.latency import measure
    from qgraph.evaluate.runners import OnnxRuntimeRunner
    from qgraph.runtime import load

    with load(artifact) as model, model.session(threads=threads) as session:
        feeds = make_feeds(model, inputs, dims, seed)
        ours = f"qgraph ({model.isa})"
        contenders: dict[str, Callable[[], object]] = {ours: lambda: session.run(feeds)}
        if onnx is not None:
            original = OnnxRuntimeRunner(onnx, threads=session.threads)
            contenders["ONNX Runtime, float"] = lambda: original.run(feeds)
        found = measure(contenders, repeat)
        used = session.threads
        slowest = sorted(session.profile(feeds), key=lambda item: -item[1])[:15] if profile else []
    rows = [{"name": name, **asdict(latency)} for name, latency in found.items()]
    shapes = {name: list(array.shape) for name, array in feeds.items()}
    if as_json:
        steps = [{"name": step.name, "kernel": step.kernel, "ns": ns} for step, ns in slowest]
        print_json({"threads": used, "inputs": shapes, "latency": rows, "slowest_steps": steps})
        return
    print(
        f"{used} thread{'s' if used > 1 else ''}; "
        + ", ".join(f"{escape(name)} {shape}" for name, shape in shapes.items())
    )
    header = ("", "median ms", "p90 ms", "min ms", "runs", "median / ours")
    base = found[ours].median_ms
    cells = [
        (
            name,
            f"{x.median_ms:.3f}",
            f"{x.p90_ms:.3f}",
            f"{x.min_ms:.3f}",
            x.runs,
            f"{x.median_ms / base:.2f}x",
        )
        for name, x in found.items()
    ]
    print(table(cells, header, right=(1, 2, 3, 4, 5)))
    if slowest:
        print()
        print(
            table(
                [(f"{ns / 1e3:.1f}", s.name, s.kernel) for s, ns in slowest],
                ("us", "step", "kernel"),
                right=(0,),
            )
        )
