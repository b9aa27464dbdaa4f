"""The model of a disk keeps what was flushed, and loses the rest as it says."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from faults.disk import Disk, Loss, state_after
from faults.record import CREATED, EMPTIED, Kind, Operation

ROOT = Path("/root-of-the-disk")
Files = dict[str, bytes | None]


class Recorder:
    """Makes records: a number stands for a file."""

    def __init__(self) -> None:
        self.done: list[Operation] = []

    def add(
        self,
        kind: Kind,
        inode: int,
        path: str = "",
        other: str = "",
        data: bytes = b"",
        **more: int,
    ) -> Recorder:
        names = (str(ROOT / path) if path else "", str(ROOT / other) if other else "")
        values = {"flags": 0, "offset": 0} | more
        number = len(self.done) + 1
        self.done.append(
            Operation(kind, number, inode=inode, path=names[0], other=names[1], data=data, **values)
        )
        return self

    def create(self, inode: int, path: str, data: bytes) -> Recorder:
        self.add(Kind.OPEN, inode, path, flags=CREATED | EMPTIED)
        return self.add(Kind.WRITE, inode, path, data=data)


@pytest.fixture
def left(tmp_path: Path):
    """Return what a power loss leaves of a folder that had one file, `old`, with inode 1."""

    def after(recorder: Recorder, loss: Loss, seed: int = 0) -> Files:
        start, out = (Path(tempfile.mkdtemp(dir=tmp_path)) for _ in range(2))
        (start / "old").write_bytes(b"old")
        disk = Disk(start)
        disk.inodes[1] = disk.root.now["old"]
        disk.inodes[2] = disk.root
        disk.root_path = str(ROOT)
        state_after(disk, recorder.done, out, loss, seed)
        return {
            str(path.relative_to(out)): path.read_bytes() if path.is_file() else None
            for path in sorted(out.rglob("*"))
        }

    return after


def states(left, recorder: Recorder) -> list[Files]:
    """Return the different states that chance makes, in 60 draws."""
    found = [left(recorder, Loss.CHANCE, seed) for seed in range(60)]
    return [state for index, state in enumerate(found) if state not in found[:index]]


def test_nothing_unflushed_is_promised(left) -> None:
    recorder = Recorder().create(5, "new", b"12345678")
    assert left(recorder, Loss.NOTHING) == {"old": b"old"}
    assert left(recorder, Loss.NAMES) == {"old": b"old", "new": b""}
    found = states(left, recorder)
    assert {"old": b"old"} in found
    assert {"old": b"old", "new": b"12345678"} in found
    assert {"old": b"old", "new": bytes(8)} in found
    torn = {state["new"] for state in found if "new" in state} - {b"", b"12345678", bytes(8)}
    assert torn and all(b"12345678".startswith(data) for data in torn if data)


def test_a_file_that_is_renamed_without_a_flush_may_be_empty(left) -> None:
    recorder = Recorder().create(5, "part", b"new").add(Kind.RENAME, 5, "part", "old")
    assert left(recorder, Loss.NAMES) == {"old": b""}
    assert left(recorder, Loss.NOTHING) == {"old": b"old"}


def test_what_is_flushed_and_renamed_is_old_or_new_and_with_its_folder_flushed_new(left) -> None:
    recorder = Recorder().create(5, "part", b"new").add(Kind.FSYNC, 5, "part")
    recorder.add(Kind.RENAME, 5, "part", "old")
    found = [{key: state.get(key) for key in ("old",)} for state in states(left, recorder)]
    assert {"old": b"old"} in found and {"old": b"new"} in found
    assert all(state["old"] in (b"old", b"new") for state in found)
    recorder.add(Kind.FSYNC, 2, ".")
    assert states(left, recorder) == [{"old": b"new"}]
    assert left(recorder, Loss.NOTHING) == {"old": b"new"}


def test_to_flush_a_folder_does_not_flush_its_own_entry(left) -> None:
    recorder = Recorder().add(Kind.MKDIR, 6, "folder").create(5, "folder/new", b"new")
    recorder.add(Kind.FSYNC, 5, "folder/new").add(Kind.FSYNC, 6, "folder")
    assert left(recorder, Loss.NOTHING) == {"old": b"old"}
    assert left(recorder.add(Kind.FSYNC, 2, "."), Loss.NOTHING) == {
        "folder": None,
        "folder/new": b"new",
        "old": b"old",
    }


def test_a_folders_entries_survive_in_their_order(left) -> None:
    recorder = Recorder().create(5, "a", b"").create(6, "b", b"").add(Kind.UNLINK, 1, "old")
    found = [set(state) for state in states(left, recorder)]
    assert sorted(map(sorted, found)) == [["a", "b"], ["a", "b", "old"], ["a", "old"], ["old"]]


def test_a_rename_survives_in_both_folders_or_in_neither(left) -> None:
    recorder = Recorder().add(Kind.MKDIR, 6, "folder").add(Kind.FSYNC, 2, ".")
    recorder.create(5, "folder/other", b"").add(Kind.RENAME, 1, "old", "folder/old")
    found = states(left, recorder)
    assert all(("old" in state) != ("folder/old" in state) for state in found)
    assert any("folder/old" in state for state in found)
    recorder.add(Kind.FSYNC, 2, ".")  # the journal commits the rename, and what came before it
    assert all({"folder/old", "folder/other"} <= set(state) for state in states(left, recorder))


def test_a_cut_and_a_write_at_an_offset_are_replayed(left) -> None:
    recorder = Recorder().add(Kind.WRITE, 1, "old", data=b"er", offset=3)
    recorder.add(Kind.TRUNCATE, 1, "old", offset=4).add(Kind.SYNC, 0)
    assert left(recorder, Loss.NOTHING) == {"old": b"olde"}
    assert states(left, recorder) == [{"old": b"olde"}]


def test_draws_are_repeated_by_their_seed(left) -> None:
    recorder = Recorder().create(5, "new", b"12345678").create(6, "another", b"87654321")
    assert left(recorder, Loss.CHANCE, 7) == left(recorder, Loss.CHANCE, 7)
    assert any(left(recorder, Loss.CHANCE, 7) != left(recorder, Loss.CHANCE, n) for n in range(9))
