"""Shifts of the mean, measured on the way from group to group."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from calibration_harness import (
    Coarse,
    check,
    data_of,
    feeds,
    groups_of,
    rows_of,
    run_whole,
    same_statistics,
    transformer,
)
from interrupted_walk import EVENTS, before_call

from qgraph.calibration import Journal, StreamingCalibrator
from qgraph.errors import InputError, UsageError
from qgraph.passes.insert_mean_shift import InsertMeanShift
from qgraph.passes.linear_groups import LinearGroup, MeanShiftSite, Stage
from qgraph.passes.mean_shift import stages


def shifted(layers: int = 2, **options: Any) -> tuple[ir.Model, list[Stage]]:
    """The toy encoder with a site behind every norm, and the stages of a walk."""
    model = transformer(layers, **options)
    InsertMeanShift()(model)
    return model, stages(model.graph, groups_of(model))


def run(model: ir.Model, batches: list, **options: Any) -> Coarse:
    handler = Coarse(model)
    data = data_of(model, batches)
    calibrator = StreamingCalibrator(data, sequential=True, **options)
    calibrator.walk(model, stages(model.graph, groups_of(model)), handler)
    return handler


def rounding(x: np.ndarray, largest: float) -> np.ndarray:
    return np.round(x * np.float32(7 / largest)) * np.float32(largest / 7)


def test_stages_of_an_encoder() -> None:
    """Every site waits for what is above it, and no longer."""
    _, found = shifted()
    kinds = ["site" if isinstance(stage, MeanShiftSite) else len(stage.weights) for stage in found]
    assert kinds == [3, 1, "site", 1, 1, "site", 3, 1, "site", 1, 1, "site", 1]
    assert [stage.value for stage in found if isinstance(stage, MeanShiftSite)] == [
        f"{norm}/unshifted" for norm in ("norm0", "norm20", "norm1", "norm21")
    ]


def test_stages_of_layers_that_share_weights() -> None:
    """Sites wait for the last layer that quantizes what is above them."""
    _, found = shifted(tied=True)
    names = [stage.values[0] if isinstance(stage, MeanShiftSite) else stage.weights[0] for stage in found]
    sites = [f"{norm}/unshifted" for norm in ("norm0", "norm20", "norm1", "norm21")]
    assert names == ["Wq", "Wo", sites[0], "Wu", "Wd", *sites[1:], "Wy"]


@pytest.mark.parametrize(
    ("corrected", "graph"),
    [(True, {}), (False, {}), (True, {"mask": False}), (False, {"tied": True}), (True, {"tied": True})],
    ids=str,
)
def test_shifts_are_those_of_the_model_so_far(corrected: bool, graph: dict) -> None:
    """Against the whole model with all stages before in effect; groups see the means set right."""
    model, found = shifted(**graph)
    mask = graph.get("mask", True)
    batches = feeds(4, mask=mask)
    handler, floats = run(model, batches, corrected=corrected), run_whole(model, batches)
    weights: dict[str, np.ndarray] = {}
    for i, (stage, record) in enumerate(zip(found, handler.records, strict=True)):
        now = rows_of(run_whole(model, batches, weights), stage.values, mask=mask)
        reference = rows_of(floats, stage.values, mask=mask)
        if isinstance(stage, LinearGroup):
            check(handler.solved[stage.weights], now, reference if corrected and i else None)
            weights |= handler.coarse([stage])
            continue
        difference = reference - now
        assert record["shift"].dtype == np.float32 and record["tokens"] == [len(now)]
        np.testing.assert_allclose(record["shift"], difference.mean(axis=0), atol=1e-6)
        squares = [np.square(rows).sum() / len(now) for rows in (difference, reference)]
        np.testing.assert_allclose(record["error"], squares, rtol=1e-4)
        assert np.abs(record["shift"]).max() > 1e-3
        weights[stage.shift] = record["shift"]


@pytest.mark.parametrize("corrected", [True, False])
def test_shifts_behind_rounded_inputs(corrected: bool) -> None:
    """Between two roundings the site is not rounded; layers to come read the rounded sum."""
    model, found = shifted(1)
    batches = feeds(3)
    handler = run(model, batches, corrected=corrected, rounding=rounding)
    records = {stage.weights: record for stage, record in zip(found, handler.records, strict=True)}
    site, group = found[2], found[3]
    assert isinstance(site, MeanShiftSite) and isinstance(group, LinearGroup)
    floats = rows_of(run_whole(model, batches), (site.value,))
    shift = records[site.weights]["shift"]
    statistics = handler.solved[group.weights]
    # The layer reads rounding(norm + shift), whose mean is that of the float model but for the rounding.
    step = statistics.largest / 7
    assert np.abs(statistics.mean - floats.mean(axis=0)).max() < step / 2
    assert np.abs(shift).max() > 1e-3
    plain = transformer(1)
    without = Coarse(plain)
    StreamingCalibrator(
        data_of(plain, batches), sequential=True, corrected=corrected, rounding=rounding
    ).walk(plain, groups_of(plain), without)
    before = without.solved[group.weights]
    np.testing.assert_allclose(statistics.mean - before.mean, shift, atol=step / 2)
    assert all(
        same_statistics(without.solved[stage.weights], handler.solved[stage.weights]) for stage in found[:2]
    )


@pytest.mark.parametrize("options", [{}, {"corrected": True, "rounding": rounding}])
def test_threads_change_nothing(options: dict) -> None:
    model, _ = shifted()
    one, *others = (run(model, feeds(7), threads=threads, **options) for threads in (1, 2, 5))
    for other in others:
        assert all(same_statistics(s, other.solved[name]) for name, s in one.solved.items())
        for a, b in zip(one.records, other.records, strict=True):
            assert all(np.array_equal(a[name], b[name]) for name in a)


class InterruptedRunError(Exception):
    """Stands for a Ctrl-C."""


def stop() -> None:
    raise InterruptedRunError


@pytest.mark.parametrize(
    "options",
    [{}, {"corrected": True}, {"rounding": rounding}],
    ids=["quantized", "corrected", "rounded"],
)
def test_interrupted_and_resumed(options: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a site, before and after: the same records, byte for byte, and nothing is solved twice."""
    model, found = shifted(1)

    def records(root: Path) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in sorted(root.rglob("group-*"))}

    def go(root: Path) -> Coarse:
        return run(model, feeds(3), threads=2, journal=Journal({"model": "toy"}, root=root), **options)

    whole = go(tmp_path / "whole")
    wanted = records(tmp_path / "whole")
    assert len(wanted) == len(found) == 7
    for event, count in (
        ("measure", 8),
        ("put", 20),
        ("manifest", 3),
        ("write", 3),
        ("apply", 3),
        ("apply", 4),
    ):
        root = tmp_path / f"{event}{count}"
        with monkeypatch.context() as patch:
            owner, name = EVENTS[event]
            patch.setattr(owner, name, getattr(owner, name))  # what before_call puts there goes again
            before_call(owner, name, count, stop)
            with pytest.raises(InterruptedRunError):
                go(root)
        behind = len(records(root))
        resumed = go(root)
        assert records(root) == wanted, (event, count)
        assert len(resumed.solved) == sum(isinstance(stage, LinearGroup) for stage in found[behind:])
        for a, b in zip(whole.records, resumed.records, strict=True):
            assert all(np.array_equal(a[name], b[name]) for name in a)


def test_a_record_of_a_site_that_is_damaged(tmp_path: Path) -> None:
    """Only the shift is measured again: groups behind it keep their records."""
    model, _ = shifted(1)
    kept = Journal({"model": "toy"}, root=tmp_path)
    first = run(model, feeds(3), journal=kept)
    path = kept.folder / "group-00002.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    again = run(model, feeds(3), journal=kept)
    assert not again.solved and path.read_bytes() == data
    np.testing.assert_array_equal(first.records[2]["shift"], again.records[2]["shift"])


def test_it_takes_the_model_as_it_is_by_then() -> None:
    model, found = shifted(1)
    calibrator = StreamingCalibrator(data_of(model, feeds(1)), sequential=False)
    with pytest.raises(UsageError, match="a shift of the mean goes with 'sequential'"):
        calibrator.walk(model, found, Coarse(model))


def test_padding_alone_is_no_data() -> None:
    model, found = shifted(1)
    batches = feeds(1)
    batches[0]["attention_mask"][:] = 0
    site = next(stage for stage in found if isinstance(stage, MeanShiftSite))
    calibrator = StreamingCalibrator(data_of(model, batches), sequential=True)
    with pytest.raises(InputError, match="'norm0/unshifted': the calibration data holds no token"):
        calibrator.walk(model, [site], Coarse(model))
