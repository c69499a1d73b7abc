"""`qgraph sign`: say who an artifact is from."""

from __future__ import annotations

from pathlib import Path

import click

from qgraph.cli.console import print_json, table
from qgraph.cli.options import json_option, refuse_overwrite, standard_options


@click.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option(
    "--key", type=click.Path(path_type=Path), required=True, help="The private key, a PEM file of Ed25519."
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="Write the signed artifact here.  [default: in place of ARTIFACT]",
)
@json_option
@standard_options
def command(artifact: Path, key: Path, output: Path | None, as_json: bool) -> None:
    """Sign the file ARTIFACT (.qg), whose bytes are all checked first. A signature that it has is replaced.
    The password of an encrypted key is taken from $QGRAPH_KEY_PASSWORD."""
    from qgraph.signing import sign

    if output is not None:
        refuse_overwrite("--output", output, [key])
    public = sign(artifact, key, output).hex()
    written = output or artifact
    if as_json:
        print_json({"artifact": str(written), "key": public})
    else:
        print(table([("wrote", written), ("signed by", public)]))
