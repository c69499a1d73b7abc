"""Build one kernel, map its linked image and call it with numpy arrays, as the runtime does.

    kernel = compile_kernel(spec, isa)
    kernel(y, x, codes, scale, gscale, 17, blocks=6)                # one call for blocks [0, 6)
    kernel(y, x, codes, scale, gscale, 17, blocks=6, split=(1, 3))  # calls of 1, 3, 1, 1 blocks, last first
    kernel(..., blocks=6, guard=True)                               # in a child process, on guarded copies

With `guard`, every array is copied to end flush with an inaccessible page and starts after canary bytes: an
access past the end kills the child (GuardError here), a write before the start is found by the canary.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import re
import signal
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

import numpy as np
from emulated import EmulatedKernel

from qgraph.codegen.isa import ISAS, Isa
from qgraph.codegen.kernels import build_kernel
from qgraph.codegen.kernels.support import support_object
from qgraph.codegen.link import CodeImage, link
from qgraph.codegen.spec import KernelSpec
from qgraph.codegen.tiles import symbol
from qgraph.codegen.tvm_backend import compile_object, compile_text
from qgraph.codegen.wasm_library import archive_image, library_members

_PAGE = mmap.PAGESIZE
_PROT_NONE = 0  # not named by the mmap module
_CANARY = 0xA5
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def cpu_features() -> set[str]:
    words = set()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith(("flags", "Features")):
            # Linux writes avx512_vnni where the runtime, and LLVM, have avx512vnni.
            words.update(line.split(":", 1)[1].replace("avx512_", "avx512").replace("amx_", "amx-").split())
    return words | ({"neon"} if "asimd" in words else set())


def native_isas() -> tuple[Isa, ...]:
    """The ISA levels whose code this machine can run, without those that only add tiles (amx.py)."""
    have = cpu_features()
    here = (i for i in ISAS.values() if i.arch == os.uname().machine and not i.base)
    return tuple(i for i in here if have.issuperset(i.features))


class GuardError(AssertionError):
    """A kernel touched memory outside its buffers."""


def _mprotect(address: int, size: int, prot: int) -> None:
    if _libc.mprotect(address, size, prot) != 0:
        raise OSError(ctypes.get_errno(), "mprotect failed")


def _address(buffer: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))


class _Guarded:
    """A copy of `array` in shared memory, its last byte followed by an inaccessible page."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array
        size = max(_PAGE, -(-array.nbytes // _PAGE) * _PAGE)
        self.map = mmap.mmap(-1, size + _PAGE)  # anonymous and shared: the parent sees what the child writes
        self.start = size - array.nbytes
        self.map[: self.start] = bytes([_CANARY]) * self.start
        self.map[self.start : size] = array.tobytes()
        self.address = _address(self.map) + self.start
        _mprotect(_address(self.map) + size, _PAGE, _PROT_NONE)

    def take_back(self, position: int) -> None:
        if self.map[: self.start] != bytes([_CANARY]) * self.start:
            raise GuardError(f"argument {position}: written before its start")
        got = np.frombuffer(self.map, self.array.dtype, self.array.size, self.start)
        if self.array.flags.writeable:
            self.array[...] = got.reshape(self.array.shape)
        elif got.tobytes() != self.array.tobytes():
            raise GuardError(f"argument {position}: a read-only array was written")


def _ranges(blocks: int, split: Sequence[int] | None) -> list[tuple[int, int]]:
    if split is None:
        return [(0, blocks)]

    def cut() -> Iterator[tuple[int, int]]:
        begin, i = 0, 0
        while begin < blocks:
            size = split[i] if i < len(split) else 1
            yield begin, min(begin + size, blocks)
            begin, i = begin + size, i + 1

    return list(cut())[::-1]  # last range first: kernels must not depend on the order


class Kernel:
    """A mapped kernel. Arrays are passed as pointers (they must be C-contiguous), ints as int64."""

    def __init__(self, spec: KernelSpec, isa: Isa, image: CodeImage) -> None:
        self.spec, self.isa, self.image = spec, isa, image
        size = -(-len(image.code) // _PAGE) * _PAGE
        self._map = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._map[: len(image.code)] = image.code
        base = _address(self._map)
        _mprotect(base, size, mmap.PROT_READ | mmap.PROT_EXEC)
        self._entry = base + image.entries[symbol(spec, isa)]

    def bind(self, *args: np.ndarray | int) -> tuple[ctypes._CFuncPtr, list[int]]:  # type: ignore[name-defined]
        """The C function of these argument types, and the values (bare addresses) before begin and end."""
        types = [ctypes.c_void_p if isinstance(a, np.ndarray) else ctypes.c_int64 for a in args]
        for i, a in enumerate(args):
            assert not isinstance(a, np.ndarray) or a.flags.c_contiguous, f"argument {i} is not contiguous"
        function = ctypes.CFUNCTYPE(None, *types, ctypes.c_int64, ctypes.c_int64)(self._entry)
        return function, [a.ctypes.data if isinstance(a, np.ndarray) else int(a) for a in args]

    def __call__(
        self, *args: np.ndarray | int, blocks: int, split: Sequence[int] | None = None, guard: bool = False
    ) -> None:
        function, values = self.bind(*args)
        ranges = _ranges(blocks, split)
        if not guard:
            for begin, end in ranges:
                function(*values, begin, end)
            return
        buffers = {i: _Guarded(a) for i, a in enumerate(args) if isinstance(a, np.ndarray)}
        for i, buffer in buffers.items():
            values[i] = buffer.address
        child = os.fork()
        if child == 0:  # nothing but the kernel runs here; no exception may escape
            for begin, end in ranges:
                function(*values, begin, end)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            name = signal.Signals(os.WTERMSIG(status)).name
            raise GuardError(f"{self.spec.op} on {self.isa.name}: {name}, an access outside of the buffers")
        for i, buffer in buffers.items():
            buffer.take_back(i)


@cache
def link_kernel(spec: KernelSpec, isa: Isa) -> CodeImage:
    """The linked image of one kernel; works for any ISA, also those this machine cannot run."""
    objects = {
        name: compile_object({name: build_kernel(spec, of)}, of) for name, of in forms_of(spec, isa).items()
    }
    if isa.arch == "wasm32":
        image = archive_image(objects)
        library_members("m", [], isa.name, image.code, image.entries)  # refuses what no library defines
        return image
    return link(objects, [symbol(spec, isa)], support_object(isa))


def forms_of(spec: KernelSpec, isa: Isa) -> dict[str, Isa]:
    """Symbol -> ISA of all that the kernel consists of: a form for tiles calls the other."""
    return {symbol(spec, of): of for of in (isa, ISAS.get(isa.base, isa))}


def stack_bytes(spec: KernelSpec, isa: Isa) -> int:
    """The largest stack frame of the kernel's machine code."""
    text = compile_text({symbol(spec, isa): build_kernel(spec, isa)}, isa)
    if isa.arch == "x86_64":
        return max((int(n) for n in re.findall(r"subq\s+\$(\d+), %rsp", text)), default=0)
    if isa.arch == "wasm32":  # a local is the stack's pointer less the frame
        frames = re.findall(r"global\.get\s+__stack_pointer\s+i32\.const\s+(\d+)\s+i32\.sub", text)
        return max(map(int, frames), default=0)
    if isa.arch == "riscv64":
        small = sum(int(n) for n in re.findall(r"addi\s+sp, sp, -(\d+)", text))
        large = re.findall(
            r"lui\s+(\w+), (\d+)\n(?:\s+addi?w?\s+\1, \1, (-?\d+)\n)?\s+sub\s+sp, sp, \1", text
        )
        return small + sum((int(upper) << 12) + int(lower or 0) for _, upper, lower in large)
    frames = re.findall(r"sub\s+sp, sp, #(\d+)(, lsl #12)?", text)  # a large frame takes one of each
    return sum(int(n) << (12 if shifted else 0) for n, shifted in frames)


def innermost_loops(text: str) -> list[list[str]]:
    """The instructions between a label and a jump back to it, of loops that hold no label of another."""
    lines = [line for line in text.splitlines() if line[:2] == ".L" or re.match(r"\t[a-z]", line)]
    labels = {line.rstrip(":"): i for i, line in enumerate(lines) if re.match(r"\.LBB\w+:", line)}
    found = []
    for i, line in enumerate(lines):
        jump = re.match(r"\tj\w+\s+(\.LBB\w+)", line)
        start = labels.get(jump.group(1), i) if jump else i
        body = lines[start + 1 : i]
        if start < i and not any(part.startswith(".LBB") for part in body):
            found.append([part for part in body if not part.startswith(".L")])
    return found


@cache
def compile_kernel(spec: KernelSpec, isa: Isa) -> Kernel:
    if isa.arch == "cuda":  # of tests/cuda, whose folder is on the path then
        from emulator import AsOnCpu

        return AsOnCpu(spec)  # type: ignore[return-value]
    image = link_kernel(spec, isa)
    return Kernel(spec, isa, image) if isa.arch == os.uname().machine else _Emulated(spec, isa, image)


class _Emulated(Kernel, EmulatedKernel):
    """A kernel of another processor (emulated.py)."""

    __init__ = EmulatedKernel.__init__

    def __call__(
        self, *args: np.ndarray | int, blocks: int, split: Sequence[int] | None = None, guard: bool = False
    ) -> None:
        self.run(args, _ranges(blocks, split), guard)


def aligned(array: np.ndarray) -> np.ndarray:
    """A 64-byte aligned copy, as the runtime guarantees for weights and temporaries."""
    raw = np.empty(array.nbytes + 64, np.uint8)
    start = -raw.ctypes.data % 64
    out = raw[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    out[...] = array
    return out
