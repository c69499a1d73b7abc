"""CUDA C++ -> machine code, by nvcc where it is installed, else by NVRTC (of a CUDA toolkit, or the wheel
`nvidia-cuda-nvrtc`). Neither needs a GPU."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
import tempfile
from abc import ABC, abstractmethod
from functools import cache
from pathlib import Path

from qgraph.codegen.cuda.arch import CudaArch
from qgraph.errors import QGraphError, ResourceError

# Multiplications and additions are fused where a kernel says so, and nowhere else: results are those that the
# tests see on a CPU.
_FLAGS = ("--fmad=false",)
_HINT = "install a CUDA toolkit (nvcc on PATH), or `pip install 'qgraph[cuda]'`"


class Compiler(ABC):
    """One compiler of CUDA C++.

    Attributes:
        name: with its version; results are cached by it.
    """

    name: str

    @abstractmethod
    def supports(self, arch: CudaArch) -> bool:
        """Whether it knows the architecture."""

    @abstractmethod
    def compile(self, text: str, arch: CudaArch) -> bytes:
        """A cubin, or PTX ending in a NUL. Raises QGraphError with what the compiler says, ResourceError if
        it is the compiler that does not work."""


class _Nvcc(Compiler):
    def __init__(self, path: str) -> None:
        self._path = path
        version = self._run(["--version"])
        release = re.search(r"release [\d.]+, V([\d.]+)", version)
        self.name = f"nvcc {release.group(1) if release else version.strip().splitlines()[-1]}"
        self._known = set(self._run(["--list-gpu-code"]).split()) | set(
            self._run(["--list-gpu-arch"]).split()
        )

    def _run(self, args: list[str], error: type[QGraphError] = ResourceError) -> str:
        try:
            done = subprocess.run([self._path, *args], capture_output=True, text=True, check=False)
        except OSError as refused:
            raise ResourceError(f"{self._path} does not run: {refused.strerror}; {_HINT}") from refused
        if done.returncode:
            said = "; ".join((done.stderr or done.stdout).split("\n"))
            raise error(f"{self._path}: {said.strip('; ')[-2000:]}")
        return done.stdout

    def supports(self, arch: CudaArch) -> bool:
        # Its lists leave the architecture-specific variants out.
        return arch.real.removesuffix("a") in self._known

    def compile(self, text: str, arch: CudaArch) -> bytes:
        try:
            return self._compile(text, arch, QGraphError)
        except QGraphError:
            # It needs a C++ compiler of a version that it knows: no defect of the text where that is missing.
            self._compile("", arch, ResourceError)
            raise

    def _compile(self, text: str, arch: CudaArch, error: type[QGraphError]) -> bytes:
        with tempfile.TemporaryDirectory(prefix="qgraph-") as folder:
            source, out = Path(folder) / "kernels.cu", Path(folder) / "kernels.out"
            source.write_text(text)
            kind = "-ptx" if arch.is_ptx else "-cubin"
            self._run(["-w", f"-arch={arch.real}", kind, *_FLAGS, "-o", str(out), str(source)], error)
            return out.read_bytes() + (b"\0" if arch.is_ptx else b"")


class _Nvrtc(Compiler):
    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        library.nvrtcGetErrorString.restype = ctypes.c_char_p
        major, minor, count = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
        self._check(library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
        self._check(library.nvrtcGetNumSupportedArchs(ctypes.byref(count)))
        numbers = (ctypes.c_int * count.value)()
        self._check(library.nvrtcGetSupportedArchs(numbers))
        self._known = set(numbers)
        self.name = f"NVRTC {major.value}.{minor.value}"

    def _check(self, status: int, log: str = "") -> None:
        if status:
            raise QGraphError(f"NVRTC: {self._library.nvrtcGetErrorString(status).decode()}{log}")

    def supports(self, arch: CudaArch) -> bool:
        return int(arch.real.rpartition("_")[2].removesuffix("a")) in self._known

    def compile(self, text: str, arch: CudaArch) -> bytes:
        program = ctypes.c_void_p()
        create = self._library.nvrtcCreateProgram
        self._check(create(ctypes.byref(program), text.encode(), b"kernels.cu", 0, None, None))
        try:
            given = [f"--gpu-architecture={arch.real}", *_FLAGS, "--disable-warnings"]
            options = (ctypes.c_char_p * len(given))(*(option.encode() for option in given))
            status = self._library.nvrtcCompileProgram(program, len(given), options)
            self._check(status, f": {self._text(program, 'ProgramLog')[:2000].decode()}" if status else "")
            return self._text(program, "PTX" if arch.is_ptx else "CUBIN")
        finally:
            self._library.nvrtcDestroyProgram(ctypes.byref(program))

    def _text(self, program: ctypes.c_void_p, what: str) -> bytes:
        size = ctypes.c_size_t()
        self._check(getattr(self._library, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
        data = ctypes.create_string_buffer(size.value)
        self._check(getattr(self._library, f"nvrtcGet{what}")(program, data))
        return data.raw


def _nvrtc() -> _Nvrtc | None:
    """That of the wheel, else of the system."""
    import importlib.util

    names = ["libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"]
    spec = importlib.util.find_spec("nvidia")
    for folder in spec.submodule_search_locations or () if spec else ():
        names[:0] = map(str, sorted(Path(folder).glob("*/lib/libnvrtc.so.*"), reverse=True))
    for name in names:
        try:
            return _Nvrtc(ctypes.CDLL(name))
        except (OSError, AttributeError):
            continue
    return None


@cache
def find_compiler() -> Compiler:
    """The compiler to use. Raises ResourceError where there is none, or nvcc does not run."""
    path = shutil.which("nvcc")
    if path is not None:
        return _Nvcc(path)
    found = _nvrtc()
    if found is None:
        raise ResourceError(f"target cuda needs a compiler of CUDA C++: {_HINT}")
    return found
