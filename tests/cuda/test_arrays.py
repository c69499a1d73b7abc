"""Inputs and outputs in memory of the GPU: read and written where they are, once they are ready."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from artifact_builder import toy as toy_of
from fake_cuda import Report

Run = Callable[..., Report]

START = """
from artifact_builder import toy_inputs
from libcuda import DLPack, Interface, use
use()
model = runtime.load(path)
session = model.session()
inputs = toy_inputs(5, 7)
expected = session.run(inputs)
copies = lambda: sum(libcuda.fake_cuda_calls(name) for name in
                     (b"cuMemcpyHtoDAsync_v2", b"cuMemcpyDtoHAsync_v2", b"cuMemcpyDtoDAsync_v2"))

def same(got):
    for name, array in expected.items():
        value = got[name]
        np.testing.assert_array_equal(value if isinstance(value, np.ndarray) else value.numpy(), array)

def empty(kind, offset=0):
    return {name: kind(np.full_like(array, 77), offset) for name, array in expected.items()}

def refused(message, *arguments):
    try:
        session.run(*arguments)
    except InputError as error:
        assert message in str(error) and "\\n" not in str(error), str(error)
    else:
        raise AssertionError(message)
"""


@pytest.mark.parametrize("kind", ["DLPack", "Interface"])
def test_no_copies(run: Run, toy: Path, kind: str) -> None:
    run(
        f"path = {str(toy)!r}{START}kind = {kind}"
        + """
before = session.memory
arrays = {name: kind(array) for name, array in inputs.items()}
targets = empty(kind)
own = copies()
got = session.run(arrays, outputs=targets)
assert copies() - own == 1  # statuses
assert all(got[name] is targets[name] for name in targets)
same(got)
same(session.run(inputs))
assert session.memory == before
same(session.run({**inputs, "mask": arrays["mask"]}, outputs={"pooled": targets["pooled"]}))
if kind is DLPack:
    assert arrays["ids"].asked == [arrays["ids"].asked[0]] and arrays["ids"].asked[0] > 2
session.close()
model.close()
""",
        leaks=True,
    )


def test_memory_that_is_not_aligned(run: Run, toy: Path) -> None:
    run(
        f"path = {str(toy)!r}{START}"
        + """
arrays = {name: Interface(array, offset=8) for name, array in inputs.items()}
targets = empty(DLPack, offset=8)
own = libcuda.fake_cuda_calls(b"cuMemcpyDtoDAsync_v2")
same(session.run(arrays, outputs=targets))
assert libcuda.fake_cuda_calls(b"cuMemcpyDtoDAsync_v2") - own == 6
aligned = {name: Interface(array, offset=16) for name, array in inputs.items()}
same(session.run(aligned))
assert libcuda.fake_cuda_calls(b"cuMemcpyDtoDAsync_v2") - own == 6
""",
        leaks=True,
    )


def test_less_memory_without_copies(run: Run, toy: Path) -> None:
    """What is bound on the GPU takes no room in the session."""
    run(
        f"path = {str(toy)!r}{START}"
        + """
arrays, targets = {name: DLPack(array) for name, array in inputs.items()}, empty(DLPack)
with model.session() as other:
    same(other.run(arrays, outputs=targets))
    small = other.memory
    assert small < session.memory
with model.session(memory_limit=small) as other:
    same(other.run(arrays, outputs=targets))
    try:
        other.run(inputs)
    except ResourceError as error:
        assert "above the limit" in str(error)
    else:
        raise AssertionError
    same(other.run(arrays, outputs=targets))
""",
        leaks=True,
    )


def test_host_outputs(run: Run, toy: Path) -> None:
    run(
        f"path = {str(toy)!r}{START}"
        + """
targets = {name: np.full_like(array, 77) for name, array in expected.items()}
got = session.run(inputs, outputs=targets)
assert all(got[name] is targets[name] for name in targets)
same(got)
""",
        leaks=True,
    )


def test_wrong_arrays(run: Run, toy: Path) -> None:
    run(
        f"path = {str(toy)!r}{START}"
        + """
gpu = {name: DLPack(array) for name, array in inputs.items()}
turned = Interface(inputs["mask"])
turned.strides = (4, 20)
refused("input 'mask' is not contiguous", {**gpu, "mask": turned})
turned.strides = (28, 4)
same(session.run({**gpu, "mask": turned}))
refused("input 'ids': expected int64, got int32", {**gpu, "ids": DLPack(inputs["ids"].astype("i4"))})
odd = DLPack(inputs["ids"])
odd.bits = 4
refused("input 'ids': it cannot be taken from the GPU's memory: its dtype (DLPack code 0, 4 bits)",
        {**gpu, "ids": odd})
refused("axis 0: batch is 2", {**gpu, "mask": DLPack(inputs["mask"][:2])})
use(1)
refused("input 'mask' is memory of cuda:1, but the model is on cuda:0",
        {**gpu, "mask": Interface(inputs["mask"])})
use(0)
same(session.run(gpu))
for outputs, message in [
    ({"pooled": DLPack(expected["pooled"][:3])}, "output 'pooled': expected f32 [5, 8], got f32 [3, 8]"),
    ({"nothing": expected["pooled"]}, "unknown output 'nothing': the model has pooled, twice"),
    ({"pooled": [1]}, "output 'pooled' is a list: give a numpy array, or one on the GPU"),
    ({"pooled": np.asfortranarray(expected["pooled"])}, "output 'pooled': give a contiguous writable array"),
    ({"pooled": expected["isa"]}, "output 'pooled': give a contiguous writable array of float32"),
    ({"pooled": DLPack(expected["isa"])}, "output 'pooled': expected float32, got int64"),
    ([1], "outputs is a list"),
]:
    refused(message, gpu, None, outputs)
targets = empty(DLPack)
both = targets["pooled"]
twice = Interface(inputs["mask"])
twice._address = both._address
refused("output 'pooled' overlaps input 'mask'", {**gpu, "mask": twice}, None, {"pooled": both})
same(session.run(gpu))
""",
        leaks=True,
        devices=2,
    )


def test_arrays_of_a_gpu_for_a_model_on_the_cpu(
    run: Run, driver: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    (tmp_path / "cpu.qg").write_bytes(toy_of(tmp_path_factory.mktemp("cpu-kernels")).to_bytes())
    run(
        f"path = {str(tmp_path / 'cpu.qg')!r}{START}"
        + """
message = "is in a GPU's memory, but the model is on the CPU: load it on 'cuda'"
refused(f"input 'ids' {message}", {**inputs, "ids": DLPack(inputs["ids"])})
refused(f"input 'mask' {message}", {**inputs, "mask": Interface(inputs["mask"])})
refused(f"output 'pooled' {message}", inputs, None, {"pooled": DLPack(expected["pooled"])})
targets = {name: np.full_like(array, 77) for name, array in expected.items()}
same(session.run(inputs, outputs=targets))
""",
        leaks=True,
    )
