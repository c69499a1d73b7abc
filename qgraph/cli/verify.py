"""`qgraph verify`: is an artifact from whom it should be?"""

from __future__ import annotations

from pathlib import Path

import click

from qgraph.cli.console import print_json, table
from qgraph.cli.options import json_option, standard_options


@click.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option(
    "--key",
    type=click.Path(path_type=Path),
    required=True,
    help="The public key that must have signed it, a PEM file of Ed25519.",
)
@json_option
@standard_options
def command(artifact: Path, key: Path, as_json: bool) -> None:
    """Check every byte of the file ARTIFACT (.qg), and that it is signed by a key. Runs nothing of it. Exits
    with 7 when the signature is missing, of another key, or wrong."""
    from qgraph.signing import read_public_key, verify

    public = read_public_key(key)
    verify(artifact, public)
    if as_json:
        print_json({"artifact": str(artifact), "key": public.hex()})
    else:
        print(table([("artifact", artifact), ("signed by", public.hex())]))
