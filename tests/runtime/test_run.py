"""The Python face on the toy artifact: results, sessions, threads, and every way to call it wrongly."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from artifact_builder import ARCH, CUDA, WIDTH, Parts, toy_inputs, toy_reference

from qgraph import runtime
from qgraph.errors import InputError, QGraphError, ResourceError, UnsupportedError, UsageError
from qgraph.runtime import _native
from qgraph.runtime.model import Model

on_the_cpu = pytest.mark.skipif(CUDA, reason="tests/cuda has what a GPU does instead")
SHAPES = [(1, 1), (1, 7), (3, 16), (8, 64), (2, 5)]


@pytest.fixture(scope="module")
def model(cache: Path, toy_path: Path) -> Iterator[Model]:
    with runtime.load(toy_path, threads=2) as model:
        yield model


def assert_same(got: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert list(got) == list(expected)
    for name, array in expected.items():
        assert got[name].dtype == array.dtype
        np.testing.assert_array_equal(got[name], array, err_msg=name)


def test_results_equal_numpy(model: Model, toy_parts: Parts) -> None:
    isa_id = {"wide": 1, "base": 2}[model.isa]
    for batch, sequence in SHAPES:
        inputs = toy_inputs(batch, sequence)
        assert_same(model.run(inputs), toy_reference(toy_parts, **inputs, isa_id=isa_id))


def test_empty_batch_runs(model: Model) -> None:
    outputs = model.run(toy_inputs(0, 3))
    assert outputs["pooled"].shape == (0, WIDTH)
    assert outputs["sum"] == sum((n + 1) * n for n in range(29))


def test_description(model: Model) -> None:
    assert [(t.name, t.dtype, t.shape) for t in model.inputs] == [
        ("ids", np.int64, ("batch", "sequence")),
        ("mask", np.float32, ("batch", "sequence")),
    ]
    assert [t.shape for t in model.outputs] == [("batch", WIDTH), ("(2 * batch)", "sequence"), (1,), ()]
    assert [(d.name, d.min, d.max) for d in model.dims] == [("batch", 0, 4096), ("sequence", 1, 4096)]
    assert model.metadata["qgraph.scheme"] == "none"
    assert [s.name for s in model.steps][:2] == ["embed", "bias"]
    assert [s.kernel for s in model.steps][:2] == ["gather", "add_bias"]
    assert [v.isa for v in model.variants] == ["future", "wide", "base"]
    assert not model.variants[0].supported
    assert model.variants[2].supported
    assert "toy.qg" in repr(model)


def test_isa_is_the_first_supported_or_the_forced(cache: Path, toy_path: Path, model: Model) -> None:
    assert model.isa == next(v.isa for v in model.variants if v.supported)
    with runtime.load(toy_path, isa="base") as base:
        assert base.isa == "base"
        assert base.run(toy_inputs(1, 1))["isa"] == [2]
    with pytest.raises(UnsupportedError, match="cannot run variant 'future': it needs warp_drive"):
        runtime.load(toy_path, isa="future")
    with pytest.raises(UnsupportedError, match="no variant 'x', only future, wide, base"):
        runtime.load(toy_path, isa="x")


@on_the_cpu
def test_threads_give_equal_bits(cache: Path, toy_path: Path) -> None:
    inputs = toy_inputs(97, 61)
    results = []
    for threads in (1, 2, 4):
        with runtime.load(toy_path, threads=threads) as model, model.session() as session:
            assert session.threads == threads
            results += [session.run(inputs) for _ in range(20)]
    for result in results[1:]:
        assert_same(result, results[0])


def test_sessions_of_eight_host_threads(model: Model, toy_parts: Parts) -> None:
    barrier = threading.Barrier(8)

    def work(index: int) -> None:
        isa_id = {"wide": 1, "base": 2}[model.isa]
        with model.session(threads=2) as session:
            barrier.wait()
            for round_ in range(20):
                inputs = toy_inputs(1 + index, 1 + round_, seed=100 * index + round_)
                assert_same(session.run(inputs), toy_reference(toy_parts, **inputs, isa_id=isa_id))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))


def test_model_run_from_many_threads(model: Model, toy_parts: Parts) -> None:
    isa_id = {"wide": 1, "base": 2}[model.isa]

    def work(seed: int) -> None:
        inputs = toy_inputs(2, 3, seed)
        assert_same(model.run(inputs), toy_reference(toy_parts, **inputs, isa_id=isa_id))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(40)))


def test_session_outlives_its_model(cache: Path, toy_path: Path) -> None:
    model = runtime.load(toy_path)
    session = model.session(threads=2)
    before = session.run(toy_inputs(2, 2))
    model.close()
    model.close()
    assert_same(session.run(toy_inputs(2, 2)), before)
    session.close()
    session.close()
    with pytest.raises(UsageError, match="closed"):
        session.run(toy_inputs(2, 2))
    with pytest.raises(UsageError, match="closed"):
        model.run(toy_inputs(2, 2))


@on_the_cpu
def test_fork_after_run(cache: Path, toy_path: Path) -> None:
    """A child of fork() has none of the pool's threads: it still computes, and does not wait for them."""
    script = f"""
import os, sys
sys.path[:0] = {[str(Path(__file__).parent), *sys.path]!r}
from artifact_builder import toy_inputs
from qgraph import runtime
model = runtime.load({str(toy_path)!r}, threads=3)
inputs = toy_inputs(50, 50)
expected = model.run(inputs)
child = os.fork()
if child == 0:
    same = all((model.run(inputs)[name] == array).all() for name, array in expected.items())
    model.close()
    os._exit(0 if same else 1)
assert os.waitpid(child, 0)[1] == 0
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True, timeout=60, env={**os.environ})


@on_the_cpu
def test_a_session_on_the_cpu_has_no_stream(model: Model) -> None:
    lib = _native.library()
    with model.session() as session:
        assert lib.qg_session_stream(session._open_handle()) is None
        with pytest.raises(InputError, match="a session on the CPU has no stream"):
            _native.check(lib.qg_session_wait(session._open_handle(), None))


def test_given_outputs(model: Model) -> None:
    inputs = toy_inputs(2, 3)
    expected = model.run(inputs)
    targets = {name: np.full_like(array, 77) for name, array in expected.items() if name != "isa"}
    got = model.run(inputs, outputs=targets)
    assert all(got[name] is target for name, target in targets.items())
    assert_same(got, expected)
    for outputs, message in (
        ({"pooled": targets["pooled"][:1]}, r"output 'pooled': expected f32 \[2, 8\], got f32 \[1, 8\]"),
        ({"pooled": targets["pooled"].T}, "output 'pooled': give a contiguous writable array of float32"),
        ({"pooled": b"12345678"}, "output 'pooled' is a bytes: give a numpy array"),
        ({"x": targets["pooled"]}, "unknown output 'x': the model has pooled, twice, isa, sum"),
        (5, "outputs is a int: give a dict"),
    ):
        with pytest.raises(InputError, match=message):
            model.run(inputs, outputs=outputs)  # type: ignore[arg-type]


def test_profile(model: Model) -> None:
    with model.session(threads=1) as session:
        found = session.profile(toy_inputs(2, 3))
        times = found.steps
        assert 0 < sum(ns for _, ns in times) <= found.wall_ns
    assert [step.name for step, _ in times] == [step.name for step in model.steps]
    assert all(0 <= time < 10**9 for _, time in times)


def test_memory_limit(cache: Path, toy_path: Path, model: Model) -> None:
    inputs = toy_inputs(4, 16)
    needed = 2 * 4 * 16 * WIDTH * 4 + 2 * 64  # two slots, two scratch buffers of one thread
    if CUDA:  # two larger and two small slots, inputs, outputs (each a multiple of 256), statuses
        needed = 2 * 4 * 16 * WIDTH * 4 + 2 * 256 + (512 + 256) + (256 + 512 + 256 + 256) + 64
    with model.session(threads=1, memory_limit=needed) as session:
        session.run(inputs)
        assert session.memory == needed
        with pytest.raises(ResourceError, match=r"above the limit.*batch=5, sequence=16"):
            session.run(toy_inputs(5, 16))
        session.run(inputs)  # still usable
    with runtime.load(toy_path, threads=1, memory_limit=needed - 1) as small, pytest.raises(ResourceError):
        small.run(inputs)


def test_foreign_arrays(model: Model) -> None:
    torch = pytest.importorskip("torch", reason="DLPack is tried with torch")
    inputs = toy_inputs(3, 4)
    expected = model.run(inputs)
    assert_same(model.run({name: torch.from_numpy(array) for name, array in inputs.items()}), expected)
    strided = {name: np.asfortranarray(array) for name, array in inputs.items()}
    assert_same(model.run(strided), expected)
    unaligned = np.frombuffer(b"x" + inputs["ids"].tobytes(), np.int64, offset=1).reshape(3, 4)
    assert_same(model.run({**inputs, "ids": unaligned}), expected)


def changed(**arrays: Any) -> dict[str, Any]:
    return {**toy_inputs(2, 3), **arrays}


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (changed(ids=np.zeros((2, 3), np.int32)), "input 'ids': expected int64, got int32"),
        (changed(ids=np.zeros((2, 3), ">i8")), "input 'ids': expected int64, got >i8"),
        (changed(ids=np.zeros((2, 3), np.complex64)), "expected int64, got complex64"),
        (changed(ids=[[1, 2, 3]] * 2), "input 'ids' is a list: give a numpy array"),
        (changed(ids=np.zeros(6, np.int64)), r"input 'ids': expected i64 \[batch, sequence\], got i64 \[6\]"),
        (changed(ids=np.zeros((2, 0), np.int64)), r"axis 1: sequence must lie in \[1, 4096\], got 0"),
        (changed(ids=np.zeros((5000, 3), np.int64)), r"axis 0: batch must lie in \[0, 4096\], got 5000"),
        (
            changed(mask=np.zeros((4, 3), np.float32)),
            "input 'mask' axis 0: batch is 4, but input 'ids' has it at 2",
        ),
        (toy_inputs(2, 65), "sequence must be at most 64 with batch=2, sequence=65"),
        (changed(ids=np.full((2, 3), 10)), "step 'embed': an index is out of range"),
        (changed(ids=np.full((2, 3), -1)), "step 'embed': an index is out of range"),
        (changed(other=np.zeros(1)), "unknown input 'other': the model has ids, mask"),
        ({"ids": np.zeros((2, 3), np.int64)}, "input 'mask' is missing"),
    ],
)
def test_wrong_inputs(model: Model, inputs: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        model.run(inputs)
    assert "\n" not in str(caught.value)
    model.run(toy_inputs(2, 3))  # still usable


def test_wrong_options(model: Model) -> None:
    for threads in (-1, 2**31, 100_000):
        with pytest.raises(InputError, match="threads"):
            model.session(threads=threads)
    with pytest.raises(InputError, match="memory_limit"):
        model.session(memory_limit=-1)


def load_parts(parts: Parts, folder: Path, **options: Any) -> Model:
    path = folder / "changed.qg"
    path.write_bytes(parts.to_bytes())
    return runtime.load(path, **options)


@pytest.fixture
def parts(toy_parts: Parts) -> Parts:
    """A copy to change."""
    return copy.deepcopy(toy_parts)


def test_fixed_and_computed_input_dims(cache: Path, parts: Parts, tmp_path: Path) -> None:
    parts.plan["values"][1]["shape"] = [2, ["add", "sequence", 0]]
    with load_parts(parts, tmp_path) as model:
        assert model.inputs[1].shape == (2, "(sequence + 0)")
        model.run(toy_inputs(2, 3))
        with pytest.raises(InputError, match="input 'mask' axis 0: expected 2, got 3"):
            model.run(toy_inputs(3, 3))
        wrong = changed(mask=np.zeros((2, 4), np.float32))
        with pytest.raises(InputError, match=r"axis 1: expected \(sequence \+ 0\) = 3 with batch=2.*got 4"):
            model.run(wrong)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("values", 4, "shape"), ["batch", ["sub", 1, "sequence"]], "negative dimension"),
        (("values", 4, "shape"), [["mul", 2**62, "sequence"]], "overflows"),
        (("values", 4, "shape"), [2**60, "sequence"], "more than 2\\^63 bytes"),
        (("values", 4, "shape"), [["floordiv", 1, ["sub", "batch", 2]]], "divides by less than 1"),
        (("values", 4, "shape"), [["mod", 1, ["sub", "batch", 2]]], "divides by less than 1"),
        (("values", 4, "shape"), [["ceildiv", 1, ["sub", "batch", 2]]], "divides by less than 1"),
        (("steps", 5, "args", 1), ["v", 8, ["sub", "batch", 3]], "argument 1 points -1 bytes into"),
        (("steps", 5, "args", 1), ["v", 8, 49], "argument 1 points 49 bytes into a value of 48"),
        (("steps", 0, "blocks"), -1, "step 'embed': -1 blocks"),
        (("checks", 0, "ge"), [1, ["mul", 2**62, "sequence"]], "overflows"),
    ],
)
def test_plans_that_fail_at_run_time(
    cache: Path, parts: Parts, tmp_path: Path, path: tuple[Any, ...], value: Any, message: str
) -> None:
    place = parts.plan
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with load_parts(parts, tmp_path) as model, pytest.raises(InputError, match=message):
        model.run(toy_inputs(2, 3))


def test_huge_temporaries_are_refused_not_tried(cache: Path, parts: Parts, tmp_path: Path) -> None:
    parts.plan["values"][4]["shape"] = [["mul", 2**58, "batch"]]
    with load_parts(parts, tmp_path) as model, pytest.raises(ResourceError, match="out of memory"):
        model.run(toy_inputs(1, 1))
    parts.plan["values"][5]["shape"] = [2**60]
    parts.plan["values"][4]["shape"] = [2**60]
    with load_parts(parts, tmp_path) as model, pytest.raises(ResourceError, match="more than 2\\^63"):
        model.run(toy_inputs(1, 1))


def test_no_variant_for_this_machine(cache: Path, parts: Parts, tmp_path: Path) -> None:
    other = "aarch64" if ARCH == "x86_64" else "x86_64"
    parts.plan["variants"] = parts.plan["variants"][:2]
    parts.plan["variants"][1]["arch"] = other
    with pytest.raises(UnsupportedError, match=f"future needs warp_drive; wide is for {other}"):
        load_parts(parts, tmp_path)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda p: None, InputError, "no such file|No such file"),
        (lambda p: p.mkdir(), InputError, "not a regular file"),
        (lambda p: p.write_bytes(b""), InputError, "is empty"),
        (lambda p: p.write_bytes(b"x" * 1000), InputError, "damaged or not an artifact"),
        (lambda p: os.mkfifo(p), InputError, "not a regular file"),
        (lambda p: p.symlink_to("nowhere"), InputError, "No such file"),
    ],
)
def test_unusable_files(
    cache: Path, tmp_path: Path, make: Any, error: type[QGraphError], message: str
) -> None:
    path = tmp_path / "bad é.qg"
    make(path)
    with pytest.raises(error, match=message) as caught:
        runtime.load(path)
    assert str(path) in str(caught.value)


def test_paths_of_any_kind(cache: Path, toy_path: Path) -> None:
    for path in (toy_path, str(toy_path), os.fsencode(toy_path)):
        runtime.load(path).close()
    with pytest.raises(InputError, match="no such file"):
        runtime.load(f"{toy_path}\0.txt")


def test_forgotten_models_end_quietly(cache: Path, toy_path: Path) -> None:
    """A process that ends with open models and sessions ends well, and says nothing."""
    script = f"""
import sys
sys.path[:0] = {[str(Path(__file__).parent), *sys.path]!r}
from artifact_builder import toy_inputs
from qgraph import runtime
model = runtime.load({str(toy_path)!r}, threads=2)
session = model.session()
model.run(toy_inputs(2, 3)), session.run(toy_inputs(2, 3))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_symlink_is_followed(cache: Path, toy_path: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.qg"
    link.symlink_to(toy_path)
    runtime.load(link).close()


def test_import_is_cheap() -> None:
    script = (
        "import sys, qgraph.runtime; print([m for m in ('numpy', 'ctypes', 'ml_dtypes') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"
