import hashlib
import os
import time

import pytest

from graft.errors import GraftError
from graft.files import digest
from graft.files.digest import check_digest, file_digest


@pytest.fixture
def memory(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "graft" / "digests.json"


def written(path, content: bytes):
    path.write_bytes(content)
    return path


def test_a_file_is_read_once_and_again_when_it_has_changed(tmp_path, memory, monkeypatch) -> None:
    file = written(tmp_path / "a", b"weights")
    monkeypatch.setattr(digest, "_SETTLED", -1.0)
    assert file_digest(file) == hashlib.sha256(b"weights").hexdigest()
    reads = []
    whole = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda *one: (reads.append(1), whole(*one))[1])
    file_digest(file)
    assert not reads
    time.sleep(0.02)
    with file.open("r+b") as opened:  # the same size, and its old time of change put back
        opened.write(b"W")
    os.utime(file, ns=(file.stat().st_atime_ns, 1))
    assert file_digest(file) == hashlib.sha256(b"Weights").hexdigest()
    assert reads
    with pytest.raises(GraftError, match="is damaged or was changed since it was written"):
        check_digest(file, hashlib.sha256(b"weights").hexdigest())


def test_what_was_just_written_is_not_remembered(tmp_path, memory) -> None:
    file_digest(written(tmp_path / "a", b"new"))
    assert not memory.exists()


@pytest.mark.parametrize("content", ["", "[]", "{", '{"a": 1}', '{"a": {"b": []}}'])
def test_a_damaged_memory_is_none(content, tmp_path, memory, monkeypatch) -> None:
    monkeypatch.setattr(digest, "_SETTLED", -1.0)
    memory.parent.mkdir(parents=True)
    memory.write_text(content)
    for _ in range(2):
        assert file_digest(written(tmp_path / "a", b"x")) == hashlib.sha256(b"x").hexdigest()


def test_no_place_to_remember_is_no_fault(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(digest, "_SETTLED", -1.0)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert file_digest(tmp_path / "file") == hashlib.sha256(b"").hexdigest()


def test_a_pipe_has_no_digest(tmp_path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(GraftError, match="no regular file"):
        file_digest(tmp_path / "pipe")
