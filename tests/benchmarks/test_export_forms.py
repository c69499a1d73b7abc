"""benchmarks/export_forms.py on small weights: every form multiplies by the same weight. Times are not
looked at."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import export_forms


def test_forms_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = tmp_path / "found.json"
    options = ["--shapes", "256", "--rows", "1,9", "--layers", "2", "--seconds", "0", "--json", str(found)]
    monkeypatch.setattr(sys, "argv", ["export_forms.py", *options])
    export_forms.main()
    cells = json.loads(found.read_text())
    forms = {(cell["format"], cell["form"]) for cell in cells}
    assert forms == {(format, form) for format, forms in export_forms.FORMS.items() for form in forms}
    for cell in cells:
        assert cell["error"] < (0.05 if cell["x"] == "int8" else 1e-5), cell
    assert len(cells) == 2 * sum(2 - (form == "dense") for _, form in forms)
