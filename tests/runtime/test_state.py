"""State from Python: what runs add, truncate, fork, copy, capacity, and every way to go wrong."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from artifact_builder import CAPACITY, CUDA, REFUSED, TOKENS, Parts, toy_decoder_reference, toy_inputs

from qgraph import runtime
from qgraph.errors import InputError, ResourceError, UsageError
from qgraph.runtime.model import Model, Session

IDS = np.random.default_rng(1).integers(0, TOKENS - 1, (3, CAPACITY))


@pytest.fixture(scope="module")
def model(cache: Path, decoder_path: Path) -> Iterator[Model]:
    with runtime.load(decoder_path, threads=2) as model:
        yield model


@pytest.fixture
def session(model: Model) -> Iterator[Session]:
    with model.session() as session:
        yield session


def feed(session: Session, ids: np.ndarray, **options: Any) -> dict[str, np.ndarray]:
    mask = np.ones((len(ids), session.length + ids.shape[1]), np.int64)
    return session.run({"input_ids": ids, "attention_mask": mask}, **options)


def check(parts: Parts, got: dict[str, np.ndarray], ids: np.ndarray) -> None:
    """That the last positions, as many as there are, follow from all of `ids`."""
    expected = toy_decoder_reference(parts, ids)
    np.testing.assert_array_equal(got["history"], ids)
    np.testing.assert_array_equal(got["logits"], expected["logits"][:, -got["logits"].shape[1] :])


@pytest.mark.parametrize("pieces", [[16], [1] * 16, [5, 1, 1, 9], [3, 13]])
def test_any_pieces_equal_the_whole(session: Session, decoder_parts: Parts, pieces: list[int]) -> None:
    at = 0
    for piece in pieces:
        assert session.length == at
        got = feed(session, IDS[:, at : at + piece])
        at += piece
        check(decoder_parts, got, IDS[:, :at])
    assert session.length == at


def test_rows_of_their_own(session: Session, decoder_parts: Parts) -> None:
    """A mask leaves out other positions in each row; equal lengths are not needed."""
    mask = np.ones((3, 7), np.int64)
    mask[1, :3] = mask[2, 4] = 0
    session.run({"input_ids": IDS[:, :4], "attention_mask": mask[:, :4]})
    got = session.run({"input_ids": IDS[:, 4:7], "attention_mask": mask})
    expected = toy_decoder_reference(decoder_parts, IDS[:, :7], mask)["logits"][:, 4:]
    np.testing.assert_array_equal(got["logits"], expected)


def test_logits_of_the_last_positions(session: Session, decoder_parts: Parts) -> None:
    assert feed(session, IDS[:, :5], dims={"logits": 2})["logits"].shape[1] == 2
    assert feed(session, IDS[:, 5:9])["logits"].shape[1] == 4  # the choice is that run's alone
    got = feed(session, IDS[:, 9:12], dims={"logits": np.int32(1)})
    assert got["logits"].shape[1] == 1
    check(decoder_parts, got, IDS[:, :12])


@pytest.mark.parametrize(
    ("dims", "message"),
    [
        ({"logits": 0}, "logits is 0: give a positive number"),
        ({"logits": -3}, "logits is -3"),
        ({"logits": 5000}, r"logits must lie in \[1, 4096\], got 5000"),
        ({"logits": 4}, "logits must be at most sequence with logits=4"),
        ({"logits": 1.5}, "logits is 1.5: give an integer"),
        ({"logits": 2**64}, "beyond 64 bits"),
        ({"batch": 1}, "'batch' is not a dimension to choose: the model has logits"),
        ({"a\nb": 1}, "is not a dimension to choose"),
    ],
)
def test_wrong_dims(session: Session, decoder_parts: Parts, dims: dict[str, Any], message: str) -> None:
    feed(session, IDS[:, :3])
    with pytest.raises(InputError, match=message) as caught:
        feed(session, IDS[:, 3:6], dims=dims)
    assert "\n" not in str(caught.value)
    assert session.length == 3
    check(decoder_parts, feed(session, IDS[:, 3:6]), IDS[:, :6])


def test_truncate_and_reset(session: Session, decoder_parts: Parts) -> None:
    feed(session, IDS)
    session.truncate(6)
    other = np.concatenate([IDS[:, :6], IDS[:, 9:12]], axis=1)
    check(decoder_parts, feed(session, IDS[:, 9:12]), other)
    session.reset()
    assert session.length == 0
    check(decoder_parts, feed(session, IDS[:2, :4]), IDS[:2, :4])  # of other rows, too
    for length in (5, -1):
        with pytest.raises(InputError, match=f"cannot truncate the state to {length} tokens: it holds 4"):
            session.truncate(length)
    for wrong in (1.5, "x", None):
        with pytest.raises(InputError, match=r"capacity is .*: give an integer"):
            session._model.session(capacity=wrong)  # type: ignore[arg-type]
    for dims in (5, [("logits", 1)], {1: 1}):
        with pytest.raises(InputError, match=r"dims is .*: give a dict"):
            session.run({}, dims=dims)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="rows is 5: give a list"):
        session.copy_state(session, 5)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="source is a NoneType: give a session"):
        session.copy_state(None)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="length is None: give an integer"):
        session.truncate(None)


def test_forks_go_on_independently(session: Session, decoder_parts: Parts) -> None:
    feed(session, IDS[:, :6])
    with session.fork() as fork, fork.fork() as second:
        assert (fork.length, fork.capacity, fork.threads) == (6, session.capacity, session.threads)
        check(decoder_parts, feed(session, IDS[:, 6:9]), IDS[:, :9])
        turned = np.concatenate([IDS[:, :6], IDS[::-1, 6:8]], axis=1)
        check(decoder_parts, feed(fork, IDS[::-1, 6:8]), turned)
        check(decoder_parts, feed(session, IDS[:, 9:10]), IDS[:, :10])
        check(decoder_parts, feed(second, IDS[:, 6:16]), IDS)


def test_copied_rows(model: Model, session: Session, decoder_parts: Parts) -> None:
    feed(session, IDS[:, :6])
    with model.session(capacity=40) as other:
        for rows in ([2, 0, 0, 1], [1], np.array([0, 2])):
            other.copy_state(session, rows)
            text = np.concatenate([IDS[rows, :6], IDS[rows, 6:8]], axis=1)
            check(decoder_parts, feed(other, IDS[rows, 6:8]), text)
        session.copy_state(session, [2, 1, 0])
        check(decoder_parts, feed(session, IDS[::-1, 6:7]), IDS[::-1, :7])
        session.copy_state(session, [2, 0])
        check(decoder_parts, feed(session, IDS[[0, 2], 7:8]), IDS[[0, 2], :8])
        with pytest.raises(InputError, match="row 2 of a state of 2 does not exist"):
            other.copy_state(session, [2])
        with pytest.raises(InputError, match="number of rows to copy is 0"):
            other.copy_state(session, [])
        assert other.length == 8
        other.truncate(0)
        session.copy_state(other)
        assert session.length == 0


def test_batch_cannot_change_while_tokens_are_held(session: Session, decoder_parts: Parts) -> None:
    feed(session, IDS[:, :4])
    with pytest.raises(InputError, match="holds 4 tokens of 3 rows, but the inputs have 2: reset the state"):
        feed(session, IDS[:2, 4:6])
    check(decoder_parts, feed(session, IDS[:, 4:6]), IDS[:, :6])


def test_full_state(model: Model, decoder_parts: Parts) -> None:
    with model.session(capacity=9) as session:
        assert session.capacity == 9
        with pytest.raises(InputError, match="10 more do not fit: make a session with a larger capacity"):
            feed(session, IDS[:, :10])
        feed(session, IDS[:, :8])
        with pytest.raises(
            InputError, match=r"holds 8 tokens .* 2 more do not fit: truncate or reset it, or"
        ):
            feed(session, IDS[:, 8:10])
        check(decoder_parts, feed(session, IDS[:, 8:9]), IDS[:, :9])


def test_failed_runs_leave_the_state(session: Session, decoder_parts: Parts) -> None:
    feed(session, IDS[:, :5])
    bad = IDS[:, 5:8].copy()
    bad[1, 1] = REFUSED
    for ids, message in ((bad, "step 'refuse': the kernel reports status 7"), (bad + TOKENS, "out of range")):
        with pytest.raises(InputError, match=message):
            feed(session, ids)
        assert session.length == 5
    with pytest.raises(
        InputError, match=r"'attention_mask' axis 1: expected total_sequence = 8 with .*, got 7"
    ):
        session.run({"input_ids": IDS[:, 5:8], "attention_mask": np.ones((3, 7), np.int64)})
    check(decoder_parts, feed(session, IDS[:, 5:8]), IDS[:, :8])


def test_inputs_need_not_grow(cache: Path, decoder_parts: Parts, tmp_path: Path) -> None:
    """Without a mask the state's length is all that changes from step to step."""
    parts = copy.deepcopy(decoder_parts)
    parts.plan["inputs"].pop()
    parts.plan["values"][1] = {"kind": "weight", "tensor": "w/ones"}
    parts.weights["w/ones"] = np.ones(3 * CAPACITY, np.int64)
    with load_parts(parts, tmp_path) as model, model.session() as session:
        for at in range(CAPACITY):
            got = session.run({"input_ids": IDS[:, at : at + 1]})
            check(parts, got, IDS[:, : at + 1])


def test_a_step_may_begin_later(cache: Path, decoder_parts: Parts, tmp_path: Path) -> None:
    """A step without blocks in the first run has all of its arguments in the second."""
    past = ["sub", "total_sequence", "sequence"]
    path = ("steps", 5, "blocks")
    changed = load_changed(decoder_parts, tmp_path, path, ["min", "batch", ["mul", 64, past]])
    with changed as model, model.session() as session:
        feed(session, IDS[:, :1])
        for at in range(1, 4):
            check(decoder_parts, feed(session, IDS[:, at : at + 1]), IDS[:, : at + 1])


def test_model_run_begins_anew(model: Model, decoder_parts: Parts) -> None:
    ones = np.ones((3, 4), np.int64)
    for _ in range(2):
        got = model.run({"input_ids": IDS[:, :4], "attention_mask": ones}, {"logits": 1})
        assert got["logits"].shape[1] == 1
        check(decoder_parts, got, IDS[:, :4])


def test_profile_is_a_run(session: Session) -> None:
    mask = np.ones((3, 2), np.int64)
    times = session.profile({"input_ids": IDS[:, :2], "attention_mask": mask}, {"logits": 1}).steps
    assert (len(times), session.length) == (7, 2)


def test_memory_counts_the_state(model: Model) -> None:
    state = 3 * CAPACITY * (TOKENS * 4 + 8)
    with model.session(memory_limit=state) as session, pytest.raises(ResourceError, match="and state, above"):
        feed(session, IDS[:, :1])
    with model.session() as session:
        feed(session, IDS[:, :1])
        first = session.memory
        assert state < first < state + (4096 if CUDA else 1024)  # a GPU also has inputs and outputs
        for at in range(1, CAPACITY):
            feed(session, IDS[:, at : at + 1])
        assert session.memory == first


def test_description(model: Model, cache: Path, toy_path: Path) -> None:
    assert model.has_state
    kinds = {dim.name: dim.kind for dim in model.dims}
    assert kinds == {
        "logits": "option",
        "batch": "input",
        "sequence": "input",
        "total_sequence": "total",
        "cache_capacity": "capacity",
    }
    with model.session() as session:
        assert session.capacity == CAPACITY


def test_models_without_state(cache: Path, toy_path: Path, session: Session) -> None:
    with runtime.load(toy_path) as plain:
        assert not plain.has_state
        assert {dim.kind for dim in plain.dims} == {"input"}
        with pytest.raises(InputError, match="capacity is 5, but the model has no state"):
            plain.session(capacity=5)
        with plain.session() as other:
            assert (other.capacity, other.length) == (0, 0)
            for call in (other.reset, other.fork, lambda: other.copy_state(session)):
                with pytest.raises(InputError, match="the model has no state"):
                    call()
            with pytest.raises(InputError, match="'logits' is not a dimension to choose: the model has none"):
                other.run(toy_inputs(1, 1), {"logits": 1})
            with pytest.raises(InputError, match="different models"):
                session.copy_state(other)


def test_wrong_options(model: Model) -> None:
    for capacity, message in (
        (-1, "capacity is -1"),
        (2**63, "capacity is"),
        (2**41, "the model allows 1 to"),
    ):
        with pytest.raises(InputError, match=message):
            model.session(capacity=capacity)
    with model.session(capacity=2**40) as session, pytest.raises(ResourceError, match="out of memory"):
        feed(session, IDS[:, :1])
    session = model.session()
    session.close()
    for call in (session.fork, session.reset, lambda: session.capacity, lambda: session.length):
        with pytest.raises(UsageError, match="the session is closed"):
            call()


REMOVED = object()


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("state",), REMOVED, r"plan.values\[5\].shape is of a state, but the plan has no member 'state'"),
        (("state",), [], "plan.state is not an object"),
        (("state", "total"), REMOVED, "plan.state has no 'total'"),
        (("state", "total"), "length", "plan.state.total is the unknown dimension 'length'"),
        (("state", "total"), 3, "plan.state.total is not a string"),
        (("state", "capacity"), "total_sequence", "capacity gives a second source to a dimension"),
        (
            ("state", "new"),
            "total_sequence",
            "state.new uses 'total_sequence', a dimension that is not known",
        ),
        (("state", "new"), ["add", "logits", 1], "state.new uses 'logits'"),
        (("state", "new"), REMOVED, "plan.state has no 'new'"),
        (("state", "default"), 0, r"plan.state.default is 0, outside \[1, "),
        (("state", "default"), 2**41, "plan.state.default is 2199023255552, outside"),
        (
            ("dims", 1, "default"),
            1,
            r"values\[5\].shape\[0\] uses 'batch', a dimension that is not known before",
        ),
        (("dims", 3, "default"), 1, r"plan.dims\[3\] gives a second source to a dimension"),
        (("dims", 0, "default"), REMOVED, r"plan.dims\[0\] is not a dimension of any input"),
        (("dims", 0, "default"), ["mul", "logits", 2], r"dims\[0\].default uses 'logits'"),
        (("dims", 0, "min"), 0, r"plan.dims\[0\] has a default and a min below 1"),
        (("values", 5, "shape"), ["batch", 2, "cache_capacity"], r"values\[5\].shape is not of rank 4"),
        (("values", 5, "shape", 1), "sequence", r"values\[5\].shape\[1\] is not a number"),
        (("values", 6, "shape", 3), "batch", r"values\[6\].shape\[3\] is not a number"),
        (("values", 5, "shape", 3), -8, r"values\[5\].shape\[3\] is negative"),
        (("values", 5, "shape", 2), "total_sequence", r"values\[5\].shape\[2\] is not the state's capacity"),
        (("values", 5, "shape", 2), 16, r"values\[5\].shape\[2\] is not the state's capacity"),
        (("values", 6, "shape", 0), 1, r"values\[6\].shape\[0\] differs from that of another state value"),
        (("values", 5, "shape", 0), "total_sequence", r"shape\[0\] uses 'total_sequence'"),
        (("values", 5, "kind"), "stat", "is the unknown kind 'stat'"),
        (("outputs", 1, "value"), 6, r"plan.outputs\[1\].value is a value of another kind"),
    ],
)
def test_damaged_plans_are_refused(
    cache: Path, decoder_parts: Parts, tmp_path: Path, path: tuple[Any, ...], value: Any, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        load_changed(decoder_parts, tmp_path, path, value)


def test_state_of_no_value_is_refused(cache: Path, decoder_parts: Parts, tmp_path: Path) -> None:
    parts = copy.deepcopy(decoder_parts)
    for value in parts.plan["values"]:
        if value["kind"] == "state":
            value.update(kind="temp", slot=0)
    with pytest.raises(InputError, match=r"plan\.state is of no value"):
        load_parts(parts, tmp_path)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("state", "new"), ["mul", 2**62, "sequence"], "state: .* overflows"),
        (("state", "new"), ["sub", 0, "sequence"], "a run cannot add -3 tokens to the state"),
        (("state", "new"), 0, "would hold 0 tokens, but total_sequence is at least 1"),
        (
            ("dims", 0, "default"),
            ["sub", "sequence", 3],
            r"default of 'logits' must lie in \[1, 4096\], but is 0",
        ),
        (("dims", 0, "default"), ["floordiv", 1, ["sub", "batch", 3]], "default of 'logits': .* divides by"),
        (("values", 4, "shape", 1), ["sub", 5, "total_sequence"], "negative dimension.*total_sequence=16"),
        (("steps", 1, "args", 1), ["v", 5, ["mul", 1 << 12, "total_sequence"]], "points 12288 bytes into"),
    ],
)
def test_plans_that_fail_at_run_time(
    cache: Path, decoder_parts: Parts, tmp_path: Path, path: tuple[Any, ...], value: Any, message: str
) -> None:
    with load_changed(decoder_parts, tmp_path, path, value) as model, model.session() as session:
        for _ in range(2):  # a failure leaves nothing behind that lets the second pass
            with pytest.raises(InputError, match=message):
                feed(session, IDS[:, :3])
            assert session.length == 0


def test_huge_states_are_refused_not_tried(cache: Path, decoder_parts: Parts, tmp_path: Path) -> None:
    heads = ("values", 5, "shape", 1)
    changed = load_changed(decoder_parts, tmp_path, heads, 2**59)
    with changed as model, pytest.raises(ResourceError, match=r"more than 2\^63 bytes for a capacity of 16"):
        model.session()
    changed = load_changed(decoder_parts, tmp_path, heads, 2**40)
    with changed as model, model.session() as session, pytest.raises(ResourceError, match="out of memory"):
        feed(session, IDS[:, :3])


def test_a_temporary_may_shrink(cache: Path, decoder_parts: Parts, tmp_path: Path) -> None:
    """Its slot then has the size that it has now, which is the greater one."""
    size = ["sub", 40, ["mul", 2, "total_sequence"]]
    changed = load_changed(decoder_parts, tmp_path, ("values", 4, "shape", 1), size)
    with changed as model, model.session() as session:
        for at in range(CAPACITY):
            got = feed(session, IDS[:, at : at + 1])
            check(decoder_parts, got, IDS[:, : at + 1])


def load_parts(parts: Parts, folder: Path) -> Model:
    path = folder / "changed.qg"
    path.write_bytes(parts.to_bytes())
    return runtime.load(path)


def load_changed(parts: Parts, folder: Path, path: tuple[Any, ...], value: Any) -> Model:
    parts = copy.deepcopy(parts)
    place: Any = parts.plan
    for key in path[:-1]:
        place = place[key]
    if value is REMOVED:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return load_parts(parts, folder)
