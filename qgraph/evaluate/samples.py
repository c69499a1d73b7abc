"""Seeded inputs that a model accepts: token ids inside their tables, masks that keep everything.

What an integer input may hold is found in the graph: one that reaches the indices of a lookup is bounded by
its table. The pipeline writes the ranges into the artifact (`METADATA_KEY`), where the graph is no longer at
hand.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qgraph.errors import InputError, UsageError

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

    from qgraph.runtime import Model

METADATA_KEY = "qgraph.input_ranges"  # JSON: input name -> [lowest, highest]

# Operators that look up in a table, by the input that holds the indices; of the first two inputs the other is
# the table. `QGatherColumns<Format>` is another, whose indices come first and pick columns.
_INDICES = {"Gather": 1, "GatherElements": 1, "QGatherNVFP4": 0}
_COLUMNS = "QGatherColumns"

# Operators that hand on the integers they are given, by the input that carries them.
_CARRIERS = dict.fromkeys(
    (
        "Cast",
        "Expand",
        "Flatten",
        "Identity",
        "Reshape",
        "Slice",
        "Squeeze",
        "Tile",
        "Transpose",
        "Unsqueeze",
    ),
    0,
)


@dataclass(frozen=True)
class InputSpec:
    """An input as the user sees it: `shape` holds ints and the names (or expressions) of symbolic dims.

    past: whether it is the cache of a decoder, [batch, heads, tokens before, width]: empty where a text
        begins.
    """

    name: str
    dtype: str  # numpy's name
    shape: tuple[int | str, ...]
    past: bool = False


def input_ranges(model: ir.Model) -> dict[str, tuple[int, int]]:
    """Input name -> (lowest, highest) for the integer and bool inputs of `model`.

    An index gets all of its smallest table, anything else exactly 1: true for a mask, one for a length or
    flag.
    """
    tables = table_sizes(model)
    return {
        str(value.name): (0, tables[str(value.name)] - 1) if value.name in tables else (1, 1)
        for value in model.graph.inputs
        if value.dtype is not None and not value.dtype.is_floating_point()
    }


def table_sizes(model: ir.Model) -> dict[str, int]:
    """Input name -> rows of the smallest constant table that it indexes, for the inputs that do."""
    sizes = {str(value.name): list(_table_sizes(value)) for value in model.graph.inputs}
    return {name: min(found) for name, found in sizes.items() if found}


def _table_sizes(value: ir.Value) -> Iterator[int]:
    """The lengths of the constant tables that `value` indexes, through operators that keep integers as they
    are."""
    seen, work = {value}, [value]
    while work:
        for node, index in work.pop().uses():
            columns = node.op_type.startswith(_COLUMNS)
            if (0 if columns else _INDICES.get(node.op_type)) == index:
                table = node.inputs[1 - index]
                axis = 1 if columns else node.attributes.get_int("axis", 0)
                size = table.shape[axis] if table is not None and table.shape is not None else None
                if isinstance(size, int):
                    yield size
            elif _CARRIERS.get(node.op_type) == index and node.outputs[0] not in seen:
                seen.add(node.outputs[0])
                work.append(node.outputs[0])


def input_specs(model: Model) -> list[InputSpec]:
    """The inputs of a loaded artifact."""
    return [InputSpec(info.name, info.dtype.name, info.shape) for info in model.inputs]


def artifact_ranges(model: Model) -> dict[str, tuple[int, int]]:
    """The ranges that the compiler wrote into a loaded artifact; none when another tool made it.

    Raises InputError when what is written there is something else.
    """
    try:
        ranges = json.loads(model.metadata.get(METADATA_KEY, "{}"))
        return {name: _range(bounds) for name, bounds in ranges.items()}
    except (ValueError, AttributeError, RecursionError):
        raise InputError(
            f"{model.path}: its metadata '{METADATA_KEY}' is not JSON of input name -> [lowest, highest]: "
            "compile the model again"
        ) from None


def _range(bounds: object) -> tuple[int, int]:
    """(lowest, highest) of a pair of int64. Raises ValueError for anything else."""
    if not isinstance(bounds, list) or [type(bound) for bound in bounds] != [int, int]:
        raise ValueError("not a pair of integers")
    low, high = bounds
    if not -(2**63) <= low <= high < 2**63:
        raise ValueError("not a range of int64")
    return low, high


def choose_dims(
    inputs: Sequence[InputSpec], given: Mapping[str, int], defaults: Mapping[str, int] | None = None
) -> dict[str, int]:
    """A size for every symbolic dim of `inputs`: `given`, else `defaults`, else 1 for a batch and 16 for the
    rest.

    Raises UsageError when `given` names a dim that no input has, or is below 1.
    """
    names = {
        dim: None for spec in inputs for dim in spec.shape if isinstance(dim, str) and dim.isidentifier()
    }
    for name, size in given.items():
        if name not in names:
            raise UsageError(
                f"no input has a dim '{name}': the model's are {', '.join(names) or 'all fixed'}"
            )
        if size < 1:
            raise UsageError(f"dim {name} must be at least 1, got {size}")
    chosen = {name: (1 if "batch" in name.lower() else 16) for name in names}
    return {**chosen, **{k: v for k, v in (defaults or {}).items() if k in names}, **given}


def first_run_dims(model: Model, given: Mapping[str, int]) -> dict[str, int]:
    """As `choose_dims`, for a run of a loaded artifact: where it has state, that is empty, and all tokens are
    new."""
    from qgraph.evaluate.text_ports import new_tokens_dim

    specs = input_specs(model)
    chosen = choose_dims(specs, given)
    total = next((dim.name for dim in model.dims if dim.kind == "total"), None)
    if total is not None and total in chosen:
        new = new_tokens_dim(specs, total)
        if isinstance(new, str) and total in given and new not in given:
            chosen[new] = given[total]
        elif total not in given and new is not None:
            chosen[total] = new if isinstance(new, int) else chosen[new]
    return chosen


def make_inputs(
    inputs: Sequence[InputSpec], ranges: Mapping[str, tuple[int, int]], dims: Mapping[str, int], seed: int
) -> dict[str, np.ndarray]:
    """One array an input: floats from a normal distribution, integers uniform in their range, bools true.

    Raises UsageError for a dim whose size is neither in `dims` nor fixed.
    """
    import numpy as np

    rng = np.random.default_rng(seed)
    feeds = {}
    for spec in inputs:
        shape = tuple(_size(spec, dim, dims) for dim in spec.shape)
        dtype = np.dtype(spec.dtype)
        if dtype.kind in "iub":
            low, high = ranges.get(spec.name, (1, 1))
            feeds[spec.name] = rng.integers(low, high, shape, endpoint=True).astype(dtype)
        else:
            feeds[spec.name] = rng.standard_normal(shape, dtype=np.float32).astype(dtype)
    return feeds


def _size(spec: InputSpec, dim: int | str, dims: Mapping[str, int]) -> int:
    if isinstance(dim, int):
        return dim
    if dim in dims:
        return dims[dim]
    raise UsageError(
        f"input '{spec.name}' has the dim '{dim}', whose size is not known: give the input itself"
    )
