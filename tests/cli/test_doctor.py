"""`graft doctor` tells what computes here and why the rest does not, quickly."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from graft.api import doctor
from graft.api.doctor import diagnose
from graft.cli.main import main
from graft.kernels.backend import native_library
from graft.kernels.backend.native_library import native
from graft.kernels.backend.reference import reference
from graft.kernels.backend.registry import backends, implementation

SECTIONS = ["versions", "kernels", "processor", "memory", "gpu", "extras"]


def test_the_text_has_every_fact(capsys) -> None:
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line and not line.startswith(" ")] == SECTIONS
    facts = [line for line in lines if line.startswith("  ")]
    assert len(facts) == sum(len(section) for section in diagnose().values())
    assert any(line.split() == ["torch", torch.__version__] for line in facts)
    assert any(line.split()[:3] == ["threads", "of", "PyTorch"] for line in facts)


def test_the_json_is_one_object(capsys) -> None:
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found) == SECTIONS
    assert found["versions"]["torch"] == torch.__version__
    assert found["processor"]["threads of PyTorch"] == torch.get_num_threads()
    assert set(found["extras"]) >= {"test", "dev", "peers"}
    assert found["extras"]["test"]["pytest"] == pytest.__version__


def test_it_imports_no_transformers() -> None:
    program = (
        "import sys\nfrom graft.cli.main import main\nassert main(['doctor', '--json']) == 0\n"
        "assert 'transformers' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_active_backend_is_the_one_that_is_called() -> None:
    operations = {operation for backend in backends() for operation in backend.operations}
    called = {implementation(operation, torch.device("cpu")) for operation in operations}
    names = {b.name for b in backends() if called & set(b.operations.values())}
    active = diagnose()["kernels"]["on cpu"]
    assert {name for name in ("reference", "native", "triton") if name in active} == names


def test_a_library_that_was_not_built(monkeypatch) -> None:
    monkeypatch.setattr(native_library, "_load", lambda: "it was not built: install a compiler")
    kernels = diagnose()["kernels"]
    assert kernels["on cpu"] == "reference"
    assert kernels["native"].startswith("not available: it was not built: install a compiler")
    assert kernels["native instructions"] is None


def test_what_a_backend_leaves_to_another(monkeypatch) -> None:
    monkeypatch.setattr(native_library, "_load", lambda: None)
    monkeypatch.setattr(native_library, "instructions", lambda: None)
    monkeypatch.setattr(doctor, "instructions", lambda: "any")
    monkeypatch.delitem(native.operations, "pool")
    operations = {operation for backend in backends() for operation in backend.operations}
    left = operations - set(native.operations)
    expected = f"native for {len(operations) - len(left)} operations, reference for {len(left)}"
    assert "pool" in left
    assert diagnose()["kernels"]["on cpu"] == expected


def test_every_operation_that_is_implemented_is_counted(monkeypatch) -> None:
    monkeypatch.setattr(native_library, "_load", lambda: None)
    monkeypatch.setattr(doctor, "instructions", lambda: "any")
    monkeypatch.delitem(native.operations, "pool")
    counts = re.findall(r"for (\d+)", diagnose()["kernels"]["on cpu"])
    assert sum(map(int, counts)) == len(reference.operations)
    families = ("attention", "linear", "latent_codes", "lora_linear", "move_scaled", "rms_norm")
    assert set(families) <= set(reference.operations)


def test_another_device_has_its_own_backend(monkeypatch) -> None:
    monkeypatch.setattr(doctor, "_device_types", lambda: ["cpu", "mps"])
    assert diagnose()["kernels"]["on mps"] == "reference"


def test_sizes_and_settings_of_a_machine(monkeypatch, tmp_path, capsys) -> None:
    proc, sys_folder = tmp_path / "proc", tmp_path / "sys"
    huge = sys_folder / "kernel/mm/transparent_hugepage/enabled"
    limit = sys_folder / "fs/cgroup/memory.max"
    for file in (huge, limit, proc / "meminfo"):
        file.parent.mkdir(parents=True)
    huge.write_text("always [madvise] never\n")
    limit.write_text("3221225472\n")
    (proc / "meminfo").write_text("MemTotal: 8388608 kB\nMemAvailable: 2097152 kB\nHugePages: 0\n")
    (proc / "cpuinfo").write_text("model name\t: Old\nflags\t\t: fpu avx2 fma\nmodel name : 2\n")
    monkeypatch.setattr(doctor, "_PROC", proc)
    monkeypatch.setattr(doctor, "_SYS", sys_folder)
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    found = diagnose()
    assert found["memory"]["total bytes"] == 8 * 2**30
    assert found["memory"]["available bytes"] == 2 * 2**30
    assert found["memory"]["limit of the control group, bytes"] == 3 * 2**30
    assert found["memory"]["swap bytes"] is None
    assert found["memory"]["transparent huge pages"] == "madvise"
    assert found["memory"]["malloc settings in the environment"]["MALLOC_ARENA_MAX"] == "1"
    assert found["processor"]["model"] == "Old"
    assert found["processor"]["instruction sets"] == ["avx2", "fma"]
    assert main(["doctor"]) == 0
    lines = [line.split("  ") for line in capsys.readouterr().out.splitlines()]
    shown = {cells[1].strip(): cells[-1].strip() for cells in lines if len(cells) > 2}
    assert shown["total"] == "8.0 GiB"
    assert shown["limit of the control group"] == "3.0 GiB"
    assert shown["swap"] == "-"


def test_a_machine_without_proc(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor, "_PROC", tmp_path)
    monkeypatch.setattr(doctor, "_SYS", tmp_path)
    found = diagnose()
    assert found["memory"]["total bytes"] > 2**28
    assert found["memory"]["available bytes"] is None
    assert found["processor"]["instruction sets"] is None
