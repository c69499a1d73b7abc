"""A decoder of our own: Llama's architecture, 3.7 M weights, trained by `train.py` on short stories.

It is small enough to travel with the sources (7.3 MB of float16), so that generation can be shown and tested
without a download. README.md says what it was trained on and how good it is.
"""

from __future__ import annotations

from pathlib import Path

from qgraph.models.causal_lm import CausalLM

HELD_OUT = Path(__file__).parent / "held_out.txt"  # stories that it was not trained on
SEPARATOR = "<|endoftext|>"  # between them, and token 0


class TinyStories(CausalLM):
    """See `qgraph.models.base.ExportableModel`."""

    def __init__(self) -> None:
        super().__init__(Path(__file__).parent)
        self.name = "tinystories"
        self.title = "TinyStories, a decoder of 3.7 M weights"
