"""What an interrupted calibration leaves, and what becomes of it."""

from __future__ import annotations

import errno
import json
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from calibration_harness import Coarse, data_of, feeds, groups_of, transformer
from interrupted_walk import EVENTS, KINDS, SOURCES

from qgraph.calibration import Journal, StreamingCalibrator
from qgraph.calibration.border import Border, BorderWriter
from qgraph.calibration.journal import _sources
from qgraph.errors import ResourceError
from qgraph.passes.linear_groups import LinearGroup

SCRIPT = Path(__file__).parent / "interrupted_walk.py"
GROUP = LinearGroup(("x",), ("n",), ("W",), 4)


def child(root: Path, kind: str, *kill: str) -> dict[str, np.ndarray] | None:
    """Runs the script; None where it was killed, as it was to be."""
    result = root.parent / "result.npz"
    result.unlink(missing_ok=True)
    done = subprocess.run(
        [sys.executable, SCRIPT, root, result, kind, *kill], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == (-signal.SIGKILL if kill else 0), done.stderr
    if kill:
        return None
    with np.load(result) as arrays:
        return dict(arrays)


def files(root: Path) -> dict[str, bytes]:
    """Every file of every journal below."""
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


@pytest.fixture(autouse=True)
def same_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qgraph.calibration.journal._sources", lambda: SOURCES)


class InterruptedRunError(Exception):
    """Stands for a Ctrl-C."""


def run(root: Path, kind: str, die: tuple[str, int] | None = None, **more: object) -> Coarse:
    """The same in this process; `die`: raise at this step of the handler."""
    model = transformer(1)

    def step(what: str, index: int) -> None:
        if (what, index) == die:
            raise InterruptedRunError

    handler = Coarse(model, step)
    journal = Journal({"model": "toy", "kind": kind, **more}, root=root)
    calibrator = StreamingCalibrator(data_of(model, feeds(3)), journal=journal, threads=2, **KINDS[kind])
    calibrator.walk(model, groups_of(model), handler)
    return handler


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    """For every kind, the files of a journal whose run nothing interrupted."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qgraph.calibration.journal._sources", lambda: SOURCES)
        for kind in KINDS:
            root = tmp_path_factory.mktemp(kind) / "journals"
            run(root, kind)
            found[kind] = files(root)
    return found


def test_a_finished_journal_is_small(finished: dict[str, dict[str, bytes]]) -> None:
    """Records, what the run was given, and the lock: no border."""
    for kind, entries in finished.items():
        names = sorted(Path(name).name for name in entries)
        assert names == [*(f"group-{i:05d}.safetensors" for i in range(5)), "journal.json", "lock"], kind


# Late enough that something is behind, early enough that something is ahead.
KILLS = [
    ("float", "run", 4), ("float", "solve", 3),
    ("sequential", "put", 11), ("sequential", "sweep", 5), ("sequential", "write", 2),
    ("sequential", "apply", 4), ("corrected", "close", 3), ("corrected", "measure", 7),
    ("corrected", "replace", 6), ("corrected", "finish", 1),
    ("rounded", "manifest", 4), ("rounded", "manifest", 5),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "event", "count"), KILLS)
def test_killed_and_resumed(
    kind: str, event: str, count: int, tmp_path: Path, finished: dict[str, dict[str, bytes]]
) -> None:
    """SIGKILL at some point, another run to the end: every byte as without."""
    root = tmp_path / "journals"
    child(root, kind, event, str(count))
    assert files(root) != finished[kind]
    handler = run(root, kind)
    assert files(root) == finished[kind]
    assert len(handler.applied) == 5
    behind = {"float": 0, "sequential": 1, "corrected": 1, "rounded": 1}[kind]
    assert len(handler.solved) <= 5 - behind, "nothing was taken from the journal"


def test_every_event_is_one(tmp_path: Path) -> None:
    """The names in the table above are names of what really happens; killed at each for the first time."""
    assert {event for _, event, _ in KILLS} == set(EVENTS)


def test_killed_again_and_again(tmp_path: Path, finished: dict[str, dict[str, bytes]]) -> None:
    """In processes of their own, the last too."""
    root = tmp_path / "journals"
    for event, count in (("put", 2), ("write", 2), ("apply", 3)):
        child(root, "corrected", event, str(count))
    arrays = child(root, "corrected")
    assert arrays is not None and files(root) == finished["corrected"]
    assert arrays["solved"] == 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("step", ["solve", "apply"])
def test_interrupted_by_an_exception(
    kind: str, step: str, tmp_path: Path, finished: dict[str, dict[str, bytes]]
) -> None:
    root = tmp_path / "journals"
    with pytest.raises(InterruptedRunError):
        run(root, kind, (step, 2))
    assert len(run(root, kind).solved) == (3 if step == "solve" else 2)
    assert files(root) == finished[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_a_second_run_computes_nothing(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: dict[str, dict[str, bytes]]
) -> None:
    root = tmp_path / "journals"
    first = run(root, kind)
    monkeypatch.setattr("qgraph.calibration.segments.open_session", None)
    second = run(root, kind)
    assert not second.solved and second.applied == first.applied
    for a, b in zip(first.records, second.records, strict=True):
        assert a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("kind", ["sequential", "rounded"])
@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "remove", "swap"])
@pytest.mark.parametrize("victim", ["record", "values", "manifest"])
def test_damage_is_found(
    kind: str, damage: str, victim: str, tmp_path: Path, finished: dict[str, dict[str, bytes]]
) -> None:
    """A damaged record or border is made again, from what is still whole; the end is the same."""
    root = tmp_path / "journals"
    with pytest.raises(InterruptedRunError):
        run(root, kind, ("solve", 3))
    (folder,) = root.iterdir()
    patterns = {"record": "group-*", "values": "border/*.values", "manifest": "border/border.json"}
    found = sorted(folder.glob(patterns[victim]))
    path, data = found[1 % len(found)], found[1 % len(found)].read_bytes()
    if damage == "flip":
        middle = len(data) - 5
        path.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])
    elif damage == "cut":
        path.write_bytes(data[:-3])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "remove":
        path.unlink()
    else:
        path.write_bytes(found[0].read_bytes() if len(found) > 1 else b"{}")
    assert len(run(root, kind).solved) == (3 if victim == "record" else 2)
    assert files(root) == finished[kind]


def test_a_manifest_that_is_json_but_not_ours(tmp_path: Path, finished: dict[str, dict[str, bytes]]) -> None:
    """One digit of a position or a shape: every file that it names is whole, and yet nothing is trusted."""
    for i, (old, new) in enumerate(((r"position\": 7", r"position\": 5"), ("[2, 6,", "[2, 5,"))):
        root = tmp_path / str(i) / "journals"
        with pytest.raises(InterruptedRunError):
            run(root, "sequential", ("solve", 3))
        manifest = next(root.iterdir()) / "border" / "border.json"
        text = manifest.read_text()
        assert old in text
        manifest.write_text(text.replace(old, new))
        run(root, "sequential")
        assert files(root) == finished["sequential"]


def test_recalculation_from_the_start_may_be_interrupted(
    tmp_path: Path, finished: dict[str, dict[str, bytes]]
) -> None:
    """Without its border a run catches up with its records; killed on the way, in the middle of a stage that
    rounds, it still ends the same."""
    for count in (3, 4):
        root = tmp_path / str(count) / "journals"
        with pytest.raises(InterruptedRunError):
            run(root, "rounded", ("solve", 3))
        shutil.rmtree(next(root.iterdir()) / "border")
        child(root, "rounded", "manifest", str(count))
        run(root, "rounded")
        assert files(root) == finished["rounded"]


def test_other_inputs_other_folder(tmp_path: Path) -> None:
    """Anything that the result depends on is in the name."""
    a, b = (Journal({"model": m}, root=tmp_path) for m in "ab")
    assert a.folder != b.folder
    with a.open():
        a.write(0, GROUP, {"x": np.zeros(2)})
    with b.open():
        assert b.read(0, GROUP) is None
    with a.open():
        assert a.read(0, GROUP) is not None
        other = LinearGroup(("x",), ("n",), ("V",), 4)
        assert a.read(0, other) is None and a.read(1, GROUP) is None


def test_versions_are_part_of_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = Journal({}, root=tmp_path).folder
    for name, module in (
        ("numpy.__version__", "0"),
        ("qgraph.__version__", "0"),
        ("onnxruntime.__version__", "0"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(name, module)
            assert Journal({}, root=tmp_path).folder != before
    assert Journal({}, root=tmp_path).folder == before


def test_sources_are_part_of_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who edits a solver does not get the results of the old one."""
    import qgraph.solvers

    monkeypatch.undo()
    copy = tmp_path / "solvers"
    shutil.copytree(qgraph.solvers.__path__[0], copy, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(qgraph.solvers, "__path__", [str(copy)])
    before = _sources.__wrapped__()
    assert before == _sources.__wrapped__()
    (copy / "rtn.py").write_text((copy / "rtn.py").read_text() + "# changed\n")
    assert _sources.__wrapped__() != before


def test_the_default_place_is_the_cache(own_cache: Path) -> None:
    journal = Journal({"model": "m"})
    assert journal.folder.parent == own_cache / "calibration"
    with journal.open():
        assert json.loads((journal.folder / "journal.json").read_text())["model"] == "m"


def test_records_come_back_as_they_were(tmp_path: Path) -> None:
    journal = Journal({}, root=tmp_path)
    record = {
        "codes": np.arange(12, dtype=np.uint8).reshape(3, 4).T,  # not contiguous
        "scalar": np.float32(0.1),
        "empty": np.zeros((0, 3), np.float64),
        "flag": np.array([True, False]),
        "odd": np.array([np.nan, -0.0, np.inf]),
    }
    with journal.open():
        fresh, kept = journal.write(0, GROUP, record), journal.read(0, GROUP)
    assert kept is not None
    for name, array in record.items():
        for other in (fresh[name], kept[name]):
            assert other.dtype == array.dtype and other.shape == array.shape
            assert np.ascontiguousarray(other).tobytes() == np.ascontiguousarray(array).tobytes()


def test_one_process_at_a_time(tmp_path: Path) -> None:
    one, other = (Journal({}, root=tmp_path) for _ in range(2))
    with one.open(), pytest.raises(ResourceError, match="another process is calibrating"), other.open():
        pass
    with other.open():  # free again
        pass


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished) -> None:
    """The message says what to do, nothing half-written stays, and with space the run goes on."""
    root = tmp_path / "journals"
    original, calls = BorderWriter.put, []

    def put(self, key, array) -> None:
        calls.append(key)
        if len(calls) == 12:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(self, key, array)

    with monkeypatch.context() as patch:
        patch.setattr(BorderWriter, "put", put)
        with pytest.raises(
            ResourceError, match="the disk is full: free some space there, or let QGRAPH_CACHE_DIR"
        ):
            run(root, "sequential")
    (folder,) = root.iterdir()
    named = json.loads(json.loads((folder / "border" / "border.json").read_text())["border"])["values"]
    assert {p.name for p in folder.glob("border/*.values")} == {v["file"] for v in named.values()}
    run(root, "sequential")
    assert files(root) == finished["sequential"]


def test_a_file_size_limit(tmp_path: Path) -> None:
    """A refusal of the system itself, in a process of its own."""

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500))

    code = (
        f"import sys; sys.path.insert(0, {str(SCRIPT.parent)!r}); import interrupted_walk as w\n"
        "from qgraph.errors import ResourceError\n"
        "try:\n"
        f"    w.main({str(tmp_path / 'j')!r}, 'unused', 'sequential')\n"
        "except ResourceError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, preexec_fn=limit, timeout=120,
        env={**__import__("os").environ, "PYTHONDONTWRITEBYTECODE": "1"},
    )  # fmt: skip
    assert "File too large" in done.stdout and "QGRAPH_CACHE_DIR" in done.stdout, done


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(ResourceError, match="Not a directory"),
        Journal({}, root=tmp_path / "file").open(),
    ):
        pass


def test_leftovers_of_dead_processes_go(own_cache: Path) -> None:
    """Scratch folders that nobody holds; those of living processes stay."""
    from qgraph.calibration.workspace import scratch_folder

    dead = own_cache / "calibration" / "scratch-dead"
    dead.mkdir(parents=True)
    (dead / "lock").write_text("")
    early = own_cache / "calibration" / "scratch-killed-before-it-had-a-lock"
    early.mkdir()
    with scratch_folder() as one:
        assert not dead.exists() and not early.exists()
        with scratch_folder() as two:
            assert one.exists() and two.exists() and one != two
    assert not one.exists() and not two.exists()


def test_border_keeps_what_is_alive(tmp_path: Path) -> None:
    """Values that stay are not written again; those that are over go; a later process finds the rest."""
    border = Border(tmp_path, keep=True)
    arrays = [np.arange(6, dtype=np.float32).reshape(2, 3), np.zeros((0, 3), np.float32)]
    with border.write(1, ["a", "b"]) as writer:
        for array in arrays:
            for key in writer.keys:
                writer.put(key, array)
    with border.write(3, ["b", "c"]) as writer:
        assert writer.keys == ("c",)
        writer.put("c", np.array([True, False]))
    again = Border(tmp_path, keep=True)
    assert sorted(again) == ["b", "c"] and again.position == 3
    assert [again.read("b", i).tolist() for i in (0, 1)] == [array.tolist() for array in arrays]
    assert again.read("b", 1).shape == (0, 3) and again.read("c", 0).tolist() == [True, False]
    assert len(list(tmp_path.glob("*.values"))) == 2
    with pytest.raises(InterruptedRunError), again.write(5, ["d"]) as writer:
        writer.put("d", arrays[0])
        raise InterruptedRunError
    assert sorted(again) == ["b", "c"] and len(list(tmp_path.glob("*.values"))) == 2
    assert not list(Border(tmp_path)) and not list(tmp_path.glob("*.values"))
