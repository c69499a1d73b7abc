"""The host's log and memory where a model is on a GPU, and a model for both that is part of a program."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import onnx
from decoders import Decoder
from emulated_artifact import emulated
from fake_cuda import Report
from test_models import COMPARE

import qgraph

Run = Callable[..., Report]

# SessionOptions as qgraph.h has them, where _native.py knows their first members alone.
HOOKS = """
import ctypes
from ctypes import CFUNCTYPE, byref, c_char_p, c_int32, c_size_t, c_void_p
from qgraph.runtime import _native
from artifact_builder import toy_inputs

Log = CFUNCTYPE(None, c_void_p, c_int32, c_char_p)
Allocate = CFUNCTYPE(c_void_p, c_void_p, c_size_t, c_size_t)
Deallocate = CFUNCTYPE(None, c_void_p, c_void_p, c_size_t)

class SessionOptions(_native.SessionOptions):
    _fields_ = (
        ("parallel_for", c_void_p),
        ("parallel_context", c_void_p),
        ("allocate", Allocate),
        ("deallocate", Deallocate),
        ("allocator_context", c_void_p),
    )

lines, asked = [], []
log = Log(lambda context, level, text: lines.append((level, text.decode())))
allocate = Allocate(lambda context, size, alignment: asked.append(size))
deallocate = Deallocate(lambda context, memory, size: None)
lib = _native.library()
lib.qg_load.argtypes = lib.qg_session_create.argtypes = None

def load(path, device):
    given = ctypes.cast(log, c_void_p)
    options = _native.LoadOptions(ctypes.sizeof(_native.LoadOptions), None, device.encode(), given)
    model = c_void_p()
    _native.check(lib.qg_load(path.encode(), byref(options), byref(model)))
    return model

def create(model, *_):
    options = SessionOptions(ctypes.sizeof(SessionOptions), 1, 0, 0, None, None, allocate, deallocate)
    session = c_void_p()
    _native.check(lib.qg_session_create(model, byref(options), byref(session)))
    return session

_native.load, _native.create_session = lambda path, isa, device, key: load(path, device), create
"""


def test_log_and_memory(run: Run, toy: Path) -> None:
    """The GPU's memory is not the host's, and a failure is told as it is returned."""
    run(
        HOOKS
        + f"""
with runtime.load({str(toy)!r}, device="cuda") as model, model.session() as session:
    assert lines[0] == (1, "variant 'future' needs warp_drive"), lines
    assert lines[1][0] == 0 and lines[1][1].endswith(" steps, variant 'wide' on cuda:0"), lines
    session.run(toy_inputs(2, 3))
    assert lines[2:] == [(0, f"memory: {{session.memory}} bytes with batch=2, sequence=3")], lines
    try:
        session.run(toy_inputs(512, 64))
    except ResourceError as error:
        assert "out of memory on cuda:0: no" in str(error) and "(CUDA_ERROR_OUT_OF_MEMORY)" in str(error)
        assert lines[-1] == (2, f"out of memory: {{error}}"), lines
    else:
        raise AssertionError("there was memory")
assert asked == [], asked
""",
        memory=1 << 20,
    )


def test_a_program_with_the_model_inside(run: Run, tmp_path: Path) -> None:
    """Of a static library for both either code is loaded. As a shared object, for Python to link it."""
    onnx.save(Decoder(4, 2, 64).model, tmp_path / "model.onnx")
    options = {"target": "cpu,cuda", "onnx": False, "verify": False, "scheme": "nvfp4"}
    with emulated():
        result = qgraph.compile(
            tmp_path / "model.onnx", output=tmp_path / "out", format="static-lib", **options
        )
    assert result.library is not None and result.header is not None
    assert "cuda-emulated" in result.header.read_text().splitlines()[0]
    program = tmp_path / "program.so"
    inside = ["-Wl,--whole-archive", str(result.library), "-Wl,--no-whole-archive"]
    subprocess.run(["g++", "-shared", *inside, "-o", str(program)], check=True)
    run(
        f"""
import ctypes
from ctypes import byref, c_byte, c_void_p
from qgraph.runtime import _native
inside = ctypes.CDLL({str(program)!r})

def load(path, isa, device, public_key):
    model = c_void_p()
    options = _native.LoadOptions(ctypes.sizeof(_native.LoadOptions), None, device.encode())
    artifact = c_byte.in_dll(inside, "out_artifact")
    _native.check(_native.library().qg_load_static(byref(artifact), byref(options), byref(model)))
    return model

_native.load = load
path, limit = "inside", 2e-5
"""
        + COMPARE
    )
