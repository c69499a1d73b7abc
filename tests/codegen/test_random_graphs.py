"""Random graphs end to end against ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from end_to_end import assert_close, compile_model, run_artifact, run_onnx
from random_graphs import INPUTS, random_model


@pytest.mark.parametrize("seed", range(16))
def test_random_graph(seed: int, tmp_path: Path) -> None:
    model = random_model(seed)
    onnx.checker.check_model(model, full_check=True)
    artifact = compile_model(model)
    for b, s in ((1, 1), (2, 3), (3, 1)):
        rng = np.random.default_rng(seed)
        sizes = {"B": b, "S": s}
        feeds = {
            name: rng.standard_normal([sizes.get(str(d), d) for d in shape]).astype(np.float32)
            for name, shape in INPUTS.items()
        }
        assert_close(run_artifact(artifact, tmp_path, feeds), run_onnx(model, feeds), 3e-5)
