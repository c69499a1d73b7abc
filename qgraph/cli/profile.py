"""`qgraph profile`: where the time of an artifact goes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from qgraph.cli.console import place, print_json, table
from qgraph.cli.options import device_option, json_option, public_key_option, standard_options, threads_option
from qgraph.cli.tensors import make_feeds, tensor_options
from qgraph.errors import UsageError

if TYPE_CHECKING:
    import numpy as np

    from qgraph.evaluate.profile import Summary
    from qgraph.runtime import Model, Profile

_SLOWEST = 15


@click.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@tensor_options
@click.option(
    "--past",
    type=click.IntRange(0),
    default=0,
    help="Tokens that a decoder with state has read before; --dim sequence=1 is a token behind them.",
)
@click.option("--repeat", type=click.IntRange(1), default=20, show_default=True, help="Timed runs.")
@click.option("--all", "every", is_flag=True, help=f"List all steps, not the {_SLOWEST} slowest.")
@threads_option
@device_option
@public_key_option
@json_option
@standard_options
def command(
    artifact: Path,
    inputs: tuple[str, ...],
    dims: tuple[str, ...],
    seed: int,
    past: int,
    repeat: int,
    every: bool,
    threads: int,
    device: str | None,
    public_key: bytes | None,
    as_json: bool,
) -> None:
    """Time every step of a run of the file ARTIFACT (.qg): by kernel, then step by step. Times are means over
    the faster half of the runs, and add up to the wall time of a run."""
    from qgraph.evaluate.profile import kernel_name
    from qgraph.runtime import load

    with load(artifact, threads=threads, device=device, public_key=public_key) as model:
        if past and (inputs or not model.has_state):
            raise UsageError("--past is for decoders with state, on seeded tokens")
        feeds = make_feeds(model, inputs, dims, seed)
        found, used = _profile(model, feeds, bool(inputs), past, repeat)
        where = place(model, used)
    if as_json:
        steps = [{"name": step.name, "kernel": step.kernel, "us": us} for step, us in found.steps]
        shapes = {name: list(array.shape) for name, array in feeds.items()}
        print_json(
            {
                "threads": used,
                "device": model.device,
                "inputs": shapes,
                "past": past,
                "runs": found.runs,
                "wall_us": found.wall_us,
                "between_us": found.between_us,
                "steps": steps,
            }
        )
        return
    shown = ", ".join(f"{name} {list(array.shape)}" for name, array in feeds.items())
    print(f"{where}; {shown}{f'; behind {past} tokens' if past else ''}\n")
    rows: list[tuple[object, ...]] = [
        (f"{us:.1f}", f"{us / found.wall_us:.1%}", count, name) for name, count, us in found.kernels
    ]
    rows.append((f"{found.between_us:.1f}", f"{found.between_us / found.wall_us:.1%}", "", "between steps"))
    rows.append((f"{found.wall_us:.1f}", "100.0%", len(found.steps), "all"))
    print(table(rows, ("us", "share", "steps", "kernel"), right=(0, 1, 2)))
    slowest = list(found.steps) if every else sorted(found.steps, key=lambda item: -item[1])[:_SLOWEST]
    print(
        "\n"
        + table([(f"{us:.1f}", s.name, kernel_name(s)) for s, us in slowest], ("us", "step", "kernel"), (0,))
    )


def _profile(
    model: Model, feeds: dict[str, np.ndarray], given: bool, past: int, repeat: int
) -> tuple[Summary, int]:
    """The profile, and the number of threads. What a user gives is run as it is."""
    import numpy as np

    from qgraph.evaluate.decoders import stateful_decoder
    from qgraph.evaluate.profile import measure
    from qgraph.evaluate.runners import run_capacity
    from qgraph.evaluate.text_ports import IDS

    if given or not model.has_state or IDS not in feeds:
        with model.session(capacity=run_capacity(model, feeds)) as session:

            def run() -> Profile:
                if model.has_state:
                    session.reset()
                return session.profile(feeds)

            return measure(run, repeat), session.threads
    ids = feeds[IDS]
    decoder = stateful_decoder(model, room=past + ids.shape[1])
    if past:
        decoder.feed(np.resize(ids, (len(ids), past)), last=True)

    def step() -> Profile:
        decoder.truncate(past)
        return decoder.profile(ids)

    return measure(step, repeat), decoder.threads
