"""Object files of our own, read back by pyelftools."""

from __future__ import annotations

import io

import pytest
from elftools.elf.elffile import ELFFile

from qgraph.codegen.elf_object import ALLOC, EXECUTE, MACHINES, WRITE, Section, write_object


def sections() -> list[Section]:
    pointers = Section(".data.rel.ro", ALLOC | WRITE, 8, [bytes(24)], {0: (0, 5), 16: (1, 0)})
    return [
        Section(".rodata.x", ALLOC, 64, [b"abc", memoryview(b"defg")]),
        Section(".text.x", ALLOC | EXECUTE, 4096, [b"\xc3" * 9]),
        pointers,
    ]


@pytest.mark.parametrize("machine", MACHINES)
def test_object(machine: str) -> None:
    data = b"".join(write_object(machine, sections(), {"first": (2, 0, 24), "second": (0, 3, 4)}))
    elf = ELFFile(io.BytesIO(data))
    assert elf["e_type"] == "ET_REL"
    assert (
        elf["e_machine"]
        == {
            "x86_64": "EM_X86_64",
            "aarch64": "EM_AARCH64",
            "armv7l": "EM_ARM",
            "riscv64": "EM_RISCV",
        }[machine]
    )
    assert elf.elfclass == MACHINES[machine].bits
    assert elf.get_section_by_name(".rodata.x").data() == b"abcdefg"
    text = elf.get_section_by_name(".text.x")
    assert text.data() == b"\xc3" * 9 and text["sh_flags"] == 6
    for section in elf.iter_sections():
        assert section["sh_offset"] % max(1, section["sh_addralign"]) == 0
    table = elf.get_section_by_name(".symtab")
    found = {s.name: (s["st_shndx"], s["st_value"], s["st_size"]) for s in table.iter_symbols() if s.name}
    assert found == {"first": (3, 0, 24), "second": (1, 3, 4)}
    # sh_info of a symbol table: the first symbol that is not local.
    bindings = [s["st_info"]["bind"] for s in table.iter_symbols()]
    assert bindings.index("STB_GLOBAL") == table["sh_info"] == 4
    wide = MACHINES[machine].bits == 64
    relocations = elf.get_section_by_name(".rela.data.rel.ro" if wide else ".rel.data.rel.ro")
    content = elf.get_section_by_name(".data.rel.ro").data()
    assert relocations["sh_info"] == 3 and elf.get_section(relocations["sh_link"]).name == ".symtab"
    places = [
        (
            r["r_offset"],
            table.get_symbol(r["r_info_sym"])["st_shndx"],
            r["r_addend"] if wide else int.from_bytes(content[r["r_offset"] :][:4], "little"),
        )
        for r in relocations.iter_relocations()
    ]
    assert places == [(0, 1, 5), (16, 2, 0)]
    assert {r["r_info_type"] for r in relocations.iter_relocations()} == {MACHINES[machine].absolute}
