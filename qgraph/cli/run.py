"""`qgraph run`: one inference."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from qgraph.cli.console import escape, print_json, table
from qgraph.cli.options import (
    device_option,
    json_option,
    public_key_option,
    refuse_overwrite,
    standard_options,
    threads_option,
)
from qgraph.cli.tensors import input_files, make_feeds, tensor_options
from qgraph.config import did_you_mean
from qgraph.errors import UsageError

if TYPE_CHECKING:
    import numpy as np


@click.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@tensor_options
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Write the outputs to this .npz file.")
@click.option("--isa", help="Use this code variant rather than the best one for the device.")
@device_option
@public_key_option
@threads_option
@json_option
@standard_options
def command(
    artifact: Path,
    inputs: tuple[str, ...],
    dims: tuple[str, ...],
    seed: int,
    output: Path | None,
    isa: str | None,
    device: str | None,
    public_key: bytes | None,
    threads: int,
    as_json: bool,
) -> None:
    """Run the file ARTIFACT (.qg) once. Loading an artifact equals running a program: run only those you
    trust."""
    import numpy as np

    from qgraph.codegen.cuda.arch import ARCHS
    from qgraph.codegen.isa import ISAS
    from qgraph.evaluate.runners import run_once
    from qgraph.runtime import load

    known = [*ISAS, *(arch.name for arch in ARCHS)]
    if isa is not None and isa not in known:
        raise UsageError(f"unknown isa '{isa}'{did_you_mean(isa, known)}")
    if output is not None:
        refuse_overwrite("--output", output, [artifact, *input_files(inputs)])
    with load(artifact, threads=threads, isa=isa, device=device, public_key=public_key) as model:
        feeds = make_feeds(model, inputs, dims, seed)
        outputs = run_once(model, feeds)
        variant, used = model.isa, model.device
    if output is not None:
        from qgraph.atomic import atomic_write

        with atomic_write(output) as temporary, Path(temporary).open("wb") as file:
            np.savez(file, **outputs)  # type: ignore[arg-type]
    rows = [("input", name, array) for name, array in feeds.items()]
    rows += [("output", name, array) for name, array in outputs.items()]
    if as_json:
        print_json({"isa": variant, "device": used, "tensors": [_describe(*row) for row in rows]})
        return
    print(table([(kind, name, f"{a.dtype} {list(a.shape)}", _statistics(a)) for kind, name, a in rows]))
    if output is not None:
        print(f"wrote {escape(str(output))}")


def _describe(kind: str, name: str, array: np.ndarray) -> dict[str, object]:
    return {
        "kind": kind,
        "name": name,
        "dtype": array.dtype.name,
        "shape": list(array.shape),
        "values": _statistics(array),
    }


def _statistics(array: np.ndarray) -> str:
    if array.size == 0:
        return "empty"
    values = array.astype("f8")
    return f"mean {values.mean():.6g}, min {values.min():.6g}, max {values.max():.6g}"
