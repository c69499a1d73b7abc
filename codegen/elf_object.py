"""Writes ELF relocatable objects: data that a linker takes into a program.

So a library needs no assembler or compiler of the target. After the System V ABI's chapters on object files.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from qgraph.codegen.archive import Buffer


@dataclass(frozen=True)
class Machine:
    """What an object says of its machine.

    Attributes:
        number: `e_machine`.
        absolute: the relocation that is a whole address.
        bits: of an address.
        flags: `e_flags`, of the ABI that programs for Linux are linked for.
    """

    number: int
    absolute: int
    bits: int = 64
    flags: int = 0


MACHINES = {
    "x86_64": Machine(62, 1),
    "aarch64": Machine(183, 257),
    "armv7l": Machine(40, 2, bits=32, flags=0x05000000),  # EABI version 5
    "riscv64": Machine(243, 2, flags=0x5),  # compressed instructions, LP64D
}

WRITE, ALLOC, EXECUTE = 1, 2, 4
_PROGBITS, _SYMTAB, _STRTAB, _RELA, _REL = 1, 2, 3, 4, 9
_GLOBAL_OBJECT, _LOCAL_SECTION = 1 << 4 | 1, 3


@dataclass
class Section:
    """A section with content.

    Attributes:
        flags: of WRITE, ALLOC, EXECUTE.
        pieces: the content, piece by piece: what is large is not copied.
        addresses: offset in this section -> (index of a section in the object's list, offset in it),
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


class _Layout:
    """The structures of ELF64, or of ELF32, as bytes."""

    def __init__(self, machine: Machine) -> None:
        self.machine, self.wide = machine, machine.bits == 64
        self.word = "Q" if self.wide else "I"
        self.header, self.section, self.symbol = (64, 64, 24) if self.wide else (52, 40, 16)

    def pack_symbol(self, name: int, info: int, section: int, value: int, size: int) -> bytes:
        if self.wide:
            return struct.pack("<IBBHQQ", name, info, 0, section, value, size)
        return struct.pack("<IIIBBH", name, value, size, info, 0, section)

    def pack_section(self, name: int, kind: int, flags: int, at: int, size: int, *rest: int) -> bytes:
        """`rest` is link, info, align and the size of an entry."""
        w = self.word
        return struct.pack(f"<II{w}{w}{w}{w}II{w}{w}", name, kind, flags, 0, at, size, *rest)

    def pack_header(self, sections_at: int, sections: int) -> bytes:
        w, machine = self.word, self.machine
        ident = b"\x7fELF" + bytes([2 if self.wide else 1, 1, 1]) + bytes(9)  # little-endian
        last = (machine.flags, self.header, 0, 0, self.section, sections, sections - 1)
        return ident + struct.pack(f"<HHI{w}{w}{w}IHHHHHH", 1, machine.number, 1, 0, 0, sections_at, *last)

    def relocations(self, section: Section) -> tuple[str, int, bytes, int]:
        """Prefix of the name, type, content, and size of an entry, of a table for a section's addresses."""
        kind, out = self.machine.absolute, b""
        for place, (target, offset) in section.addresses.items():
            if self.wide:
                out += struct.pack("<QQq", place, (target + 1) << 32 | kind, offset)
            else:
                out += struct.pack("<II", place, (target + 1) << 8 | kind)
        return (".rela", _RELA, out, 24) if self.wide else (".rel", _REL, out, 8)

    def content(self, section: Section) -> Sequence[Buffer]:
        """Where a relocation has no room for the offset in its target, that lies in the section."""
        if self.wide or not section.addresses:
            return section.pieces
        data = bytearray(b"".join(section.pieces))
        for place, (_, offset) in section.addresses.items():
            struct.pack_into("<I", data, place, offset)
        return [bytes(data)]


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
    layout = _Layout(MACHINES[machine])
    names, strings = _Strings(), _Strings()
    # Section 0 is null, those given follow, and each has a local symbol of the same number.
    table = [bytes(layout.symbol)]
    table += [layout.pack_symbol(0, _LOCAL_SECTION, i + 1, 0, 0) for i in range(len(sections))]
    for name, (index, offset, size) in symbols.items():
        table.append(layout.pack_symbol(strings.add(name), _GLOBAL_OBJECT, index + 1, offset, size))
    related = [i for i, section in enumerate(sections) if section.addresses]
    first_table = len(sections) + 1 + len(related)

    out: list[Buffer] = [b""]  # the header, once all is known
    headers = [bytes(layout.section)]
    at = layout.header

    def add(
        name: str, kind: int, pieces: Sequence[Buffer], align: int, flags: int = 0, link: int = 0,
        info: int = 0, entry: int = 0,
    ) -> None:  # fmt: skip
        nonlocal at
        pad, size = -at % align, sum(len(piece) for piece in pieces)
        out.extend((bytes(pad), *pieces))
        at += pad
        headers.append(layout.pack_section(names.add(name), kind, flags, at, size, link, info, align, entry))
        at += size

    for section in sections:
        add(section.name, _PROGBITS, layout.content(section), section.align, section.flags)
    for i in related:
        prefix, kind, relocations, entry = layout.relocations(sections[i])
        add(prefix + sections[i].name, kind, [relocations], 8, link=first_table, info=i + 1, entry=entry)
    add(".symtab", _SYMTAB, table, 8, link=first_table + 1, info=len(sections) + 1, entry=layout.symbol)
    add(".strtab", _STRTAB, [bytes(strings.data)], 1)
    add(".note.GNU-stack", _PROGBITS, [], 1)  # the stack need not be executable
    names_offset = names.add(".shstrtab")
    content = bytes(names.data)
    headers.append(layout.pack_section(names_offset, _STRTAB, 0, at, len(content), 0, 0, 1, 0))
    at += len(content)
    pad = -at % 8
    out += [content, bytes(pad), *headers]
    out[0] = layout.pack_header(at + pad, len(headers))
    return out
