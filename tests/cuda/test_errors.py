"""What goes wrong on a GPU, each with one clear line, nothing left behind, and no silent way around it."""

from __future__ import annotations

import copy
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from artifact_builder import Parts
from cmake_build import RUNTIME
from fake_cuda import Report

Run = Callable[..., Report]

FAILS = """
from artifact_builder import toy_inputs

def fails(error, message, call):
    try:
        call()
    except error as caught:
        assert message in str(caught) and "\\n" not in str(caught), str(caught)
    else:
        raise AssertionError(message)
"""


@pytest.fixture
def write(tmp_path: Path) -> Callable[[Parts], str]:
    def write(parts: Parts) -> str:
        path = tmp_path / "changed.qg"
        path.write_bytes(parts.to_bytes())
        return str(path)

    return write


def elf(machine: int) -> bytes:
    """An ELF file of nothing, for this machine."""
    start = b"\x7fELF\x02\x01\x01" + bytes(9)
    return start + struct.pack("<HHIQQQIHHHHHH", 3, machine, 1, 0, 0, 64, 0, 64, 0, 0, 64, 0, 0)


@pytest.mark.parametrize(
    ("code", "error", "message"),
    [
        (elf(190), "UnsupportedError", "cuda:0 cannot load the code of variant 'wide': CUDA_ERROR_NO_BINARY"),
        (elf(62), "InputError", "cuda:0 cannot load the code of variant 'wide': CUDA_ERROR_INVALID_IMAGE"),
        (b".version 8.0\n\0", "UnsupportedError", "'wide': fake ptxas: no PTX here: CUDA_ERROR_INVALID_PTX"),
        (b".version 8.0\n", "InputError", "variant 'wide' is neither a cubin nor PTX that ends in NUL"),
        (b"", "InputError", "variant 'wide' is neither a cubin nor PTX that ends in NUL"),
    ],
)
def test_code_that_does_not_load(
    run: Run, toy_parts: Parts, write: Callable[[Parts], str], code: bytes, error: str, message: str
) -> None:
    parts = copy.deepcopy(toy_parts)
    parts.code["cuda.wide"] = code
    run(FAILS + f"fails({error}, {message!r}, lambda: runtime.load({write(parts)!r}))\nassert not live()")


def test_kernel_that_is_not_there(run: Run, toy_parts: Parts, write: Callable[[Parts], str]) -> None:
    parts = copy.deepcopy(toy_parts)
    parts.plan["kernels"][3] = "nothing"
    message = "variant 'wide' has no kernel 'nothing': CUDA_ERROR_NOT_FOUND"
    run(FAILS + f"fails(InputError, {message!r}, lambda: runtime.load({write(parts)!r}))\nassert not live()")


REMOVED = object()


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("steps", 3, "args", 2), ["scratch", 8], "plan.steps[3].args[2][0] is for the CPU alone"),
        (("variants", 1, "functions"), REMOVED, "plan.variants[1] has no 'functions'"),
        (("variants", 1, "functions", 0), REMOVED, "functions does not have one entry for each kernel"),
        (("variants", 1, "functions", 0, "threads"), 0, "threads is 0, outside [1, 1024]"),
        (("variants", 1, "functions", 0, "threads"), 1025, "threads is 1025, outside [1, 1024]"),
        (("variants", 1, "functions", 0, "threads"), REMOVED, "functions[0] has no 'threads'"),
        (("variants", 1, "functions", 0, "shared"), -1, "shared is -1, outside [0, 232448]"),
        (("variants", 1, "functions", 0, "shared"), 232449, "shared is 232449, outside [0, 232448]"),
        (("variants", 1, "functions", 0, "shared"), REMOVED, "functions[0] has no 'shared'"),
        (("version",), 2, "plan of version 2"),
    ],
)
def test_damaged_plans_are_refused(
    run: Run,
    toy_parts: Parts,
    write: Callable[[Parts], str],
    path: tuple[Any, ...],
    value: Any,
    message: str,
) -> None:
    parts = copy.deepcopy(toy_parts)
    place: Any = parts.plan
    for key in path[:-1]:
        place = place[key]
    if value is REMOVED:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    errors = "(InputError, UnsupportedError)"
    report = run(FAILS + f"fails({errors}, {message!r}, lambda: runtime.load({write(parts)!r}))")
    assert not report.calls.get("cuModuleLoadDataEx")


def test_steps_need_no_grain(run: Run, toy_parts: Parts, write: Callable[[Parts], str]) -> None:
    parts = copy.deepcopy(toy_parts)
    for step in parts.plan["steps"]:
        del step["grain"]
    run(FAILS + f"with runtime.load({write(parts)!r}) as model: model.run(toy_inputs(2, 3))")


@pytest.mark.parametrize("shared", [0, 1, 49152, 232448])
def test_shared_memory(run: Run, toy_parts: Parts, write: Callable[[Parts], str], shared: int) -> None:
    """It has to be asked for, which the fake driver insists on: together with static shared memory little is
    much."""
    parts = copy.deepcopy(toy_parts)
    parts.plan["variants"][1]["functions"][2]["shared"] = shared
    report = run(FAILS + f"with runtime.load({write(parts)!r}) as model: model.run(toy_inputs(2, 3))")
    assert report.calls.get("cuFuncSetAttribute", 0) == (shared > 0)


def test_too_many_blocks(run: Run, toy_parts: Parts, write: Callable[[Parts], str]) -> None:
    parts = copy.deepcopy(toy_parts)
    parts.plan["steps"][7]["blocks"] = ["mul", 2**30, "batch"]
    parts.plan["steps"][7]["kernel"] = 5  # of which every block writes the same number
    parts.plan["steps"][7]["args"] = [["v", 10]]
    message = "step 'sum': 2147483648 blocks, a GPU takes at most 2147483647"
    run(
        FAILS
        + f"""
with runtime.load({write(parts)!r}) as model, model.session() as session:
    for _ in range(2):
        fails(UnsupportedError, {message!r}, lambda: session.run(toy_inputs(2, 3)))
    session.run(toy_inputs(0, 3))
    fails(UnsupportedError, {message!r}, lambda: session.run(toy_inputs(2, 3)))
assert not live(), live()
"""
    )


def test_out_of_memory(run: Run, toy: Path, toy_parts: Parts, write: Callable[[Parts], str]) -> None:
    parts = copy.deepcopy(toy_parts)
    parts.weights["w/bias"] = np.zeros(2**18, np.float32)
    rows = 512 * 64  # two temporaries, ids, mask, pooled, twice, and four small ones
    arena = 2 * rows * 32 + rows * 8 + rows * 4 + 512 * 32 + 2 * rows * 4 + 4 * 256
    run(
        FAILS
        + f"""
message = "out of memory on cuda:0: no 1049088 bytes left (CUDA_ERROR_OUT_OF_MEMORY)"
fails(ResourceError, message, lambda: runtime.load({write(parts)!r}))
assert not live(), live()
with runtime.load({str(toy)!r}) as model, model.session() as session:
    small, expected = toy_inputs(2, 3), model.run(toy_inputs(2, 3))
    for _ in range(2):
        message = "left (CUDA_ERROR_OUT_OF_MEMORY): {arena} bytes for temporaries with batch=512, sequence=64"
        fails(ResourceError, message, lambda: session.run(toy_inputs(512, 64)))
    for name, array in session.run(small).items():
        np.testing.assert_array_equal(array, expected[name])
assert not live(), live()
""",
        memory=1 << 20,
    )


def test_statuses_name_their_step(run: Run, decoder_parts: Parts, write: Callable[[Parts], str]) -> None:
    """The first step that has one; and the next run is not told of it again."""
    parts = copy.deepcopy(decoder_parts)
    parts.plan["steps"].append({**parts.plan["steps"][6], "name": "again"})
    run(
        FAILS
        + f"""
from artifact_builder import REFUSED, TOKENS
def feed(session, *ids):
    mask = np.ones((1, session.length + len(ids)), np.int64)
    return session.run({{"input_ids": np.array([ids]), "attention_mask": mask}})
with runtime.load({write(parts)!r}) as model, model.session() as session:
    feed(session, 1, 2)
    for _ in range(2):
        fails(InputError, "step 'refuse': the kernel reports status 7", lambda: feed(session, 1, REFUSED))
        fails(InputError, "step 'embed': an index is out of range", lambda: feed(session, TOKENS, REFUSED))
        assert session.length == 2
        feed(session, 3)
        session.truncate(2)
assert not live(), live()
"""
    )


@pytest.mark.parametrize("code", [700, 719])
def test_a_kernel_that_fails_loses_the_context(run: Run, toy: Path, code: int) -> None:
    """Everything fails then, with the same advice; ending is still quiet."""
    name = {700: "CUDA_ERROR_ILLEGAL_ADDRESS", 719: "CUDA_ERROR_LAUNCH_FAILED"}[code]
    run(
        FAILS
        + f"""
model = runtime.load({str(toy)!r})
session, other = model.session(), model.session()
session.run(toy_inputs(2, 3)), other.run(toy_inputs(2, 3))
libcuda.fake_cuda_fail(b"kernel", 3, {code})
message = "a run on cuda:0 failed: {name} (the fake driver's words): this process cannot use the GPU any more"
fails(ResourceError, message, lambda: session.run(toy_inputs(2, 3)))
for use in (lambda: session.run(toy_inputs(2, 3)), lambda: other.run(toy_inputs(1, 1)), model.session,
            lambda: runtime.load({str(toy)!r})):
    fails(ResourceError, "this process cannot use the GPU any more, start it anew", use)
session.close(), other.close(), model.close()
""",
        leaks=True,
    )


def test_any_call_may_fail(run: Run, toy: Path, decoder: Path) -> None:
    """Whichever call of the driver fails: an error of ours, nothing leaks, and the next attempt works."""
    header = (RUNTIME / "src" / "cuda_driver.h").read_text()
    functions = re.findall(r'F\(\w+, "(\w+)"', header)
    assert len(functions) > 40
    report = run(
        FAILS
        + f"""
from qgraph.errors import QGraphError

def work():
    inputs = toy_inputs(2, 3)
    with runtime.load({str(toy)!r}) as model, model.session() as session:
        results = [session.run(inputs)["pooled"], session.run(toy_inputs(4096, 64))["pooled"]]
        session.profile(inputs)
    with runtime.load({str(decoder)!r}) as model, model.session() as session:
        for tokens in (2, 1):
            mask = np.ones((3, session.length + tokens), np.int64)
            feeds = {{"input_ids": np.ones((3, tokens), np.int64), "attention_mask": mask}}
            results.append(session.run(feeds)["logits"])
        with session.fork() as fork:
            fork.copy_state(session, [2, 0])
            results.append(np.array(fork.length))
    return results

expected = work()
quiet = {{"cuCtxPopCurrent_v2", "cuMemFree_v2", "cuMemFreeHost", "cuStreamDestroy_v2", "cuEventDestroy_v2",
         "cuModuleUnload", "cuGraphDestroy", "cuGraphExecDestroy", "cuDevicePrimaryCtxRelease_v2"}}
names = {functions!r}
count = {{name: libcuda.fake_cuda_calls(name.encode()) for name in names}}
assert {{name for name in names if not count[name]}} == {{
    "cuGetErrorName", "cuGetErrorString", "cuFuncSetAttribute", "cuMemcpyDtoDAsync_v2", "cuStreamWaitEvent",
    "cuEventRecord",
}}
once = {{name for name in names if name.startswith("cuDevice") and "Ctx" not in name}} | {{"cuInit"}}
tried, left = 0, {{}}
for name in names:
    if name in quiet or name in once or not count[name]:
        continue
    before = libcuda.fake_cuda_calls(name.encode())
    work()
    per_run = libcuda.fake_cuda_calls(name.encode()) - before
    for n in {{*range(1, min(per_run, 4) + 1), per_run}}:
        for code in (999, 2) if "Alloc" in name else (999,):
            libcuda.fake_cuda_fail(name.encode(), n, code)
            try:
                work()
            except ResourceError as error:
                wanted = "CUDA_ERROR_OUT_OF_MEMORY" if code == 2 else "CUDA_ERROR_UNKNOWN"
                assert wanted in str(error) and "\\n" not in str(error), (name, n, str(error))
                tried += 1
            else:
                assert name in ("cuCtxPushCurrent_v2", "cuStreamSynchronize"), (name, n)  # of a destructor
            libcuda.fake_cuda_fail(name.encode(), 0, 0)
            if name == "cuCtxPushCurrent_v2":
                left = live()  # what a destructor could not free
            assert live() == left, (name, n, live())
for got, wanted in zip(work(), expected, strict=True):
    np.testing.assert_array_equal(got, wanted)
assert tried > 60, tried
""",
        leaks=True,
    )
    assert report.calls["cuGraphLaunch"] > 100
