import errno
import os
import stat
import subprocess
import sys

import pytest

from graft.errors import GraftError
from graft.files import write
from graft.files.write import (
    new_folder,
    remove_folder,
    replacing,
    sweep,
    unwritable,
    write_json,
    write_text,
)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_flushed_before_its_name_and_its_folder_after(tmp_path, monkeypatch) -> None:
    done = []
    fsync, replace = os.fsync, os.replace

    def flushed(descriptor):
        done.append(("flush", os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))))
        fsync(descriptor)

    def renamed(old, new):
        done.append(("rename", os.path.basename(new)))
        replace(old, new)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(os, "replace", renamed)
    write_text(tmp_path / "a.txt", "text")
    (first, temporary), second, third = done
    assert first == "flush" and temporary.startswith(".a.txt.")
    assert second == ("rename", "a.txt")
    assert third == ("flush", tmp_path.name)


def test_all_of_a_folder_is_flushed_before_it_has_its_name(tmp_path, monkeypatch) -> None:
    done = []
    fsync, rename = os.fsync, os.rename

    def flushed(descriptor):
        done.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(os, "rename", lambda old, new: (done.append("rename"), rename(old, new)))
    with new_folder(tmp_path / "out") as part:
        (part / "inner").mkdir()
        (part / "inner" / "file").write_text("1")
        (part / "other").write_text("2")
    before, after = done[: done.index("rename")], done[done.index("rename") + 1 :]
    assert {"file", "other", "inner", part.name} <= set(before)
    assert after == [tmp_path.name]


def test_a_planted_link_is_not_followed(tmp_path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    for name in ("a.json.part", ".a.json.part"):
        (tmp_path / name).symlink_to(victim)
    write_json(tmp_path / "a.json", {"a": 1})
    (tmp_path / "b.json").symlink_to(victim)
    write_json(tmp_path / "b.json", {"b": 1})  # the link itself is replaced
    assert victim.read_text() == "precious"
    assert not (tmp_path / "b.json").is_symlink()


def test_files_have_the_mode_that_the_umask_leaves(tmp_path) -> None:
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "a", "")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640


def test_what_a_killed_writer_left_goes_with_the_next_write(tmp_path) -> None:
    code = (
        "import os, sys\nfrom pathlib import Path\nfrom graft.files.write import *\n"
        "place = Path(sys.argv[1])\n"
        "with replacing(place / 'a') as one, new_folder(place / 'b') as two:\n"
        "    (two / 'inner').write_text('1')\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    left = names(tmp_path)
    assert len(left) == 2 and all(name.endswith(".part") for name in left)
    write_text(tmp_path / "a", "new")
    assert [name.startswith(".b.") for name in names(tmp_path) if name != "a"] == [True]
    assert sweep(tmp_path) == []
    assert names(tmp_path) == ["a"]


def test_what_another_process_is_writing_is_left_alone(tmp_path) -> None:
    with replacing(tmp_path / "a") as living:
        living.write_text("slow")
        write_text(tmp_path / "a", "quick")
        assert sweep(tmp_path) == [living.name]
        assert (tmp_path / "a").read_text() == "quick"
    assert (tmp_path / "a").read_text() == "slow"
    busy = pytest.raises(GraftError, match="b is being written by another process")
    with new_folder(tmp_path / "b"), busy, new_folder(tmp_path / "b"):
        raise AssertionError
    assert names(tmp_path) == ["a", "b"]


def test_files_that_only_look_like_temporaries_are_kept(tmp_path) -> None:
    kept = [".a.part", ".a.notes.part", "a.0123456789ab.part"]
    for name in kept:
        (tmp_path / name).write_text("mine")
    write_text(tmp_path / "a", "")
    assert names(tmp_path) == sorted([*kept, "a"])


def test_a_disk_that_cannot_be_flushed_leaves_what_was_there(tmp_path, monkeypatch) -> None:
    write_text(tmp_path / "a", "before")

    def fails(descriptor):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(write.os, "fsync", fails)
    with pytest.raises(GraftError, match="a cannot be written: Input/output error"):
        write_text(tmp_path / "a", "after")
    with pytest.raises(GraftError, match="out cannot be written"), new_folder(tmp_path / "out"):
        pass
    assert names(tmp_path) == ["a"]
    assert (tmp_path / "a").read_text() == "before"


def test_a_folder_is_removed_at_one_stroke(tmp_path, monkeypatch) -> None:
    (tmp_path / "out" / "inner").mkdir(parents=True)

    def killed(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(write.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        remove_folder(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    sweep(tmp_path, "out")
    assert names(tmp_path) == []
    remove_folder(tmp_path / "out")  # nothing there is no fault


def test_a_folder_that_appears_meanwhile_is_kept(tmp_path) -> None:
    with pytest.raises(GraftError, match="out exists already"), new_folder(tmp_path / "out"):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine").write_text("precious")
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["mine"]


@pytest.mark.parametrize("name", ["x" * 250, "\u6f22" * 82 + ".json"])
def test_a_name_as_long_as_names_may_be(name, tmp_path) -> None:
    write_text(tmp_path / name, "1")
    assert names(tmp_path) == [name]


def test_the_advice_fits_the_fault(tmp_path) -> None:
    numbers = (errno.ENOSPC, errno.EROFS, errno.EMFILE)
    full, fixed, many = (str(unwritable(tmp_path, OSError(n, os.strerror(n)))) for n in numbers)
    assert full.endswith(
        "No space left on device; free some space or choose another place with --out"
    )
    assert fixed.endswith("Read-only file system; choose another place with --out")
    assert many.endswith("Too many open files")
