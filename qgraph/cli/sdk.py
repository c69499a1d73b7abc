"""`qgraph sdk`: what a C or C++ program is built against."""

from __future__ import annotations

from pathlib import Path

import click

from qgraph.cli.console import make_progress, print_json, table
from qgraph.cli.options import json_option, quiet_option, standard_options


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True, metavar="DIR", help="A new folder.")
@click.option(
    "--amalgamation",
    is_flag=True,
    help="Write the runtime as qgraph.h, qgraph.hpp and qgraph.cc instead, for a build system of your own.",
)
@json_option
@quiet_option
@standard_options
def command(out: Path, amalgamation: bool, as_json: bool, quiet: bool) -> None:
    """Build the C and C++ runtime and install it to the folder DIR: headers, static and shared library, CMake
    package, pkg-config file, examples. Needs CMake and a C++17 compiler; with --amalgamation neither."""
    from qgraph.runtime import sdk

    with make_progress(quiet) as progress:
        progress.phase("write" if amalgamation else "build")
        files = sdk.write_amalgamation(out) if amalgamation else sdk.install(out)
    if as_json:
        print_json({"files": [str(path) for path in files]})
    else:
        print(table([("wrote", path) for path in files]))
