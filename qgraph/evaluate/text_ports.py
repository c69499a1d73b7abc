"""What the inputs of a causal language model take of a text, and what its outputs give back for the next run.

Exporters agree on names: `input_ids` [batch, sequence], `attention_mask` [batch, tokens so far],
`position_ids` [batch, sequence], and where there is a cache `past_key_values.N.key`, `.value` [batch, heads,
tokens before, width], given back as `present.N.key`, `.value`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qgraph.errors import InputError, UnsupportedError, UsageError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from qgraph.evaluate.samples import InputSpec
    from qgraph.runtime import Model

METADATA_KEY = "qgraph.cache"  # JSON: [past input, present output] of the ONNX file, for every state

IDS, MASK, POSITIONS = "input_ids", "attention_mask", "position_ids"
_PAST = ("past_key_values", "past")  # what such an input begins with
_PRESENT = ("present_key_values", "present")


@dataclass(frozen=True)
class TextPorts:
    """The inputs of a causal model: those for tokens, and those of its cache with the outputs they come back
    as."""

    tokens: tuple[InputSpec, ...]
    cache: Mapping[str, str]  # past input -> present output
    pasts: tuple[InputSpec, ...]

    def feeds(self, ids: npt.NDArray[np.int64], held: int) -> dict[str, npt.NDArray]:
        """The token inputs for `ids` [batch, sequence] behind `held` tokens, none of them padding."""
        import numpy as np

        batch, sequence = ids.shape
        found = {}
        for spec in self.tokens:
            if spec.name == MASK:
                values = np.ones((batch, held + sequence), spec.dtype)
            elif spec.name == POSITIONS:
                values = np.broadcast_to(np.arange(held, held + sequence), ids.shape)
            else:
                values = ids
            found[spec.name] = np.ascontiguousarray(values, spec.dtype)
        return found


def empty_cache(pasts: Iterable[InputSpec], feeds: Mapping[str, npt.NDArray]) -> dict[str, npt.NDArray]:
    """Cache inputs before the first token, of length 0, for as many rows as `feeds` have.

    Raises UnsupportedError where heads or width are not fixed.
    """
    import numpy as np

    batch = next((len(array) for array in feeds.values() if array.ndim), 1)
    found = {}
    for spec in pasts:
        rows, heads, _, width = spec.shape if len(spec.shape) == 4 else ("?",) * 4
        if not (isinstance(heads, int) and isinstance(width, int)):
            raise UnsupportedError(
                f"cache input '{spec.name}' is {list(spec.shape)}: expected [batch, heads, past, width] with "
                "fixed heads and width"
            )
        shape = (rows if isinstance(rows, int) else batch, heads, 0, width)
        found[spec.name] = np.zeros(shape, spec.dtype)
    return found


def artifact_cache(model: Model) -> dict[str, str]:
    """Past input -> present output, of the ONNX file that a loaded artifact with state was built from.

    Raises InputError when what is written there is something else.
    """
    try:
        pairs = json.loads(model.metadata.get(METADATA_KEY, "[]"))
        if not all(isinstance(name, str) for pair in pairs for name in pair):
            raise ValueError
        return dict(pairs)
    except (ValueError, TypeError, RecursionError):
        raise InputError(
            f"{model.path}: its metadata '{METADATA_KEY}' is not JSON of pairs of names: compile it again"
        ) from None


def new_tokens_dim(specs: Iterable[InputSpec], total: str) -> int | str | None:
    """Which dim of an artifact's inputs counts the tokens of a run, where `total` counts all: axis 1 of
    `input_ids`, else of the first input of integers [batch, ..] that is another."""
    spec = _tokens_input(specs, total)
    return None if spec is None else spec.shape[1]


def new_tokens(model: Model, feeds: Mapping[str, npt.NDArray]) -> int:
    """How many tokens a run of an artifact with state on `feeds` adds to it; 0 where nothing tells."""
    from qgraph.evaluate.samples import input_specs

    total = next((dim.name for dim in model.dims if dim.kind == "total"), "")
    spec = _tokens_input(input_specs(model), total)
    ids = None if spec is None else feeds.get(spec.name)
    return ids.shape[1] if ids is not None and ids.ndim == 2 else 0


def _tokens_input(specs: Iterable[InputSpec], total: str) -> InputSpec | None:
    found = [
        spec
        for spec in sorted(specs, key=lambda spec: spec.name != IDS)
        if len(spec.shape) == 2 and spec.dtype.startswith("int") and spec.shape[1] != total
    ]
    return next(iter(found), None)


def no_logit(token: int, vocabulary: int, where: str = "") -> InputError:
    """The error for a token that the model cannot have meant; `where` it stands, if that is worth saying."""
    return InputError(f"token {token}{where} has no logit among {vocabulary}: is this the model's tokenizer?")


def text_ports(
    specs: Sequence[InputSpec], outputs: Iterable[str], *, logits: str = "logits", where: str = "the model"
) -> TextPorts:
    """The ports of a model with these inputs and outputs.

    Raises UsageError for a model that is no causal language model (no `input_ids`, no `logits`, inputs of
    another kind), UnsupportedError for a cache that does not come back.
    """
    outputs = tuple(outputs)
    if logits not in outputs:
        raise UsageError(
            f"{where} has no output '{logits}'; it has {', '.join(outputs)}: is it a causal language model?"
        )
    tokens = tuple(spec for spec in specs if spec.name in (IDS, MASK, POSITIONS) and len(spec.shape) == 2)
    pasts = tuple(spec for spec in specs if _suffix(spec.name, _PAST) and len(spec.shape) == 4)
    foreign = [spec for spec in specs if spec not in tokens and spec not in pasts]
    if foreign or IDS not in {spec.name for spec in tokens}:
        raise UsageError(
            f"{where} has the inputs {', '.join(f'{s.name} {list(s.shape)}' for s in specs)}: a text gives "
            f"{IDS}, {MASK} and {POSITIONS}, each of two dimensions, and a cache {_PAST[0]}.*"
        )
    presents = {_suffix(name, _PRESENT): name for name in outputs}
    cache = {}
    for spec in pasts:
        present = presents.get(_suffix(spec.name, _PAST))
        if present is None:
            raise UnsupportedError(
                f"{where}: cache input '{spec.name}' has no output that brings it up to date, such as "
                f"'{_PRESENT[1]}{_suffix(spec.name, _PAST)}'"
            )
        cache[spec.name] = present
    return TextPorts(tokens, cache, pasts)


def _suffix(name: str, prefixes: Iterable[str]) -> str:
    """What follows the first of `prefixes` that `name` begins with; empty if none."""
    return next((name[len(p) :] for p in prefixes if name.startswith(p)), "")
