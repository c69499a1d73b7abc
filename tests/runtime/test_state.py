"""State from Python: what runs add, truncate, fork, copy, capacity, and every way to go wrong."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from artifact_builder import CAPACITY, REFUSED, TOKENS, Parts, toy_decoder_reference, toy_inputs

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
