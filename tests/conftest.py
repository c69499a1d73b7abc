"""What all tests of a run share."""

from __future__ import annotations

import os
import shutil
import tempfile

import pytest

_EXPORTS = pytest.StashKey[str]()


def pytest_configure(config: pytest.Config) -> None:
    """One folder for the models that torch exports (tests/passes/exports.py), whichever worker makes them."""
    if "QGRAPH_TEST_EXPORTS" not in os.environ:  # else the user's, or that of the run this is a worker of
        config.stash[_EXPORTS] = os.environ["QGRAPH_TEST_EXPORTS"] = tempfile.mkdtemp(
            prefix="qgraph-exports-"
        )


def pytest_unconfigure(config: pytest.Config) -> None:
    if folder := config.stash.get(_EXPORTS, ""):
        shutil.rmtree(folder, ignore_errors=True)
        os.environ.pop("QGRAPH_TEST_EXPORTS", None)
