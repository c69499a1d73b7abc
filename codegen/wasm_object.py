"""Reads and writes relocatable WebAssembly objects, so that a library needs no assembler or compiler of the
target.

After the WebAssembly core specification (binary format) and the tool conventions' "Linking" (sections
`linking` and `reloc.*`), as LLVM writes them and wasm-ld reads them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from qgraph.codegen.archive import Buffer
from qgraph.errors import QGraphError

_MAGIC = b"\0asm\1\0\0\0"
_CUSTOM, _TYPE, _IMPORT, _FUNCTION, _ELEMENT, _CODE, _DATA, _DATA_COUNT = 0, 1, 2, 3, 9, 10, 11, 12
I32, I64 = 0x7F, 0x7E
_FUNCREF, _FUNCTION_TYPE = 0x70, 0x60

# Linking: version, subsections, kinds of symbols, their flags, relocations.
_VERSION, _SEGMENTS, _SYMBOLS = 2, 5, 8
_KIND_FUNCTION, _KIND_DATA, _KIND_SECTION = 0, 1, 3
_LOCAL, _HIDDEN, _UNDEFINED, _EXPLICIT_NAME = 0x02, 0x04, 0x10, 0x40
_FUNCTION_INDEX_LEB, _TABLE_INDEX_I32, _MEMORY_ADDR_I32 = 0, 2, 5


# What LLVM calls by itself.
_FROM_LIBC = {"memcpy", "memset", "memmove"}


# ---- numbers and names


def _unsigned(value: int, width: int = 1) -> bytes:
    """LEB128, of at least `width` bytes: a place that a linker fills in has five."""
    out = bytearray()
    while value > 0x7F or len(out) + 1 < width:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _signed(value: int) -> bytes:
    out = bytearray()
    while not -0x40 <= value < 0x40:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value & 0x7F])


def _name(text: str) -> bytes:
    data = text.encode()
    return _unsigned(len(data)) + data


def _vector(items: Sequence[bytes]) -> bytes:
    return _unsigned(len(items)) + b"".join(items)


class _Reader:
    def __init__(self, data: Buffer) -> None:
        self.data, self.at = data, 0

    def byte(self) -> int:
        self.at += 1
        return self.data[self.at - 1]

    def unsigned(self) -> int:
        value, shift = 0, 0
        while (byte := self.byte()) & 0x80:
            value |= (byte & 0x7F) << shift
            shift += 7
        return value | byte << shift

    def take(self, size: int) -> bytes:
        self.at += size
        return bytes(self.data[self.at - size : self.at])

    def name(self) -> str:
        return self.take(self.unsigned()).decode()

    def more(self) -> bool:
        return self.at < len(self.data)


# ---- what LLVM makes of a kernel


@dataclass(frozen=True)
class Kernel:
    """A function that takes parameters of I32 and I64 and returns nothing."""

    symbol: str
    params: tuple[int, ...]


def read_kernel(data: Buffer, symbol: str) -> Kernel:
    """The function `symbol` of an object. Raises QGraphError if there is none, or another kind of it."""
    sections = {number: _Reader(content) for number, content in _sections(data) if number != _CUSTOM}
    types = [_read_type(sections[_TYPE]) for _ in range(sections[_TYPE].unsigned())]
    imported = sum(kind == 0 for kind, _ in _read_imports(sections[_IMPORT]))
    functions = [sections[_FUNCTION].unsigned() for _ in range(sections[_FUNCTION].unsigned())]
    for entry in _read_symbols(data):
        if entry.kind == _KIND_FUNCTION and entry.name == symbol and not entry.flags & _UNDEFINED:
            params, results = types[functions[entry.index - imported]]
            if results or not {*params} <= {I32, I64}:
                raise QGraphError(f"kernel {symbol} takes or returns other than pointers and int64")
            return Kernel(symbol, params)
    raise QGraphError(f"no object defines kernel {symbol}")


def with_prefix(data: Buffer, prefix: str) -> bytes:
    """An object whose functions have `prefix` before their names, and are hidden: two models with a kernel of
    the same name can be linked into one program.

    Raises QGraphError where it calls a function that is not its own, but for those of the C library that LLVM
    puts in by itself.
    """
    out = [_MAGIC]
    for number, content in _sections(data):
        reader = _Reader(content)
        if number == _IMPORT:
            called = {name for kind, name in _read_imports(reader) if kind == 0} - _FROM_LIBC
            if called:
                raise QGraphError(f"a kernel calls '{min(called)}', which no kernel library provides")
        elif number == _CUSTOM and reader.name() == "linking":
            content = _name("linking") + _renamed(reader, prefix)
        out += [bytes([number]), _unsigned(len(content)), content]
    return b"".join(out)


@dataclass
class _Symbol:
    kind: int
    flags: int
    name: str = ""
    index: int = 0
    rest: bytes = b""  # of defined data: segment, offset, size

    def encode(self) -> bytes:
        head = bytes([self.kind]) + _unsigned(self.flags)
        name = _name(self.name) if self.name else b""
        if self.kind == _KIND_DATA:
            return head + name + self.rest
        return head + _unsigned(self.index) + name


def _sections(data: Buffer) -> Iterator[tuple[int, bytes]]:
    if bytes(data[: len(_MAGIC)]) != _MAGIC:
        raise QGraphError("a kernel's object is not WebAssembly")
    reader = _Reader(data)
    reader.take(len(_MAGIC))
    while reader.more():
        number = reader.byte()
        yield number, reader.take(reader.unsigned())


def _read_type(reader: _Reader) -> tuple[tuple[int, ...], tuple[int, ...]]:
    reader.byte()
    params = tuple(reader.take(reader.unsigned()))
    return params, tuple(reader.take(reader.unsigned()))


def _read_imports(reader: _Reader) -> Iterator[tuple[int, str]]:
    """Kind, 0 for a function, and name."""
    for _ in range(reader.unsigned()):
        reader.name()  # of the module
        name, kind = reader.name(), reader.byte()
        if kind in (0, 3):  # a type's index, or a global's type and whether it changes
            reader.take(2) if kind == 3 else reader.unsigned()
        else:  # a memory; a table, after its type: limits
            reader.take(kind == 1)
            limits = reader.byte()
            reader.unsigned()
            if limits & 1:
                reader.unsigned()
        yield kind, name


def _read_symbols(data: Buffer) -> list[_Symbol]:
    for number, content in _sections(data):
        reader = _Reader(content)
        if number == _CUSTOM and reader.name() == "linking":
            reader.unsigned()
            while reader.more():
                kind, part = reader.byte(), _Reader(reader.take(reader.unsigned()))
                if kind == _SYMBOLS:
                    return [_read_symbol(part) for _ in range(part.unsigned())]
    return []


def _read_symbol(reader: _Reader) -> _Symbol:
    symbol = _Symbol(reader.byte(), reader.unsigned())
    named = not symbol.flags & _UNDEFINED or bool(symbol.flags & _EXPLICIT_NAME)
    if symbol.kind == _KIND_DATA:
        symbol.name = reader.name()
        if not symbol.flags & _UNDEFINED:
            symbol.rest = b"".join(_unsigned(reader.unsigned()) for _ in range(3))
        return symbol
    symbol.index = reader.unsigned()
    if symbol.kind != _KIND_SECTION and named:
        symbol.name = reader.name()
    return symbol


def _renamed(reader: _Reader, prefix: str) -> bytes:
    """The rest of section `linking`, from its version on."""
    out = [_unsigned(reader.unsigned())]
    while reader.more():
        kind, part = reader.byte(), reader.take(reader.unsigned())
        if kind == _SYMBOLS:
            table = _Reader(part)
            symbols = [_read_symbol(table) for _ in range(table.unsigned())]
            for symbol in symbols:
                if symbol.kind == _KIND_FUNCTION and not symbol.flags & _UNDEFINED:
                    symbol.name = prefix + symbol.name
                    symbol.flags |= _HIDDEN
            part = _vector([symbol.encode() for symbol in symbols])
        out += [bytes([kind]), _unsigned(len(part)), part]
    return b"".join(out)


# ---- what a program links beside the kernels


@dataclass
class Segment:
    """A piece of the memory that a program begins with.

    Attributes:
        pieces: the content, piece by piece: what is large is not copied.
        addresses: offset in this segment -> (index of a segment in the object's list, offset in it): 32-bit
            addresses that the linker fills in.
        functions: offset in this segment -> index of a kernel in the object's list: 32-bit indices in the
            program's table of functions, likewise; of what calls the kernel.
    """

    name: str
    align: int
    pieces: Sequence[Buffer]
    addresses: Mapping[int, tuple[int, int]] = field(default_factory=dict)
    functions: Mapping[int, int] = field(default_factory=dict)

    @property
    def size(self) -> int:
        return sum(len(piece) for piece in self.pieces)


def write_object(
    segments: Sequence[Segment], symbols: Mapping[str, tuple[int, int, int]], kernels: Sequence[Kernel]
) -> list[Buffer]:
    """The pieces of an object with `segments`, and with a function for each of `kernels`, which other objects
    define: `void f(const int64_t* args)` calls the kernel with these numbers. So all are called through
    pointers of one type: WebAssembly checks types in calls through its table.

    `symbols` are the global ones, all of them data: name -> (index of a segment, offset, size).
    """
    types = list(dict.fromkeys([(I32,), *(kernel.params for kernel in kernels)]))
    functions = [_function(_caller(kernel, i)) for i, kernel in enumerate(kernels)]
    caller_type = types.index((I32,))
    # Symbols, by index: the kernels, their callers, the start of each segment, then those that have a name.
    count = len(kernels)
    table = [_Symbol(_KIND_FUNCTION, _UNDEFINED | _HIDDEN, "", i) for i in range(count)]
    table += [
        _Symbol(_KIND_FUNCTION, _LOCAL, f"call.{kernel.symbol}", count + i)
        for i, kernel in enumerate(kernels)
    ]
    for i, segment in enumerate(segments):
        table.append(_data(segment.name, i, 0, segment.size, _LOCAL))
    table += [_data(name, *place) for name, place in symbols.items()]

    imports = [_import("__linear_memory", b"\2\0\0")]
    imports += [_import(kernel.symbol, b"\0" + _unsigned(types.index(kernel.params))) for kernel in kernels]
    imports.append(_import("__indirect_function_table", bytes([1, _FUNCREF, 0]) + _unsigned(count + 1)))
    elements = [b"\0" + _constant(1) + _vector([_unsigned(count + i) for i in range(count)])]
    # In front of `call` and its operand's five bytes, and of the function's end.
    code, calls, at = [_unsigned(count)], [], len(_unsigned(count))
    for i, body in enumerate(functions):
        at += len(body)
        code.append(body)
        calls.append(bytes([_FUNCTION_INDEX_LEB]) + _unsigned(at - 6) + _unsigned(i))
    data, places = _data_section(segments, count)

    sections: list[tuple[int, Sequence[Buffer]]] = [
        (_TYPE, [_vector([_type(params) for params in types])]),
        (_IMPORT, [_vector(imports)]),
        (_FUNCTION, [_vector([_unsigned(caller_type)] * count)]),
        (_ELEMENT, [_vector(elements)]),
        (_DATA_COUNT, [_unsigned(len(segments))]),
        (_CODE, code),
        (_DATA, data),
    ]
    numbers = [number for number, _ in sections]
    described = [_name(s.name) + _unsigned(s.align.bit_length() - 1) + b"\0" for s in segments]
    parts = {_SYMBOLS: _vector([symbol.encode() for symbol in table]), _SEGMENTS: _vector(described)}
    linking = b"".join(bytes([kind]) + _unsigned(len(part)) + part for kind, part in parts.items())
    sections.append((_CUSTOM, [_name("linking") + _unsigned(_VERSION) + linking]))
    for name, number, relocations in (("CODE", _CODE, calls), ("DATA", _DATA, places)):
        target = _unsigned(numbers.index(number))
        sections.append((_CUSTOM, [_name(f"reloc.{name}") + target + _vector(relocations)]))

    out: list[Buffer] = [_MAGIC]
    for number, pieces in sections:
        out += [bytes([number]) + _unsigned(sum(len(piece) for piece in pieces)), *pieces]
    return out


def _data_section(segments: Sequence[Segment], kernels: int) -> tuple[list[Buffer], list[bytes]]:
    """Content and relocations, in the order of their places."""
    pieces: list[Buffer] = [_unsigned(len(segments))]
    relocations: list[bytes] = []
    at, address = len(pieces[0]), 0
    for segment in segments:
        address += -address % segment.align
        head = b"\0" + _constant(address) + _unsigned(segment.size)
        pieces += [head, *segment.pieces]
        at += len(head)
        found = {
            place: bytes([_MEMORY_ADDR_I32])
            + _unsigned(at + place)
            + _unsigned(2 * kernels + to)
            + _signed(offset)
            for place, (to, offset) in segment.addresses.items()
        } | {
            place: bytes([_TABLE_INDEX_I32]) + _unsigned(at + place) + _unsigned(kernels + index)
            for place, index in segment.functions.items()
        }
        relocations += [found[place] for place in sorted(found)]
        at += segment.size
        address += segment.size
    return pieces, relocations


def _caller(kernel: Kernel, index: int) -> bytes:
    """The instructions of the function that calls kernel `index`: pointers are the low halves of numbers."""
    loads = {I32: b"\x28\2", I64: b"\x29\3"}  # i32.load and i64.load, and their alignments' logarithms
    out = b"".join(b"\x20\0" + loads[kind] + _unsigned(8 * i) for i, kind in enumerate(kernel.params))
    return out + b"\x10" + _unsigned(index, 5)


def _function(code: bytes) -> bytes:
    """With its size, no locals, and its end."""
    return _unsigned(len(code) + 2) + b"\0" + code + b"\x0b"


def _type(params: tuple[int, ...]) -> bytes:
    return bytes([_FUNCTION_TYPE]) + _unsigned(len(params)) + bytes(params) + b"\0"


def _import(name: str, what: bytes) -> bytes:
    return _name("env") + _name(name) + what


def _constant(value: int) -> bytes:
    """The expression `i32.const value`."""
    return b"\x41" + _signed(value) + b"\x0b"


def _data(name: str, segment: int, offset: int, size: int, flags: int = 0) -> _Symbol:
    return _Symbol(_KIND_DATA, flags, name, rest=b"".join(map(_unsigned, (segment, offset, size))))
