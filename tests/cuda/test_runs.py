"""What a run asks of the driver: one graph, few copies, one wait; threads, timing, and the end of it all."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

from artifact_builder import Parts
from fake_cuda import Report

Run = Callable[..., Report]

# Feeds `session` and holds every result against the reference.
FEED = """
from artifact_builder import toy_decoder_reference, Parts, TOKENS, CAPACITY
ids = np.random.default_rng(1).integers(0, TOKENS - 1, (3, CAPACITY))
table = np.random.default_rng(0).integers(-4, 5, (TOKENS, 16)).astype(np.float32)
parts = Parts({}, {}, {"w/table": table})

def feed(session, tokens, **options):
    at = session.length
    mask = np.ones((3, at + tokens), np.int64)
    got = session.run({"input_ids": ids[:, at : at + tokens], "attention_mask": mask}, **options)
    expected = toy_decoder_reference(parts, ids[:, : at + tokens])
    np.testing.assert_array_equal(got["logits"], expected["logits"][:, -got["logits"].shape[1] :])
    np.testing.assert_array_equal(got["history"], expected["history"])
    return got

def calls(name):
    return libcuda.fake_cuda_calls(name.encode())

COUNTED = ("cuGraphInstantiateWithFlags", "cuGraphExecKernelNodeSetParams", "cuGraphLaunch", "kernel",
           "cuStreamSynchronize", "cuMemcpyHtoDAsync_v2", "cuMemcpyDtoHAsync_v2", "cuMemsetD8Async",
           "cuMemAlloc_v2", "cuMemAllocHost_v2", "cuLaunchKernel")

class Counted:
    def __enter__(self):
        self.before = {name: calls(name) for name in COUNTED}
        return self
    def __exit__(self, *_):
        self.calls = {name: calls(name) - n for name, n in self.before.items() if calls(name) != n}
"""


def test_a_decode_step_is_one_launch(run: Run, decoder: Path) -> None:
    """Of the steps those that depend on the length alone are brought up to date, and nothing is allocated."""
    run(
        FEED
        + f"""
model = runtime.load({str(decoder)!r})
session = model.session()
with Counted() as first:
    feed(session, 2, dims={{"logits": 1}})
assert first.calls["cuGraphInstantiateWithFlags"] == 1, first.calls
feed(session, 1, dims={{"logits": 1}})
for _ in range(3, CAPACITY):
    with Counted() as step:
        feed(session, 1, dims={{"logits": 1}})
    assert step.calls == {{
        "cuGraphExecKernelNodeSetParams": 5,  # all but embed and refuse
        "cuGraphLaunch": 1,
        "kernel": 7,
        "cuStreamSynchronize": 1,
        "cuMemcpyHtoDAsync_v2": 2,  # ids, mask
        "cuMemcpyDtoHAsync_v2": 3,  # logits, history, statuses
    }}, step.calls
session.reset()
with Counted() as again:
    feed(session, 2, dims={{"logits": 1}})
assert "cuGraphInstantiateWithFlags" not in again.calls, again.calls
session.close()
model.close()
assert not live(), live()
"""
    )


def test_graphs_are_kept_by_their_steps(run: Run, decoder_parts: Parts, tmp_path: Path) -> None:
    """A step without blocks makes another graph; going back to a set of steps makes none."""
    parts = copy.deepcopy(decoder_parts)
    past = ["sub", "total_sequence", "sequence"]
    parts.plan["steps"][5]["blocks"] = ["min", "batch", ["mul", 64, past]]  # recall: not in a first run
    for kernel, name in ((2, "remember"), (5, "recall")):
        assert parts.plan["kernels"][kernel] in ("append_ids", "recall"), name
    (tmp_path / "later.qg").write_bytes(parts.to_bytes())
    run(
        FEED
        + f"""
model = runtime.load({str(tmp_path / "later.qg")!r})
session = model.session()
made = []
for _ in range(3):
    for _ in range(3):
        with Counted() as step:
            at = session.length
            mask = np.ones((3, at + 1), np.int64)
            got = session.run({{"input_ids": ids[:, at : at + 1], "attention_mask": mask}})
            expected = toy_decoder_reference(parts, ids[:, : at + 1])
            np.testing.assert_array_equal(got["logits"], expected["logits"][:, -1:])
            if at > 0:
                np.testing.assert_array_equal(got["history"], expected["history"])
        made.append(step.calls.get("cuGraphInstantiateWithFlags", 0))
        assert step.calls["kernel"] == (6 if at == 0 else 7)
    session.reset()
assert made == [1, 1, 0] + [0] * 6, made
session.profile({{"input_ids": ids[:, :1], "attention_mask": np.ones((3, 1), np.int64)}})
session.close()
model.close()
assert not live(), live()
"""
    )


def test_few_graphs_are_kept(run: Run, decoder_parts: Parts, tmp_path: Path) -> None:
    """Each length runs another set of steps here; sessions keep the latest ones, and results stay right."""
    parts = copy.deepcopy(decoder_parts)
    copies = []
    for length in range(1, 9):  # a step more for each token
        extra = copy.deepcopy(parts.plan["steps"][3])
        extra["blocks"] = ["min", "batch", ["mul", 64, ["max", 0, ["sub", "total_sequence", length]]]]
        copies.append({**extra, "name": f"again {length}"})
    parts.plan["steps"][4:4] = copies
    (tmp_path / "many.qg").write_bytes(parts.to_bytes())
    run(
        FEED
        + f"""
with runtime.load({str(tmp_path / "many.qg")!r}) as model, model.session() as session:
    for _ in range(8):
        feed(session, 1)
    assert libcuda.fake_cuda_live(b"execs") == libcuda.fake_cuda_live(b"graphs") == 4
    session.truncate(4)
    with Counted() as kept:
        for _ in range(4):
            feed(session, 1)
    assert "cuGraphInstantiateWithFlags" not in kept.calls
    session.truncate(0)
    with Counted() as dropped:
        feed(session, 1)
    assert dropped.calls["cuGraphInstantiateWithFlags"] == 1
assert not live(), live()
"""
    )


def test_an_output_may_shrink_with_the_state(run: Run, decoder_parts: Parts, tmp_path: Path) -> None:
    """Its room then is what it has now, which is the greater one."""
    parts = copy.deepcopy(decoder_parts)
    size = ["sub", 400, ["mul", 20, "total_sequence"]]
    parts.plan["values"].append({"kind": "output", "dtype": "f32", "shape": ["batch", size]})
    parts.plan["outputs"].append({"name": "rest", "value": 9})
    (tmp_path / "shrinks.qg").write_bytes(parts.to_bytes())
    run(
        FEED
        + f"""
with runtime.load({str(tmp_path / "shrinks.qg")!r}) as model, model.session() as session:
    feed(session, 5)
    with session.fork() as fork:
        assert feed(fork, 1)["rest"].shape == (3, 280)
        fork.reset()
        assert feed(fork, 1)["rest"].shape == (3, 380)
assert not live(), live()
"""
    )


def test_profile(run: Run, toy: Path) -> None:
    run(
        f"""
from artifact_builder import toy_inputs
with runtime.load({str(toy)!r}) as model, model.session() as session:
    for inputs in (toy_inputs(40, 30), toy_inputs(0, 3), toy_inputs(2, 3)):
        expected = session.run(inputs)
        found = session.profile(inputs)
        assert [step for step, _ in found.steps] == list(model.steps)
        times = [ns for _, ns in found.steps]
        assert all(ns >= 0 for ns in times) and 0 < sum(times) <= found.wall_ns, times
        for name, array in session.run(inputs).items():
            np.testing.assert_array_equal(array, expected[name])
assert not live(), live()
"""
    )


def test_large_tensors(run: Run, toy: Path, toy_parts: Parts) -> None:
    """Beyond what is staged in pinned memory."""
    run(
        f"""
from artifact_builder import toy, toy_inputs, toy_reference, Parts, VOCABULARY, WIDTH
generator = np.random.default_rng(0)
table = generator.standard_normal((VOCABULARY, WIDTH), np.float32)
parts = Parts({{}}, {{}}, {{"w/table": table, "w/bias": generator.standard_normal(WIDTH, np.float32)}})
inputs = toy_inputs(4096, 64)
with runtime.load({str(toy)!r}) as model:
    for batch in (4096, 1, 4000):
        part = {{name: array[:batch] for name, array in inputs.items()}}
        outputs = model.run(part)
        for name, array in toy_reference(parts, **part, isa_id=1).items():
            np.testing.assert_array_equal(outputs[name], array)
assert not live(), live()
"""
    )


def test_sessions_of_two_threads(run: Run, toy: Path, decoder: Path) -> None:
    """Each with models and sessions of its own, and with sessions of models that both share."""
    run(
        FEED
        + f"""
import threading
from artifact_builder import toy_inputs
shared = runtime.load({str(decoder)!r}), runtime.load({str(toy)!r})
inputs = toy_inputs(3, 5)
expected = shared[1].run(inputs)
failed = []

def work(index):
    try:
        for round in range(10):
            own = runtime.load({str(decoder)!r})
            with own.session() as a, shared[0].session() as b, shared[1].session() as c:
                for session in (a, b):
                    for tokens in (3, 1, 1, index + 1):
                        feed(session, tokens)
                with b.fork() as fork:
                    feed(fork, 2)
                    feed(b, 1)
                for name, array in c.run(inputs).items():
                    np.testing.assert_array_equal(array, expected[name])
            own.close()
    except BaseException as error:
        failed.append(error)
        raise

threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
assert not failed
[model.close() for model in shared]
assert not live(), live()
"""
    )


def test_weights_are_shared_by_sessions(run: Run, decoder: Path) -> None:
    run(
        FEED
        + f"""
model = runtime.load({str(decoder)!r})
assert libcuda.fake_cuda_live(b"memory") == 1
sessions = [model.session() for _ in range(3)]
[feed(session, 2) for session in sessions]
assert libcuda.fake_cuda_live(b"memory") == 1 + 3 * 3  # arena, state, statuses
model.close()
[feed(session, 2) for session in sessions]  # they keep what they need
[session.close() for session in sessions]
assert not live(), live()
"""
    )


def test_fork(run: Run, decoder: Path) -> None:
    """A child cannot use the GPU of its parent; it says so, and frees nothing of it."""
    run(
        FEED
        + f"""
import os
model = runtime.load({str(decoder)!r})
session = model.session()
feed(session, 2)
before = {{name: calls(name) for name in COUNTED}}
child = os.fork()
if child == 0:
    try:
        for use in (lambda: feed(session, 1), lambda: runtime.load({str(decoder)!r}), session.fork):
            try:
                use()
            except UnsupportedError as error:
                assert "this process is a fork() of one that used it" in str(error), str(error)
            else:
                os._exit(2)
        session.close()
        model.close()
        os._exit(0)
    finally:
        os._exit(1)
assert os.waitpid(child, 0)[1] == 0
feed(session, 1)
session.close()
model.close()
assert not live(), live()
"""
    )


def test_child_of_a_process_that_used_no_gpu(run: Run, decoder: Path) -> None:
    run(
        FEED
        + f"""
import os
from qgraph.runtime import _native
_native.library()
child = os.fork()
if child == 0:
    try:
        with runtime.load({str(decoder)!r}) as model, model.session() as session:
            feed(session, 2)
        os._exit(0)
    finally:
        os._exit(1)
assert os.waitpid(child, 0)[1] == 0
"""
    )


def test_forgotten_sessions_end_quietly(run: Run, decoder: Path) -> None:
    run(
        FEED
        + f"""
model = runtime.load({str(decoder)!r})
session = model.session()
feed(session, 2)
""",
        leaks=True,
    )
