"""What a power loss leaves: a recorded order of operations, replayed on a model of a disk.

The model is a journalled file system of which nothing is promised but what was flushed:

- A file's data are certain up to its last fsync. Of what was written and cut since, a prefix
  survives: none of it, some operations, or some and half of the next write (*torn*); and whatever
  survives of its length, the bytes may never have reached the disk and read as zeros (delayed
  allocation, as of ext4 with data=writeback, and XFS). A file that was never flushed may be empty.
- A folder's entries (create, link, rename, unlink, mkdir, rmdir) are certain up to the last fsync
  of that folder. Of those since, a prefix survives, as the journal keeps their order. To flush a
  file does not flush its entry in the folder, and to flush a folder does not flush its own entry
  in its parent. Different folders lose independently of each other.
- A rename is one transaction: it survives in both of its folders or in neither.
- ext4's kindness of flushing a file that is renamed over another one is not modelled.

Attributes (mode, times) are not modelled; a sync or syncfs flushes all.

`Loss.CHANCE` draws each of these by a seed. The two extremes are `Loss.NOTHING`, in which nothing
that was not flushed survives, and `Loss.NAMES`, in which all entries do and no data that was not
flushed: the files of zero length that follow a rename without an fsync.
"""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from faults.record import CREATED, EMPTIED, Kind, Operation


class Loss(Enum):
    """What of the data and entries that were not flushed a power loss takes."""

    CHANCE = "chance"
    NOTHING = "nothing unflushed survives"
    NAMES = "names survive, unflushed data do not"


@dataclass(eq=False)
class File:
    """A file, or a symbolic link."""

    data: bytes = b""
    """As of the last flush."""
    pending: list[tuple[int, bytes | None]] = field(default_factory=list)
    """Writes (offset, bytes) and cuts (length, None) since."""
    target: str | None = None
    """Of a symbolic link."""


@dataclass(eq=False)
class Move:
    """An entry that goes from one place to another, or comes (no source), or goes (no target)."""

    source: tuple[Folder, str] | None
    target: tuple[Folder, str] | None
    node: File | Folder


@dataclass(eq=False)
class Folder:
    """A folder."""

    now: dict[str, File | Folder] = field(default_factory=dict)
    """Its entries as the running system sees them."""
    flushed: dict[str, File | Folder] = field(default_factory=dict)
    """Its entries as of the last flush."""
    pending: list[Move] = field(default_factory=list)
    """What happened to its entries since."""


def apply_move(entries: dict[str, File | Folder], folder: Folder, move: Move) -> None:
    """Do to a folder's entries what a move does to them."""
    if move.source is not None and move.source[0] is folder:
        entries.pop(move.source[1], None)
    if move.target is not None and move.target[0] is folder:
        entries[move.target[1]] = move.node


def changed(data: bytes, pending: Sequence[tuple[int, bytes | None]], zeros: bool = False) -> bytes:
    """Return a file's data after writes and cuts; zeros: as long, but the bytes written are 0."""
    content = bytearray(data)
    for offset, written in pending:
        if written is None:
            del content[offset:]
            content.extend(bytes(offset - len(content)))
        else:
            content.extend(bytes(max(0, offset - len(content))))
            content[offset : offset + len(written)] = bytes(len(written)) if zeros else written
    return bytes(content)


class Disk:
    """The state of a watched folder, as it is seen and as it is certain."""

    def __init__(self, root: Path) -> None:
        """Begin with what is in the folder, all of it flushed."""
        self.root_path = os.path.realpath(root)
        self.inodes: dict[int, File | Folder] = {}
        self.root = self._read(self.root_path)
        assert isinstance(self.root, Folder)

    def _read(self, path: str) -> File | Folder:
        node: File | Folder
        if os.path.islink(path):
            node = File(target=os.readlink(path))
        elif os.path.isdir(path):
            entries = {name: self._read(os.path.join(path, name)) for name in os.listdir(path)}
            node = Folder(now=entries, flushed=dict(entries))
        else:
            node = File(Path(path).read_bytes())
        self.inodes[os.lstat(path).st_ino] = node
        return node

    def _place(self, path: str) -> tuple[Folder, str] | None:
        """Return the folder and the name in it; None for a place outside of the watched folder."""
        inside = os.path.relpath(path, self.root_path).split(os.sep)
        if inside[0] == os.pardir:
            return None
        node: File | Folder = self.root
        for part in inside[:-1]:
            assert isinstance(node, Folder), path
            node = node.now[part]
        assert isinstance(node, Folder), path
        return node, inside[-1]

    def apply(self, operation: Operation) -> None:
        """Do what a recorded operation did."""
        kind = operation.kind
        if kind == Kind.OPEN:
            if operation.flags & CREATED:
                self._come(operation.path, operation.inode, File())
            elif operation.flags & EMPTIED:
                self._file(operation).pending.append((0, None))
        elif kind == Kind.WRITE:
            self._file(operation).pending.append((operation.offset, operation.data))
        elif kind == Kind.TRUNCATE:
            self._file(operation).pending.append((operation.offset, None))
        elif kind == Kind.MKDIR:
            self._come(operation.path, operation.inode, Folder())
        elif kind == Kind.SYMLINK:
            self._come(operation.other, operation.inode, File(target=operation.path))
        elif kind == Kind.LINK:
            self._come(operation.other, operation.inode, self._file(operation))
        elif kind in (Kind.UNLINK, Kind.RMDIR):
            self._move(self._place(operation.path), None, operation)
        elif kind == Kind.RENAME:
            self._move(self._place(operation.path), self._place(operation.other), operation)
        elif kind == Kind.FSYNC:
            self._flush(self.inodes[operation.inode])
        else:
            assert kind == Kind.SYNC, kind
            for node in self.inodes.values():
                self._flush(node)

    def _file(self, operation: Operation) -> File:
        node = self.inodes[operation.inode]
        assert isinstance(node, File), operation
        return node

    def _come(self, path: str, inode: int, node: File | Folder) -> None:
        self.inodes[inode] = node  # a number may be used again
        self._happen(Move(None, self._place(path), node))

    def _move(
        self,
        source: tuple[Folder, str] | None,
        target: tuple[Folder, str] | None,
        operation: Operation,
    ) -> None:
        node = source[0].now[source[1]] if source else self.inodes[operation.inode]
        self._happen(Move(source, target, node))

    def _happen(self, move: Move) -> None:
        places = (move.source, move.target)
        for folder in {id(place[0]): place[0] for place in places if place}.values():
            apply_move(folder.now, folder, move)
            folder.pending.append(move)

    def _flush(self, node: File | Folder) -> None:
        if isinstance(node, File):
            node.data, node.pending = changed(node.data, node.pending), []
            return
        while node.pending:
            self._commit(node.pending[0])

    def _commit(self, move: Move) -> None:
        """Make a move certain, and in its other folder all that came before it."""
        for place in (move.source, move.target):
            while place is not None and move in place[0].pending:
                first = place[0].pending[0]
                if first is move:
                    apply_move(place[0].flushed, place[0], move)
                    del place[0].pending[0]
                else:
                    self._commit(first)

    # After a loss -------------------------------------------------------------------------------

    def write(self, folder: Path, loss: Loss, chance: random.Random) -> None:
        """Write into an empty folder what a power loss leaves now."""
        folders = _folders(self.inodes.values(), self.root)
        keep = {}
        for node in folders:
            pending = len(node.pending)
            shares = {Loss.NOTHING: 0, Loss.NAMES: pending}
            keep[node] = shares[loss] if loss in shares else chance.randint(0, pending)
        _agree(folders, keep)
        entries = {}
        for node in folders:
            survived = dict(node.flushed)
            for move in node.pending[: keep[node]]:
                apply_move(survived, node, move)
            entries[node] = survived
        self._write(self.root, folder, entries, loss, chance)

    def _write(
        self,
        node: Folder,
        path: Path,
        entries: dict[Folder, dict[str, File | Folder]],
        loss: Loss,
        chance: random.Random,
    ) -> None:
        for name, child in sorted(entries[node].items()):
            place = path / name
            if isinstance(child, Folder):
                place.mkdir()
                self._write(child, place, entries, loss, chance)
            elif child.target is not None:
                place.symlink_to(child.target)
            else:
                place.write_bytes(_survived(child, loss, chance))


def _folders(nodes: object, root: Folder) -> list[Folder]:
    """Return all folders that there are or were, each once, in the order of their making."""
    found: dict[Folder, None] = {root: None}
    queue = [root, *(node for node in nodes if isinstance(node, Folder))]  # type: ignore[attr-defined]
    for node in queue:
        found.setdefault(node)
        inside = [*node.now.values(), *node.flushed.values(), *(m.node for m in node.pending)]
        queue += [child for child in inside if isinstance(child, Folder) and child not in found]
        found.update(dict.fromkeys(child for child in inside if isinstance(child, Folder)))
    return list(found)


def _agree(folders: Sequence[Folder], keep: dict[Folder, int]) -> None:
    """Lower what folders keep until each move is kept by both of its folders or by neither."""
    changing = True
    while changing:
        changing = False
        for folder in folders:
            for index, move in enumerate(folder.pending[: keep[folder]]):
                others = {place[0] for place in (move.source, move.target) if place} - {folder}
                if any(move not in other.pending[: keep[other]] for other in others):
                    keep[folder], changing = index, True
                    break


def _survived(file: File, loss: Loss, chance: random.Random) -> bytes:
    if not file.pending or loss in (Loss.NOTHING, Loss.NAMES):
        return file.data
    fate = chance.choice(("nothing", "all", "prefix", "torn", "zeros"))
    if fate == "nothing":
        return file.data
    if fate == "all":
        return changed(file.data, file.pending)
    kept = file.pending[: chance.randint(0, len(file.pending))]
    if fate == "torn" and len(kept) < len(file.pending):
        offset, written = file.pending[len(kept)]
        if written:
            kept = [*kept, (offset, written[: chance.randint(1, len(written))])]
    return changed(file.data, kept, zeros=fate == "zeros")


def state_after(
    start: Disk, operations: Sequence[Operation], folder: Path, loss: Loss, seed: int
) -> None:
    """Write into `folder` what a power loss after the operations leaves; `start` is used up."""
    for operation in operations:
        start.apply(operation)
    start.write(folder, loss, random.Random(seed))
