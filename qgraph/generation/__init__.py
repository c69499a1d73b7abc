"""Text from a causal language model, token by token.

for token in qgraph.open_generator("model.qg", "tokenizer.json").stream("Once upon a time"):
    print(token.text, end="", flush=True)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qgraph.generation.generator import Generation, Generator, Timing, Token, generate, open_generator
    from qgraph.generation.sampling import Sampling

__all__ = [
    "MAX_SAMPLES",
    "MAX_TOKENS",
    "Generation",
    "Generator",
    "Sampling",
    "Timing",
    "Token",
    "generate",
    "open_generator",
]

MAX_TOKENS = 128  # of a text, by default
MAX_SAMPLES = 4096  # of one prompt


def __getattr__(name: str) -> Any:
    if name in __all__:
        import importlib

        module = "sampling" if name == "Sampling" else "generator"
        return getattr(importlib.import_module(f"qgraph.generation.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
