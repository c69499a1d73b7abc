"""Artifacts that releases wrote are still read, run, and give what they gave; and what is written today is of
the version that it says. README.md has the rules."""

from __future__ import annotations

import json
import platform
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for golden_models, under pytest's importlib mode

from golden_models import MODELS, SIGNED, load_runs, run, write_key

import qgraph
from qgraph.codegen import package
from qgraph.codegen.tiles import symbol
from qgraph.errors import SignatureError, UnsupportedError
from qgraph.report import artifact as reader
from qgraph.signing import read_public_key, sign, verify

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
FORMAT = (ROOT / "runtime" / "FORMAT.md").read_text()
SETS = sorted(
    (folder for folder in HERE.iterdir() if re.fullmatch(r"\d+\.\d+\.\d+", folder.name)),
    key=lambda folder: [int(part) for part in folder.name.split(".")],
)
FILES = [path for folder in SETS for path in sorted(folder.glob("*.qg"))]
TOLERANCE = 1e-5


def runs_of(path: Path) -> Path:
    return path.with_name(f"{path.name.split('.')[0]}.npz")


def arch_of(path: Path) -> str:
    return str(reader.read_artifact(path).variants[0]["arch"])


HERE_TOO = [path for path in FILES if arch_of(path) == platform.machine()]
FOREIGN = [path for path in FILES if path not in HERE_TOO]


def name(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


# ---- what was written is read


@pytest.mark.parametrize("path", HERE_TOO, ids=name)
def test_every_variant_gives_what_it_gave(path: Path) -> None:
    inputs, outputs = load_runs(runs_of(path))
    with qgraph.load(path) as model:
        isas = [variant.isa for variant in model.variants if variant.supported]
    for isa in isas:
        for got, want in zip(run(path, inputs, isa=isa), outputs, strict=True):
            assert list(got) == list(want)
            for key, expected in want.items():
                limit = TOLERANCE * np.abs(expected).max()
                np.testing.assert_allclose(got[key], expected, rtol=0, atol=limit, err_msg=f"{isa}: {key}")


@pytest.mark.parametrize("path", FOREIGN, ids=name)
def test_code_for_another_machine_is_refused_with_advice(path: Path) -> None:
    """(tests/runtime/test_cross_compilation.py runs it, under qemu.)"""
    mine = platform.machine()
    message = rf"{path.name}: no code in the file fits this machine \({mine}\): .* is for {arch_of(path)}: "
    with pytest.raises(UnsupportedError, match=message + f"compile the model with --target {mine}-linux"):
        qgraph.load(path)


@pytest.mark.parametrize("folder", SETS, ids=lambda folder: folder.name)
def test_the_signature_is_still_right(folder: Path) -> None:
    key = read_public_key(folder / "golden.pub")
    signed = list(folder.glob("*.signed.qg"))
    assert signed
    for path in signed:
        verify(path, key)
        inputs, _ = load_runs(runs_of(path))
        run(path, inputs, public_key=key)
        with pytest.raises(SignatureError):
            run(path, inputs, public_key=bytes([3, *bytes(31)]))


def test_there_are_files_of_every_version_that_is_read() -> None:
    found = [reader.read_artifact(path) for path in FILES]
    oldest, newest = reader.FORMATS
    assert {int(info.metadata["qgraph.format"]) for info in found} >= set(range(oldest, newest + 1))
    oldest, newest = reader.PLAN_VERSIONS
    assert {plan["version"] for info in found for plan in info.plans.values()} >= set(
        range(oldest, newest + 1)
    )


def test_a_set_is_of_the_version_that_its_folder_says() -> None:
    for path in FILES:
        assert reader.read_artifact(path).metadata["qgraph.version"] == path.parent.name


def test_sizes() -> None:
    assert all(path.stat().st_size < 60_000 for path in FILES)
    for folder in SETS:
        assert sum(path.stat().st_size for path in folder.iterdir()) < 400_000


# ---- everybody means the same versions


def test_versions_agree() -> None:
    source = (ROOT / "runtime" / "src" / "version.h").read_text()
    of_runtime = {key: int(value) for key, value in re.findall(r"(k\w+) = (\d+)", source)}
    assert (of_runtime["kOldestFormat"], of_runtime["kNewestFormat"]) == reader.FORMATS
    assert (of_runtime["kOldestPlan"], of_runtime["kNewestPlan"]) == reader.PLAN_VERSIONS
    assert int(package.FORMAT_VERSION) == reader.FORMATS[1]
    assert f"# The artifact `.qg`, format version {package.FORMAT_VERSION}\n" in FORMAT
    assert f'"version": {reader.PLAN_VERSIONS[1]},' in FORMAT


# ---- what is written today


def vocabulary(pattern: str) -> set[str]:
    """The words that FORMAT.md lists in backticks behind `pattern`."""
    match = re.search(pattern + r" `([^`]+)`", FORMAT)
    assert match, pattern
    return set(match[1].split())


OPERATORS = vocabulary("with op one of")
DTYPES = vocabulary("`dtype` is one of")


def structure(data: bytes) -> set[str]:
    """What a reader of the file relies on: rules of the container, keys of its metadata, members of the plan
    and their types, the words in it. Not which kernels there are, and how many: these are free."""
    info = reader.parse_artifact(data, Path("golden.qg"))
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    found = {f"metadata {key}" for key in info.metadata}
    found.add(f"format {info.metadata['qgraph.format']}")
    found |= {f"tensor has {key}" for key in header["qgraph.root"]}
    reserved = (re.sub(r"(code|pad)\..*", r"\1", tensor) for tensor in header if tensor.startswith("qgraph."))
    found |= {f"tensor {tensor}" for tensor in reserved}
    start = 8 + int.from_bytes(data[:8], "little")
    offsets = {start + header[n]["data_offsets"][0] for n in info.tensors}
    found |= {f"tensors lie {offset % 64} behind a multiple of 64" for offset in offsets}
    for key, plan in info.plans.items():
        found |= set(members(plan, f"{key} plan"))
        found.add(f"{key} plan version {plan['version']}")
    return found


def members(node: Any, path: str) -> Iterator[str]:
    """Paths of a plan with the types of what is there. A value goes by its kind."""
    if isinstance(node, dict):
        kind = f"<{node['kind']}>" if path.endswith(".values[]") else ""
        for key, value in node.items():
            yield from members(value, f"{path}{kind}.{key}")
    elif re.search(r"\.(new|default|blocks|ge\[\]|shape\[\])$", path):
        yield f"{path}: expression"
        require_expression(node, path)
    elif path.endswith(".args[]"):
        yield f"{path}: argument"
        kind, *rest = node
        assert (kind, len(rest)) in {("v", 1), ("v", 2), ("i", 1), ("scratch", 1), ("status", 0)}, node
        if kind in "vi" and len(rest) == (2 if kind == "v" else 1):
            require_expression(rest[-1], path)
    elif isinstance(node, list):
        for item in node:
            yield from members(item, f"{path}[]")
    else:
        yield f"{path}: {type(node).__name__}"
        if path.endswith(".dtype"):
            assert node in DTYPES, node


def require_expression(node: Any, path: str) -> None:
    if isinstance(node, list):
        operator, *operands = node
        assert operator in OPERATORS and len(operands) == 2, f"{path}: {node}"
        for operand in operands:
            require_expression(operand, path)
    else:
        assert isinstance(node, (int, str)), f"{path}: {node}"


@pytest.fixture
def without_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """No kernel is compiled: what is in the images does not matter here."""

    def empty(kernels: Any, isas: Any, report: Any) -> SimpleNamespace:
        entries = {symbol(spec, isa): 0 for isa in isas for spec in kernels}
        return SimpleNamespace(code=bytes(64), entries=entries)

    monkeypatch.setattr("qgraph.codegen.artifact.compile_image", empty)


def written_today(model: str, folder: Path) -> bytes:
    return MODELS[model]().compile(folder, verify=False).read_bytes()


@pytest.mark.parametrize("model", MODELS)
def test_todays_writer_writes_the_same(model: str, tmp_path: Path, without_code: None) -> None:
    """If this fails, README.md says what to do: raise the version, or add a set."""
    assert structure(written_today(model, tmp_path)) == structure((SETS[-1] / f"{model}.qg").read_bytes())


def test_todays_signature_is_the_same(tmp_path: Path) -> None:
    private, _ = write_key(tmp_path)
    sign(SETS[-1] / f"{SIGNED}.qg", private, tmp_path / "signed.qg")
    assert (tmp_path / "signed.qg").read_bytes() == (SETS[-1] / f"{SIGNED}.signed.qg").read_bytes()


def test_the_test_sees_a_change(tmp_path: Path, without_code: None, monkeypatch: pytest.MonkeyPatch) -> None:
    data = written_today("decoder", tmp_path)
    before = structure(data)
    tensors, metadata = package.parse(memoryview(data))

    def changed(edit: Any, **more: str) -> set[str]:
        plan = json.loads(bytes(tensors[0].raw))
        edit(plan)
        plan_tensor = package.raw_tensor("qgraph.plan", json.dumps(plan).encode())
        pieces = package.serialize([plan_tensor, *tensors[1:]], metadata | more)
        return structure(b"".join(pieces)) ^ before

    assert changed(lambda plan: None) == set()
    assert changed(lambda plan: plan["steps"][0].update(stream=1)) == {"cpu plan.steps[].stream: int"}
    assert "cpu plan.state.total: str" in changed(lambda plan: plan["state"].pop("total"))
    assert "cpu plan.slots: str" in changed(lambda plan: plan.update(slots="1"))
    assert changed(lambda plan: None, later="1") == {"metadata later"}
    with pytest.raises(AssertionError):
        changed(lambda plan: plan["steps"][0].update(blocks=["shift", 1, 2]))
    with pytest.raises(AssertionError):
        changed(lambda plan: plan["steps"][0]["args"].append(["q", 1]))
    with pytest.raises(UnsupportedError):
        changed(lambda plan: plan.update(version=2))
    monkeypatch.setattr(package, "FORMAT_VERSION", "2")
    with pytest.raises(UnsupportedError):
        changed(lambda plan: None)
