"""Decoders with a cache: calibrated as if they had none, for every text begins with an empty one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from calibration_harness import Coarse, data_of, groups_of, prepared, same_statistics
from tiny_decoder import POSITIONS, VOCABULARY, tiny_decoder

import qgraph
from qgraph.calibration import StreamingCalibrator, collect, model_inputs, open_data
from qgraph.errors import InputError

KINDS = [{}, {"mask": False}, {"positions": False}, {"mask": False, "positions": False}]


def models(**options: bool) -> tuple[ir.Model, ir.Model]:
    """The decoder without a cache and with one, prepared, layers selected."""
    without, with_cache = (prepared(tiny_decoder(cache=cache, **options)) for cache in (False, True))
    return without, with_cache


def batches(model: ir.Model, *, padded: bool = True) -> list[dict[str, np.ndarray]]:
    """What the model takes but for a cache; the second sample of each batch is padded at its end."""
    rng, found = np.random.default_rng(2), []
    names = {spec.name for spec in model_inputs(model) if not spec.past}
    for length in (9, 12):
        ids = rng.integers(0, VOCABULARY, (2, length))
        mask = np.ones_like(ids)
        mask[1, 6:] = not padded
        feeds = {"input_ids": ids, "attention_mask": mask, "position_ids": np.arange(length) + 0 * ids}
        found.append({name: feeds[name] for name in names})
    return found


@pytest.mark.parametrize("options", KINDS)
@pytest.mark.parametrize("walk", [{"sequential": False}, {"sequential": True, "corrected": True}])
def test_the_same_statistics_as_without_a_cache(options: dict, walk: dict) -> None:
    found = []
    for model in models(**options):
        handler = Coarse(model)
        data = data_of(model, batches(model))
        StreamingCalibrator(data, **walk).walk(model, groups_of(model), handler)
        found.append(handler)
    assert found[0].applied == found[1].applied and len(found[0].applied) == 9
    for name, statistics in found[0].solved.items():
        assert same_statistics(statistics, found[1].solved[name])


def test_padding_counts_for_nothing() -> None:
    """The mask is over all tokens, of which the cache has none."""
    _, model = models()
    for padded, tokens in ((True, 9 + 6 + 12 + 6), (False, 2 * (9 + 12))):
        found = collect(model, batches(model, padded=padded))
        assert {statistics.tokens for statistics in found.values()} == {tokens}


def test_a_cache_may_be_given() -> None:
    """One that holds something counts like the tokens it is of."""
    _, model = models()
    (feeds, _) = batches(model, padded=False)
    pasts = [spec.name for spec in model_inputs(model) if spec.past]
    assert len(pasts) == 4
    empty = {name: np.zeros((2, 2, 0, 32), np.float32) for name in pasts}
    for name, statistics in collect(model, [feeds]).items():
        assert same_statistics(statistics, collect(model, [{**feeds, **empty}])[name])
    held = {name: np.ones((2, 2, 3, 32), np.float32) for name in pasts}
    longer = {**feeds, **held, "attention_mask": np.ones((2, 12), np.int64)}
    assert {s.tokens for s in collect(model, [longer]).values()} == {18}
    with pytest.raises(InputError, match=r"lacks the model's input 'past_key_values\.0\.value'"):
        collect(model, [{**feeds, pasts[0]: empty[pasts[0]]}])
    with pytest.raises(InputError, match=r"has the shape \[2, 3, 0, 32\]; the model takes \[batch, 2, total"):
        collect(model, [{**feeds, **empty, pasts[0]: np.zeros((2, 3, 0, 32), np.float32)}])


def test_texts_and_arrays(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    words = [f"w{i}" for i in range(VOCABULARY)]
    made = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="w0")
    )
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.save(str(tmp_path / "tokenizer.json"))
    rng = np.random.default_rng(4)
    ids = rng.integers(0, VOCABULARY, (6, 16))
    (tmp_path / "text.txt").write_text("\n".join(" ".join(words[i] for i in row) for row in ids))
    positions = np.arange(16) + 0 * ids
    np.savez(tmp_path / "arrays.npz", input_ids=ids, attention_mask=np.ones_like(ids), position_ids=positions)
    sources = (("text.txt", {"tokenizer": tmp_path / "tokenizer.json", "length": 16}), ("arrays.npz", {}))
    for file, options in sources:
        found = []
        for model in models():
            data = open_data(tmp_path / file, model_inputs(model), **options)
            assert data.samples == 6
            found.append(collect(model, data))
        for name, statistics in found[0].items():
            assert same_statistics(statistics, found[1][name])
    assert POSITIONS > 16


def test_a_calibrated_compile(tmp_path: Path) -> None:
    """Codes and scales are those of the model without a cache."""
    import onnx

    found = []
    for cache in (False, True):
        path = tmp_path / f"{cache}.onnx"
        onnx.save(tiny_decoder(cache=cache, layers=1), path)
        data = batches(prepared(onnx.load(path)))
        result = qgraph.quantize(path, scheme="nvfp4", calibration=data, output=tmp_path / f"{cache}.low")
        assert result.onnx is not None
        found.append({t.name: t.raw_data for t in onnx.load(result.onnx).graph.initializer})
        assert result.report.calibration["samples"] == 2
    assert found[0] == found[1] and any("codes" in name for name in found[0])
