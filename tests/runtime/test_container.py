"""Files whose hashes are right and whose container or plan is not: each rule of FORMAT.md, broken alone."""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
from artifact_builder import ARCH, Parts, Tensor, container, header_of, padded, sign
from cmake_build import RUNTIME

from qgraph import runtime
from qgraph.codegen.isa import TARGETS, get_target
from qgraph.errors import InputError, UnsupportedError
from qgraph.report.artifact import read_artifact


def load(data: bytes, folder: Path) -> None:
    path = folder / "model.qg"
    path.write_bytes(data)
    runtime.load(path).close()


def test_it_is_a_safetensors_file(toy_path: Path, toy_parts: Parts) -> None:
    with safetensors.safe_open(toy_path, "numpy") as file:
        assert file.metadata()["qgraph.format"] == "1"
        assert (file.get_tensor("w/table") == toy_parts.weights["w/table"]).all()
        assert json.loads(file.get_tensor("qgraph.plan").tobytes())["version"] == 1


Header = dict[str, Any]


def shift(header: Header, name: str, begin: int, end: int) -> None:
    offsets = header[name]["data_offsets"]
    header[name]["data_offsets"] = [offsets[0] + begin, offsets[1] + end]


# A change of the header, of which the body and the hashes stay as they are, and what the runtime says to it.
HEADERS: list[tuple[str, Callable[[Header], Any], str]] = [
    ("no metadata", lambda h: h.pop("__metadata__"), "header has no '__metadata__'"),
    ("metadata no object", lambda h: h.update(__metadata__=[]), "is not an object"),
    ("metadata no strings", lambda h: h["__metadata__"].update(x=1), "is not a string"),
    ("no format", lambda h: h["__metadata__"].pop("qgraph.format"), "not an artifact: no 'qgraph.format'"),
    ("no hash", lambda h: h["__metadata__"].pop("sha256:w/bias"), "'w/bias' has no hash"),
    ("short hash", lambda h: h["__metadata__"].update({"sha256:w/bias": "00"}), "is not a SHA-256"),
    ("capital hash", lambda h: h["__metadata__"].update({"sha256:w/bias": "A" * 64}), "is not a SHA-256"),
    ("wrong hash", lambda h: h["__metadata__"].update({"sha256:w/bias": "0" * 64}), "'w/bias' is damaged"),
    ("no root", lambda h: h.pop("qgraph.root"), "the tensors take"),
    ("root renamed", lambda h: h.update({"w/x": h.pop("qgraph.root")}), "last tensor is not 'qgraph.root'"),
    ("hole", lambda h: h.pop("w/bias"), "leaves a hole or overlaps"),
    ("overlap", lambda h: (shift(h, "w/bias", -64, 0), h["w/bias"].update(shape=[24])), "overlaps another"),
    ("offsets swapped", lambda h: h["w/bias"]["data_offsets"].reverse(), "ends before it begins"),
    ("negative offset", lambda h: h["w/bias"].update(data_offsets=[-64, -32]), "outside"),
    ("huge offset", lambda h: h["w/bias"].update(data_offsets=[0, 2**63 - 1], shape=[2**61]), "do not match"),
    ("offset over int64", lambda h: h["w/bias"].update(data_offsets=[0, 2**63]), "does not fit 64 bits"),
    ("one offset", lambda h: h["w/bias"].update(data_offsets=[0]), "is not a pair"),
    ("fractional offset", lambda h: h["w/bias"].update(data_offsets=[0.0, 32.0]), "is not an integer"),
    ("wrong shape", lambda h: h["w/bias"].update(shape=[9]), "do not match its dtype and shape"),
    ("overflowing shape", lambda h: h["w/bias"].update(shape=[2**62, 2**62, 8]), "do not match"),
    ("negative shape", lambda h: h["w/bias"].update(shape=[-2, -4]), "outside"),
    ("wrong dtype", lambda h: h["w/bias"].update(dtype="F64"), "do not match its dtype and shape"),
    ("unknown dtype", lambda h: h["w/bias"].update(dtype="F33"), "unknown dtype 'F33'"),
    ("half bytes", lambda h: h["w/bias"].update(dtype="F4", shape=[65]), "do not match"),
    ("no dtype", lambda h: h["w/bias"].pop("dtype"), "header.w/bias has no 'dtype'"),
    ("entry no object", lambda h: h.update({"w/bias": 1}), "is not an object"),
    ("no plan", lambda h: rename(h, "qgraph.plan", "w/plan"), "no tensor 'qgraph.plan'"),
]


def rename(header: Header, old: str, new: str) -> None:
    header[new] = header.pop(old)
    header["__metadata__"][f"sha256:{new}"] = header["__metadata__"].pop(f"sha256:{old}")


def body_and_header(parts: Parts) -> tuple[bytes, Header]:
    tensors = padded(parts.tensors())
    return b"".join(t.data for t in tensors), copy.deepcopy(header_of(tensors, parts.metadata))


@pytest.mark.parametrize(("change", "message"), [pytest.param(c, m, id=name) for name, c, m in HEADERS])
def test_header(
    cache: Path, toy_parts: Parts, tmp_path: Path, change: Callable[[Header], Any], message: str
) -> None:
    body, header = body_and_header(toy_parts)
    change(header)
    with pytest.raises(InputError, match=message):
        load(sign(json.dumps(header).encode(), body), tmp_path)


def test_unchanged_and_reordered_headers_load(cache: Path, toy_parts: Parts, tmp_path: Path) -> None:
    body, header = body_and_header(toy_parts)
    load(sign(json.dumps(header).encode(), body), tmp_path)
    load(sign(json.dumps(dict(reversed(header.items())), indent=1).encode(), body), tmp_path)


# The version, what the file says of its writer, and what the runtime and `inspect` say to that.
NEWER, OLDER = r"update (the runtime|qgraph) to {}", r"compile the model again with this qgraph, or use {}"
VERSIONS = [
    (2, "0.9.1", NEWER.format(r"(qgraph )?0\.9\.1 or later")),
    (999, "12.0.0.dev1", NEWER.format(r"(qgraph )?12\.0\.0\.dev1 or later")),
    (2, None, r"update (the runtime|qgraph)$"),
    (2, "0.9.1 \n", r"update (the runtime|qgraph)"),
    (0, "0.0.3", OLDER.format(r"(the runtime of )?qgraph 0\.0\.3")),
    (0, None, OLDER.format(r"(the runtime of )?the qgraph that wrote it")),
]


@pytest.mark.parametrize(("version", "writer", "todo"), VERSIONS)
@pytest.mark.parametrize("what", ["artifact of format", "plan of version"])
def test_other_versions(
    cache: Path, toy_parts: Parts, tmp_path: Path, what: str, version: int, writer: str | None, todo: str
) -> None:
    parts = copy.deepcopy(toy_parts)
    if what == "plan of version":
        parts.plan["version"] = version
    else:
        parts.metadata["qgraph.format"] = str(version)
    del parts.metadata["qgraph.version"]
    if writer is not None:
        parts.metadata["qgraph.version"] = writer
    found = rf"^\S+/model.qg: {what} {version}, this (library )?\(?qgraph \(?[\d.]+\) reads 1: {todo}"
    with pytest.raises(UnsupportedError, match=found):
        load(parts.to_bytes(), tmp_path)
    with pytest.raises(UnsupportedError, match=found):
        read_artifact(tmp_path / "model.qg")


@pytest.mark.parametrize("text", ["", "x", "1.5", "-1", "1 ", "99999999999999999999"])
def test_formats_that_are_no_number(cache: Path, toy_parts: Parts, tmp_path: Path, text: str) -> None:
    parts = copy.deepcopy(toy_parts)
    parts.metadata["qgraph.format"] = text
    with pytest.raises(InputError, match=f"'qgraph.format' is '{text}', not a number"):
        load(parts.to_bytes(), tmp_path)


# What a later qgraph may write though it should have raised a version: where, what, and what is said.
UNKNOWN: list[tuple[tuple[str | int, ...], Any, str]] = [
    (("steps", 0, "args", 0), ["stream", 1], r"plan.steps\[0\].args\[0\]\[0\] is the unknown kind 'stream'"),
    (("values", 0, "dtype"), "f8", r"plan.values\[0\].dtype is the unknown dtype 'f8'"),
    (("values", 4, "kind"), "ring", r"plan.values\[4\].kind is the unknown kind 'ring'"),
    (("steps", 0, "blocks"), ["shift", 1, 2], r"plan.steps\[0\].blocks\S* .*unknown operator 'shift'"),
    (("variants", 0, "entries"), None, r"plan.variants\[0\] has no 'entries'"),
]


@pytest.mark.parametrize(("path", "value", "message"), UNKNOWN)
@pytest.mark.parametrize(
    ("writer", "newer"),
    [("0.9.0", True), ("1.0.0rc1", True), ("0.1.0", False), ("0.0.9", False), ("new", False), (None, False)],
)
def test_what_a_later_qgraph_wrote(
    cache: Path,
    toy_parts: Parts,
    tmp_path: Path,
    path: tuple[str | int, ...],
    value: Any,
    message: str,
    writer: str | None,
    newer: bool,
) -> None:
    """A file is not damaged whose hashes are right: if its writer is later, the library is too old."""
    parts = changed_plan(toy_parts, path, value)
    del parts.metadata["qgraph.version"]
    if writer is not None:
        parts.metadata["qgraph.version"] = writer
    hint = rf": the file is of qgraph {writer}, this library of [\d.]+: update the runtime$" if newer else "$"
    with pytest.raises(UnsupportedError if newer else InputError, match=message + r"[^:]*" + hint):
        load(parts.to_bytes(), tmp_path)


def test_an_unknown_dtype_of_the_container(cache: Path, toy_parts: Parts, tmp_path: Path) -> None:
    body, header = body_and_header(toy_parts)
    header["w/bias"]["dtype"] = "F33"
    header["__metadata__"]["qgraph.version"] = "0.9.0"
    with pytest.raises(
        UnsupportedError, match=r"unknown dtype 'F33': the file is of qgraph 0\.9\.0, .* update"
    ):
        load(sign(json.dumps(header).encode(), body), tmp_path)


def test_damage_to_a_later_file_is_damage(cache: Path, toy_parts: Parts, tmp_path: Path) -> None:
    body, header = body_and_header(toy_parts)
    header["__metadata__"]["qgraph.version"] = "0.9.0"
    with pytest.raises(InputError, match="is damaged"):
        load(sign(json.dumps(header).encode(), bytes([body[0] ^ 1]) + body[1:]), tmp_path)


def test_other_processors(cache: Path, toy_parts: Parts, tmp_path: Path) -> None:
    parts = copy.deepcopy(toy_parts)
    for variant in parts.plan["variants"]:
        variant["arch"] = "riscv64"
    todo = rf"this machine \({ARCH}\): .*base is for riscv64: compile the model with --target {ARCH}-linux$"
    with pytest.raises(UnsupportedError, match=rf"model.qg: no code in the file fits .*{todo}"):
        load(parts.to_bytes(), tmp_path)
    parts = copy.deepcopy(toy_parts)
    del parts.plan["variants"][1:]
    with pytest.raises(
        UnsupportedError, match=r"future needs warp_drive: run it on a CPU that has what it needs$"
    ):
        load(parts.to_bytes(), tmp_path)


def test_the_runtime_calls_targets_what_the_compiler_does() -> None:
    source = (RUNTIME / "src" / "cpu_features.cc").read_text()
    arches, targets = (
        re.findall(rf'machine_{what}\(\) {{ return "(.*?)"', source) for what in ("arch", "target")
    )
    assert dict(zip(targets, arches, strict=True)) == {name: get_target(name)[0].arch for name in TARGETS}


def test_duplicate_keys(cache: Path, toy_parts: Parts, tmp_path: Path) -> None:
    body, header = body_and_header(toy_parts)
    text = json.dumps(header).replace('"w/bias": {', '"w/bias": 1, "w/bias": {')
    with pytest.raises(InputError, match="key 'w/bias' occurs twice"):
        load(sign(text.encode(), body), tmp_path)


def test_unpadded_header(cache: Path, toy_parts: Parts, tmp_path: Path) -> None:
    body, header = body_and_header(toy_parts)
    text = json.dumps(header).encode()
    text += b" " * (1 + -(8 + len(text) + 1) % 64)
    text += b" " * (len(text) % 2 == 0)
    start = len(text).to_bytes(8, "little") + text
    if len(start) % 64 == 0:
        start = (len(text) + 1).to_bytes(8, "little") + text + b" "
    with pytest.raises(InputError, match="the header is not padded"):
        load(start + body + hashlib.sha256(start).digest(), tmp_path)


def test_pads(cache: Path, toy_parts: Parts, tmp_path: Path) -> None:
    tensors = padded(toy_parts.tensors())
    index = next(i for i, t in enumerate(tensors) if t.name.startswith("qgraph.pad."))
    dirty = copy.deepcopy(tensors)
    dirty[index].data = bytes(len(dirty[index].data) - 1) + b"\1"
    with pytest.raises(InputError, match=r"padding 'qgraph.pad.\d+' is damaged: it is not zero"):
        load(resigned(dirty), tmp_path)
    del tensors[index]
    with pytest.raises(InputError, match="is not aligned to 64 bytes"):
        load(resigned(tensors), tmp_path)


def resigned(tensors: list[Tensor]) -> bytes:
    """As `container`, without adding pads."""
    return sign(json.dumps(header_of(tensors, {})).encode(), b"".join(t.data for t in tensors))


def test_empty_tensors_are_fine(cache: Path, toy_parts: Parts, tmp_path: Path) -> None:
    tensors = [*toy_parts.tensors(), Tensor("w/empty", "F32", [0, 3], b""), Tensor("w/void", "F32", [0], b"")]
    load(container(tensors, toy_parts.metadata), tmp_path)


def test_a_damaged_large_file_names_the_first_tensor(cache: Path, toy_parts: Parts, tmp_path: Path) -> None:
    """Above 4 MiB hashing is parallel; the message must not depend on who is first."""
    big = [Tensor(f"w/big{i}", "U8", [2**20], bytes([i]) * 2**20) for i in range(8)]
    data = bytearray(container([*toy_parts.tensors(), *big], toy_parts.metadata))
    load(bytes(data), tmp_path)
    for i in (2, 5, 7):
        position = data.index(bytes([i]) * 2**20)
        data[position + 12345] ^= 1
    for _ in range(5):
        with pytest.raises(InputError, match="tensor 'w/big2' is damaged"):
            load(bytes(data), tmp_path)


def changed_plan(original: Parts, path: tuple[str | int, ...], value: Any) -> Parts:
    """With `value` at `path` of the plan; None removes."""
    parts = copy.deepcopy(original)
    place: Any = parts.plan
    for key in path[:-1]:
        place = place[key]
    if value is None:
        del place[path[-1]]
    elif isinstance(place, list) and path[-1] == len(place):
        place.append(value)
    else:
        place[path[-1]] = value
    return parts


# (where, what to put there, what the runtime says); None removes.
PLANS: list[tuple[tuple[str | int, ...], Any, str]] = [
    (("version",), None, "plan has no 'version'"),
    (("dims", 0, "name"), "sequence", r"plan.dims\[1\].name repeats 'sequence'"),
    (("dims", 0, "min"), -1, "outside"),
    (("dims", 0, "max"), -1, "outside"),
    (("dims", 0, "min"), 5000, "has min above max"),
    (("dims", 2), {"name": "free", "min": 1, "max": 2}, r"plan.dims\[2\] is not a dimension of any input"),
    (("dims",), [{"name": f"d{i}", "min": 1, "max": 2} for i in range(4097)], "more than 4096 entries"),
    (("checks", 0, "ge"), [1], "is not a pair"),
    (("checks", 0, "message"), 1, "is not a string"),
    (("checks", 0, "ge", 1), "width", "unknown dimension 'width'"),
    (("inputs", 0, "value"), 11, r"plan.inputs\[0\].value is 11, but there are 11 values"),
    (("inputs", 0, "value"), -1, "is -1, but there are 11 values"),
    (("inputs", 0, "value"), 7, "is a value of another kind"),
    (("inputs", 0, "value"), 1, "repeats a value"),
    (("inputs", 0, "name"), "mask", "repeats 'mask'"),
    (("inputs", 1), None, "plan.inputs does not name value 1"),
    (("outputs", 3), None, "plan.outputs does not name value 10"),
    (("outputs", 0, "value"), 0, "is a value of another kind"),
    (("values", 2, "tensor"), "w/none", "a tensor that the file does not have"),
    (("values", 2, "tensor"), "qgraph.plan", "is not a weight"),
    (("values", 0, "kind"), "stat", "unknown kind 'stat'"),
    (("values", 0, "dtype"), "f8", "unknown dtype 'f8'"),
    (("values", 4, "shape"), [1] * 9, "rank above 8"),
    (("values", 4, "shape"), [-1], "is negative"),
    (("values", 4, "slot"), 2, "is 2, but there are 2 slots"),
    (("slots",), -1, "outside"),
    (("slots",), 12, "exceeds the number of values"),
    (("slots",), 2**40, "outside"),
    (("steps", 0, "kernel"), 7, "is 7, but there are 7 kernels"),
    (("steps", 0, "grain"), 0, "outside"),
    (("steps", 0, "blocks"), ["add", 1], r"is not \[operator, a, b\]"),
    (("steps", 0, "blocks"), ["pow", 1, 2], "unknown operator 'pow'"),
    (("steps", 0, "args", 0), ["v", 11], "but there are 11 values"),
    (("steps", 0, "args", 0), ["v"], "wrong number of elements"),
    (("steps", 0, "args", 0), ["v", 1, 2, 3], "wrong number of elements"),
    (("steps", 0, "args", 0), ["i"], "wrong number of elements"),
    (("steps", 0, "args", 0), ["status", 1], "wrong number of elements"),
    (("steps", 0, "args", 0), ["x", 1], "unknown kind 'x'"),
    (("steps", 0, "args", 0), [], "has no element 0"),
    (("steps", 0, "args"), [["i", 1]] * 31, "more than 30 elements"),
    (("steps", 3, "args", 4), ["scratch", 2**26 + 1], "outside"),
    (("steps", 3, "args", 4), ["scratch", 2**26], "above 67108864 bytes"),
    (("steps", 3, "args", 4), ["scratch", -1], "outside"),
    (("steps", 3, "args", 4), ["scratch", "batch"], "is not an integer"),
    (("variants",), [], "plan.variants is empty"),
    (("variants", 1, "isa"), "future", "repeats 'future'"),
    (("variants", 0, "code"), "qgraph.code.none", "a tensor that the file does not have"),
    (("variants", 0, "entries", 0), 2**20, "bytes of code"),
    (("variants", 0, "entries", 0), -1, "bytes of code"),
    (("variants", 0, "entries", 6), None, "one entry for each kernel"),
    (("variants", 0, "features"), "avx2", "is not an array"),
]


@pytest.mark.parametrize(("path", "value", "message"), PLANS)
def test_plan(
    cache: Path, toy_parts: Parts, tmp_path: Path, path: tuple[str | int, ...], value: Any, message: str
) -> None:
    parts = changed_plan(toy_parts, path, value)
    with pytest.raises(InputError, match=message) as caught:
        load(parts.to_bytes(), tmp_path)
    assert "\n" not in str(caught.value)


def test_unknown_members_are_ignored(cache: Path, toy_parts: Parts, tmp_path: Path) -> None:
    parts = copy.deepcopy(toy_parts)
    parts.plan["later"] = {"x": [None, True, 1.5]}
    parts.plan["steps"][0]["comment"] = "é"
    load(parts.to_bytes(), tmp_path)


# ---- what the reader in Python says of headers that fit their hash


def with_header(text: str) -> bytes:
    return sign(text.encode(), b"")


@pytest.mark.parametrize("header", ["1", "[]", '{"__metadata__": "x"}', "[" * 100_000])
def test_headers_of_another_shape(header: str, tmp_path: Path) -> None:
    (tmp_path / "model.qg").write_bytes(with_header(header))
    with pytest.raises(InputError, match="damaged artifact: "):
        read_artifact(tmp_path / "model.qg")


@pytest.mark.parametrize("format", ["", "1 ", "-1", "\uff11"])
def test_formats_that_are_no_numbers(format: str, tmp_path: Path) -> None:
    """As the runtime sees it."""
    text = json.dumps({"__metadata__": {"qgraph.format": format}})
    (tmp_path / "model.qg").write_bytes(with_header(text))
    for read in (read_artifact, runtime.load):
        with pytest.raises(InputError, match=f"'qgraph.format' is '{format}', not a number"):
            read(tmp_path / "model.qg")


def test_a_version_that_is_none_is_not_printed(tmp_path: Path) -> None:
    text = json.dumps({"__metadata__": {"qgraph.format": "2", "qgraph.version": "9\n\x1b[31m"}})
    (tmp_path / "model.qg").write_bytes(with_header(text))
    with pytest.raises(UnsupportedError, match=r"reads 1: update qgraph$"):
        read_artifact(tmp_path / "model.qg")
