"""The plan: memory sharing never lets two live temporaries overlap, and the JSON says what the steps say."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
import sympy
from hypothesis import given, settings
from hypothesis import strategies as st

from qgraph.codegen.dims import symbol
from qgraph.codegen.memory import Buffer
from qgraph.codegen.plan import _assign_slots, _dims
from qgraph.errors import QGraphError, UnsupportedError

B = symbol("batch")


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_slots_of_live_temporaries_are_distinct(data):
    count = data.draw(st.integers(1, 12))
    temps = [Buffer("temp", "f32", (sympy.Integer(data.draw(st.integers(1, 100))), B)) for _ in range(count)]
    steps = [
        data.draw(st.lists(st.sampled_from(temps), min_size=1, max_size=3))
        for _ in range(data.draw(st.integers(1, 20)))
    ]
    steps.append(list(temps))  # each is used somewhere
    cut = data.draw(st.integers(0, count))
    steps = [[b for b in s if b in temps[:cut]] for s in steps] + [[b] for b in temps[cut:]]
    slot, slots = _assign_slots(steps, temps)
    assert set(slot) == set(temps) and set(slot.values()) == set(range(slots))
    life = {b: [i for i, s in enumerate(steps) if b in s] for b in temps}
    for i, a in enumerate(temps):
        for b in temps[i + 1 :]:
            overlap = life[a][0] <= life[b][-1] and life[b][0] <= life[a][-1]
            assert not (overlap and slot[a] == slot[b])


def test_chain_needs_two_slots():
    temps = [Buffer("temp", "f32", (B,)) for _ in range(6)]
    slot, slots = _assign_slots([[a, b] for a, b in pairwise(temps)], temps)
    assert slots == 2 and [slot[t] for t in temps] == [0, 1, 0, 1, 0, 1]


def test_dims_come_from_whole_input_dimensions():
    S = symbol("sequence")
    x = Buffer("input", "i64", (B, S))
    mask = Buffer("input", "i64", (B, sympy.expand(2 * S)))
    assert [d["name"] for d in _dims([x, mask], [])] == ["batch", "sequence"]
    json.dumps(_dims([x, mask], []))
    with pytest.raises(QGraphError, match="'sequence' is the whole dimension of no input"):
        _dims([mask], [])


def test_checks_against_numbers_bound_the_dims():
    x = Buffer("input", "i64", (B,))
    limits = [(sympy.Integer(512), B, ""), (B, sympy.Integer(3), ""), (sympy.Integer(600), B, "")]
    assert _dims([x], limits) == [{"name": "batch", "min": 3, "max": 512}]
    with pytest.raises(UnsupportedError, match="no size of 'batch'"):
        _dims([x], [*limits, (sympy.Integer(2), B, "")])
