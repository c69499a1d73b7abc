"""The table of schemes is consistent with formats and solvers."""

from __future__ import annotations

import pytest

from qgraph.errors import UsageError
from qgraph.formats import FORMATS
from qgraph.schemes import SCHEMES, Scheme, get_scheme
from qgraph.solvers import SOLVERS, default_solver


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=str)
def test_every_scheme_names_things_that_exist(scheme: Scheme):
    assert get_scheme(scheme.name) is scheme
    assert set(scheme.solvers) <= set(SOLVERS)
    assert scheme.weight_format is None or scheme.weight_format in FORMATS
    assert scheme.summary and "\n" not in scheme.summary


@pytest.mark.parametrize("scheme", [s for s in SCHEMES.values() if s.weight_format], ids=str)
def test_bits_per_weight_is_what_the_format_stores(scheme: Scheme):
    nbytes = FORMATS[str(scheme.weight_format)].nbytes(4096, 4096)
    assert scheme.bits_per_weight == pytest.approx(8 * nbytes / 4096**2, abs=1e-3)


def test_defaults():
    nvfp4, none = SCHEMES["nvfp4"].solvers, SCHEMES["none"].solvers
    assert default_solver(nvfp4, calibrated=False) == "sweep"
    assert default_solver(nvfp4, calibrated=True) == "gptq"
    assert default_solver(none, calibrated=True) == ""


def test_unknown():
    with pytest.raises(
        UsageError,
        match=r"^unknown scheme 'nvpf4'; known: none, nvfp4, .*; did you mean 'nvfp4'\?$",
    ):
        get_scheme("nvpf4")


def test_a_scheme_without_a_solver_is_refused():
    with pytest.raises(ValueError, match="solvers are for"):
        Scheme("x", "x", "nvfp4", None, 4.5)
