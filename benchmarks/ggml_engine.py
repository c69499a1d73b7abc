"""llama.cpp's matrix products, from its libraries, as an engine of benchmarks/kernels.py."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np
from compiled import compile_c
from matmul_engines import AbsentError, Contender, Problem

from qgraph.errors import ResourceError

SOURCE = Path(__file__).with_name("ggml_chain.c")

# The types compared, and what its products round activations to.
TYPES = {"nvfp4": "int8 by 32", "q4_0": "int8 by 32", "tq2_0": "int8 by 256", "tq1_0": "int8 by 256"}


class Ggml:
    """A chain of weights of one of ggml's types.

    include, libraries: the folders of ggml.h and of libggml-base.so.
    """

    def __init__(self, kind: str, include: Path, libraries: Path) -> None:
        self._kind, self._include, self._libraries = kind, include, libraries

    def __call__(self, problem: Problem) -> Contender:
        K, N = problem.K, problem.N
        library = load(self._include, self._libraries)
        kind = library.find_type(self._kind.encode())
        if kind < 0:
            raise AbsentError(f"this ggml has no type {self._kind}")
        if K % library.block_of(kind):
            raise AbsentError(f"K = {K} is not made of blocks of {library.block_of(kind)}")
        row = library.row_bytes(kind, K)
        layers = problem.layers(N * row)
        weight = np.random.default_rng(0).standard_normal((N, K), np.float32) / np.float32(K**0.5)
        rounded = np.empty((N, row), np.uint8)
        library.round_weight(kind, _pointer(weight), _pointer(rounded), N, K)
        turned = np.stack([np.roll(rounded, i, axis=0) for i in range(layers)])
        chain = library.open_chain(kind, K, N, layers, problem.threads, _pointer(turned))
        if not chain:
            raise AbsentError("ggml has no memory for it")
        owner = Chain(library, chain, N)
        name = f"llama.cpp {self._kind} ({library.buffer_name(chain).decode()})"
        return Contender(name, layers, N * row, TYPES[self._kind], owner.bind)


class Chain:
    """An open chain; closed when nobody holds it."""

    def __init__(self, library: ctypes.CDLL, chain: int, N: int) -> None:
        self._library, self._chain, self._N, self._rows = library, chain, N, 0
        weakref.finalize(self, library.close_chain, chain)

    def bind(self, x: np.ndarray) -> Callable[[], object]:
        if not self._library.bind_rows(self._chain, len(x), _pointer(x)):
            raise AbsentError("ggml has no memory for it")
        self._rows = len(x)
        return self.run

    def run(self) -> None:
        if not self._library.run_chain(self._chain):
            raise AbsentError("ggml ends with an error")

    def output(self) -> np.ndarray:
        """What the last run gave, float32 [rows, N]."""
        y = np.empty((self._rows, self._N), np.float32)
        self._library.read_output(self._chain, _pointer(y))
        return y


def load(include: Path, libraries: Path) -> ctypes.CDLL:
    """The compiled C side. Raises AbsentError where it does not compile or load against these folders."""
    linked = (
        f"-I{include}",
        f"-L{libraries}",
        "-lggml-base",
        "-lggml-cpu",
        f"-Wl,-rpath,{libraries.resolve()}",
    )
    try:
        library = compile_c(SOURCE.read_text(encoding="utf-8"), "-O2", *linked)
    except (ResourceError, OSError) as error:
        raise AbsentError(f"no ggml in {include} and {libraries}: {error}") from error
    size, number, pointer = ctypes.c_int64, ctypes.c_int, ctypes.c_void_p
    for name, result, takes in (
        ("find_type", number, (ctypes.c_char_p,)),
        ("block_of", size, (number,)),
        ("row_bytes", size, (number, size)),
        ("round_weight", None, (number, pointer, pointer, size, size)),
        ("open_chain", pointer, (number, size, size, number, number, pointer)),
        ("buffer_name", ctypes.c_char_p, (pointer,)),
        ("bind_rows", ctypes.c_bool, (pointer, size, pointer)),
        ("run_chain", ctypes.c_bool, (pointer,)),
        ("read_output", None, (pointer, pointer)),
        ("close_chain", None, (pointer,)),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, takes
    return library


def _pointer(array: np.ndarray) -> int:
    assert array.flags.c_contiguous
    return array.ctypes.data
