"""The tests of the CPU's kernels on the emulated GPU: the same operands, references and limits."""

from __future__ import annotations

import types
from collections.abc import Callable

import pytest

from qgraph.codegen.isa import Isa

pytest.register_assert_rewrite(
    "test_attention", "test_attention_decode", "test_dynamic_quantize", "test_elementwise", "test_gather",
    "test_gather_columns", "test_norm", "test_reduce",
)  # fmt: skip

import test_attention  # noqa: E402
import test_attention_decode  # noqa: E402
import test_dynamic_quantize  # noqa: E402
import test_elementwise  # noqa: E402
import test_gather  # noqa: E402
import test_gather_columns  # noqa: E402
import test_norm  # noqa: E402
import test_reduce  # noqa: E402

CUDA = Isa("cuda", "cuda", "", "", (), (), 1, "", "")
MODULES = (
    test_attention,
    test_attention_decode,
    test_dynamic_quantize,
    test_elementwise,
    test_gather,
    test_gather_columns,
    test_norm,
    test_reduce,
)
# What is about the CPU's code: its blocks and ranges, stack, vectors and machine code. And casts of every
# type to every other, 49 kernels: those out of range are among the rest.
LEFT_OUT = (
    "test_query_blocks_and_splits",
    "test_empty_ranges_touch_nothing",
    "test_any_split_of_the_blocks_gives_the_same_bits",
    "test_every_operator_links_where_it_cannot_run",
    "test_links",
    "test_links_and_stays_on_a_small_stack",
    "test_cast",
)


def _on_cuda(function: Callable[..., None]) -> Callable[..., None] | None:
    """The test with its `isa` replaced; None for one that has none."""
    marks = [m for m in getattr(function, "pytestmark", []) if m.name == "parametrize"]
    if not any(m.args[0] == "isa" for m in marks):
        return None
    copy = types.FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    copy.__annotations__ = function.__annotations__
    copy.pytestmark = [m for m in function.pytestmark if m.args[:1] != ("isa",)]  # type: ignore[attr-defined]
    return pytest.mark.parametrize("isa", [CUDA], ids=["cuda"])(copy)


for _module in MODULES:
    for _name, _test in list(vars(_module).items()):
        if _name.startswith("test_") and _name not in LEFT_OUT and callable(_test):
            _copy = _on_cuda(_test)
            if _copy is not None:
                globals()[f"{_name}__{_module.__name__.removeprefix('test_')}"] = _copy
