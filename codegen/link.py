"""Objects -> one flat, position-independent code image.

The kernels of an image refer to nothing but their own constants, each other and a few support routines,
always relative to the program counter. So all relocations can be resolved at compile time, and the runtime
has only to map the result: there is no linker and no symbol table on the machine that runs an artifact.

Image rules: sections are laid out in the order they are reached; entries are 64-byte aligned; the image must
be mapped at a page boundary (AArch64 addresses constants by page).
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass, field

from qgraph.errors import QGraphError

ENTRY_ALIGN = 64


@dataclass(frozen=True)
class CodeImage:
    """A linked image: `code` to be mapped read-execute, `entries` the byte offset of each symbol asked
    for."""

    code: bytes
    entries: dict[str, int]


@dataclass(frozen=True)
class _Relocation:
    offset: int
    kind: int
    symbol: str  # name, or "" for a section symbol
    section: int  # section index of a defined symbol, 0 when undefined
    value: int  # the symbol's offset in its section
    addend: int


@dataclass
class _Section:
    data: bytes
    align: int
    relocations: list[_Relocation] = field(default_factory=list)


@dataclass
class _Object:
    name: str
    machine: str
    sections: dict[int, _Section]
    symbols: dict[str, tuple[int, int]]  # global or weak name -> (section index, offset)


def _read(name: str, data: bytes) -> _Object:
    from elftools.elf.constants import SH_FLAGS
    from elftools.elf.elffile import ELFFile
    from elftools.elf.relocation import RelocationSection
    from elftools.elf.sections import SymbolTableSection

    elf = ELFFile(io.BytesIO(data))
    sections: dict[int, _Section] = {}
    for index, section in enumerate(elf.iter_sections()):
        if not section["sh_flags"] & SH_FLAGS.SHF_ALLOC or section["sh_size"] == 0:
            continue
        if section["sh_flags"] & SH_FLAGS.SHF_WRITE or section["sh_type"] != "SHT_PROGBITS":
            if section.name.startswith((".eh_frame", ".init_array")):
                continue
            raise QGraphError(
                f"kernel object {name}: section {section.name} is writable data; kernels must be pure code"
            )
        sections[index] = _Section(section.data(), section["sh_addralign"] or 1)
    symtab = next(s for s in elf.iter_sections() if isinstance(s, SymbolTableSection))
    symbols = {
        s.name: (s["st_shndx"], s["st_value"])
        for s in symtab.iter_symbols()
        if s["st_info"]["bind"] in ("STB_GLOBAL", "STB_WEAK") and isinstance(s["st_shndx"], int)
    }
    for section in elf.iter_sections():
        if not isinstance(section, RelocationSection) or section["sh_info"] not in sections:
            continue
        for rel in section.iter_relocations():
            sym = symtab.get_symbol(rel["r_info_sym"])
            defined = sym["st_shndx"] if isinstance(sym["st_shndx"], int) else 0
            sections[section["sh_info"]].relocations.append(
                _Relocation(
                    rel["r_offset"], rel["r_info_type"], sym.name, defined, sym["st_value"], rel["r_addend"]
                )
            )
    return _Object(name, elf["e_machine"], sections, symbols)


def _signed(value: int, bits: int, what: str) -> int:
    if not -(1 << (bits - 1)) <= value < 1 << (bits - 1):
        raise QGraphError(f"code image too large: {what} does not fit {bits} bits")
    return value & ((1 << bits) - 1)


def _patch_x86(image: bytearray, kind: int, place: int, target: int, addend: int) -> bool:
    # PC32 and PLT32 (a call to a symbol that the image itself defines) are the same sum here.
    if kind in (2, 4):
        image[place : place + 4] = _signed(target + addend - place, 32, "a relative address").to_bytes(
            4, "little"
        )
        return True
    if kind == 24:  # PC64
        image[place : place + 8] = _signed(target + addend - place, 64, "a relative address").to_bytes(
            8, "little"
        )
        return True
    return False


def _patch_arm(image: bytearray, kind: int, place: int, target: int, addend: int) -> bool:
    word = int.from_bytes(image[place : place + 4], "little")
    value = target + addend
    ldst_shift = {278: 0, 284: 1, 285: 2, 286: 3, 299: 4}
    if kind in (282, 283):  # JUMP26, CALL26
        word |= _signed((value - place) >> 2, 26, "a branch")
    elif kind in (275, 276):  # ADR_PREL_PG_HI21 and its unchecked form
        pages = _signed((value >> 12) - (place >> 12), 21, "a page distance")
        word |= (pages & 3) << 29 | (pages >> 2) << 5
    elif kind == 277:  # ADD_ABS_LO12_NC
        word |= (value & 0xFFF) << 10
    elif kind in ldst_shift:  # LDST<size>_ABS_LO12_NC
        word |= (value & 0xFFF) >> ldst_shift[kind] << 10
    elif kind == 261:  # PREL32
        word = _signed(value - place, 32, "a relative address")
    elif kind == 260:  # PREL64
        image[place : place + 8] = _signed(value - place, 64, "a relative address").to_bytes(8, "little")
        return True
    else:
        return False
    image[place : place + 4] = word.to_bytes(4, "little")
    return True


_PATCH = {"EM_X86_64": _patch_x86, "EM_AARCH64": _patch_arm}


def link(objects: Mapping[str, bytes], entries: list[str], support: bytes | None = None) -> CodeImage:
    """Link ELF relocatable `objects` (file name -> bytes), keeping what `entries` reach.

    `support` is one more object, searched for symbols that an object refers to and no other defines (memset,
    memcpy).
    Raises QGraphError when a symbol is undefined, data is writable, or a relocation is not relative.
    """
    parsed = [_read(name, data) for name, data in objects.items()]
    helper = _read("support", support) if support is not None else None
    where = {symbol: obj for obj in parsed for symbol in obj.symbols}
    missing = [e for e in entries if e not in where]
    if missing:
        raise QGraphError(f"no object defines kernel {missing[0]}")

    image = bytearray()
    placed: dict[tuple[int, int], int] = {}
    work: list[tuple[_Object, int]] = []

    def place(obj: _Object, index: int, align: int) -> int:
        key = (id(obj), index)
        if key not in placed:
            section = obj.sections[index]
            image.extend(bytes(-len(image) % max(align, section.align)))
            placed[key] = len(image)
            image.extend(section.data)
            work.append((obj, index))
        return placed[key]

    offsets = {}
    for entry in entries:
        obj = where[entry]
        index, value = obj.symbols[entry]
        offsets[entry] = place(obj, index, ENTRY_ALIGN) + value
    for obj, index in work:  # grows while sections are reached
        base = placed[id(obj), index]
        for rel in obj.sections[index].relocations:
            if rel.section:
                target = place(obj, rel.section, 1) + rel.value
            elif (other := where.get(rel.symbol, helper)) is not None and rel.symbol in other.symbols:
                section, value = other.symbols[rel.symbol]
                target = place(other, section, ENTRY_ALIGN) + value
            else:
                raise QGraphError(
                    f"kernel object {obj.name} calls '{rel.symbol}', which no kernel library provides"
                )
            patch = _PATCH.get(obj.machine)
            if patch is None or not patch(image, rel.kind, base + rel.offset, target, rel.addend):
                raise QGraphError(
                    f"kernel object {obj.name}: relocation type {rel.kind} of {obj.machine} is not relative"
                )
    return CodeImage(bytes(image), offsets)
