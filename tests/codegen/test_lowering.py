"""What the lowering makes of small graphs: which steps, which epilogues, which copies.

Numbers are checked end to end in tests/codegen/test_operators.py; here it is structure.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
from onnx import numpy_helper, shape_inference

from qgraph.codegen.lowering import Lowering, lower, supported_ops
from qgraph.codegen.lowering.context import ATTRIBUTES, HANDLERS
from qgraph.codegen.plan import make_plan
from qgraph.errors import InputError, UnsupportedError


def graph(text: str, **weights: np.ndarray) -> ir.Graph:
    """A graph in ONNX's text form, with initializers, shapes inferred."""
    model = onnx.parser.parse_model(f'<ir_version: 11, opset_import: ["" : 23]> agraph {text}')
    model.graph.initializer.extend(
        numpy_helper.from_array(np.asarray(value), name) for name, value in weights.items()
    )
    model = shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    return ir.from_proto(model).graph


def ops(low: Lowering) -> list[str]:
    return [step.spec.op for step in low.steps]


HANDLED_TOGETHER = {h: [op for op, other in HANDLERS.items() if other is h] for h in HANDLERS.values()}
W = np.zeros((64, 32), np.float32)
BIAS = np.zeros(32, np.float32)


def test_bias_and_activation_become_the_epilogue():
    low = lower(
        graph(
            "(float[B, S, 64] x) => (float[B, S, 32] y) { h = MatMul(x, w) a = Add(b, h) y = Gelu(a) }",
            w=W,
            b=BIAS,
        )
    )
    assert ops(low) == ["matmul_f32"]
    assert low.steps[0].spec["epilogue"] == ("bias", "gelu_erf")
    assert [buffer.kind for kind, buffer, _ in low.steps[0].args[:4] if kind == "v"] == [
        "output",
        "input",
        "weight",
        "weight",
    ]


def test_residual_of_the_same_shape_is_fused_and_a_broadcast_one_is_not():
    text = "(float[B, S, 64] x, float[{}] r) => (float[B, S, 32] y) {{ h = MatMul(x, w) y = Add(h, r) }}"
    same = lower(graph(text.format("B, S, 32"), w=W))
    assert ops(same) == ["matmul_f32"] and same.steps[0].spec["epilogue"] == ("residual",)
    other = lower(graph(text.format("B, 1, 32"), w=W))
    assert ops(other) == ["matmul_f32", "elementwise"] and other.steps[0].spec["epilogue"] == ()


def test_a_gate_is_fused_and_a_broadcast_factor_is_not():
    text = (
        "(float[B, S, 64] x) => (float[B, S, 32] y)"
        "{{ g = MatMul(x, w) u = MatMul(x, w2) a = Relu(g) y = Mul({}) }}"
    )
    for order in ("a, u", "u, a"):
        low = lower(graph(text.format(order), w=W, w2=W + 1))
        assert ops(low) == ["matmul_f32", "matmul_f32"]
        assert sorted(e for step in low.steps for e in step.spec["epilogue"]) == ["factor", "relu"]
    low = lower(graph(text.format("u, b"), w=W, w2=W + 1, b=BIAS))
    assert ops(low) == ["matmul_f32", "elementwise"] and low.steps[0].spec["epilogue"] == ()


def test_a_product_used_twice_is_computed_once_and_not_changed():
    low = lower(
        graph(
            "(float[B, 64] x) => (float[B, 32] y, float[B, 32] z)"
            "{ h = MatMul(x, w) y = Relu(h) z = Add(h, b) }",
            w=W,
            b=BIAS,
        )
    )
    assert ops(low) == ["matmul_f32", "elementwise", "elementwise"] and low.steps[0].spec["epilogue"] == ()


def test_an_output_that_is_read_on_is_computed_in_the_callers_memory():
    low = lower(
        graph("(float[B, 64] x) => (float[B, 32] h, float[B, 32] y) { h = MatMul(x, w) y = Relu(h) }", w=W)
    )
    assert ops(low) == ["matmul_f32", "elementwise"]
    assert {b.kind for s in low.steps for k, b, *_ in s.args if k == "v"} == {"input", "weight", "output"}


def test_elementwise_chains_are_one_kernel():
    low = lower(
        graph(
            "(float[B, S] x, float[B, S] z) => (float[B, S] y)"
            "{ a = Mul(x, c) b = Sigmoid(a) d = Mul(x, b) e = Sub(d, z) y = Sqrt(e) }",
            c=np.float32(1.702),
        )
    )
    assert ops(low) == ["elementwise"]
    assert low.steps[0].spec["rank"] == 1 and low.steps[0].spec["inputs"] == ("f32", "f32")


def test_heads_are_split_and_merged_without_copies():
    low = lower(
        graph(
            """(float[B, S, 64] x) => (float[B, S, 64] y) {
              r = Reshape(x, split) q = Transpose<perm = [0, 2, 1, 3]>(r)
              a = Attention(q, q, q) t = Transpose<perm = [0, 2, 1, 3]>(a)
              m = Reshape(t, merge) y = MatMul(m, w)
            }""",
            split=np.array([0, 0, 4, 16]),
            merge=np.array([0, 0, 64]),
            w=np.zeros((64, 64), np.float32),
        )
    )
    assert ops(low) == ["attention", "matmul_f32"]


def test_a_transposed_output_is_copied():
    low = lower(graph("(float[B, S] x) => (float[S, B] y) { y = Transpose(x) }"))
    assert ops(low) == ["elementwise"]


def test_an_input_that_is_an_output_is_copied():
    low = lower(graph("(float[B, S] x) => (float[B, S] y) { y = Identity(x) }"))
    assert ops(low) == ["elementwise"] and low.steps[0].spec["expr"] == ("in", 0)


def test_concat_computes_into_the_result():
    low = lower(
        graph("(float[B, S] x, float[B, T] z) => (float[B, U] y) { a = Relu(x) y = Concat<axis = 1>(a, z) }")
    )
    assert ops(low) == ["elementwise", "elementwise"]
    assert all(step.args[0][1].kind == "output" for step in low.steps)


def test_shape_arithmetic_leaves_no_steps():
    low = lower(
        graph(
            "(float[B, 4, 8] x) => (float[B, 32] y)"
            "{ s = Shape(x) b = Gather(s, zero) u = Unsqueeze(b, axis)"
            "  t = Concat<axis = 0>(u, rest) y = Reshape(x, t) }",
            zero=np.array(0),
            axis=np.array([0]),
            rest=np.array([32]),
        )
    )
    assert ops(low) == ["elementwise"]  # the copy to the output


def test_unknown_operators_are_named_with_their_nodes():
    with pytest.raises(UnsupportedError, match=r"NonZero \('odd'\)") as caught:
        lower(graph("(float[B, S] x) => (int64[2, N] y) { [odd] y = NonZero(x) }"))
    assert "\n" not in str(caught.value)


def test_unsupported_types_are_named():
    with pytest.raises(UnsupportedError, match="'x' has data type FLOAT16"):
        lower(graph("(float16[B, S] x) => (float16[B, S] y) { y = Relu(x) }"))


def test_a_mask_for_fewer_keys_is_refused():
    """ONNX pads it with "do not attend"; taking it for a broadcast one would be a wrong result."""
    text = (
        "(float[B, 2, S, 8] q, float[B, 2, S, 8] k, bool[S, {}] m) => (float[B, 2, S, 8] y)"
        "{{ y = Attention(q, k, k, m) }}"
    )
    assert ops(lower(graph(text.format("S")))) == ["attention"]
    with pytest.raises(UnsupportedError, match="mask for 1 of S keys"):
        lower(graph(text.format("1")))


def test_attributes_are_honoured_or_refused():
    """Declared attributes exist; an undeclared one is refused unless it has its default value."""
    for (domain, op), names in ATTRIBUTES.items():
        if domain == "" and len(HANDLED_TOGETHER[HANDLERS[domain, op]]) == 1:
            versions = [
                s for s in onnx.defs.get_all_schemas_with_history() if s.name == op and s.domain == ""
            ]
            assert names <= {a for s in versions for a in s.attributes}, op
    model = graph("(float[B, S] x, float[B, S] z) => (float[B, S] y) { y = Add(x, z) }")
    model[0].attributes.add(ir.AttrInt64("strange", 1))
    with pytest.raises(UnsupportedError, match="attribute strange = 1 is not supported"):
        lower(model)


def test_ports_that_the_runtime_would_refuse():
    twice = graph("(float[B, S] x) => (float[B, S] y) { y = Relu(x) }")
    twice.outputs.append(twice.outputs[0])
    with pytest.raises(UnsupportedError, match="output 'y' is listed 2 times"):
        lower(twice)
    nul = graph("(float[B, S] x) => (float[B, S] y) { y = Relu(x) }")
    nul.inputs[0].name = "a\0b"
    with pytest.raises(UnsupportedError, match=r"input 'a\\x00b'"):
        lower(nul)
    none = graph("(float[B, S] x) => (float[B, S] y) { y = Relu(x) }")
    none.outputs.clear()
    with pytest.raises(InputError, match="no outputs"):
        lower(none)
    with pytest.raises(UnsupportedError, match="cannot be held"):
        make_plan(
            lower(graph("(float[1099511627776, 1099511627776] x) => (float[] y) { y = ReduceSum(x) }")), []
        )


def test_listing():
    assert {"MatMul", "Attention", "ai.qgraph::QLinearNVFP4"} <= set(supported_ops())
