"""Importing qgraph and asking the command line for help stay cheap."""

from __future__ import annotations

import subprocess
import sys
import time

HEAVY = (
    "numpy",
    "onnx",
    "onnx_ir",
    "onnxruntime",
    "onnxscript",
    "torch",
    "transformers",
    "tvm",
    "sympy",
    "rich",
)


def loaded(code: str) -> set[str]:
    """Which heavy packages are loaded after `code` in a fresh interpreter."""
    probe = f"import sys\n{code}\nprint(*[m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


def test_import_qgraph_loads_nothing_heavy() -> None:
    assert loaded("import qgraph") == set()


def test_help_loads_nothing_heavy() -> None:
    assert loaded("from qgraph.cli import run\nassert run(['--help']) == 0") == set()


def test_schemes_and_compile_help_load_nothing_heavy() -> None:
    code = "from qgraph.cli import run\nassert run(['schemes']) == 0\nassert run(['compile', '--help']) == 0"
    assert loaded(code) == set()


def test_the_probe_sees_a_heavy_import() -> None:
    assert loaded("import numpy") == {"numpy"}


def test_help_is_quick() -> None:
    times = []
    for _ in range(5):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "qgraph", "--help"], capture_output=True, check=True)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.5


def test_modules_that_the_documents_name() -> None:
    names = ("errors.InputError", "generation.Sampling", "runtime.load", "signing.read_public_key")
    for name in names:  # alone: an import of one may bring another
        assert loaded(f"import qgraph\nassert qgraph.{name}") <= {"numpy"}


def test_public_names_resolve() -> None:
    import qgraph

    for name in qgraph.__all__:
        assert getattr(qgraph, name) is not None
