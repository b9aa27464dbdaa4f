"""The shim does what it is told, to calls that no symbol stands for, too."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from faults.record import Kind, read_record
from faults.shim import Action, build

SCRIPT = """
import os, shutil, signal, sys
signal.signal(signal.SIGTERM, lambda *_: print("signal"))
os.chdir(sys.argv[1])
os.mkdir("folder")                                      # 1
with open("folder/file", "wb", buffering=0) as file:    # 2
    file.write(b"0123456789")                           # 3
    os.fsync(file)                                      # 4
os.replace("folder/file", "file")                       # 5
shutil.copyfile("file", "copy")                         # 6, 7, and 8 which finds the end
os.truncate("copy", 4)                                  # 9
os.unlink("file")                                       # 10
shutil.rmtree("folder")                                 # 11
open(sys.argv[1] + "x", "w").close()                    # is beside the folder
print("done")
"""

RUST = """
import sys
import numpy
from safetensors.numpy import save_file
save_file({"a": numpy.arange(6)}, sys.argv[1] + "/a.safetensors")
"""


@pytest.fixture
def watched(needs_shim: None, tmp_path: Path):
    """Run a script under the shim in a folder; return the folder and how it ended."""

    def run(
        action: Action, at: int = 0, value: int = 0, script: str = SCRIPT
    ) -> tuple[Path, subprocess.CompletedProcess[str]]:
        folder = tmp_path / "watched"
        folder.mkdir()
        environment = {
            "LD_PRELOAD": str(build()),
            "FAULT_PREFIX": os.path.realpath(folder),
            "FAULT_ACTION": str(int(action)),
            "FAULT_AT": str(at),
            "FAULT_VALUE": str(value),
            "FAULT_LOG": str(tmp_path / "record"),
        }
        words = [sys.executable, "-c", script, str(folder)]
        return folder, subprocess.run(
            words, env=os.environ | environment, capture_output=True, text=True
        )

    return run


def test_it_records_each_operation_with_its_data(watched, tmp_path) -> None:
    folder, ended = watched(Action.RECORD)
    assert ended.stdout == "done\n"
    record = read_record(tmp_path / "record")
    kinds = "MKDIR OPEN WRITE FSYNC RENAME OPEN WRITE TRUNCATE UNLINK RMDIR".split()
    assert [operation.kind for operation in record] == [Kind[name] for name in kinds]
    assert [operation.number for operation in record] == [1, 2, 3, 4, 5, 6, 7, 9, 10, 11]
    assert [operation.data for operation in record if operation.data] == [b"0123456789"] * 2
    names = [(operation.path, operation.other) for operation in record][4]
    assert names == (str(folder / "folder" / "file"), str(folder / "file"))
    assert len({record[index].inode for index in (1, 2, 3, 4)}) == 1


def test_it_kills_before_an_operation(watched) -> None:
    folder, ended = watched(Action.KILL, 5)
    assert ended.returncode == -signal.SIGKILL
    assert (folder / "folder" / "file").read_bytes() == b"0123456789"
    assert not (folder / "file").exists()


@pytest.mark.parametrize(("at", "left"), [(3, "folder/file"), (7, "copy")])
def test_it_tears_a_write(at, left, watched) -> None:
    folder, ended = watched(Action.TEAR, at)
    assert ended.returncode == -signal.SIGKILL
    assert (folder / left).read_bytes() == b"01234"


def test_it_sends_a_signal_and_goes_on(watched) -> None:
    folder, ended = watched(Action.SIGNAL, 6, signal.SIGTERM)
    assert (ended.returncode, ended.stdout) == (0, "signal\ndone\n")
    assert (folder / "copy").read_bytes() == b"0123"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT])
def test_writes_fail_from_an_operation_on(number, watched) -> None:
    folder, ended = watched(Action.FAIL, 3, number)
    assert f"OSError: [Errno {number}]" in ended.stderr
    assert (folder / "folder" / "file").read_bytes() == b""


def test_without_descriptors_what_is_open_can_be_written(watched) -> None:
    folder, ended = watched(Action.FAIL, 3, errno.EMFILE)
    assert f"OSError: [Errno {errno.EMFILE}]" in ended.stderr
    assert "copyfile" in ended.stderr
    assert (folder / "file").read_bytes() == b"0123456789"


def test_it_sees_what_rust_does_without_the_c_library(watched, tmp_path) -> None:
    folder, _ = watched(Action.RECORD, script=RUST)
    record = read_record(tmp_path / "record")
    assert record[-1].kind == Kind.RENAME, "safetensors writes a temporary file and renames it"
    assert record[-1].other == str(folder / "a.safetensors")
    written = b"".join(entry.data for entry in record if entry.kind == Kind.WRITE)
    assert written == (folder / "a.safetensors").read_bytes()
    assert load_file(folder / "a.safetensors")["a"].tolist() == [0, 1, 2, 3, 4, 5]


def test_what_the_process_starts_can_run(watched) -> None:
    script = "import subprocess; subprocess.run(['sh', '-c', 'echo hello > file; cat file'])"
    _, ended = watched(Action.KILL, 1, script=f"import os, sys; os.chdir(sys.argv[1]); {script}")
    assert (ended.returncode, ended.stdout) == (0, "hello\n")
