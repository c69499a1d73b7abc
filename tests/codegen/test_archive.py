"""Archives as System V `ar` has them."""

from __future__ import annotations

import struct

import pytest

from qgraph.codegen.archive import Member, read_archive, write_archive


@pytest.mark.parametrize("size", [4, 5])
@pytest.mark.parametrize("symbol", ["even_name_", "odd_name_"])
def test_archive(size: int, symbol: str) -> None:
    content = bytes(range(size))
    data = b"".join(write_archive([Member("model.o", [content[:2], content[2:]], [symbol])]))
    assert data[:8] == b"!<arch>\n"
    members, at = [], 8
    while at < len(data):
        name, length = data[at : at + 16].rstrip(), int(data[at + 48 : at + 58])
        assert data[at + 58 : at + 60] == b"`\n"
        members.append((name, at, data[at + 60 : at + 60 + length]))
        at += 60 + length + length % 2
    assert at == len(data)
    (index_name, _, index), (name, offset, found) = members
    assert (index_name, name, found) == (b"/", b"model.o/", content)
    assert int.from_bytes(index[:4], "big") == 1 and int.from_bytes(index[4:8], "big") == offset
    assert index[8:].rstrip(b"\0").decode() == symbol


def test_several_members() -> None:
    members = [Member("a.o", [b"abc"], ["x", "y"]), Member("b.o", [b"", b"defg"], ["z"])]
    data = b"".join(write_archive(members))
    assert [bytes(content) for content in read_archive(data)] == [b"abc", b"defg"]
    index = data[68:]
    offsets = struct.unpack(">IIII", index[:16])
    assert offsets[0] == 3 and offsets[1] == offsets[2]
    assert [data[at : at + 4] for at in offsets[1:]] == [b"a.o/", b"a.o/", b"b.o/"]
    assert index[16:22] == b"x\0y\0z\0"
