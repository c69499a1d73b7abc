"""The table of docs/architecture.md holds: every import between parts of qgraph goes down it, never up."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Part -> what it may import besides itself. Data flows down this list. `errors` and `progress` are open to
# all but the runtime, which knows errors alone.
BASE = {"errors", "progress", "atomic", "cache"}
MAY_IMPORT: dict[str, set[str]] = {
    "cli": {"*"},
    "pipeline": {
        "config",
        "passes",
        "calibration",
        "codegen",
        "evaluate",
        "report",
        "schemes",
        "formats",
        "runtime",
        "export",
    }
    | BASE,
    "config": {"schemes", "solvers", "export", "codegen.isa", "codegen.targets"} | BASE,
    "export": {"passes", "codegen", "evaluate", "formats", "schemes"} | BASE,
    "models": {"evaluate"} | BASE,
    "signing": {"report"} | BASE,
    "report": {"evaluate", "formats", "runtime"} | BASE,
    "calibration": {"passes", "solvers", "evaluate", "formats"} | BASE,
    "generation": {"evaluate"} | BASE,
    "evaluate": {"formats", "runtime"} | BASE,
    "passes": {"formats", "solvers", "schemes"} | BASE,
    "codegen": {"formats", "schemes", "passes.cache"} | BASE,
    "solvers": {"formats"} | BASE,
    "formats": BASE,
    "schemes": {"errors"},
    "runtime": {"errors"},
    "errors": set(),
    "progress": set(),
    "cache": set(),
    "atomic": {"errors"},
}
FOLDERS = {name: ROOT / name for name in ("passes", "codegen", "runtime", "models")}


def modules() -> Iterator[tuple[str, Path]]:
    """(module name without `qgraph.`, file) of every Python module of the product."""
    for path in sorted((ROOT / "qgraph").rglob("*.py")):
        yield _name(path.relative_to(ROOT / "qgraph")), path
    for name, folder in FOLDERS.items():
        for path in sorted(folder.rglob("*.py")):
            if "tests" not in path.relative_to(folder).parts:
                yield f"{name}.{_name(path.relative_to(folder))}".rstrip("."), path


def _name(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path, module: str) -> Iterator[tuple[int, str]]:
    """(line, name below `qgraph`) of every import of the project's own, also those inside functions."""
    package = f"qgraph.{module}" if module else "qgraph"
    if path.name != "__init__.py":
        package = package.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join(
                    [*package.split(".")[: len(package.split(".")) - node.level + 1], base]
                ).rstrip(".")
            targets = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for target in targets:
            if target.split(".")[0] in FOLDERS:
                yield node.lineno, f"!{target}"
            elif target.startswith("qgraph."):
                yield node.lineno, target.removeprefix("qgraph.")


MODULES = dict(modules())


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_go_down(module: str) -> None:
    part = module.split(".")[0]
    if part in ("", "__main__"):
        allowed = {"*"}  # the lazy face: names, not modules, are what it loads
    else:
        assert part in MAY_IMPORT, f"{part} is not in the table: add it here and in docs/architecture.md"
        allowed = MAY_IMPORT[part] | {part}
    for line, target in imports(MODULES[module], module):
        assert not target.startswith("!"), (
            f"{MODULES[module]}:{line}: import qgraph.{target[1:]}, not {target[1:]}"
        )
        if "*" in allowed or target.split(".")[0] not in MAY_IMPORT:
            continue  # `from qgraph import __version__`
        assert any(target == name or target.startswith(f"{name}.") for name in allowed), (
            f"{MODULES[module]}:{line}: {part} must not import qgraph.{target}"
        )


def test_the_table_has_no_cycle() -> None:
    done: set[str] = set()
    rest = {part: {name.split(".")[0] for name in names if name != "*"} for part, names in MAY_IMPORT.items()}
    while rest:
        free = [part for part, names in rest.items() if names <= done]
        assert free, f"cycle among {sorted(rest)}"
        for part in free:
            done.add(part)
            del rest[part]


def test_every_part_exists() -> None:
    """The table names no part that has gone."""
    parts = {module.split(".")[0] for module in MODULES}
    assert set(MAY_IMPORT) <= parts


def test_the_test_sees_a_wrong_import(tmp_path: Path) -> None:
    """The check can fail: bare, absolute, relative and local imports are all seen."""
    file = tmp_path / "bad.py"
    file.write_text("import passes\nfrom ..solvers import rtn\ndef f():\n    import qgraph.pipeline\n")
    found = [target for _, target in imports(file, "formats.bad")]
    assert found == ["!passes", "solvers.rtn", "pipeline"]
