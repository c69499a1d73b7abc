"""Sites for shifts of the mean, and where the shifts go: exact for any shift, on what exporters write."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx_ir as ir
import pytest
from exports import export_case, exported
from onnx.reference import ReferenceEvaluator
from prepare_harness import feeds_for, ops, parse, refusals, run_ort
from toy_transformer import block, chosen

from qgraph.errors import UsageError
from qgraph.formats.activations import dynamic_qdq
from qgraph.formats.nvfp4 import global_scale
from qgraph.passes import prepare_model
from qgraph.passes.base import add_initializer, replace_node
from qgraph.passes.check_prepared import violations
from qgraph.passes.fuse_mean_shift import FuseMeanShift
from qgraph.passes.infer_shapes import InferShapes
from qgraph.passes.insert_mean_shift import InsertMeanShift
from qgraph.passes.lowbit_functions import AddLowbitFunctions
from qgraph.passes.lowbit_weights import FORMS, LINEARS, from_node
from qgraph.passes.mean_shift import marked, site_of
from qgraph.passes.quantize_weights import QuantizeWeights
from qgraph.passes.remove_unused import RemoveUnused
from qgraph.passes.select_layers import SelectLayers
from qgraph.schemes import get_scheme


def some_feeds(model: ir.Model) -> dict[str, np.ndarray]:
    # Exporters give RotaryEmbedding a cache of batch 1, which ONNX Runtime refuses for any other batch.
    batch = 1 if "RotaryEmbedding" in ops(model) else 2
    return feeds_for(model, high=2, batch=batch, sequence=5)


def insert(model: ir.Model, where: str = "all") -> list[str]:
    """Runs the pass, which changes no output by a bit. Returns the names of the values that get a shift."""
    feeds = some_feeds(model)
    before = run_ort(model, feeds)
    found = InsertMeanShift(where)(model).modified
    names = [str(add.outputs[0].name) for add in marked(model.graph)]
    assert found == bool(names) and not InsertMeanShift(where)(model).modified
    for a, b in zip(before, run_ort(model, feeds), strict=True):
        np.testing.assert_array_equal(a, b)
    return names


def give_shifts(model: ir.Model, seed: int = 0) -> None:
    """Some shift at every site."""
    rng = np.random.default_rng(seed)
    for add in marked(model.graph):
        site = site_of(add)
        shift = rng.normal(0, 0.5, site.K).astype(np.float32)
        model.graph.initializers[site.shift].const_value = ir.Tensor(shift, name=site.shift)


def fuse(model: ir.Model, run=run_ort) -> FuseMeanShift:
    """Runs the pass and holds it to its promises: equal outputs, names as they were, a second run does
    nothing."""
    feeds = some_feeds(model)
    before, outputs = run(model, feeds), [output.name for output in model.graph.outputs]
    adds = len(list(marked(model.graph)))
    step = FuseMeanShift()
    assert step(model).modified == (len(list(marked(model.graph))) < adds)
    assert not FuseMeanShift()(model).modified
    assert [output.name for output in model.graph.outputs] == outputs
    for a, b in zip(before, run(model, feeds), strict=True):
        np.testing.assert_allclose(b, a, rtol=0, atol=1e-5 * np.abs(a).max())
    shapes = [(v.name, v.dtype, v.shape) for node in model.graph for v in node.outputs]
    InferShapes()(model)
    assert shapes == [(v.name, v.dtype, v.shape) for node in model.graph for v in node.outputs]
    used = {v.name for node in model.graph for v in node.inputs if v is not None}
    assert set(model.graph.initializers) <= used
    return step


def unfused(model: ir.Model) -> list[str]:
    """The names of the values that still come from an Add of a shift."""
    return [str(add.outputs[0].name) for add in marked(model.graph)]


# name, opset, dynamo, operators that folding adds
EXPORTS = [
    ("bert", 23, True, {}),
    ("bert", 18, True, {}),
    ("bert_eager", 17, False, {}),
    ("bert_eager", 14, False, {}),
    ("llama", 23, True, {"Add": 3}),  # gate, up and head get biases
    ("llama", 18, True, {"Add": 3}),
    ("llama", 17, False, {"Add": 3}),
    ("llama", 14, False, {"Add": 3}),
    ("vit", 14, False, {}),
]


@pytest.mark.parametrize(("name", "opset", "dynamo", "added"), [export_case(*case) for case in EXPORTS])
def test_exports(name: str, opset: int, dynamo: bool, added: dict[str, int]) -> None:
    """LayerNorm and RMSNorm models as exporters write them: every shift finds its place, exactly."""
    for where, sites in (("attention", 1), ("all", 2)):
        model = prepare_model(exported(name, opset, dynamo))
        SelectLayers(include=["*"])(model)
        before, names = Counter(ops(model)), {v.name for node in model.graph for v in node.outputs}
        norms = before["LayerNormalization"] + before["RMSNormalization"]
        assert norms == 3 and len(insert(model, where)) == sites
        give_shifts(model)
        step = fuse(model)
        assert not step.refusals and not unfused(model) and not list(violations(model))
        if where == "all":
            assert Counter(ops(model)) - before == added and not before - Counter(ops(model))
            assert names <= {v.name for node in model.graph for v in node.outputs}


def linear_case(reads: str, results: str, **more: np.ndarray) -> ir.Model:
    """x -> w -> RMSNormalization h -> `reads`, prepared, all layers chosen."""
    rng = np.random.default_rng(0)
    outputs = ", ".join(f"float[n, {size}] {name}" for name, size in (r.split(":") for r in results.split()))
    text = f"""(float[n, 64] x) => ({outputs}) {{
        a = MatMul(x, w)
        h = RMSNormalization(a, scale)
        {reads}
    }}"""
    weights = {"w": (64, 64), "v": (64, 96), "u": (64, 32), "b": (96,), "c": (32,)} | {"scale": (64,)}
    arrays = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in weights.items()} | more
    used = {name: a for name, a in arrays.items() if f"{name})" in text or f", {name}," in text}
    return chosen(parse(text, **used))


def decoder(attention: str = "op", *, bias: bool = False, norm: str = "RMSNormalization") -> ir.Model:
    """Two layers of a decoder with grouped heads; its head is the table of the embedding. ids -> y."""
    rng = np.random.default_rng(0)
    arrays: dict[str, np.ndarray] = {"table": rng.standard_normal((80, 64)).astype(np.float32)}
    lines = ["x0 = Gather(table, ids)"]

    def linear(i: int, name: str, x: str, K: int, N: int) -> str:
        arrays[f"w{name}{i}"] = (rng.standard_normal((K, N)) / np.sqrt(K)).astype(np.float32)
        if not bias:
            return f"{name}{i} = MatMul({x}, w{name}{i})"
        arrays[f"b{name}{i}"] = rng.normal(0, 0.1, N).astype(np.float32)
        return f"{name}{i}n = MatMul({x}, w{name}{i})  {name}{i} = Add({name}{i}n, b{name}{i})"

    def normed(name: str, x: str) -> str:
        arrays[f"s{name}"] = rng.uniform(0.5, 1.5, 64).astype(np.float32)
        return f"{name} = {norm}<axis = -1>({x}, s{name})"

    arrays |= {
        "heads": np.array([0, 0, 4, 16]),
        "kv_heads": np.array([0, 0, 2, 16]),
        "merged": np.array([0, 0, 64]),
        "two": np.array([2]),
        "repeat": np.array([1, 1, 2, 1, 1]),
        "keys": np.array([0, 4, 16, -1]),
        "values": np.array([0, 4, -1, 16]),
    }
    spellings = {
        "op": "a{i} = Attention<is_causal = 1>(qt{i}, kt{i}, vt{i})",
        "softmax": """kt2{i} = Transpose<perm = [0, 1, 3, 2]>(kt{i})
            k5{i} = Unsqueeze(kt2{i}, two)  v5{i} = Unsqueeze(vt{i}, two)
            kx{i} = Expand(k5{i}, repeat)  vx{i} = Expand(v5{i}, repeat)
            kr{i} = Reshape(kx{i}, keys)  vr{i} = Reshape(vx{i}, values)
            qk{i} = MatMul(qt{i}, kr{i})  p{i} = Softmax(qk{i})  a{i} = MatMul(p{i}, vr{i})""",
    }
    for i in range(2):
        lines += [
            normed(f"before{i}", f"x{i}"),
            linear(i, "q", f"before{i}", 64, 64),
            linear(i, "k", f"before{i}", 64, 32),
            linear(i, "v", f"before{i}", 64, 32),
            *(f"{t}h{i} = Reshape({t}{i}, {'heads' if t == 'q' else 'kv_heads'})" for t in "qkv"),
            *(f"{t}t{i} = Transpose<perm = [0, 2, 1, 3]>({t}h{i})" for t in "qkv"),
            spellings[attention].format(i=i),
            f"at{i} = Transpose<perm = [0, 2, 1, 3]>(a{i})  am{i} = Reshape(at{i}, merged)",
            linear(i, "o", f"am{i}", 64, 64),
            f"r{i} = Add(x{i}, o{i})",
            normed(f"behind{i}", f"r{i}"),
            linear(i, "g", f"behind{i}", 64, 172),
            linear(i, "u", f"behind{i}", 64, 172),
            f"sg{i} = Sigmoid(g{i})  silu{i} = Mul(g{i}, sg{i})  m{i} = Mul(silu{i}, u{i})",
            linear(i, "d", f"m{i}", 172, 64),
            f"x{i + 1} = Add(r{i}, d{i})",
        ]
    lines += [normed("last", "x2"), "head = Transpose<perm = [1, 0]>(table)", "y = MatMul(last, head)"]
    text = "(int64[batch, sequence] ids) => (float[batch, sequence, 80] y) {\n" + "\n".join(lines) + "\n}"
    used = {name: array for name, array in arrays.items() if f"{name})" in text or f"{name}," in text}
    return chosen(parse(text, **used))


def test_sites() -> None:
    """Nothing above the first norm is quantized, or nothing at all; a LayerNormalization is a site whoever
    reads it, an RMSNormalization where a linear layer does."""
    assert insert(block()) == ["h2"]
    rest = "s = RMSNormalization(a, scale)  t = LayerNormalization(a, scale)  z = Relu(s)  y = Relu(t)"
    assert insert(linear_case(f"g = MatMul(h, v)  {rest}", "g:96 y:64 z:64")) == ["h", "t"]
    model = linear_case("g = MatMul(h, v)", "g:96")
    SelectLayers(include=["*"], exclude=["*"])(model)
    assert insert(model) == []
    with pytest.raises(UsageError, match="'some' is none of all, attention"):
        InsertMeanShift("some")


@pytest.mark.parametrize("attention", ["op", "softmax"])
def test_behind_attentions(attention: str) -> None:
    """Of all norms the first one behind each attention, however that is written."""
    everywhere = ["behind0", "before1", "behind1", "last"]
    assert insert(decoder(attention)) == everywhere
    assert insert(decoder(attention), "attention") == ["behind0", "behind1"]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("norm", ["RMSNormalization", "LayerNormalization"])
def test_decoder(norm: str, bias: bool) -> None:
    """Biases present or absent, grouped heads, a head that is tied to the embedding."""
    model = decoder(bias=bias, norm=norm)
    before = Counter(ops(model))
    insert(model)
    give_shifts(model)
    assert not fuse(model).refusals and not unfused(model)
    made = {"LayerNormalization": 0, "RMSNormalization": 1 if bias else 2 + 3 + 2 + 1}[norm]  # the head's
    assert Counter(ops(model))["Add"] - before["Add"] == made
    assert not list(violations(model))


@pytest.mark.parametrize(
    ("reads", "results"),
    [
        ("y = MatMul(h, v)", "y:96"),  # the product is an output: its name goes to the sum
        ("m = MatMul(h, v)  y = Add(m, b)", "y:96"),
        ("m = MatMul(h, v)  y = Add(m, b)  n = MatMul(x, v)  z = Add(n, b)", "y:96 z:96"),  # both shared
        ("m = MatMul(h, v)  y = Add(m, b)  z = Relu(m)", "y:96 z:96"),  # the product is read by two
        ("m = MatMul(h, v)  y = Add(m, c1)", "y:96"),  # a bias of one number
        ("m = MatMul(h, v)  n = MatMul(h, u)  y = Relu(m)  z = Add(n, c)", "y:96 z:32"),
    ],
)
def test_layers_that_read_it(reads: str, results: str) -> None:
    model = linear_case(reads, results, c1=np.ones(1, np.float32))
    assert insert(model) == ["h"]
    give_shifts(model)
    assert not fuse(model).refusals and not unfused(model)


@pytest.mark.parametrize(
    ("reads", "results", "why"),
    [
        (
            "m = MatMul(h, v)  y = Relu(h)  z = Relu(m)",
            "y:64 z:96",
            "(Relu) reads it, and is no linear layer",
        ),
        ("y = MatMul(h, v)  t = Transpose(h)  z = MatMul(x, t)", "y:96 z:n", "is no linear layer"),
        ("y = MatMul(h, v)  z = Identity(h)", "y:96 z:64", "'z' is an output"),
    ],
)
def test_an_add_that_stays(reads: str, results: str, why: str) -> None:
    model = linear_case(reads, results)
    (name,) = insert(model)
    give_shifts(model)
    step = fuse(model)
    assert unfused(model) == [name] and why in refusals([step])[0] and "stays" in refusals([step])[0]


def test_shifts_of_zero_go() -> None:
    """Nothing is made for them, and what would hold another shift does not hold these."""
    model = linear_case("y = MatMul(h, v)  z = Relu(h)", "y:96 z:64")
    before = ops(model)
    insert(model)
    assert not fuse(model).refusals and ops(model) == before


def test_biases_of_norms() -> None:
    """Made where there is none; copied where others have the same; left where it is computed."""
    text = """(float[n, 64] x) => (float[n, 64] y, float[n, 64] z) {
        a = MatMul(x, w)
        c = LayerNormalization(a, scale, bias)
        d = LayerNormalization(c, scale, bias)
        e = LayerNormalization(d, scale)
        k = Abs(bias)
        y = LayerNormalization(e, scale, k)
        z = LayerNormalization(x, scale, bias)
    }"""
    rng = np.random.default_rng(0)
    vectors = {name: rng.standard_normal(64).astype(np.float32) for name in ("scale", "bias")}
    model = parse(text, w=rng.standard_normal((64, 64)).astype(np.float32), **vectors)
    InferShapes()(model)
    SelectLayers()(model)
    assert insert(model) == ["c", "d", "e", "y"]
    give_shifts(model)
    step = fuse(model)
    assert unfused(model) == ["y"] and "the bias 'k'" in refusals([step])[0]


@pytest.mark.parametrize("scheme", FORMS)
@pytest.mark.parametrize("bias", [False, True])
def test_quantized_layers(scheme: str, bias: bool) -> None:
    """b += d W', with W' as the low-bit node has it."""
    reads = "m = MatMul(h, v)  y = Add(m, b)" if bias else "y = MatMul(h, v)"
    model = linear_case(reads, "y:96")
    insert(model)
    give_shifts(model)
    QuantizeWeights(scheme, "rtn")(model)
    AddLowbitFunctions()(model)
    assert [op for op in ops(model) if op.startswith("QLinear")] == [FORMS[scheme].linear] * 2
    assert not fuse(model, by_reference).refusals and not unfused(model)


def by_reference(model: ir.Model, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    return ReferenceEvaluator(ir.to_proto(model)).run(None, feeds)


@pytest.mark.parametrize("norm", ["RMSNormalization", "LayerNormalization"])
def test_rounded_activations(norm: str) -> None:
    """A norm's bias is before the rounding, a layer's is behind it: the Add stays there."""
    model = linear_case("y = MatMul(h, v)", "y:96")
    (node,) = (node for node in model.graph if node.op_type == "RMSNormalization")
    node.op_type = norm
    insert(model)
    give_shifts(model)
    QuantizeWeights("nvfp4-w4a8", "rtn")(model)
    AddLowbitFunctions()(model)
    step = fuse(model, by_reference)
    if norm == "LayerNormalization":
        assert not unfused(model)
    else:
        assert unfused(model) == ["h"] and "DynamicQDQInt8" in refusals([step])[0]


# ---- measured on the way ---------------------------------------------------------------------------------


def quantize(model: ir.Model, batches: list[dict], scheme: str, **options: object) -> None:
    """Round to nearest, walking from layer to layer; shifts, if there are sites, are measured."""
    from qgraph.calibration import StreamingCalibrator, model_inputs, open_data

    rounding = None
    if "-w4a" in scheme:
        activations = get_scheme(scheme).activation_format
        rounding = lambda x, amax: dynamic_qdq(x, activations, global_scale(amax))  # noqa: E731
    data = open_data(batches, model_inputs(model))
    calibrator = StreamingCalibrator(data, sequential=True, rounding=rounding, threads=1, **options)
    QuantizeWeights(scheme, "rtn", calibrator=calibrator, threads=1)(model)


def means(model: ir.Model, names: list[str], batches: list[dict]) -> dict[str, np.ndarray]:
    """The mean over all tokens of some values; low-bit layers by their dequantized weights."""
    model = floats(model)
    proto = ir.to_proto(model)
    del proto.graph.output[:]
    for name in names:
        output = proto.graph.output.add()
        output.name, output.type.tensor_type.elem_type = name, 1
    runs = [run_ort(proto, batch) for batch in batches]
    return {
        name: np.concatenate([run[i].reshape(-1, run[i].shape[-1]) for run in runs]).mean(axis=0, dtype=float)
        for i, name in enumerate(names)
    }


def floats(model: ir.Model) -> ir.Model:
    """A copy with low-bit layers as MatMuls: ONNX Runtime has no kernels for most of their types."""
    model = model.clone()
    for node in tuple(model.graph):
        if node.op_type in LINEARS:
            weight = add_initializer(model.graph, from_node(node).dequantize(), f"{node.name}.float")
            replace_node(node, [ir.node("MatMul", [node.inputs[0], weight], name=node.name)])
    RemoveUnused()(model)
    AddLowbitFunctions()(model)
    return model


def ids(count: int, seed: int) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    frequent = rng.zipf(1.3, (count, 2, 24)) % 80
    return [{"ids": one} for one in frequent]


@pytest.mark.parametrize(
    ("scheme", "graph"),
    [
        ("nvfp4", {}),
        ("nvfp4", {"norm": "LayerNormalization"}),
        ("nvfp4-w4a8", {"bias": True}),
        ("int2", {"attention": "softmax"}),
        ("ternary", {"norm": "LayerNormalization", "bias": True}),
    ],
    ids=str,
)
def test_the_shift_goes(scheme: str, graph: dict) -> None:
    """What is left of it is below 5 % of what it was at every site on calibration data, and less on
    others."""
    sites = ["behind0", "before1", "behind1", "last"]
    calibration, others = ids(6, 0), ids(6, 1)
    wanted = {
        "seen": means(decoder(**graph), sites, calibration),
        "others": means(decoder(**graph), sites, others),
    }
    left: dict[tuple[str, str], np.ndarray] = {}
    for corrected in (False, True):
        model = decoder(**graph)
        if corrected:
            insert(model)
        quantize(model, calibration, scheme)
        for data, batches in (("seen", calibration), ("others", others)):
            found = means(model, sites, batches)
            left[data, corrected] = np.array([np.linalg.norm(wanted[data][s] - found[s]) for s in sites])
    assert (left["seen", False] > 0.02).all()
    assert (left["seen", True] < 0.05 * left["seen", False]).all(), left
    assert (left["others", True] < left["others", False]).all(), left
