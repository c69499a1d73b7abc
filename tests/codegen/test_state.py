"""Decoders whose cache is state of the session: every way to feed a text gives what the reference gives."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from decoders import VOCABULARY, Decoder, close, tokens
from end_to_end import parse
from onnx.reference import ReferenceEvaluator

import qgraph.runtime
from qgraph.codegen import Artifact, build_artifact
from qgraph.codegen.lowering import lower
from qgraph.codegen.plan import CACHE_CAPACITY
from qgraph.errors import InputError, UnsupportedError
from qgraph.passes import prepare_model
from qgraph.passes.lowbit_functions import AddLowbitFunctions
from qgraph.passes.quantize_cache import QuantizeCache


@contextmanager
def session(artifact: Artifact, folder: Path, **options: int) -> Iterator[qgraph.runtime.Session]:
    artifact.write(folder / "model.qg")
    with qgraph.runtime.load(folder / "model.qg") as model:
        made = model.session(threads=options.pop("threads", 1), **options)  # type: ignore[arg-type]
        yield made
        made.close()


@pytest.fixture(scope="module")
def artifact() -> Artifact:
    return Decoder().artifact()


SHAPES = [(4, 4, 32), (4, 2, 64), (3, 1, 80), (2, 1, 128), (1, 1, 256), (5, 5, 18), (7, 1, 34)]


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), SHAPES)
def test_token_by_token_and_in_chunks_equals_the_whole(
    heads: int, kv_heads: int, head_dim: int, tmp_path: Path
) -> None:
    decoder = Decoder(heads, kv_heads, head_dim)
    with session(decoder.artifact(), tmp_path) as run:
        for batch, cuts in ((1, range(1, 12)), (3, (5, 6, 7, 17, 18)), (3, (18,))):
            ids = tokens(batch, cuts[-1])
            pads = [0] * batch
            whole = decoder.reference(ids, pads, [cuts[-1]])[0]
            start = 0
            for stop, want in zip(cuts, decoder.reference(ids, pads, cuts), strict=True):
                got = run.run(decoder.feeds(ids, pads, start, stop))["logits"]
                close(got, want)
                close(got, whole[:, start:stop])
                start = stop
            assert run.length == cuts[-1]
            run.reset()


def test_rows_padded_on_the_left(tmp_path: Path) -> None:
    decoder = Decoder(masked=True)
    ids, pads, cuts = tokens(3, 14), [0, 4, 7], (9, 10, 11, 14)
    with session(decoder.artifact(), tmp_path) as run:
        start = 0
        for stop, want in zip(cuts, decoder.reference(ids, pads, cuts), strict=True):
            got = run.run(decoder.feeds(ids, pads, start, stop))["logits"]
            for row, pad in enumerate(pads):  # what comes of padding is nobody's business
                first = max(pad - start, 0)
                close(got[row, first:], want[row, first:])
            start = stop
        # A row by itself, without its padding.
        run.reset()
        alone = run.run(decoder.feeds(ids[1:2, 4:], [0], 0, 10))["logits"]
        close(alone[:, -3:], got[1:2], 1e-5)


def test_a_past_of_several_chunks_whatever_the_number_of_threads(tmp_path: Path) -> None:
    decoder = Decoder(4, 2, 32, masked=True)
    ids, cuts = tokens(2, 303), (255, 256, 257, 258, 300, 301, 302, 303)
    wants = decoder.reference(ids, [0, 3], cuts)
    results = []
    for threads in (1, 3):
        with session(decoder.artifact(), tmp_path, threads=threads) as run:
            start, own = 0, []
            for stop, want in zip(cuts, wants, strict=True):
                own.append(run.run(decoder.feeds(ids, [0, 3], start, stop))["logits"])
                close(own[-1][1, 3 if start == 0 else 0 :], want[1, 3 if start == 0 else 0 :], 1e-5)
                start = stop
            results.append(own)
    for one, other in zip(*results, strict=True):
        np.testing.assert_array_equal(one, other)


def test_truncated_and_forked(artifact: Artifact, tmp_path: Path) -> None:
    decoder = Decoder()
    ids, other = tokens(2, 10), tokens(2, 10, seed=1)
    other[:, :6] = ids[:, :6]
    wants = [decoder.reference(text, [0, 0], (6, 7, 10)) for text in (ids, other)]
    with session(artifact, tmp_path) as run:

        def feed(which: qgraph.runtime.Session, text: np.ndarray, start: int, stop: int) -> np.ndarray:
            return which.run(decoder.feeds(text, [0, 0], start, stop))["logits"]

        close(feed(run, ids, 0, 6), wants[0][0])
        fork = run.fork()
        close(feed(run, ids, 6, 7), wants[0][1])
        close(feed(fork, other, 6, 7), wants[1][1])
        close(feed(run, ids, 7, 10), wants[0][2])
        close(feed(fork, other, 7, 10), wants[1][2])
        run.truncate(6)
        close(feed(run, other, 6, 7), wants[1][1])
        fork.copy_state(run, [1, 0])
        close(fork.run(decoder.feeds(other[::-1], [0, 0], 7, 10))["logits"], wants[1][2][::-1])
        fork.close()


def test_no_more_tokens_than_there_is_room_for(artifact: Artifact, tmp_path: Path) -> None:
    decoder = Decoder()
    ids = tokens(1, 8)
    with session(artifact, tmp_path, capacity=5) as run:
        assert run.capacity == 5
        run.run(decoder.feeds(ids, [0], 0, 4))
        with pytest.raises(InputError, match="5"):
            run.run(decoder.feeds(ids, [0], 4, 6))
        assert run.length == 4
        close(run.run(decoder.feeds(ids, [0], 4, 5))["logits"], decoder.reference(ids, [0], (4, 5))[1])


def test_logits_of_the_last_positions_alone(artifact: Artifact, tmp_path: Path) -> None:
    decoder = Decoder()
    ids = tokens(3, 9)
    whole = decoder.reference(ids, [0] * 3, (9,))[0]
    with session(artifact, tmp_path) as run:
        feeds = decoder.feeds(ids, [0] * 3, 0, 9)
        for count in (1, 4, 9):
            run.reset()
            close(run.run(feeds, dims={"logits": count})["logits"], whole[:, -count:])
        run.reset()
        assert run.run(feeds)["logits"].shape == (3, 9, VOCABULARY)
        run.reset()
        with pytest.raises(InputError, match="logits"):
            run.run(feeds, dims={"logits": 10})
        assert run.length == 0


def test_what_the_plan_says(artifact: Artifact) -> None:
    plan = artifact.plan.document
    assert [port["name"] for port in plan["inputs"]] == ["input_ids", "position_ids"]
    assert [port["name"] for port in plan["outputs"]] == ["logits"]
    assert plan["state"] == {
        "total": "total_sequence",
        "new": "sequence",
        "capacity": "cache_capacity",
        "default": CACHE_CAPACITY,
    }
    states = [value for value in plan["values"] if value["kind"] == "state"]
    assert [(v["dtype"], v["shape"]) for v in states] == [("f32", ["batch", 2, "cache_capacity", 32])] * 2
    assert artifact.metadata["qgraph.cache"] == (
        '[["past_key", "present_key"], ["past_value", "present_value"]]'
    )
    logits = next(dim for dim in plan["dims"] if dim["name"] == "logits")
    assert logits["default"] == "sequence"


def test_keys_are_computed_where_they_stay() -> None:
    """The rotary embedding writes into the state; values, of a product, are copied there."""
    low = lower(Decoder().prepared().graph)
    written = [step.name for step in low.steps if step.args[0][1].kind == "state"]
    assert written.count("vt/append") == 1
    assert not any("kr" in name for name in written)
    assert len(written) == 3  # two halves of the keys


def test_the_last_layer_is_done_for_the_last_positions_alone() -> None:
    low = lower(Decoder().prepared().graph)
    rows = {
        step.spec["n"]: str(step.args[-1][1])
        for step in low.steps
        if step.spec.op == "matmul_f32" and step.args[-1][0] == "i"
    }
    assert rows[VOCABULARY] == rows[40] == "batch*logits"
    assert rows[64] == rows[128] == "batch*sequence"


def test_the_room_is_no_larger_than_what_positions_allow() -> None:
    model = Decoder(rotary=False, masked=True).prepared()
    model.graph.meta.setdefault("qgraph.checks", []).append((100, ir.SymbolicDim("total"), "at most 100"))
    plan = build_artifact(model).plan.document
    assert plan["state"]["default"] == 100
    assert {d["name"]: d["max"] for d in plan["dims"]}["cache_capacity"] == 100


QKV = """(float[batch, sequence, 36] inputs_embeds,
  float[batch, 1, past, 12] pk, float[batch, 1, past, 12] pv)
 => ({outputs}) {{ q, k, v = Split<axis = 2, num_outputs = 3>(inputs_embeds)
 qh = Unsqueeze(q, one) kh = Unsqueeze(k, one) vh = Unsqueeze(v, one)
 {body} }}"""
ALL = "float[batch, 1, sequence, 12] y, float[batch, 1, total, 12] nk, float[batch, 1, total, 12] nv"


@pytest.mark.parametrize(
    ("body", "outputs", "why"),
    [
        (
            "y, nk, nv = Attention(qh, kh, vh, , pk, pv) z = Neg(nk)",
            ALL + ", float[batch, 1, total, 12] z",
            "read",
        ),
        (
            "nk = Concat<axis = 2>(pk, kh) nv = Concat<axis = 2>(pv, vh) y = Identity(qh)",
            ALL,
            "input 'pk' .* looks like a cache",
        ),
    ],
)
def test_other_caches_are_refused(body: str, outputs: str, why: str) -> None:
    model = parse(QKV.format(body=body, outputs=outputs), {"one": np.array([1])})
    prepared = prepare_model(ir.from_proto(model))
    with pytest.raises(UnsupportedError, match=why):
        lower(prepared.graph)


# ---- keys and values as int8


def int8(model: onnx.ModelProto) -> ir.Model:
    """Prepared, with what goes into the cache rounded, as a low-bit file has it."""
    prepared = prepare_model(ir.from_proto(model))
    QuantizeCache()(prepared)
    AddLowbitFunctions()(prepared)
    return prepared


def low_bit_reference(model: ir.Model) -> ReferenceEvaluator:
    return ReferenceEvaluator(ir.to_proto(model))


@pytest.mark.parametrize("mask", ["", "mask"])
def test_int8_state_gives_what_the_rounded_keys_and_values_give(mask: str, tmp_path: Path) -> None:
    """Queries, keys and values are inputs here: no last bit of a product decides about a rounding."""
    model = parse(
        f"""(float[batch, sequence, 128] inputs_embeds,
        float[batch, sequence, 64] k, float[batch, sequence, 64] v,
        {"bool[batch, 1, sequence, total] mask," if mask else ""}
        float[batch, 2, past, 32] pk, float[batch, 2, past, 32] pv)
        => (float[batch, 4, sequence, 32] y, float[batch, 2, total, 32] nk, float[batch, 2, total, 32] nv) {{
        q4 = Reshape(inputs_embeds, by_head) k4 = Reshape(k, by_kv_head) v4 = Reshape(v, by_kv_head)
        qt = Transpose<perm = [0, 2, 1, 3]>(q4) kt = Transpose<perm = [0, 2, 1, 3]>(k4)
        vt = Transpose<perm = [0, 2, 1, 3]>(v4)
        y, nk, nv = Attention<is_causal = 1>(qt, kt, vt, {mask}, pk, pv) }}""",
        {"by_head": np.array([0, 0, 4, 32]), "by_kv_head": np.array([0, 0, 2, 32])},
    )
    rounded = int8(model)
    reference = low_bit_reference(rounded)
    artifact = build_artifact(rounded)
    states = [v for v in artifact.plan.document["values"] if v["kind"] == "state"]
    assert sorted(v["dtype"] for v in states) == ["f32", "f32", "i8", "i8"]
    assert {(layer.kernel, layer.compute) for layer in artifact.layers} == {
        ("store_int8", "rounds to int8 codes with a scale"),
        ("attention", "float32 of keys and values stored as int8"),
    }
    rng = np.random.default_rng(0)
    past = [np.zeros((2, 2, 0, 32), np.float32)] * 2
    start = 0
    with session(artifact, tmp_path) as run:
        for stop in (1, 2, 20, 57, 58, 310, 311):
            count = stop - start
            feeds = {
                "inputs_embeds": rng.standard_normal((2, count, 128)).astype(np.float32),
                "k": rng.standard_normal((2, count, 64)).astype(np.float32),
                "v": rng.standard_normal((2, count, 64)).astype(np.float32),
            }
            if mask:
                feeds["mask"] = rng.random((2, 1, count, stop)) < 0.8
            want, *past = reference.run(None, feeds | {"pk": past[0], "pv": past[1]})
            close(run.run(feeds)["y"], want)
            start = stop
        assert run.memory < 4 * sum(p.nbytes for p in past) * run.capacity // 311


def test_decoder_with_an_int8_cache(tmp_path: Path) -> None:
    decoder = Decoder(masked=True)
    ids, cuts = tokens(2, 12), (6, 7, 8, 12)
    wants = decoder.reference(ids, [0, 2], cuts)
    with session(build_artifact(int8(decoder.model)), tmp_path) as run:
        start = 0
        for stop, want in zip(cuts, wants, strict=True):
            got = run.run(decoder.feeds(ids, [0, 2], start, stop))["logits"][:, 2 if start == 0 else 0 :]
            want = want[:, 2 if start == 0 else 0 :]
            error = np.linalg.norm(got - want) / np.linalg.norm(want)
            assert 1e-6 < error < 1e-2  # it is rounded, and no more than that
            start = stop
