"""Rotary embeddings in every spelling: one operator after the pass, and the outputs of before."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
import onnx_ir as ir
import pytest
from prepare_harness import check_pass, ops, parse, refusals

from qgraph.passes.base import shape_of
from qgraph.passes.fuse_rotary import FuseRotary
from qgraph.passes.infer_shapes import InferShapes

INTS = {
    "zero": [0], "one": [1], "two": [2], "three": [3], "last": [-1], "four": [4], "six": [6],
    "end": [np.iinfo(np.int64).max],
    "pairs": [0, 0, 0, 4, 2], "halves": [0, 0, 0, 2, 4], "flat": [0, 0, 0, 8],
    "i0": 0, "i1": 1,
}  # fmt: skip
FLOATS = {"freq": 1 / 10.0 ** np.arange(4), "freq3": 1 / 10.0 ** np.arange(3), "minus": -1.0, "scale": 1.25}

# What makes angles f [batch, sequence, 4] of position_ids
_ANGLES = """
        p = Cast<to = 1>(position_ids)
        pu = Unsqueeze(p, last)
        f = Mul(pu, freq)"""
_HALVES = (
    _ANGLES
    + """
        t = Concat<axis = -1>(f, f)
        c3 = Cos(t)  s3 = Sin(t)
        c = Unsqueeze(c3, one)  s = Unsqueeze(s3, one)"""
)
_PAIRS = (
    _ANGLES
    + """
        fu = Unsqueeze(f, last)  fe = Concat<axis = -1>(fu, fu)
        t = Reshape(fe, flat3)
        c3 = Cos(t)  s3 = Sin(t)
        c = Unsqueeze(c3, one)  s = Unsqueeze(s3, one)"""
)
_SINGLE = (
    _ANGLES
    + """
        c3 = Cos(f)  s3 = Sin(f)
        c = Unsqueeze(c3, one)  s = Unsqueeze(s3, one)"""
)
_SLICES = """
        a = Slice(x, zero, four, last)  b = Slice(x, four, end, last)"""
_TURN = (
    _SLICES
    + """
        n = Neg(b)
        r = Concat<axis = -1>(n, a)"""
)
_SUM = """
        xc = Mul(x, c)  rs = Mul(r, s)
        y = Add(xc, rs)"""
_CROSS = """
        ac = Mul(a, c)  bs = Mul(b, s)  bc = Mul(b, c)  as = Mul(a, s)
        y1 = Sub(ac, bs)  y2 = Add(bc, as)"""

SPELLINGS = {
    "halves": _HALVES + _TURN + _SUM,
    "halves, split": _HALVES + """
        a, b = Split<axis = -1, num_outputs = 2>(x)
        n = Neg(b)
        r = Concat<axis = -1>(n, a)""" + _SUM,
    "halves, factors and terms swapped": _HALVES + _SLICES + """
        n = Mul(minus, b)
        r = Concat<axis = 3>(n, a)
        xc = Mul(c, x)  rs = Mul(s, r)
        y = Add(rs, xc)""",
    "halves, scaled tables": _HALVES + """
        cs = Mul(c, scale)  ss = Mul(scale, s)""" + _TURN + """
        xc = Mul(x, cs)  rs = Mul(r, ss)
        y = Add(xc, rs)""",
    "halves, the other way": _HALVES + _SLICES + """
        n = Neg(a)
        r = Concat<axis = -1>(b, n)""" + _SUM,
    "halves, the other way, subtracted": _HALVES + _TURN + """
        xc = Mul(x, c)  rs = Mul(r, s)
        y = Sub(xc, rs)""",
    "halves, each by itself": _SINGLE + _SLICES + _CROSS + """
        y = Concat<axis = -1>(y1, y2)""",
    "halves, an axis of their own": _SINGLE + """
        xr = Reshape(x, halves)
        a = Gather<axis = -2>(xr, i0)  b = Gather<axis = -2>(xr, i1)""" + _CROSS + """
        y = Concat<axis = -1>(y1, y2)""",
    "halves, tables computed twice": _ANGLES + """
        c3 = Cos(f)  s3 = Sin(f)  c4 = Cos(f)  s4 = Sin(f)
        cc = Concat<axis = -1>(c3, c4)  ss = Concat<axis = -1>(s3, s4)
        c = Unsqueeze(cc, one)  s = Unsqueeze(ss, one)""" + _TURN + _SUM,
    "halves, outer product": """
        p = Cast<to = 1>(position_ids)
        pu = Unsqueeze(p, one)  fu = Unsqueeze(freq, last)
        ft = MatMul(fu, pu)
        f = Transpose<perm = [0, 2, 1]>(ft)
        t = Concat<axis = -1>(f, f)
        c3 = Cos(t)  s3 = Sin(t)
        c = Unsqueeze(c3, one)  s = Unsqueeze(s3, one)""" + _TURN + _SUM,
    "halves, tables by position": """
        c3 = Gather(cos_table, position_ids)  s3 = Gather(sin_table, position_ids)
        c = Unsqueeze(c3, one)  s = Unsqueeze(s3, one)""" + _TURN + _SUM,
    "halves, negated terms": _SINGLE + _SLICES + """
        ac = Mul(a, c)  bn = Neg(b)  bs = Mul(bn, s)  bc = Mul(b, c)  as = Mul(s, a)
        y1 = Add(ac, bs)  y2 = Add(as, bc)
        y = Concat<axis = -1>(y1, y2)""",
    "pairs": _PAIRS + """
        a = Slice(x, zero, end, last, two)  b = Slice(x, one, end, last, two)
        n = Neg(b)
        nu = Unsqueeze(n, last)  au = Unsqueeze(a, last)
        ru = Concat<axis = -1>(nu, au)
        r = Reshape(ru, flat)""" + _SUM,
    "pairs, each by itself": _SINGLE + """
        xr = Reshape(x, pairs)
        a1, b1 = Split<axis = -1, num_outputs = 2>(xr)
        a = Squeeze(a1, last)  b = Squeeze(b1, last)""" + _CROSS + """
        u1 = Unsqueeze(y1, last)  u2 = Unsqueeze(y2, last)
        yu = Concat<axis = -1>(u1, u2)
        y = Reshape(yu, flat)""",
    "a part": _ANGLES.replace("freq", "freq3") + """
        t = Concat<axis = -1>(f, f)
        c3 = Cos(t)  s3 = Sin(t)
        c = Unsqueeze(c3, one)  s = Unsqueeze(s3, one)
        xr = Slice(x, zero, six, last)  rest = Slice(x, six, end, last)
        a = Slice(xr, zero, three, last)  b = Slice(xr, three, end, last)
        n = Neg(b)
        r = Concat<axis = -1>(n, a)
        xc = Mul(xr, c)  rs = Mul(r, s)
        yr = Add(xc, rs)
        y = Concat<axis = -1>(yr, rest)""",
    "a part, each by itself": _ANGLES.replace("freq", "freq3") + """
        c3 = Cos(f)  s3 = Sin(f)
        c = Unsqueeze(c3, one)  s = Unsqueeze(s3, one)
        a = Slice(x, zero, three, last)  b = Slice(x, three, six, last)  rest = Slice(x, six, end, last)"""
        + _CROSS + """
        y = Concat<axis = -1>(y1, y2, rest)""",
}  # fmt: skip


def graph(body: str, sizes: str = "batch, 3, sequence, 8", outputs: str = "") -> ir.Model:
    table = np.random.default_rng(0).standard_normal((8, 4)).astype(np.float32)
    constants = {name: np.array(value, np.int64) for name, value in INTS.items()}
    constants |= {name: np.array(value, np.float32) for name, value in FLOATS.items()}
    constants["flat3"] = np.array([0, 0, 8], np.int64)
    constants["cos_table"] = np.concatenate([np.cos(table)] * 2, -1)
    constants["sin_table"] = np.concatenate([np.sin(table)] * 2, -1)
    return parse(
        f"""(float[{sizes}] x, int64[batch, sequence] position_ids) => (float[{sizes}] y{outputs}) {{{body}
        }}""",
        **{name: value for name, value in constants.items() if _reads(body, name)},
    )


def _reads(body: str, name: str) -> bool:
    words = body.replace("(", " ").replace(")", " ").replace(",", " ").split()
    return name in words


def rotary_nodes(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph if node.op_type == "RotaryEmbedding"]


@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings(name: str) -> None:
    model = check_pass(graph(SPELLINGS[name]), FuseRotary(), batch=2, sequence=5)
    (node,) = rotary_nodes(model)
    counts = Counter(ops(model))
    assert not {"Slice", "Split", "Concat", "Reshape", "Sub", "Add"} & set(counts), counts
    assert node.inputs[0] is model.graph.inputs[0] and node.outputs[0].is_graph_output()
    assert node.attributes.get_int("interleaved", 0) == name.startswith("pairs")
    assert node.attributes.get_int("rotary_embedding_dim", 0) == (6 if name.startswith("a part") else 0)
    for cache in node.inputs[1:3]:
        assert list(map(str, shape_of(cache) or ())) == ["batch", "sequence", "3" if "part" in name else "4"]


@pytest.mark.parametrize("readers", ["", "one more"])
def test_heads_behind_tokens(readers: str) -> None:
    """x [batch, sequence, heads, size]: transposed before and behind, and not twice where it was already."""
    body = SPELLINGS["halves"].replace("c = Unsqueeze(c3, one)  s = Unsqueeze(s3, one)",
                                       "c = Unsqueeze(c3, two)  s = Unsqueeze(s3, two)")  # fmt: skip
    if not readers:
        model = check_pass(graph(body, "batch, sequence, 3, 8"), FuseRotary(), batch=2, sequence=5)
        assert ops(model)[-3:] == ["Transpose", "RotaryEmbedding", "Transpose"]
        return
    body = body.replace("y = Add", "z = Add") + "\n y = Identity(z)\n t1 = Transpose<perm = [0, 2, 1, 3]>(z)"
    body += "\n w = Neg(t1)"
    model = graph(body, "batch, sequence, 3, 8", outputs=", float[batch, 3, sequence, 8] w")
    model = check_pass(model, FuseRotary(), batch=2, sequence=5)
    (node,) = rotary_nodes(model)
    assert {reader.op_type for reader in node.outputs[0].consumers()} == {"Neg", "Transpose"}


def test_tables_of_one_text() -> None:
    """Caches of batch 1, from a table without axes for batch and heads."""
    body = (
        """
        t = Slice(cos_table, zero, six, zero)  u = Slice(sin_table, zero, six, zero)"""
        + _TURN
    )
    body += """
        xc = Mul(x, t)  rs = Mul(r, u)
        y = Add(xc, rs)"""
    model = graph(body, "1, 3, 6, 8")
    model = check_pass(model, FuseRotary(), batch=1, sequence=6)
    (node,) = rotary_nodes(model)
    assert [list(shape_of(v) or ()) for v in node.inputs[1:3]] == [[1, 6, 4]] * 2


def test_queries_and_keys_share_tables() -> None:
    """Also with those of a RotaryEmbedding that the file has."""
    second = re.sub(r"\b(x|a|b|n|r|xc|rs|y)\b", r"\g<1>2", _TURN + _SUM)
    body = f"""
        x2 = Neg(x){SPELLINGS["halves"]}{second}
        c5 = Cos(f)  s5 = Sin(f)  c6 = Cos(f)
        z = RotaryEmbedding(x2, c5, s5)  v = RotaryEmbedding(x2, c6, s5)"""
    shape = "float[batch, 3, sequence, 8]"
    model = graph(body, outputs=f", {shape} y2, {shape} z, {shape} v")
    model = check_pass(model, FuseRotary(), batch=2, sequence=5)
    assert len(rotary_nodes(model)) == 4
    assert len({node.inputs[1:3] for node in rotary_nodes(model)}) == 1
    assert Counter(ops(model))["Cos"] == Counter(ops(model))["Sin"] == 1


REFUSED = {
    "different angles": (
        _ANGLES + """
        g = Mul(f, scale)
        t = Concat<axis = -1>(f, g)
        c3 = Cos(t)  s3 = Sin(t)
        c = Unsqueeze(c3, one)  s = Unsqueeze(s3, one)""" + _TURN + _SUM,
        "not known to be the same",
    ),
    "pairs of columns, halves of angles": (
        _HALVES + SPELLINGS["pairs"].removeprefix(_PAIRS),
        "not known to be the same",
    ),
    "angles of each head": (
        _HALVES.replace("c = Unsqueeze(c3, one)", "c1 = Unsqueeze(c3, one)  c = Mul(c1, heads)")
        + _TURN + _SUM,
        "the same for all heads",
    ),
    "one position for all": (
        "\n t = Concat<axis = -1>(freq, freq)  c = Cos(t)  s = Sin(t)" + _TURN + _SUM,
        "not one for each position",
    ),
    "another operator behind": (_HALVES + _TURN + "\n xc = Mul(x, c)  rs = Mul(r, s)  y = Max(xc, rs)",
                                "what follows is none"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    body, reason = REFUSED[name]
    model = graph(body)
    if "heads" in body:
        array = np.array([[[1.0]], [[2.0]], [[3.0]]], np.float32)
        model.graph.register_initializer(ir.Value(name="heads", const_value=ir.tensor(array)))
        _rename_input(model, "heads")
    InferShapes()(model)
    step = FuseRotary()
    assert not step(model).modified
    assert any(reason in text for text in refusals([step])), refusals([step])


def _rename_input(model: ir.Model, name: str) -> None:
    """Lets nodes that read an undeclared `name` read the initializer of that name."""
    for node in model.graph:
        for index, value in enumerate(node.inputs):
            if value is not None and value.name == name:
                node.replace_input_with(index, model.graph.initializers[name])


def test_nothing_to_do() -> None:
    body = "\n n = Neg(x)  y = Concat<axis = -1>(n, x)".replace("y = ", "y0 = ") + "\n y = Mul(x, x)"
    model = graph(body)
    InferShapes()(model)
    step = FuseRotary()
    assert not step(model).modified and not step.refusals


def test_tables_come_before_all_readers() -> None:
    """The second value is turned whole, before the Concat that the first one ends with."""
    body = SPELLINGS["a part"].replace("y = Concat<axis = -1>(yr, rest)", "")
    second = """
        xr2 = Slice(w, zero, six, last)
        a2 = Slice(xr2, zero, three, last)  b2 = Slice(xr2, three, end, last)
        n2 = Neg(b2)
        r2 = Concat<axis = -1>(n2, a2)
        xc2 = Mul(xr2, c)  rs2 = Mul(r2, s)
        y2 = Add(xc2, rs2)
        y = Concat<axis = -1>(yr, rest)"""
    model = graph("\n w = Neg(x)" + body + second, outputs=", float[batch, 3, sequence, 6] y2")
    model = check_pass(model, FuseRotary(), batch=2, sequence=5)
    assert [n.attributes.get_int("rotary_embedding_dim", 0) for n in rotary_nodes(model)] == [0, 6]


def test_what_is_refused_leaves_nothing() -> None:
    """The cosines have a half, the sines have not."""
    body = SPELLINGS["halves, tables by position"]
    model = graph(body)
    table = model.graph.initializers["sin_table"]
    array = table.const_value.numpy().copy()
    array[0, 0] += 1
    table.const_value = ir.tensor(array)
    InferShapes()(model)
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    step = FuseRotary()
    assert not step(model).modified and "not known to be the same" in refusals([step])[0]
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before
