"""`qgraph check`: does an artifact compute what it should?"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qgraph.cli.console import print_json, table
from qgraph.cli.options import device_option, json_option, standard_options, threads_option
from qgraph.cli.tensors import make_feeds, tensor_options
from qgraph.errors import BudgetError, UsageError
from qgraph.evaluate.verify import REL_ERROR_LIMIT, rounded_limit

if TYPE_CHECKING:
    import numpy as np

    from qgraph.evaluate.compare import Difference

    Arrays = Mapping[str, np.ndarray]
    Row = Mapping[str, Any]


@click.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option(
    "--lowbit",
    type=click.Path(path_type=Path),
    help="Its low-bit ONNX file, run by ONNX's reference evaluator.",
)
@click.option("--original", type=click.Path(path_type=Path), help="The float ONNX file, run by ONNX Runtime.")
@tensor_options
@click.option(
    "--max-rel-error",
    type=float,
    help=f"Allowed against --lowbit.  [default: {REL_ERROR_LIMIT:g}; more for artifacts that --compute made]",
)
@click.option(
    "--min-cosine",
    type=float,
    default=0.9,
    show_default=True,
    help="Demanded against --original, for each output.",
)
@threads_option
@device_option
@json_option
@standard_options
def command(
    artifact: Path,
    lowbit: Path | None,
    original: Path | None,
    inputs: tuple[str, ...],
    dims: tuple[str, ...],
    seed: int,
    max_rel_error: float | None,
    min_cosine: float,
    threads: int,
    device: str | None,
    as_json: bool,
) -> None:
    """Run the file ARTIFACT (.qg) and its references on the same inputs and compare every output. Exits with
    5 when one differs too much. The cache of a decoder is empty."""
    from qgraph.evaluate.compare import compare
    from qgraph.evaluate.decoders import FromStart
    from qgraph.evaluate.runners import OnnxRuntimeRunner, Runner, run_capacity, run_once
    from qgraph.evaluate.text_ports import artifact_cache
    from qgraph.report.artifact import read_artifact
    from qgraph.runtime import load

    if lowbit is None and original is None:
        raise UsageError("nothing to compare with: give --lowbit, --original or both")
    with load(artifact, threads=threads, device=device) as model:
        feeds = make_feeds(model, inputs, dims, seed)
        got = run_once(model, feeds)
        cache, capacity = artifact_cache(model), run_capacity(model, feeds)
        if max_rel_error is None:
            compute = read_artifact(artifact).metadata.get("qgraph.compute", "f32")
            max_rel_error = rounded_limit(compute, model.device)
    rows: list[Row] = []
    faults: list[str] = []
    roundings = 0
    if lowbit is not None:
        try:
            found, roundings = _against_lowbit(artifact, lowbit, cache, capacity, feeds, got, threads, device)
            allowed = max_rel_error
            rows += _rows("lowbit", found, lambda d: d.rel_error <= allowed)
        except BudgetError as error:
            faults.append(str(error))
    if original is not None:
        plain = OnnxRuntimeRunner(original, threads=threads)
        runner: Runner = FromStart(plain, cache) if cache else plain
        rows += _rows("original", compare(got, runner.run(feeds)), lambda d: d.cosine >= min_cosine)
    if as_json:
        print_json({"inputs": _shapes(feeds), "roundings": roundings, "comparisons": rows, "faults": faults})
    else:
        print(table([("input", name, shape) for name, shape in _shapes(feeds).items()]))
        header = ("against", "output", "relative error", "cosine", "max abs error", "")
        print(table([_cells(row) for row in rows], header, right=(2, 3, 4)))
        if roundings:
            print(
                f"activations are rounded at {roundings} places, everywhere exactly; what lies between these "
                "was compared piece by piece"
            )
    if missed := [f"{row['output']} against {row['against']}" for row in rows if not row["ok"]]:
        limits = f"relative error {max_rel_error:g} against lowbit, cosine {min_cosine:g} against original"
        faults.append(f"outside the limits ({limits}): {', '.join(missed)}")
    if faults:
        raise BudgetError("; ".join(faults))


def _against_lowbit(
    artifact: Path,
    lowbit: Path,
    cache: Mapping[str, str],
    capacity: int,
    feeds: Arrays,
    got: Arrays,
    threads: int,
    device: str | None,
) -> tuple[dict[str, Difference], int]:
    """The artifact's outputs beside those of ONNX's reference evaluator, and how many roundings of
    activations there are: see evaluate/verify.py for what these change."""
    from qgraph.evaluate.verify import Reference
    from qgraph.pipeline import build_exposed
    from qgraph.report.artifact import read_artifact

    info = read_artifact(artifact)
    with tempfile.TemporaryDirectory(prefix="qgraph-") as folder:
        exposed, roundings = build_exposed(
            lowbit,
            info.metadata.get("qgraph.target", "x86_64-linux"),
            Path(folder),
            info.metadata.get("qgraph.packing", "fast"),
            info.metadata.get("qgraph.compute", "f32"),
        )
        reference = Reference(
            lowbit,
            exposed=exposed,
            roundings=roundings,
            cache=cache,
            capacity=capacity,
            threads=threads,
            device=device,
        )
        return reference.compare(feeds, got, "these inputs"), len(roundings)


def _rows(against: str, found: Mapping[str, Difference], within: Callable[[Difference], bool]) -> list[Row]:
    return [
        {"against": against, "output": name, **vars(difference), "ok": within(difference)}
        for name, difference in found.items()
    ]


def _cells(row: Row) -> tuple[object, ...]:
    numbers = (f"{row['rel_error']:.3g}", f"{row['cosine']:.6f}", f"{row['max_abs']:.3g}")
    return row["against"], row["output"], *numbers, "ok" if row["ok"] else "MISSED"


def _shapes(feeds: Mapping[str, np.ndarray]) -> dict[str, str]:
    return {name: f"{array.dtype} {list(array.shape)}" for name, array in feeds.items()}
