"""Kernels for tiles (AMX), beside the kernels that they are forms of."""

from __future__ import annotations

import amx
import numpy as np
import pytest
from group_cases import GroupMatMul, random_weight
from int8_cases import Int8MatMul

from qgraph.codegen.digits import digit_rows
from qgraph.codegen.int8_input import int8_input
from qgraph.formats.group import GROUP_FORMATS

pytestmark = amx.required
GROUPS = [spec.name for spec in GROUP_FORMATS if int8_input(spec.name)]
SHAPES = ((172, 49), (37, 3), (512, 80))
ROWS = (9, 16, 17, 33, 100)


@pytest.mark.parametrize("weight_format", GROUPS)
@pytest.mark.parametrize("digits", [3, 2, 1])
def test_digits_give_the_bits_of_vnni(weight_format: str, digits: int) -> None:
    assert digit_rows(weight_format, "", 16)
    fewer = {} if digits == 3 else {"digits": digits}
    packing = "2bit" if weight_format == "ternary" else ""
    for K, N in SHAPES:
        q = random_weight(weight_format, K, N)
        tiles, base = (GroupMatMul(isa, q, packing, **fewer) for isa in (amx.ISA, amx.BASE))
        for M in (8, *ROWS):
            x, before = tiles.inputs(M), amx.steps()
            got = tiles.run(x)
            assert (amx.steps() > before) == (M > 8 or amx.NATIVE)
            np.testing.assert_array_equal(got, base.run(x))


@pytest.mark.parametrize("weight_format", GROUPS)
def test_int8_activations_give_the_bits_of_vnni(weight_format: str) -> None:
    for K, N in SHAPES:
        tiles, base = (Int8MatMul(isa, weight_format, K, N) for isa in (amx.ISA, amx.BASE))
        for M in (8, *ROWS):
            x, before = tiles.inputs(M), amx.steps()
            got = tiles.run(x)
            assert (amx.steps() > before) == (M > 8 or amx.NATIVE)
            np.testing.assert_array_equal(got, base.run(x))
