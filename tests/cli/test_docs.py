"""What the documents say of the command line is what the code does."""

from __future__ import annotations

import re
import tomllib
from dataclasses import asdict
from pathlib import Path

from cli_harness import ROOT, command

import qgraph.errors
from qgraph.cli import VERBS
from qgraph.config import CompileConfig
from qgraph.report import REPORT_VERSION, CompileReport
from qgraph.schemes import SCHEMES

README = (ROOT / "README.md").read_text()
CLI = (ROOT / "docs" / "cli.md").read_text()


def blocks(text: str, language: str) -> list[str]:
    """The fenced code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def first_column(text: str, heading: str) -> list[str]:
    """The cells in backticks of the first column of the table with this header."""
    table = text.split(f"| {heading} |", 1)[1].split("\n\n", 1)[0]
    return re.findall(r"^\| `?([^`|]+?)`? \|", table, re.MULTILINE)


def test_verbs() -> None:
    assert {row.split()[0] for row in first_column(CLI, "verb")} == set(VERBS)


def test_exit_codes() -> None:
    errors = [e for e in vars(qgraph.errors).values() if isinstance(e, type) and issubclass(e, Exception)]
    assert {int(row) for row in first_column(CLI, "code")} == {0, 129, 130, 141, 143} | {
        error.exit_code for error in errors
    }


def test_config_example_is_the_default() -> None:
    found = tomllib.loads(blocks(CLI, "toml")[0])
    assert CompileConfig.from_options(found) == CompileConfig(exclude=("*pooler*",))
    assert set(found) == set(asdict(CompileConfig()))


def test_report_fields() -> None:
    document = CompileReport("0", {}, {}).to_json()
    assert document.pop("report_version") == REPORT_VERSION
    assert [row.removesuffix("[]") for row in first_column(CLI, "field")] == list(document)


def test_schemes() -> None:
    assert first_column(README, "scheme") == list(SCHEMES)
    for scheme in SCHEMES.values():
        assert f"| `{scheme.name}` | {scheme.summary} | {scheme.bits_per_weight:g} |" in README
        for solver in scheme.solvers:
            assert f"`{solver}`" in README


def test_cpp_example_compiles() -> None:
    from qgraph.runtime.build import find_compiler

    (source,) = blocks(README, "cpp")
    assert len(source.splitlines()) <= 20
    flags = [
        "-std=c++17",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-fsyntax-only",
        f"-I{ROOT / 'runtime' / 'include'}",
    ]
    compiler = " ".join(find_compiler())
    script = f"{compiler} {' '.join(flags)} -x c++ - <<'EOF'\n{source}\nEOF"
    done = command("bash", "-c", script)
    assert done.code == 0, done.err


def test_no_command_of_the_documents_overwrites_its_model() -> None:
    commands = []
    for document in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        commands += re.findall(r"^qgraph (?:compile|quantize) (\S+) .*?-o (\S+)", document.read_text(), re.M)
    assert len(commands) >= 6
    for model, prefix in commands:
        assert model != f"{prefix}.onnx"


def test_links_lead_somewhere() -> None:
    for document in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for link in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
            if not link.startswith("http"):
                assert (document.parent / link).exists(), f"{document.name}: {link}"


def test_folders_of_the_readme_exist() -> None:
    for folder in re.findall(r"`([a-z/]+/)`", README):
        assert Path(ROOT / folder).is_dir(), folder
