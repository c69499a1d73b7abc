"""What is different where a model is linked into a WebAssembly program: its code is no bytes in memory.

There, a function is reached by its index in the program's table of functions, which the linker makes. So a
code image is an archive of the kernels' objects until it becomes part of a library, and a table of such
indices in the program.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence

from qgraph.codegen.archive import Buffer, Member, read_archive, write_archive
from qgraph.codegen.link import CodeImage
from qgraph.codegen.wasm_object import Segment, read_kernel, with_prefix, write_object

_INDEX = 4  # bytes of an index
_MODEL, _ENTRY = 20, 12  # bytes of qg_static_model and qg_static_code


def archive_image(objects: Mapping[str, bytes]) -> CodeImage:
    """The image of kernels (symbol -> object): an entry is where a kernel's index will be in the table."""
    members = [Member(f"{i}.o", [data], [symbol]) for i, (symbol, data) in enumerate(objects.items())]
    entries = {symbol: _INDEX * i for i, symbol in enumerate(objects)}
    return CodeImage(b"".join(write_archive(members)), entries)


def library_members(
    name: str, container: Sequence[Buffer], isa: str, image: Buffer, entries: Mapping[str, int]
) -> list[Member]:
    """The objects of a library: the model with its container and table, and the kernels.

    Args:
        name: of the library; names of kernels get it as a prefix.
        isa: the code variant; image: as `archive_image` made it; entries: those of the image, by symbol.
    """
    objects = read_archive(image)
    kernels, made = [], []
    for data, symbol in zip(objects, sorted(entries, key=lambda symbol: entries[symbol]), strict=True):
        renamed = with_prefix(data, f"{name}_")
        kernels.append(read_kernel(renamed, f"{name}_{symbol}"))
        made.append(Member(f"{len(kernels) - 1}.o", [renamed], [kernels[-1].symbol]))
    size = sum(len(piece) for piece in container)
    constants = Segment(f".rodata.qgraph.{name}", 64, [*container, isa.encode() + b"\0"])
    # qg_static_model {struct_size, data, size, code, code_count}, its qg_static_code {isa, data, size}, the
    # table.
    start, table = _MODEL + _ENTRY, bytes(_INDEX * len(kernels))
    numbers = struct.pack("<IIIII III", _MODEL, 0, size, 0, 1, 0, 0, len(table))
    addresses = {4: (0, 0), 12: (1, _MODEL), _MODEL: (0, size), _MODEL + 4: (1, start)}
    functions = {start + _INDEX * i: i for i in range(len(kernels))}
    pointers = Segment(f".data.qgraph.{name}", 4, [numbers, table], addresses, functions)
    symbol = f"{name}_artifact"
    model = write_object([constants, pointers], {symbol: (1, 0, _MODEL)}, kernels)
    return [Member("model.o", model, [symbol]), *made]
