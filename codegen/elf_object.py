"""Writes ELF64 relocatable objects, and archives of objects: data that a linker takes into a program.

So a library needs no assembler, compiler or `ar` of the target. After the System V ABI's chapters on object
files; archives in the variant with a `/` symbol table that GNU ld, gold, lld and mold read.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

Buffer = bytes | memoryview

# Machine -> (e_machine, the relocation that is a whole 64-bit address).
MACHINES = {"x86_64": (62, 1), "aarch64": (183, 257)}

WRITE, ALLOC, EXECUTE = 1, 2, 4
_PROGBITS, _SYMTAB, _STRTAB, _RELA = 1, 2, 3, 4
_GLOBAL_OBJECT, _LOCAL_SECTION = 1 << 4 | 1, 3
_HEADER, _SECTION, _SYMBOL = 64, 64, 24


@dataclass
class Section:
    """A section with content.

    Attributes:
        flags: of WRITE, ALLOC, EXECUTE.
        pieces: the content, piece by piece: what is large is not copied.
        addresses: offset in this section -> (index of a section in the object's list, offset in it), 64-bit
            addresses that the linker fills in.
    """

    name: str
    flags: int
    align: int
    pieces: Sequence[Buffer]
    addresses: Mapping[int, tuple[int, int]] = field(default_factory=dict)

    @property
    def size(self) -> int:
        return sum(len(piece) for piece in self.pieces)


class _Strings:
    """A string table."""

    def __init__(self) -> None:
        self.data = bytearray(1)

    def add(self, text: str) -> int:
        offset = len(self.data)
        self.data += text.encode() + b"\0"
        return offset


def write_object(
    machine: str, sections: Sequence[Section], symbols: Mapping[str, tuple[int, int, int]]
) -> list[Buffer]:
    """The pieces of an object file for a machine of MACHINES.

    `symbols` are the global ones, all of them data: name -> (index of a section, offset, size).
    """
    number, absolute = MACHINES[machine]
    names, strings = _Strings(), _Strings()
    # Section 0 is null, those given follow, and each has a local symbol of the same number.
    table = [bytes(_SYMBOL)]
    table += [struct.pack("<IBBHQQ", 0, _LOCAL_SECTION, 0, i + 1, 0, 0) for i in range(len(sections))]
    for name, (index, offset, size) in symbols.items():
        table.append(struct.pack("<IBBHQQ", strings.add(name), _GLOBAL_OBJECT, 0, index + 1, offset, size))
    related = [i for i, section in enumerate(sections) if section.addresses]
    first_table = len(sections) + 1 + len(related)

    out: list[Buffer] = [b""]  # the header, once all is known
    headers = [bytes(_SECTION)]
    at = _HEADER

    def add(
        name: str, kind: int, pieces: Sequence[Buffer], align: int, flags: int = 0, link: int = 0,
        info: int = 0, entry: int = 0,
    ) -> None:  # fmt: skip
        nonlocal at
        pad, size = -at % align, sum(len(piece) for piece in pieces)
        out.extend((bytes(pad), *pieces))
        at += pad
        fields = (names.add(name), kind, flags, 0, at, size, link, info, align, entry)
        headers.append(struct.pack("<IIQQQQIIQQ", *fields))
        at += size

    for section in sections:
        add(section.name, _PROGBITS, section.pieces, section.align, section.flags)
    for i in related:
        relocations = [
            struct.pack("<QQq", place, (target + 1) << 32 | absolute, offset)
            for place, (target, offset) in sections[i].addresses.items()
        ]
        name = f".rela{sections[i].name}"
        add(name, _RELA, relocations, 8, link=first_table, info=i + 1, entry=24)
    add(".symtab", _SYMTAB, table, 8, link=first_table + 1, info=len(sections) + 1, entry=_SYMBOL)
    add(".strtab", _STRTAB, [bytes(strings.data)], 1)
    add(".note.GNU-stack", _PROGBITS, [], 1)  # the stack need not be executable
    names_offset = names.add(".shstrtab")
    content = bytes(names.data)
    headers.append(struct.pack("<IIQQQQIIQQ", names_offset, _STRTAB, 0, 0, at, len(content), 0, 0, 1, 0))
    at += len(content)
    pad = -at % 8
    out += [content, bytes(pad), *headers]
    ident = b"\x7fELF" + bytes([2, 1, 1]) + bytes(9)  # 64 bits, little-endian
    last = (0, _HEADER, 0, 0, _SECTION, len(headers), len(headers) - 1)
    out[0] = ident + struct.pack("<HHIQQQIHHHHHH", 1, number, 1, 0, 0, at + pad, *last)
    return out


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
