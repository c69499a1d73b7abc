# ruff: noqa: E501 (one graph a line is easier to read)
"""Shape inference against real runs: every rule, at several sizes, with every intermediate value compared."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from prepare_harness import check_shapes, feeds_for, parse, run_ort

from qgraph.errors import InputError, UnsupportedError
from qgraph.passes.infer_shapes import CHECKS, CONTENT, InferShapes

SIZES = [{"b": 2, "s": 7, "t": 4}, {"b": 3, "s": 10, "t": 8}, {"b": 1, "s": 1, "t": 4}]
I64 = np.int64


def infer(text: str, opset: int = 23, **weights: np.ndarray) -> ir.Model:
    model = parse(text, opset, **weights)
    InferShapes()(model)
    return model


# One graph a line: the body computes y from x and, where named, further inputs.
GRAPHS = {
    "elementwise": "(float[b,s,4] x, float[s,1] z) => (float[b,s,4] y) { a = Relu(x) b1 = Add(a, z) y = Mul(b1, x) }",
    "comparison": "(float[b,s] x) => (bool[b,s] y) { z = Neg(x) c = Greater(x, z) d = LessOrEqual(x, z) y = Or(c, d) }",
    "where_cast": "(float[b,s] x) => (float[b,s] y) { c = Cast<to=9>(x) z = Abs(x) y = Where(c, x, z) }",
    "isnan_clip": "(float[b,s] x) => (bool[b,s] y) { c = Clip(x) y = IsNaN(c) }",
    "matmul_batched": "(float[b,1,s,4] x, float[t,4,5] z) => (float[b,t,s,5] y) { y = MatMul(x, z) }",
    "matmul_vectors": "(float[4] x, float[b,4,s] z) => (float[b,s] y) { y = MatMul(x, z) }",
    "matmul_dot": "(float[s] x, float[s] z) => (float y) { y = MatMul(x, z) }",
    "gemm": "(float[4,s] x, float[5,4] z) => (float[s,5] y) { y = Gemm<transA=1,transB=1>(x, z) }",
    "einsum": '(float[b,s,4] x, float[b,t,4] z) => (float[b,s,t] y) { y = Einsum<equation="bsd,btd->bst">(x, z) }',
    "einsum_implicit": '(float[s,4] x, float[4,t] z) => (float[s,t] y) { y = Einsum<equation="ij,jk">(x, z) }',
    "transpose": "(float[b,s,4] x) => (float[4,b,s] y) { y = Transpose<perm=[2,0,1]>(x) }",
    "transpose_default": "(float[b,s,4] x) => (float[4,s,b] y) { y = Transpose(x) }",
    "flatten": "(float[b,s,4] x) => (float[n,m] y) { a = Flatten<axis=2>(x) b0 = Flatten<axis=0>(x) y = Add(a, a) z = Neg(b0) }",
    "flatten_negative": "(float[b,s,4] x) => (float[n,m] y) { y = Flatten<axis=-1>(x) }",
    "softmax": "(float[b,s] x) => (float[b,s] y) { a = Softmax(x) y = LogSoftmax<axis=0>(a) }",
    "concat": "(float[b,s] x, float[b,t] z) => (float[b,n] y) { y = Concat<axis=-1>(x, z, x) }",
    "split_even": "(float[b,8] x) => (float[b,4] y) { y, z = Split<axis=1,num_outputs=2>(x) }",
    "split_uneven": "(float[b,7] x) => (float[b,3] y) { y, z, w = Split<axis=1,num_outputs=3>(x) }",
    "layer_norm": "(float[b,s,4] x, float[4] w) => (float[b,s,4] y) { y, m, i = LayerNormalization(x, w) }",
    "layer_norm_axis": "(float[b,3,4] x, float[3,4] w) => (float[b,3,4] y) { y, m, i = LayerNormalization<axis=1>(x, w) }",
    "rms_norm": "(float[b,s,4] x, float[4] w) => (float[b,s,4] y) { y = RMSNormalization(x, w) }",
    "argmax": "(float[b,s] x) => (int64[b] y) { y = ArgMax<axis=1,keepdims=0>(x) z = ArgMin<axis=0>(x) }",
    "gather_rows": "(float[9,4] x, int64[b,s] i) => (float[b,s,4] y) { y = Gather(x, i) }",
    "gather_scalar_axis": "(float[b,8,4] x, int64 i) => (float[b,4] y) { y = Gather<axis=1>(x, i) }",
    "gather_elements": "(float[b,8] x, int64[b,3] i) => (float[b,3] y) { y = GatherElements<axis=1>(x, i) }",
    "gather_nd": "(float[8,5,3] x, int64[b,s,2] i) => (float[b,s,3] y) { y = GatherND(x, i) }",
    "gather_nd_batch": "(float[b,5,6,3] x, int64[b,s,1] i) => (float[b,s,6,3] y) { y = GatherND<batch_dims=1>(x, i) }",
    "size_shape": "(float[b,s,4] x) => (int64[1] y) { n = Size(x) h = Shape<start=-2,end=3>(x) y = Shape<start=1>(h) }",
    "dropout": "(float[b,s] x) => (float[b,s] y) { y, m = Dropout(x) }",
    "global_pool": "(float[b,3,s,8] x) => (float[b,3,1,1] y) { y = GlobalAveragePool(x) }",
    "conv": "(float[b,4,s,9] x, float[6,2,1,3] w) => (float[b,6,n,m] y) { y = Conv<group=2,strides=[1,2],pads=[0,1,0,1]>(x, w) }",
    "conv_same": '(float[b,3,s,9] x, float[6,3,3,3] w) => (float[b,6,n,m] y) { y = Conv<auto_pad="SAME_UPPER",strides=[2,2]>(x, w) }',
    "conv_patches": "(float[b,3,16,16] x, float[5,3,8,8] w) => (float[b,5,2,2] y) { y = Conv<strides=[8,8]>(x, w) }",
    "max_pool": "(float[b,3,9,9] x) => (float[b,3,n,m] y) { y, i = MaxPool<kernel_shape=[2,3],strides=[2,2],ceil_mode=1>(x) }",
    "average_pool": "(float[b,3,9,9] x) => (float[b,3,n,m] y) { y = AveragePool<kernel_shape=[3,3],pads=[1,1,1,1]>(x) }",
    "one_hot": "(int64[b,s] x, int64 d) => (float[b,s,5] y) { y = OneHot(x, depth, values) }",
    "depth_to_space": "(float[b,8,s,3] x) => (float[b,2,n,6] y) { y = DepthToSpace<blocksize=2>(x) }",
    "attention_4d": "(float[b,4,s,8] q, float[b,2,t,8] k, float[b,2,t,6] v) => (float[b,4,s,6] y) { y = Attention(q, k, v) }",
    "attention_3d": "(float[b,s,32] q, float[b,t,16] k, float[b,t,16] v) => (float[b,s,32] y) "
    "{ y, pk, pv, qk = Attention<q_num_heads=4,kv_num_heads=2>(q, k, v) }",
    "attention_past": "(float[b,4,s,8] q, float[b,4,s,8] k, float[b,4,s,8] v, float[b,4,p,8] pk, float[b,4,p,8] pv, "
    "float[s,n] m) => (float[b,4,s,8] y) { y, nk, nv = Attention(q, k, v, m, pk, pv) }",
    "rotary": "(float[b,4,s,8] x, float[b,s,4] c, float[b,s,4] i) => (float[b,4,s,8] y) { y = RotaryEmbedding(x, c, i) }",
    "rotary_positions": "(float[b,s,32] x, int64[b,s] p) => (float[b,s,32] y) { y = RotaryEmbedding<num_heads=4>(x, c, i, p) }",
    "cumsum_trilu": "(float[s,s] x) => (float[s,s] y) { c = CumSum(x, axis) y = Trilu(c) }",
    "quantize": "(float[b,s] x) => (float[b,s] y) { q = QuantizeLinear(x, scale, zero) y = DequantizeLinear(q, scale, zero) }",
    "dynamic_quantize": "(float[b,s] x) => (uint8[b,s] y) { y, a, z = DynamicQuantizeLinear(x) }",
}
WEIGHTS = {
    "rotary_positions": {"c": np.ones((16, 4), np.float32), "i": np.zeros((16, 4), np.float32)},
    "one_hot": {"depth": np.array(5, I64), "values": np.array([0, 1], np.float32)},
    "cumsum_trilu": {"axis": np.array(0, I64)},
    "quantize": {"scale": np.array(0.1, np.float32), "zero": np.array(3, np.uint8)},
}


@pytest.mark.parametrize("name", GRAPHS)
def test_rule_matches_onnxruntime(name: str) -> None:
    text = GRAPHS[name]
    if name == "one_hot":
        text = text.replace(", int64 d", "")
    model = infer(text, **WEIGHTS.get(name, {}))
    sizes = [{**s, "p": 5, "n": s["s"] + 5} for s in SIZES] if name == "attention_past" else SIZES
    if name == "conv_same":
        sizes = SIZES[:2]
    assert check_shapes(model, sizes, high=3) >= len(sizes)


REDUCTIONS = ["Max", "Mean", "Min", "Prod", "Sum", "L1", "L2", "SumSquare", "LogSum", "LogSumExp"]


@pytest.mark.parametrize("kind", REDUCTIONS)
def test_reductions(kind: str) -> None:
    model = infer(
        f"(float[b,s,4] x) => (float[b,4] y) {{ y = Reduce{kind}<keepdims=0>(x, axes) z = Reduce{kind}(x) "
        f"w = Reduce{kind}<noop_with_empty_axes=1>(x) v = Reduce{kind}(x, last) }}",
        axes=np.array([1], I64),
        last=np.array([-1, -2], I64),
    )
    check_shapes(model, SIZES)


def shaped(target: list[int], **more: np.ndarray) -> dict[str, np.ndarray]:
    return {"target": np.array(target, I64), **more}


@pytest.mark.parametrize(
    ("target", "attributes", "expected"),
    [
        ([0, 0, 2, 2], "", "[b,s,2,2]"),
        ([0, -1], "", "[b,4*s]"),
        ([-1, 4], "", "[b*s,4]"),
        ([-1], "", "[4*b*s]"),
        ([0, 0, -1], "", "[b,s,4]"),
        ([2, -1, 2], "", "[2,b*s,2]"),
    ],
)
def test_reshape(target: list[int], attributes: str, expected: str) -> None:
    model = infer(
        f"(float[b,s,4] x) => (float[n] y) {{ y = Reshape{attributes}(x, target) }}", **shaped(target)
    )
    assert str(model.graph.outputs[0].shape) == expected
    check_shapes(model, SIZES)


def test_reshape_that_must_divide_records_a_check() -> None:
    model = infer("(float[b,t] x) => (float[b,n,4] y) { y = Reshape(x, target) }", **shaped([0, -1, 4]))
    assert str(model.graph.outputs[0].shape) == "[b,floor(t/4),4]"
    ((a, b, message),) = model.graph.meta[CHECKS]
    assert message == "b*t must be a multiple of 4*b (reshape 'n0')"
    bound = {"b": 2, "t": 8}
    assert a.evaluate(bound) >= b.evaluate(bound)
    assert a.evaluate({"b": 2, "t": 7}) < b.evaluate({"b": 2, "t": 7})
    check_shapes(model, [{"b": 2, "t": 8}, {"b": 3, "t": 4}])


def test_reshape_from_computed_shape() -> None:
    """What dynamo writes for `view(batch, sequence, -1, 32)`."""
    model = infer(
        "(float[b,s,96] x) => (float[n] y) { b1 = Shape<start=0,end=1>(x) s1 = Shape<start=1,end=2>(x)"
        " t = Concat<axis=0>(b1, s1, minus, heads) y = Reshape<allowzero=1>(x, t) }",
        minus=np.array([-1], I64),
        heads=np.array([32], I64),
    )
    assert str(model.graph.outputs[0].shape) == "[b,s,3,32]"
    content = next(n for n in model.graph if n.op_type == "Concat").outputs[0].meta[CONTENT]
    assert list(map(str, content)) == ["b", "s", "-1", "32"]
    check_shapes(model, SIZES)


def test_torchscript_expand_idiom() -> None:
    """Where(Equal(target, -1), Shape, target), the TorchScript exporter's `expand`."""
    model = infer(
        "(float[b,s] x) => (float[n] y) { n1 = Shape(x) one = ConstantOfShape<value=int64[1]{1}>(rank)"
        " m = Mul(one, minus) e = Equal(target, m) w = Where(e, one, target) y = Expand(x, w) }",
        rank=np.array([3], I64),
        minus=np.array(-1, I64),
        target=np.array([5, -1, -1], I64),
    )
    assert str(model.graph.outputs[0].shape) == "[5,b,s]"
    check_shapes(model, SIZES)


def test_arithmetic_on_shapes() -> None:
    """Division, remainder, casts through float and products are followed exactly."""
    model = infer(
        "(float[b,s,12] x) => (int64[1] y) { b1 = Shape<start=0,end=1>(x) s1 = Shape<start=1,end=2>(x)"
        " p = Mul(b1, s1) q = Div(p, two) r = Mod(s1, two) d = Div(twelve_p, three) "
        " f = Cast<to=1>(s1) g = Div(f, twof) h = Floor(g) c = Ceil(g) hi = Cast<to=7>(h) ci = Cast<to=7>(c)"
        " mx = Max(b1, s1) mn = Min(b1, one) su = Sub(p, b1) n = Neg(b1) pr = ReduceProd(sh) sh2 = Identity(sh)"
        " y = Concat<axis=0>(q, r, d, hi, ci, mx, mn, su, n, pr) }".replace(
            "q = Div", "twelve_p = Mul(p, twelve) sh = Shape(x) q = Div"
        ),
        two=np.array([2], I64),
        three=np.array([3], I64),
        twelve=np.array([12], I64),
        one=np.array([1], I64),
        twof=np.array([2], np.float32),
    )
    content = model.graph.outputs[0].meta[CONTENT]
    assert [str(c) for c in content] == [
        "floor(b*s/2)",
        "s - 2*floor(s/2)",
        "4*b*s",
        "floor(s/2)",
        "-floor(-s/2)",
        "Max(b, s)",
        "1",
        "b*s - b",
        "-b",
        "12*b*s",
    ]
    check_shapes(model, SIZES)


@pytest.mark.parametrize(
    ("start", "end", "step", "expected"),
    [
        (0, 2**63 - 1, 1, "s"),
        (1, 2**31 - 1, 1, "s - 1"),
        (0, -1, 1, "s - 1"),
        (-1, 2**63 - 1, 1, "1"),
        (0, 5, 1, "Min(5, s)"),
        (0, 2**63 - 1, 2, "floor(s/2 + 1/2)"),
        (-1, -(2**63), -1, "s"),
        (-1, -(2**63), -2, "floor(s/2 + 1/2)"),
    ],
)
def test_slice_of_a_named_dimension(start: int, end: int, step: int, expected: str) -> None:
    model = infer(
        "(float[b,s,4] x) => (float[b,n,4] y) { y = Slice(x, start, end, axes, steps) }",
        start=np.array([start], I64),
        end=np.array([end], I64),
        axes=np.array([1], I64),
        steps=np.array([step], I64),
    )
    assert str(model.graph.outputs[0].shape[1]) == expected
    check_shapes(model, SIZES)


@pytest.mark.parametrize(
    ("start", "end", "step"), [(1, 3, 1), (-3, -1, 1), (3, -10, -1), (2, -9, -2), (7, 9, 1), (0, 9, 3)]
)
def test_slice_of_constants_follows_content(start: int, end: int, step: int) -> None:
    model = infer(
        "(float[b] x) => (int64[n] y) { y = Slice(data, start, end, axes, steps) z = Neg(x) }",
        data=np.arange(5, dtype=I64),
        start=np.array([start], I64),
        end=np.array([end], I64),
        axes=np.array([0], I64),
        steps=np.array([step], I64),
    )
    check_shapes(model, SIZES[:1])


def test_position_table_gives_a_check() -> None:
    """A constant of 512 rows sliced by the sequence length must be long enough: found when it meets `s`."""
    model = infer(
        "(float[b,s,4] x) => (float[b,s,4] y) { n = Shape<start=1,end=2>(x) p = Slice(table, zero, n, zero)"
        " y = Add(x, p) }",
        table=np.zeros((512, 4), np.float32),
        zero=np.array([0], I64),
    )
    assert str(model.graph.outputs[0].shape) == "[b,s,4]"
    assert str(next(n for n in model.graph if n.op_type == "Slice").outputs[0].shape) == "[s,4]"
    ((bound, limited, message),) = model.graph.meta[CHECKS]
    assert (bound, str(limited), message) == (512, "s", "s must be at most 512 (table)")
    check_shapes(model, SIZES)


def test_positions_after_a_past_need_one_check() -> None:
    """table[past : past + s] of 64 rows: one bound implies the other."""
    model = infer(
        "(float[b,s,4] x, float[b,p,4] k) => (float[b,s,4] y) { n = Shape<start=1,end=2>(x) o = Shape<start=1,end=2>(k)"
        " e = Add(n, o) t = Slice(table, o, e, zero) y = Add(x, t) }",
        table=np.zeros((64, 4), np.float32),
        zero=np.array([0], I64),
    )
    messages = [m for *_, m in model.graph.meta[CHECKS]]
    assert "p + s must be at most 64 (table)" in messages
    check_shapes(model, [{"b": 2, "s": 3, "p": 5}, {"b": 1, "s": 1, "p": 63}])


def test_range_expand_gather_nd() -> None:
    """The mask arithmetic of dynamo exports, where ONNX's own inference gives up."""
    model = infer(
        "(int64[b,s] mask) => (int64[n] y) { nb = Shape<start=0,end=1>(mask) ns = Shape<start=1,end=2>(mask)"
        " b0 = Squeeze(nb) s0 = Squeeze(ns) rb = Range(zero, b0, one) rs = Range(zero, s0, one)"
        " ub = Unsqueeze(rb, a12) us = Unsqueeze(rs, a01) m = Max(ub, us) sh = Shape(m) eb = Expand(ub, sh)"
        " es = Expand(us, sh) vb = Unsqueeze(eb, last) vs = Unsqueeze(es, last) c = Concat<axis=-1>(vb, vs)"
        " y = GatherND(mask, c) }",
        zero=np.array(0, I64),
        one=np.array(1, I64),
        a12=np.array([1, 2], I64),
        a01=np.array([0, 1], I64),
        last=np.array([-1], I64),
    )
    assert str(model.graph.outputs[0].shape) == "[b,1,s]"
    check_shapes(model, SIZES)


@pytest.mark.parametrize(
    ("start", "limit", "delta"), [(0, 10, 3), (10, 0, -3), (0.0, 1.0, 0.3), (5, 0, 1), (1.5, 4.5, 1.0)]
)
def test_range_of_constants(start: float, limit: float, delta: float) -> None:
    dtype = np.float32 if isinstance(start, float) else I64
    kind = "float" if dtype == np.float32 else "int64"
    model = infer(
        f"(float[b] x) => ({kind}[n] y) {{ y = Range(start, limit, delta) z = Neg(x) }}",
        start=np.array(start, dtype),
        limit=np.array(limit, dtype),
        delta=np.array(delta, dtype),
    )
    check_shapes(model, SIZES[:1])


def test_layout_operators() -> None:
    model = infer(
        "(float[b,s,1,4] x) => (float[n] y) { a = Squeeze(x, two) c = Unsqueeze(a, ends) t = Tile(a, repeats)"
        " p = Pad(a, pads) q = Pad(a, pads1, value, one) e = Expand(a, target) k, i = TopK(a, count)"
        " r = Resize(x, , scales) y = Concat<axis=0>(a, a) w = ConstantOfShape(shape) o = EyeLike(g) g = Flatten(a) }".replace(
            "o = EyeLike(g) g = Flatten(a)", "g = Flatten(a) o = EyeLike(g)"
        ),
        two=np.array([2], I64),
        ends=np.array([0, -1], I64),
        repeats=np.array([2, 1, 3], I64),
        pads=np.array([0, 1, 2, 0, 0, 1], I64),
        pads1=np.array([2, 3], I64),
        value=np.array(0, np.float32),
        one=np.array([1], I64),
        target=np.array([6, 1, 1, 1], I64),
        count=np.array([2], I64),
        scales=np.array([1, 2, 1, 1], np.float32),
        shape=np.array([2, 3], I64),
    )
    check_shapes(model, SIZES)


def test_split_of_a_named_dimension() -> None:
    model = infer("(float[t,3] x) => (float[n,3] y) { y, z = Split<axis=0,num_outputs=2>(x) }")
    check_shapes(model, [{"t": 4}, {"t": 8}])


def test_unnamed_dimensions_get_names() -> None:
    model = parse(
        "(float[?,4] x, float[?,4] z) => (float[n] y) { y = Concat<axis=0>(x, z) }".replace("?", "n")
    )
    for value in model.graph.inputs:
        value.shape = ir.Shape([None, 4])
    InferShapes()(model)
    assert [str(v.shape) for v in model.graph.inputs] == ["[x_dim0,4]", "[z_dim0,4]"]
    assert str(model.graph.outputs[0].shape) == "[x_dim0 + z_dim0,4]"


def test_names_that_are_no_identifiers_are_cleaned() -> None:
    model = parse("(float[n,4] x) => (float[n] y) { y = Neg(x) }")
    model.graph.inputs[0].shape = ir.Shape(["batch size\x1b[31m", 4])
    InferShapes()(model)
    name = model.graph.inputs[0].shape[0].value
    assert name.isidentifier() and name.startswith("batch_size")


def test_expression_over_other_inputs_is_kept() -> None:
    """Attention masks of decoder exports are declared as `past + sequence`."""
    model = parse(
        "(float[s,4] x, float[p,4] k, float[n,4] m) => (float[n] y) { c = Concat<axis=0>(x, k) y = Add(c, m) }"
    )
    model.graph.inputs[2].shape = ir.Shape([ir.SymbolicDim("p + s"), 4])
    InferShapes()(model)
    assert str(model.graph.outputs[0].shape) == "[p + s,4]"
    assert model.graph.meta[CHECKS] == []


def test_dimensions_that_must_agree_are_declared_equal() -> None:
    """Two names for one size: the input says so afterwards, and the report too."""
    model = parse("(float[s,4] x, float[m,4] z) => (float[s,4] y) { y = Add(x, z) }")
    step = InferShapes()
    step(model)
    assert str(model.graph.inputs[1].shape) == "[s,4]"
    assert "dimension 'm' is taken to equal 's'" in step.refusals[0].reason
    assert not InferShapes()(model).modified


def test_dynamic_dimension_that_meets_a_number_becomes_it() -> None:
    model = infer("(float[s,4] x) => (float[s,4] y) { y = Add(x, w) }", w=np.zeros((8, 4), np.float32))
    assert str(model.graph.inputs[0].shape) == "[8,4]"


@pytest.mark.parametrize(
    ("body", "weights", "message"),
    [
        ("y = MatMul(x, w)", {"w": np.zeros((5, 4), np.float32)}, "node 'n0' (MatMul): the inner dimensions"),
        ("y = Add(x, w)", {"w": np.zeros((2, 3), np.float32)}, "do not broadcast"),
        ("y = Reshape(x, w)", {"w": np.array([3, 5], I64)}, "do not fit"),
        ("y = Reshape(x, w)", {"w": np.array([-1, -1], I64)}, "two dimensions open"),
        ("y = Transpose<perm=[0,0]>(x)", {}, "not a permutation"),
        ("y = Softmax(x) z = Unsqueeze(x, w)", {"w": np.array([5], I64)}, "out of range"),
        ("y = Squeeze(x, w)", {"w": np.array([1], I64)}, "squeezed axis 1"),
        ("y = Concat<axis=3>(x, x)", {}, "axis 3 is out of range"),
        ("y = Add(x, w)", {"w": np.zeros(4, np.int64)}, "its inputs are FLOAT and INT64"),
        ("y = Not(x)", {}, "may not be FLOAT"),
        ("y = Conv<strides=[0]>(w, w)", {"w": np.zeros((1, 1, 4), np.float32)}, "must be positive"),
    ],
)
def test_wrong_models_are_refused(body: str, weights: dict, message: str) -> None:
    with pytest.raises(InputError, match="node 'n") as caught:
        infer(f"(float[2,4] x) => (float[n] y) {{ {body} }}", **weights)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("y = NonZero(x)", "node 'n0' (NonZero): the size of its output depends on data"),
        ("y = Unique(x)", "(Unique)"),
        (
            "i = Cast<to=7>(x) y = Reshape(x, i)",
            "node 'n1' (Reshape): its target shape ('i') depends on data",
        ),
        ("y = com.acme.Thing(x)", "(com.acme::Thing): this operator is not supported"),
    ],
)
def test_what_cannot_be_known_is_named(body: str, message: str) -> None:
    with pytest.raises(UnsupportedError) as caught:
        InferShapes()(parse(f"(float[b] x) => (float[n] y) {{ {body} }}", imports=', "com.acme" : 1'))
    assert message in str(caught.value)


def test_checks_survive_a_second_run() -> None:
    """A pass may remove the node that needed a check; the check stays."""
    model = infer(
        "(float[b,s,4] x) => (float[b,s,4] y) { n = Shape<start=1,end=2>(x) p = Slice(table, zero, n, zero) y = Add(x, p) }",
        table=np.zeros((512, 4), np.float32),
        zero=np.array([0], I64),
    )
    before = model.graph.meta[CHECKS]
    add = next(n for n in model.graph if n.op_type == "Add")
    add.replace_input_with(1, add.inputs[0])
    assert not InferShapes()(model).modified
    assert model.graph.meta[CHECKS] == before


def test_a_wrong_annotation_in_the_file_is_ignored() -> None:
    model = parse("(float[b,4] x) => (float[b,9] y) { y = Neg(x) }")
    InferShapes()(model)
    assert str(model.graph.outputs[0].shape) == "[b,4]"
    assert run_ort(model, feeds_for(model))[0].shape == (3, 4)


# -- axes -----------------------------------------------------------------------------------------------------

AXES = {
    "Softmax": "y = Softmax<axis=AXIS>(x)",
    "LogSoftmax": "y = LogSoftmax<axis=AXIS>(x)",
    "Hardmax": "y = Hardmax<axis=AXIS>(x)",
    "LpNormalization": "y = LpNormalization<axis=AXIS>(x)",
    "LayerNormalization": "y = LayerNormalization<axis=AXIS>(x, w)",
    "RMSNormalization": "y = RMSNormalization<axis=AXIS>(x, w)",
    "ReduceSum": "a = Constant<value_ints=[AXIS]>() y = ReduceSum(x, a)",
    "ArgMax": "y = ArgMax<axis=AXIS>(x)",
    "TopK": "k = Constant<value_ints=[1]>() y, z = TopK<axis=AXIS>(x, k)",
    "Concat": "y = Concat<axis=AXIS>(x, x)",
    "Split": "y, z = Split<axis=AXIS,num_outputs=2>(x)",
    "Gather": "y = Gather<axis=AXIS>(x, i)",
    "GatherElements": "y = GatherElements<axis=AXIS>(x, i)",
    "ScatterElements": "y = ScatterElements<axis=AXIS>(x, i, x)",
    "Flatten": "y = Flatten<axis=AXIS>(x)",
    "Squeeze": "a = Constant<value_ints=[AXIS]>() y = Squeeze(x, a)",
    "Unsqueeze": "a = Constant<value_ints=[AXIS]>() y = Unsqueeze(x, a)",
    "CumSum": "a = Constant<value_int=AXIS>() y = CumSum(x, a)",
    "OneHot": "d = Constant<value_int=3>() v = Constant<value_ints=[0, 1]>() y = OneHot<axis=AXIS>(i, d, v)",
    "MeanVarianceNormalization": "y = MeanVarianceNormalization<axes=[AXIS]>(x)",
    "QuantizeLinear": "y = QuantizeLinear<axis=AXIS>(x, w)",
    "DequantizeLinear": "q = Cast<to=2>(x) y = DequantizeLinear<axis=AXIS>(q, w)",
    "TensorScatter": "y = TensorScatter<axis=AXIS>(x, x)",
}


@pytest.mark.parametrize("axis", [-7, 7])
@pytest.mark.parametrize("op", AXES)
def test_axis_out_of_range(op: str, axis: int) -> None:
    from qgraph.passes.lift_constants import LiftConstants

    opset = 24 if op == "TensorScatter" else 23
    model = parse(
        f"(float[b,4] x, int64[b,4] i) => (float[n,m] y) {{ {AXES[op].replace('AXIS', str(axis))} }}",
        opset,
        w=np.ones(4, np.float32),
    )
    LiftConstants()(model)
    with pytest.raises(InputError, match=f"{op}.*axis {axis} is out of range for rank"):
        InferShapes()(model)


def test_softmax_of_a_scalar_has_no_axis() -> None:
    with pytest.raises(InputError, match="axis -1 is out of range for rank 0"):
        infer("(float x) => (float y) { y = Softmax(x) }")


def test_gather_nd_batch_dims_out_of_range() -> None:
    for batch_dims in (-1, 2):
        with pytest.raises(InputError, match=f"batch_dims {batch_dims} is out of range"):
            infer(
                f"(float[b,4] x, int64[b,1] i) => (float[b] y) {{ y = GatherND<batch_dims={batch_dims}>(x, i) }}"
            )


def test_quantization_of_a_whole_tensor_ignores_its_axis() -> None:
    for scale in (np.array(1, np.float32), np.ones(1, np.float32)):
        infer("(float[4] x) => (uint8[4] y) { y = QuantizeLinear<axis=1>(x, w) }", w=scale)


# -- squeeze without axes ---------------------------------------------------------------------------------------


def test_squeeze_without_axes_of_a_dimension_that_may_be_1() -> None:
    with pytest.raises(UnsupportedError, match=r"Squeeze.*names no axes, and 's' may be 1 or more"):
        infer("(float[4,s] x) => (float y) { y = Squeeze(x) }")


def test_squeeze_without_axes() -> None:
    model = infer("(float[1,4,s] x) => (float[n,m] y) { a = Concat<axis=2>(x, x) y = Squeeze(a) }")
    assert str(model.graph.outputs[0].shape) == "[4,2*s]"
    check_shapes(model, SIZES)
