"""What is packaged is what is in the tree, and an installed wheel works outside the checkout."""

from __future__ import annotations

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("passes", "codegen", "runtime", "models")


def python_packages() -> set[str]:
    """Every folder with an `__init__.py`, by the name it imports as."""
    found = set()
    for top in ("qgraph", *FOLDERS):
        for init in (ROOT / top).rglob("__init__.py"):
            parts = init.parent.relative_to(ROOT).parts
            if "tests" not in parts:
                found.add(".".join(parts if top == "qgraph" else ("qgraph", *parts)))
    return found


def test_packages_list_is_the_tree() -> None:
    """setuptools cannot discover packages below a mapped prefix, so the list is written out: it must be
    whole."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert len(listed) == len(set(listed))
    assert set(listed) == python_packages()


def test_version_is_in_one_place() -> None:
    import qgraph

    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] == qgraph.__version__


def test_type_checker_overlay_is_complete() -> None:
    """`.typings/qgraph` shows type checkers the package as it is installed: one link an entry, none
    dangling."""
    overlay = {path.name: path.resolve() for path in (ROOT / ".typings" / "qgraph").iterdir()}
    wanted = {name: ROOT / name for name in FOLDERS}
    for path in (ROOT / "qgraph").iterdir():
        if path.name != "__pycache__":
            wanted[path.name] = path
    assert overlay == {name: path.resolve() for name, path in wanted.items()}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Built from a copy of the tracked files: setuptools would otherwise leave build/ and egg-info in the
    # checkout.
    pytest.importorskip("setuptools", reason="needs setuptools to build a wheel without the network")
    source = tmp_path_factory.mktemp("source")
    files = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    for name in files:
        if (ROOT / name).is_file() and not name.startswith(".typings/"):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    out = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "-q",
            "--no-deps",
            "--no-build-isolation",
            "-w",
            str(out),
            str(source),
        ],
        check=True,
    )
    (built,) = out.glob("*.whl")
    return built


def test_wheel_holds_every_module_and_the_runtime(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    wanted = {"qgraph/py.typed", "qgraph/runtime/FORMAT.md"}
    for top in ("qgraph", *FOLDERS):
        for path in (ROOT / top).rglob("*.py"):
            parts = path.relative_to(ROOT).parts
            if "tests" not in parts and "examples" not in parts:
                wanted.add("/".join(parts if top == "qgraph" else ("qgraph", *parts)))
    for pattern in ("include/**/*.h", "src/*.h", "src/*.cc"):
        sources = list((ROOT / "runtime").glob(pattern))
        assert sources, pattern
        wanted |= {"qgraph/" + path.relative_to(ROOT).as_posix() for path in sources}
    for name in ("config.json", "model.safetensors", "tokenizer.json", "held_out.txt"):
        wanted.add(f"qgraph/models/tinystories/{name}")
    assert wanted <= names, sorted(wanted - names)
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.startswith("qgraph-")} == {"qgraph"}


def test_installed_wheel_imports_outside_the_checkout(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(target)
    # -I: neither the working directory nor PYTHONPATH; an editable install's finder is taken out of the way.
    probe = f"""
import importlib, pkgutil, sys
sys.meta_path = [f for f in sys.meta_path if "__editable__" not in f"{{f!r}} {{type(f).__module__}}"]
sys.path_hooks = [h for h in sys.path_hooks if "__editable__" not in repr(h)]
sys.path.insert(0, {str(target)!r})
import qgraph
names = ["qgraph"] + [m.name for m in pkgutil.walk_packages(qgraph.__path__, "qgraph.")]
for name in names:
    if not name.endswith("__main__") and ".kernels" not in name:
        module = importlib.import_module(name)
        assert module.__file__ is None or module.__file__.startswith({str(target)!r}), module.__file__
print(len(names))
"""
    done = subprocess.run([sys.executable, "-I", "-c", probe], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout.split()[-1]) >= len(python_packages())
