import errno
import fcntl
import json
import os
import re
import socket
import subprocess
import sys

import pytest

from graft.errors import GraftError
from graft.files.lock import LOCK, is_owned, owned
from graft.files.write import scratch_folder, sweep, write_text

HOLD = (
    "import sys, time\nfrom pathlib import Path\nfrom graft.files.lock import owned\n"
    "with owned(Path(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(60)\n"
)


def test_a_second_owner_is_told_who_the_first_is(tmp_path) -> None:
    with owned(tmp_path):
        with pytest.raises(GraftError) as caught, owned(tmp_path):
            raise AssertionError
        assert re.search(rf"is in use by process {os.getpid()} on .*, since '\d", str(caught.value))
    assert list(tmp_path.iterdir()) == []
    with owned(tmp_path):
        pass


def test_a_killed_owner_holds_nothing(tmp_path) -> None:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"held\n"
    with pytest.raises(GraftError, match=f"in use by process {process.pid} "), owned(tmp_path):
        raise AssertionError
    process.kill()
    process.wait()
    process.stdout.close()
    assert (tmp_path / LOCK).exists()
    with owned(tmp_path):
        pass
    assert not (tmp_path / LOCK).exists()


def test_a_lock_file_with_anything_in_it_is_taken(tmp_path) -> None:
    (tmp_path / LOCK).write_bytes(b"\x1b[31m\xff")
    with owned(tmp_path), pytest.raises(GraftError, match="in use by process"), owned(tmp_path):
        raise AssertionError
    (tmp_path / LOCK).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(GraftError, match="cannot be written"), owned(tmp_path):
        raise AssertionError
    assert not (tmp_path / "elsewhere").exists()


def test_one_of_many_that_begin_at_once_wins(tmp_path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom graft.files.lock import owned\n"
        "from graft.errors import GraftError\n"
        "try:\n    with owned(Path(sys.argv[1])):\n        print('won', flush=True)\n"
        "        sys.stdin.read()\n"
        "except GraftError:\n    print('lost', flush=True)\n"
    )
    command, pipe = [sys.executable, "-c", code, str(tmp_path)], subprocess.PIPE
    many = [subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) for _ in range(6)]
    outcomes = [one.stdout.readline().strip() for one in many if one.stdout]
    for one in many:
        one.communicate("")
    assert sorted(outcomes) == ["lost"] * 5 + ["won"]


def test_without_locks_the_process_that_is_named_decides(tmp_path, monkeypatch) -> None:
    def unsupported(*arguments) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with owned(tmp_path):
        assert is_owned(tmp_path)
        with pytest.raises(GraftError, match=f"in use by process {os.getpid()} "), owned(tmp_path):
            raise AssertionError
    assert not is_owned(tmp_path)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    named = {"process": ended.pid, "host": socket.gethostname(), "since": "", "command": ""}
    (tmp_path / LOCK).write_text(json.dumps(named))
    with owned(tmp_path):
        pass
    write_text(tmp_path / "file", "is written all the same")
    with scratch_folder(tmp_path / "out"):
        assert sweep(tmp_path) == []


def test_a_pipe_in_the_place_of_the_lock_is_told(tmp_path) -> None:
    os.mkfifo(tmp_path / LOCK)
    with pytest.raises(GraftError, match="cannot be written"), owned(tmp_path):
        raise AssertionError
