"""Files are written by graft/files/write.py and read by graft/files/read.py, and nowhere else."""

from __future__ import annotations

import ast
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[2] / "src" / "graft"
WRITES = {"write_text", "write_bytes", "mkdir", "unlink", "rmdir", "rmtree", "rename", "symlink_to"}
WRITES |= {"save_file", "touch", "mkdtemp", "NamedTemporaryFile", "makedirs", "copytree", "move"}
READS = {"read_text", "read_bytes", "safe_load", "unsafe_load", "full_load"}
OPENS = {"open"}
OF_A_MODULE = {("os", "replace"), ("os", "remove"), ("json", "load"), ("torch", "load")}
OF_A_MODULE |= {("pickle", "load"), ("pickle", "loads"), ("torch", "save"), ("numpy", "load")}

EXCUSED = {
    "model/tensor_file.py": "open: the temporary file that `replacing` made",
    "export/ollama/write.py": "write_text: in the temporary folder that `new_folder` made",
    "export/openvino/write.py": "read_bytes: what OpenVINO wrote there just before",
    "api/run/adopted.py": "write_text: in the temporary folder that `new_folder` made",
    "api/verify.py": "open: two files of which graft wrote one just before",
    "train/loop.py": "open: metrics grow by lines, and are flushed before each checkpoint",
    "model/weight_files.py": "open: a file whose header was read by `open_regular`, to be mapped",
    "convert/readers/pickled.py": "load: torch's, with weights_only",
    "demo/run.py": "read_text: its own rows, which come with the package",
    "model/running/memory.py": "read_text, write_text: Linux's /proc",
    "model/running/prefetch.py": "read_text: Linux's /proc",
    "model/devices.py": "read_text: Linux's /proc",
    "api/doctor.py": "read_text: Linux's /proc and /sys",
    "data/worker.py": "open, read_text: /dev/null and Linux's /proc",
    "patterns.py": "load: what its own process is sent",
    "cli/show.py": "open: /dev/null",
    "cli/signals.py": "open: /dev/null",
}


def doors(path: Path) -> set[str]:
    """Return the calls of a file that read or write files by themselves."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        if isinstance(node.func, ast.Name) and node.func.id in OPENS | {"save_file"}:
            found.add(node.func.id)
        elif isinstance(node.func, ast.Attribute):
            owner = node.func.value.id if isinstance(node.func.value, ast.Name) else ""
            name = node.func.attr
            if name in WRITES | READS | OPENS or (owner, name) in OF_A_MODULE:
                found.add(name)
    return found


def test_nothing_else_reads_or_writes_files() -> None:
    found = {
        str(path.relative_to(SOURCE)): doors(path)
        for path in sorted(SOURCE.rglob("*.py"))
        if path.parent != SOURCE / "files"
    }
    others = {name: calls for name, calls in found.items() if calls}
    unexcused = {
        name: sorted(calls - set(EXCUSED.get(name, "").partition(":")[0].split(", ")))
        for name, calls in others.items()
    }
    assert {name: calls for name, calls in unexcused.items() if calls} == {}


def test_an_excuse_that_nothing_needs_is_taken_back() -> None:
    needless = {
        name: reason
        for name, reason in EXCUSED.items()
        if not set(reason.partition(":")[0].split(", ")) <= doors(SOURCE / name)
    }
    assert needless == {}


def test_it_sees_what_it_looks_for(tmp_path) -> None:
    file = tmp_path / "a.py"
    file.write_text("open('x')\npath.write_text('')\nos.replace('a', 'b')\n'a'.replace('b')")
    assert doors(file) == {"open", "write_text", "replace"}
