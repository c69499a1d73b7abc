"""Writes archives of objects (`.a`), and reads those again.

So a library needs no `ar` of the target. In the variant with a `/` symbol table that GNU ld, gold, lld, mold
and wasm-ld read.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

Buffer = bytes | memoryview


@dataclass(frozen=True)
class Member:
    """A file of an archive: its name, of at most 15 characters, its content, piece by piece, and the symbols
    that it defines."""

    name: str
    pieces: Sequence[Buffer]
    symbols: Sequence[str]


_ARCHIVE, _TITLE = b"!<arch>\n", 60


def write_archive(members: Sequence[Member]) -> list[Buffer]:
    """The pieces of an archive."""

    def title(name: str, size: int) -> bytes:
        return b"%-16s%-12d%-6d%-6d%-8s%-10d`\n" % (name.encode(), 0, 0, 0, b"644", size)

    sizes = [sum(len(piece) for piece in member.pieces) for member in members]
    count = sum(len(member.symbols) for member in members)
    listing = b"".join(symbol.encode() + b"\0" for member in members for symbol in member.symbols)
    index_size = 4 + 4 * count + len(listing)
    index_size += index_size % 2
    out: list[Buffer] = [b""]
    offsets, at = [], len(_ARCHIVE) + _TITLE + index_size
    for member, size in zip(members, sizes, strict=True):
        offsets += [at] * len(member.symbols)
        out += [title(f"{member.name}/", size), *member.pieces, b"\n" * (size % 2)]
        at += _TITLE + size + size % 2
    index = struct.pack(f">I{count}I", count, *offsets) + listing
    out[0] = _ARCHIVE + title("/", index_size) + index.ljust(index_size, b"\0")
    return out


def read_archive(data: Buffer) -> list[memoryview]:
    """The contents of the members of an archive that `write_archive` wrote."""
    members, view, at = [], memoryview(data), len(_ARCHIVE)
    while at < len(view):
        size = int(bytes(view[at + 48 : at + 58]))
        at += _TITLE
        members.append(view[at : at + size])
        at += size + size % 2
    return members[1:]  # the first is the index
