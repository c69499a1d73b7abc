"""What benchmarks of whole models share: where models and texts are, and the options that say which."""

from __future__ import annotations

import argparse
import os
from collections.abc import Collection
from pathlib import Path

DATA = Path(os.environ.get("QGRAPH_DATA", Path(__file__).parents[2] / "shared" / "data"))
STORIES = "text/tinystories_v2_gpt4_train_first10k_lines.txt"


def arguments(doc: str | None, known: Collection[str]) -> argparse.ArgumentParser:
    """The options; `doc` is the module's docstring, `known` the names of models."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"of {', '.join(known)}; default: all")
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--minilm", type=Path, help="an exported MiniLM, to save the export")
    return parser


def chosen(
    parser: argparse.ArgumentParser, options: argparse.Namespace, known: Collection[str]
) -> Collection[str]:
    """The models that were asked for; ends the program where one is not known."""
    unknown = [name for name in options.models if name not in known]
    if unknown:
        parser.error(f"unknown model {', '.join(unknown)}; known: {', '.join(known)}")
    return options.models or known
