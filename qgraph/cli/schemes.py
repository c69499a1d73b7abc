"""`qgraph schemes`: the table of schemes."""

from __future__ import annotations

from dataclasses import asdict

import click

from qgraph.cli.console import print_json, table
from qgraph.cli.options import json_option, standard_options
from qgraph.schemes import SCHEMES


@click.command()
@json_option
@standard_options
def command(as_json: bool) -> None:
    """List the schemes that `--scheme` takes."""
    if as_json:
        print_json([asdict(scheme) for scheme in SCHEMES.values()])
        return
    rows = [(s.name, s.summary, f"{s.bits_per_weight:g}", ", ".join(s.solvers)) for s in SCHEMES.values()]
    print(table(rows, header=("scheme", "what it is", "bits/weight", "solvers, best first")))
