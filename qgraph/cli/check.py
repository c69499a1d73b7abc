"""`qgraph check`: does an artifact compute what it should?"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click

from qgraph.cli.console import print_json, table
from qgraph.cli.options import json_option, standard_options, threads_option
from qgraph.cli.tensors import make_feeds, tensor_options
from qgraph.errors import BudgetError, UsageError
from qgraph.evaluate.verify import REL_ERROR_LIMIT

if TYPE_CHECKING:
    import numpy as np


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
    default=REL_ERROR_LIMIT,
    show_default=True,
    help="Allowed against --lowbit.",
)
@click.option(
    "--min-cosine",
    type=float,
    default=0.9,
    show_default=True,
    help="Demanded against --original, for each output.",
)
@threads_option
@json_option
@standard_options
def command(
    artifact: Path,
    lowbit: Path | None,
    original: Path | None,
    inputs: tuple[str, ...],
    dims: tuple[str, ...],
    seed: int,
    max_rel_error: float,
    min_cosine: float,
    threads: int,
    as_json: bool,
) -> None:
    """Run the file ARTIFACT (.qg) and its references on the same inputs and compare every output. Exits with
    5 when one differs too much."""
    from qgraph.evaluate.compare import compare
    from qgraph.evaluate.runners import open_runner
    from qgraph.runtime import load

    if lowbit is None and original is None:
        raise UsageError("nothing to compare with: give --lowbit, --original or both")
    with load(artifact, threads=threads) as model:
        feeds = make_feeds(model, inputs, dims, seed)
        got = model.run(feeds)
    rows, missed = [], []
    for kind, path, engine in (("lowbit", lowbit, "reference"), ("original", original, "onnxruntime")):
        if path is None:
            continue
        wanted = open_runner(path, engine=engine, threads=threads).run(feeds)
        for name, found in compare(got, wanted).items():
            ok = found.rel_error <= max_rel_error if kind == "lowbit" else found.cosine >= min_cosine
            rows.append({"against": kind, "output": name, **vars(found), "ok": ok})
            if not ok:
                missed.append(f"{name} against {kind}")
    if as_json:
        print_json({"inputs": _shapes(feeds), "comparisons": rows})
    else:
        print(table([("input", name, shape) for name, shape in _shapes(feeds).items()]))
        header = ("against", "output", "relative error", "cosine", "max abs error", "")
        print(table([_row(row) for row in rows], header, right=(2, 3, 4)))
    if missed:
        limits = f"relative error {max_rel_error:g} against lowbit, cosine {min_cosine:g} against original"
        raise BudgetError(f"outside the limits ({limits}): {', '.join(missed)}")


def _row(row: Mapping[str, object]) -> tuple[object, ...]:
    numbers = (f"{row['rel_error']:.3g}", f"{row['cosine']:.6f}", f"{row['max_abs']:.3g}")
    return row["against"], row["output"], *numbers, "ok" if row["ok"] else "MISSED"


def _shapes(feeds: Mapping[str, np.ndarray]) -> dict[str, str]:
    return {name: f"{array.dtype} {list(array.shape)}" for name, array in feeds.items()}
