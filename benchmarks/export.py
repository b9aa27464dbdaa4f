"""Exporting a large model: how near to the disk's speed, and how much memory beside the files.

Writes a packed INT4 folder of a Llama shape with random weights, measures how fast this disk writes
and reads as many bytes, and exports the folder to each target in a fresh process, its pages dropped
from the cache before and the written file flushed to the disk within the time. Memory is counted
twice: anonymous memory (RssAnon, sampled), of which 2 GB are allowed, and all resident memory
(VmHWM), in which the pages of the mapped folder count too, beside the packed file's size.
share_of_write is the time that the disk takes to write the exported bytes over the export's; 50 %
is asked. share_of_copy counts that the packed folder has to be read, too. Export and disk are
measured in turn, so that another load hits both; it hits the export more, which computes.

    python benchmarks/export.py                         the 7B shape; needs about 16 GB of disk
    python benchmarks/export.py --shape 1.1b --targets gguf mlx
    python benchmarks/export.py --folder F              keeps the packed folder in F
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from _common import ROOT, write_csv
from _shapes import SHAPES
from _timing import OtherLoad, peak_bytes, print_table, run_child

TARGETS = ("gguf", "mlx", "onnx", "openvino")
MEMORY_LIMIT = 2e9
DISK_SHARE = 0.5
SAMPLE_SECONDS = 0.02
_PIECE = 1 << 24


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=list(SHAPES), default="7b")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--folder", type=Path, help="of the packed model; it stays there")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child is not None:
        print(json.dumps(_child(**json.loads(arguments.child))))
        return
    if not Path("/proc/self/status").is_file():
        print("skipped: reads Linux's /proc")
        return
    (ROOT / "build").mkdir(exist_ok=True)
    place = Path(tempfile.mkdtemp(prefix="export-", dir=ROOT / "build"))
    packed = arguments.folder or place / "packed"
    try:
        size = _packed_folder(packed, arguments.shape, place)
        rows = [_best(packed, place, target, size, arguments) for target in arguments.targets]
    finally:
        shutil.rmtree(place)
    print_table(rows)
    print(f"wrote {write_csv(f'export-{arguments.shape}', rows)}")


def _packed_folder(folder: Path, shape: str, place: Path) -> int:
    """Make the folder where it is not there yet, and return the size of its tensors."""
    from _packed_folder import packed_bytes, write_packed_folder

    from graft.formats.int_group import IntGroupFormat
    from graft.model.folder import QUANTISATION_FILE

    weight_format = IntGroupFormat(4, 32)
    size = packed_bytes(SHAPES[shape], weight_format)
    there = (folder / QUANTISATION_FILE).is_file()
    needed = 2.5 * size + (0 if there else size)
    free = shutil.disk_usage(place).free
    if free < needed + 1e9:
        print(f"skipped: up to {needed / 1e9:.1f} GB are to be written, {free / 1e9:.1f} GB free")
        raise SystemExit(0)
    if not there:
        write_packed_folder(folder, SHAPES[shape], weight_format)
    print(f"packed folder: {size / 1e9:.2f} GB", flush=True)
    return size


def _best(
    packed: Path, place: Path, target: str, size: int, arguments: argparse.Namespace
) -> dict[str, object]:
    """Return the figures of the turn that came nearest to the disk's speed."""
    turns = [_turn(packed, place, target, size, arguments.shape) for _ in range(arguments.repeats)]
    for turn in turns:
        print(turn, flush=True)
    return max(turns, key=lambda turn: float(str(turn["share_of_write"])))


def _turn(packed: Path, place: Path, target: str, size: int, shape: str) -> dict[str, object]:
    for file in packed.iterdir():
        _forget(file)
    out = place / ("model.gguf" if target == "gguf" else target)
    found = run_child(__file__, {"packed": str(packed), "out": str(out), "target": target})
    shutil.rmtree(out) if out.is_dir() else out.unlink()
    out.with_name(f"{out.name}.md").unlink(missing_ok=True)  # the card of a single file
    write, read = _disk_seconds(place / "disk", found["bytes"])
    share = write / found["seconds"]
    copy = write + read * size / found["bytes"]
    missed = [
        name
        for name, holds in {
            "memory": found["anonymous"] <= MEMORY_LIMIT,
            "resident": found["resident"] <= size + MEMORY_LIMIT,
            "disk": share >= DISK_SHARE,
        }.items()
        if not holds
    ]
    return {
        "shape": shape,
        "target": target,
        "packed_gb": round(size / 1e9, 2),
        "written_gb": round(found["bytes"] / 1e9, 2),
        "seconds": round(found["seconds"], 1),
        "cpu_seconds": round(found["cpu_seconds"], 1),
        "disk_write_seconds": round(write, 1),
        "disk_read_seconds": round(read, 1),
        "share_of_write": round(share, 2),
        "share_of_copy": round(copy / found["seconds"], 2),
        "anonymous_gb": round(found["anonymous"] / 1e9, 2),
        "resident_above_packed_gb": round((found["resident"] - size) / 1e9, 2),
        "other_load_cores": round(found["other"], 1),
        "missed": ", ".join(missed),
    }


def _disk_seconds(path: Path, count: int) -> tuple[float, float]:
    """Return the seconds that the disk takes to write so many bytes, fsync included, and to read
    them again."""
    piece = os.urandom(_PIECE)
    begin = time.perf_counter()
    with path.open("wb") as file:
        for start in range(0, count, _PIECE):
            file.write(piece[: count - start])
        file.flush()
        os.fsync(file.fileno())
    write = time.perf_counter() - begin
    _forget(path)
    begin = time.perf_counter()
    with path.open("rb", buffering=0) as file:
        while file.read(_PIECE):
            pass
    read = time.perf_counter() - begin
    path.unlink()
    return write, read


def _forget(file: Path) -> None:
    """Have a file leave the page cache."""
    with file.open("rb") as opened:
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _child(packed: str, out: str, target: str) -> dict[str, Any]:
    from graft.api.export import bytes_on_disk, export_model

    with _AnonymousPeak() as peak:
        load, begin, cpu = OtherLoad(), time.perf_counter(), time.process_time()
        export_model(packed, target, out)  # type: ignore[arg-type]
        path = Path(out)
        for file in [path] if path.is_file() else path.iterdir():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
        seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
        other = load.cores()
    return {
        "seconds": seconds,
        "cpu_seconds": cpu,
        "other": other,
        "bytes": bytes_on_disk(path),
        "anonymous": peak.bytes,
        "resident": peak_bytes(),
    }


class _AnonymousPeak:
    """The largest anonymous memory of this process inside the block, as sampled; in bytes."""

    def __enter__(self) -> _AnonymousPeak:
        self.bytes, self._ended = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(SAMPLE_SECONDS):
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith("RssAnon:"):
                    self.bytes = max(self.bytes, int(line.split()[1]) * 1024)


if __name__ == "__main__":
    main()
