"""WebAssembly objects: what LLVM makes of kernels, read and renamed, and what is written beside them.

An object is a module, too, if one with parts that a linker would move: Node.js, where there is one, says
whether it is valid, and runs its functions.
"""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from qgraph.codegen.archive import read_archive
from qgraph.codegen.compile import compile_image
from qgraph.codegen.isa import ISAS
from qgraph.codegen.spec import KernelSpec
from qgraph.codegen.wasm_library import library_members
from qgraph.codegen.wasm_object import I32, I64, Kernel, Segment, read_kernel, with_prefix, write_object
from qgraph.errors import QGraphError

CODE, DATA = 10, 11
KERNELS = [Kernel("one", (I32, I64, I32, I64, I64)), Kernel("two", (I32, I64, I64))]


def unsigned(data: bytes, at: int) -> tuple[int, int]:
    """A LEB128 number, and where it ends."""
    value = shift = 0
    while True:
        value |= (data[at] & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if not data[at - 1] & 0x80:
            return value, at


def sections(data: bytes) -> list[tuple[int, str, bytes]]:
    """Number, name of a custom one, content."""
    assert data[:8] == b"\0asm\1\0\0\0"
    found, at = [], 8
    while at < len(data):
        number = data[at]
        size, at = unsigned(data, at + 1)
        content, name = data[at : at + size], ""
        if number == 0:
            length, start = unsigned(content, 0)
            name, content = content[start : start + length].decode(), content[start + length :]
        found.append((number, name, content))
        at += size
    return found


def relocations(data: bytes, name: str) -> list[tuple[int, int, int, int]]:
    """Type, place in the section's content, symbol, addend."""
    content = next(content for _, other, content in sections(data) if other == name)
    target, at = unsigned(content, 0)
    assert sections(data)[target][0] == {"reloc.CODE": CODE, "reloc.DATA": DATA}[name]
    count, at = unsigned(content, at)
    found = []
    for _ in range(count):
        kind, (place, at) = content[at], unsigned(content, at + 1)
        symbol, at = unsigned(content, at)
        addend, at = unsigned(content, at) if kind == 5 else (0, at)  # none is negative here
        found.append((kind, place, symbol, addend))
    assert at == len(content)
    return found


def an_object() -> bytes:
    constants = Segment(".rodata", 64, [b"abc", memoryview(b"defg")])
    pointers = Segment(".data", 4, [b"\x11" * 4 + bytes(12)], {4: (0, 6)}, {8: 1, 12: 0})
    return b"".join(write_object([constants, pointers], {"m_artifact": (1, 0, 16)}, KERNELS))


def test_object() -> None:
    data = an_object()
    numbers = [number for number, *_ in sections(data)]
    assert numbers == [1, 2, 3, 9, 12, CODE, DATA, 0, 0, 0]
    content = {number: content for number, _, content in sections(data) if number}
    # Symbols: two kernels, their two callers, two segments, then the model.
    calls = relocations(data, "reloc.CODE")
    assert [(kind, symbol) for kind, _, symbol, _ in calls] == [(0, 0), (0, 1)]
    for (_, place, *_), index in zip(calls, (0, 1), strict=True):
        assert content[CODE][place - 1 : place + 6] == bytes([0x10, 0x80 | index, 0x80, 0x80, 0x80, 0, 0x0B])
    pointers = relocations(data, "reloc.DATA")
    assert [(kind, symbol, addend) for kind, _, symbol, addend in pointers] == [
        (5, 4, 6),
        (2, 3, 0),
        (2, 2, 0),
    ]
    start = content[DATA].index(b"\x11" * 4)
    assert [place - start for _, place, *_ in pointers] == [4, 8, 12]
    linking = next(content for _, name, content in sections(data) if name == "linking")
    assert linking[0] == 2 and b"\x0am_artifact\x01\x00\x10" in linking


def test_large_numbers() -> None:
    """An object of more than 64 bytes has addresses that need a byte more for their sign."""
    large = b"".join(write_object([Segment(".a", 64, [bytes(64)]), Segment(".b", 64, [bytes(1)])], {}, []))
    (content,) = (content for number, _, content in sections(large) if number == DATA)
    assert content.endswith(b"\x00\x41\xc0\x00\x0b\x01\x00")  # i32.const 64


RUN = """
const data = new Uint8Array(require('fs').readFileSync(process.argv[1]));
const memory = new WebAssembly.Memory({ initial: 1 });
const table = new WebAssembly.Table({ initial: 8, element: 'anyfunc' });
const calls = [];
const env = { __linear_memory: memory, __indirect_function_table: table };
for (const name of ['one', 'two']) env[name] = (...args) => calls.push([name, ...args.map(String)]);
new WebAssembly.Instance(new WebAssembly.Module(data), { env });
const words = new BigInt64Array(memory.buffer, 1024, 5);
words.set([0x1234567890n, -5n, 7n, 1n << 62n, 9n]);
table.get(1)(1024);
table.get(2)(1024);
console.log(JSON.stringify(calls));
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
def test_functions_that_call_kernels(tmp_path: Path) -> None:
    (tmp_path / "object.o").write_bytes(an_object())
    command = ["node", "-e", RUN, str(tmp_path / "object.o")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    low = str(0x34567890)  # of a pointer the low half
    assert done.stdout.strip() == str(
        [["one", low, "-5", "7", str(1 << 62), "9"], ["two", low, "-5", "7"]]
    ).replace("'", '"').replace(" ", "")


# ---- kernels


SPECS = [KernelSpec.make("layer_norm", n=24, eps=1e-5, rms=False, bias=bias) for bias in (True, False)]


def test_kernels_of_a_library() -> None:
    image = compile_image(SPECS, [ISAS["wasm32"]])
    assert list(image.entries.values()) == [4 * i for i in range(len(SPECS))]
    members = library_members("m", [bytes(64)], "wasm32", image.code, image.entries)
    assert [member.symbols for member in members] == [["m_artifact"], *([f"m_{s.symbol}"] for s in SPECS)]
    for spec, original, member in zip(SPECS, read_archive(image.code), members[1:], strict=True):
        renamed = b"".join(member.pieces)
        before, after = sections(bytes(original)), sections(renamed)
        assert [(n, c) for n, name, c in before if name != "linking"] == [
            (n, c) for n, name, c in after if name != "linking"
        ]
        kernel = read_kernel(renamed, f"m_{spec.symbol}")
        assert kernel.params == read_kernel(original, spec.symbol).params
        assert kernel.params[-2:] == (I64, I64) and kernel.params[0] == I32
        with pytest.raises(QGraphError, match=f"no object defines kernel {spec.symbol}"):
            read_kernel(renamed, spec.symbol)
    table = b"".join(members[0].pieces)
    assert struct.pack("<IIIII", 20, 0, 64, 0, 1) in table


def test_a_call_of_what_is_not_there() -> None:
    with pytest.raises(QGraphError, match="a kernel calls 'expf', which no kernel library provides"):
        with_prefix(b"".join(write_object([], {}, [Kernel("expf", (I32,))])), "m_")
    with pytest.raises(QGraphError, match="is not WebAssembly"):
        with_prefix(b"\x7fELF" + bytes(20), "m_")
