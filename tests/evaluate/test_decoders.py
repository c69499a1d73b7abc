"""Decoders: a text read bit by bit gives the logits of the whole text, whatever reads it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from tiny_decoder import HIDDEN, POSITIONS, VOCABULARY, save_decoder, tiny_decoder

from qgraph.errors import InputError, UnsupportedError, UsageError
from qgraph.evaluate.decoders import (
    TOKENS_AT_ONCE,
    Decoder,
    StatefulDecoder,
    open_decoder,
    open_text_runner,
)
from qgraph.evaluate.runners import OnnxRuntimeRunner

KINDS = ("onnx", "onnx-cache", "reference-cache", "qgraph", "qgraph-cache")


@pytest.fixture(scope="module")
def ids() -> np.ndarray:
    return np.random.default_rng(7).integers(0, VOCABULARY, (3, 12))


@pytest.fixture(scope="module")
def whole(decoders: Path, ids: np.ndarray) -> np.ndarray:
    """Logits of whole texts, by the model without a cache."""
    runner = OnnxRuntimeRunner(decoders / "cache0.onnx", threads=1)
    positions = np.broadcast_to(np.arange(12), ids.shape).copy()
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": positions}
    return runner.run(feeds)["logits"]


def opened(kind: str, decoders: Path, **options: object) -> Decoder:
    engine, _, cache = kind.partition("-")
    file = decoders / f"cache{int(bool(cache))}.{'qg' if engine == 'qgraph' else 'onnx'}"
    return open_decoder(file, engine="" if engine == "onnx" else engine, threads=1, **options)  # type: ignore


@pytest.fixture(params=KINDS)
def decoder(request: pytest.FixtureRequest, decoders: Path) -> Iterator[Decoder]:
    found = opened(request.param, decoders)
    yield found
    found.close()


def close(got: np.ndarray, wanted: np.ndarray) -> None:
    assert got.shape == wanted.shape
    np.testing.assert_allclose(got, wanted, atol=1e-4 * np.abs(wanted).max())


@pytest.mark.parametrize("steps", [(12,), (5, 1, 3, 3), (1,) * 12])
@pytest.mark.parametrize("batch", [1, 3])
def test_bit_by_bit_is_the_whole_text(
    decoder: Decoder, steps: tuple[int, ...], batch: int, ids: np.ndarray, whole: np.ndarray
) -> None:
    found = []
    for step in steps:
        found.append(decoder.feed(ids[:batch, decoder.length : decoder.length + step]))
    assert decoder.length == 12
    close(np.concatenate(found, axis=1), whole[:batch])


def test_the_last_position_alone(decoder: Decoder, ids: np.ndarray, whole: np.ndarray) -> None:
    close(decoder.feed(ids[:, :5], last=True), whole[:, 4:5])
    close(decoder.feed(ids[:, 5:6], last=True), whole[:, 5:6])
    close(decoder.feed(ids[:, 6:]), whole[:, 6:])


@pytest.mark.parametrize("at_once", [1, 5, 36])
def test_a_long_text_is_read_in_several_runs(
    decoders: Path, ids: np.ndarray, whole: np.ndarray, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TOKENS_AT_ONCE, "cpu", at_once)
    decoder = opened("qgraph-cache", decoders, capacity=12)
    assert isinstance(decoder, StatefulDecoder)
    runs, run = [], decoder.session.run
    monkeypatch.setattr(
        decoder.session, "run", lambda feeds, **how: runs.append(feeds["input_ids"].size) or run(feeds, **how)
    )
    close(decoder.feed(ids[:2, :11], last=True), whole[:2, 10:11])
    assert sum(runs) == 22 and max(runs) <= max(at_once, 2) and len(runs) == {1: 11, 5: 6, 36: 1}[at_once]
    with pytest.raises(InputError, match="13 tokens are more than the capacity of 12"):
        decoder.feed(ids[:2, :2], last=True)
    assert decoder.length == 11
    close(decoder.feed(ids[:2, 11:], last=True), whole[:2, 11:])


def test_a_text_that_fails_in_its_second_run_is_forgotten(
    decoders: Path, ids: np.ndarray, whole: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TOKENS_AT_ONCE, "cpu", 4)
    decoder = opened("qgraph-cache", decoders)
    assert isinstance(decoder, StatefulDecoder)
    run = decoder.session.run
    decoder.feed(ids[:1, :2])

    def failing(feeds: Mapping[str, np.ndarray], **how: object) -> object:
        if decoder.length > 2:
            raise KeyboardInterrupt
        return run(feeds, **how)  # type: ignore[arg-type]

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(decoder.session, "run", failing)
        decoder.feed(ids[:1, 2:], last=True)
    assert decoder.length == 2
    close(decoder.feed(ids[:1, 2:]), whole[:1, 2:])


def test_reset_begins_anew(decoder: Decoder, ids: np.ndarray, whole: np.ndarray) -> None:
    decoder.feed(ids[::-1, :7])
    decoder.reset()
    assert decoder.length == 0
    close(decoder.feed(ids[:1]), whole[:1])


def test_selected_texts_go_on(decoder: Decoder, ids: np.ndarray, whole: np.ndarray) -> None:
    decoder.feed(ids[:, :6])
    decoder.select([2, 0, 0, 1])
    close(decoder.feed(ids[[2, 0, 0, 1], 6:9]), whole[[2, 0, 0, 1], 6:9])
    decoder.select([1, 3])
    close(decoder.feed(ids[:2, 9:]), whole[:2, 9:])
    assert decoder.length == 12


def test_what_is_known_of_a_model(decoder: Decoder) -> None:
    assert decoder.vocabulary == VOCABULARY


@pytest.mark.parametrize("wrong", [np.array([1, 2]), np.zeros((1, 0), int), np.array([[0.5]])])
def test_what_are_no_ids(decoder: Decoder, wrong: np.ndarray) -> None:
    with pytest.raises(InputError, match="expected integers"):
        decoder.feed(wrong)


def test_errors_leave_the_text_as_it_was(decoder: Decoder, ids: np.ndarray, whole: np.ndarray) -> None:
    decoder.feed(ids[:1, :4])
    for token in (-1, VOCABULARY):
        with pytest.raises(InputError, match=f"token {token} has no logit among {VOCABULARY}"):
            decoder.feed(np.array([[token]]))
    with pytest.raises((InputError, ValueError)):
        decoder.feed(ids[:2, 4:5])
    assert decoder.length == 4
    close(decoder.feed(ids[:1, 4:]), whole[:1, 4:])


@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize(("mask", "positions"), [(False, False), (True, False), (False, True)])
def test_models_that_take_less(
    cache: bool, mask: bool, positions: bool, ids: np.ndarray, whole: np.ndarray, tmp_path: Path
) -> None:
    path = save_decoder(tmp_path / "model.onnx", cache=cache, mask=mask, positions=positions)
    decoder = open_decoder(path, threads=1)
    close(np.concatenate([decoder.feed(ids[:, :7]), decoder.feed(ids[:, 7:])], axis=1), whole)


def test_a_whole_text_runner_hides_the_cache(decoders: Path, ids: np.ndarray, whole: np.ndarray) -> None:
    runner = open_text_runner(decoders / "cache1.onnx", threads=1)
    assert (runner.inputs, runner.outputs) == (("input_ids", "attention_mask", "position_ids"), ("logits",))
    mask, positions = np.ones_like(ids), np.broadcast_to(np.arange(12), ids.shape).copy()
    mask[1, 7:] = 0
    feeds = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    found = runner.run(feeds)["logits"]
    close(found[[0, 2]], whole[[0, 2]])
    close(found[1, :7], whole[1, :7])
    close(runner.run(feeds)["logits"], found)
    with pytest.raises(InputError, match="missing attention_mask, position_ids"):
        runner.run({"input_ids": ids})


@pytest.mark.parametrize("kind", KINDS)
def test_a_capacity(kind: str, decoders: Path, ids: np.ndarray, whole: np.ndarray) -> None:
    decoder = opened(kind, decoders, capacity=6)
    decoder.feed(ids[:, :5])
    assert decoder.capacity == 6
    with pytest.raises(InputError, match=r"7 tokens|capacity"):
        decoder.feed(ids[:, 5:7])
    close(decoder.feed(ids[:, 5:6]), whole[:, 5:6])


def test_room_is_made(decoders: Path) -> None:
    file = decoders / "cache1.qg"
    assert open_decoder(file, threads=1, room=17).capacity == 17
    assert open_decoder(file, threads=1, room=17, capacity=9).capacity == 9
    assert open_decoder(file, threads=1).capacity == POSITIONS  # of a session with room for 2048
    assert open_decoder(file, threads=1, room=10**12).capacity < 10**12  # as far as the model goes


def test_steps_of_an_artifact_with_state_can_be_timed(decoders: Path, ids: np.ndarray) -> None:
    decoder = opened("qgraph-cache", decoders)
    assert isinstance(decoder, StatefulDecoder)
    assert sum(ns for _, ns in decoder.profile(ids).steps) > 0
    assert decoder.length == ids.shape[1]


def changed(tmp_path: Path, change: object) -> Path:
    proto = tiny_decoder(cache=True)
    change(proto.graph)  # type: ignore[operator]
    onnx.save(proto, tmp_path / "changed.onnx")
    return tmp_path / "changed.onnx"


def test_what_is_no_causal_language_model(tmp_path: Path) -> None:
    def no_logits(graph: onnx.GraphProto) -> None:
        graph.output[0].name = graph.node[-1].output[0] = "scores"

    def another_input(graph: onnx.GraphProto) -> None:
        graph.input.append(helper.make_tensor_value_info("pixels", TensorProto.FLOAT, [1, 3]))

    def no_present(graph: onnx.GraphProto) -> None:
        del graph.output[2]

    def heads_unknown(graph: onnx.GraphProto) -> None:
        graph.input[3].type.tensor_type.shape.dim[1].dim_param = "heads"

    def two_dimensions(graph: onnx.GraphProto) -> None:
        graph.initializer.append(helper.make_tensor("merge", TensorProto.INT64, [2], [-1, VOCABULARY]))
        graph.node[-1].output[0] = "logits3"
        graph.node.append(helper.make_node("Reshape", ["logits3", "merge"], ["logits"]))
        del graph.output[0].type.tensor_type.shape.dim[0]

    for change, kind, message in (
        (no_logits, UsageError, "has no output 'logits'; it has scores"),
        (another_input, UsageError, r"pixels \[1, 3\]: a text gives"),
        (no_present, UnsupportedError, r"'past_key_values.0.value' has no output .* 'present.0.value'"),
        (two_dimensions, UsageError, r"expected \[batch, sequence, vocabulary\]"),
    ):
        with pytest.raises(kind, match=message):
            open_decoder(changed(tmp_path, change), threads=1)
    decoder = open_decoder(changed(tmp_path, heads_unknown), threads=1)
    with pytest.raises(UnsupportedError, match="fixed heads and width"):
        decoder.feed(np.array([[1]]))
    assert HIDDEN  # of the model that is changed
