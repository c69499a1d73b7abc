"""`qgraph keygen`: a key pair to sign artifacts with."""

from __future__ import annotations

from pathlib import Path

import click

from qgraph.cli.console import print_json, table
from qgraph.cli.options import json_option, standard_options


@click.command()
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    required=True,
    metavar="NAME",
    help="Write NAME.pem, the private key, and NAME.pub, the public one. Neither may be there.",
)
@json_option
@standard_options
def command(output: Path, as_json: bool) -> None:
    """Make a key pair of Ed25519. Whoever has the private one can sign: let nobody else read it."""
    from qgraph.signing import generate_key, read_public_key

    private, public = generate_key(output)
    key = read_public_key(public).hex()
    if as_json:
        print_json({"private": str(private), "public": str(public), "key": key})
    else:
        print(table([("private", private), ("public", public), ("key", key)]))
