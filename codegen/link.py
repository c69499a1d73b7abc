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
from dataclasses import dataclass, field, replace

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
    origin: int  # the offset that relative addresses count from: `offset` but for the lower half of RISC-V's


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
    symbols: dict[str, tuple[int, int]]  # global name -> (section index, offset)


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
            if section.name.startswith((".eh_frame", ".init_array", ".ARM.ex")):
                continue
            raise QGraphError(
                f"kernel object {name}: section {section.name} is writable data; kernels must be pure code"
            )
        sections[index] = _Section(section.data(), section["sh_addralign"] or 1)
    symtab = next(s for s in elf.iter_sections() if isinstance(s, SymbolTableSection))
    symbols = {
        s.name: (s["st_shndx"], s["st_value"])
        for s in symtab.iter_symbols()
        if s["st_info"]["bind"] == "STB_GLOBAL" and isinstance(s["st_shndx"], int)
    }
    machine = elf["e_machine"]
    for section in elf.iter_sections():
        if not isinstance(section, RelocationSection) or section["sh_info"] not in sections:
            continue
        own = sections[section["sh_info"]]
        for rel in section.iter_relocations():
            sym = symtab.get_symbol(rel["r_info_sym"])
            # TVM puts conversions of float16 into every object, weak, by a calling convention that is not
            # every target's: nobody is to call them.
            weak = sym["st_info"]["bind"] == "STB_WEAK"
            defined = sym["st_shndx"] if isinstance(sym["st_shndx"], int) and not weak else 0
            at, kind = rel["r_offset"], rel["r_info_type"]
            addend = rel["r_addend"] if section.is_RELA() else _addend_in_place(own.data, at)
            own.relocations.append(_Relocation(at, kind, sym.name, defined, sym["st_value"], addend, at))
        if machine == "EM_RISCV":
            own.relocations = _with_lower_halves(own.relocations)
    return _Object(name, machine, sections, symbols)


def _addend_in_place(data: bytes, at: int) -> int:
    """Of an ARM branch: 24 bits that count words."""
    offset = int.from_bytes(data[at : at + 3], "little")
    return (offset - (offset >> 23 << 24)) * 4


def _with_lower_halves(relocations: list[_Relocation]) -> list[_Relocation]:
    """A PCREL_LO12 names the instruction that takes the upper half of the same address: it gets that one's
    symbol, and the place it counts from."""
    upper = {rel.offset: rel for rel in relocations if rel.kind == _PCREL_HI20}
    return [
        replace(upper[rel.value], offset=rel.offset, kind=rel.kind) if rel.kind in _PCREL_LO12 else rel
        for rel in relocations
    ]


def _signed(value: int, bits: int, what: str) -> int:
    if not -(1 << (bits - 1)) <= value < 1 << (bits - 1):
        raise QGraphError(f"code image too large: {what} does not fit {bits} bits")
    return value & ((1 << bits) - 1)


# A patch makes what lies at `place` refer to `value`, both offsets in the image; `origin` is what distances
# count from. False for a relocation that is not relative.


def _patch_x86(image: bytearray, kind: int, place: int, value: int, origin: int) -> bool:
    # PC32 and PLT32 (a call to a symbol that the image itself defines) are the same sum here.
    if kind in (2, 4):
        image[place : place + 4] = _signed(value - place, 32, "a relative address").to_bytes(4, "little")
        return True
    if kind == 24:  # PC64
        image[place : place + 8] = _signed(value - place, 64, "a relative address").to_bytes(8, "little")
        return True
    return False


def _patch_arm(image: bytearray, kind: int, place: int, value: int, origin: int) -> bool:
    if kind not in (28, 29):  # CALL, JUMP24: all code is ARM code, none Thumb
        return False
    branch = _signed((value - place) >> 2, 24, "a branch").to_bytes(3, "little")
    image[place : place + 3] = branch
    return True


_PCREL_HI20, _PCREL_LO12 = 23, (24, 25)


def _patch_riscv(image: bytearray, kind: int, place: int, value: int, origin: int) -> bool:
    distance = value - origin
    # The lower half is signed: the upper one is rounded.
    upper = _signed(distance + 0x800 >> 12, 20, "a relative address") << 12
    lower = distance & 0xFFF
    word = int.from_bytes(image[place : place + 4], "little")
    if kind in (18, 19):  # CALL, CALL_PLT: auipc and jalr
        second = int.from_bytes(image[place + 4 : place + 8], "little") | lower << 20
        image[place + 4 : place + 8] = second.to_bytes(4, "little")
        word |= upper
    elif kind == _PCREL_HI20:
        word |= upper
    elif kind == 24:  # PCREL_LO12_I
        word |= lower << 20
    elif kind == 25:  # PCREL_LO12_S, of a store
        word |= (lower >> 5) << 25 | (lower & 31) << 7
    else:
        return False
    image[place : place + 4] = word.to_bytes(4, "little")
    return True


def _patch_aarch64(image: bytearray, kind: int, place: int, value: int, origin: int) -> bool:
    word = int.from_bytes(image[place : place + 4], "little")
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


_PATCH = {
    "EM_X86_64": _patch_x86,
    "EM_AARCH64": _patch_aarch64,
    "EM_ARM": _patch_arm,
    "EM_RISCV": _patch_riscv,
}


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
            where_to = base + rel.offset, target + rel.addend, base + rel.origin
            if patch is None or not patch(image, rel.kind, *where_to):
                raise QGraphError(
                    f"kernel object {obj.name}: relocation type {rel.kind} of {obj.machine} is not relative"
                )
    return CodeImage(bytes(image), offsets)
