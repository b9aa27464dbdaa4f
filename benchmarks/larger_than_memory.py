"""A QLoRA step of a model that is larger than memory, from its memory-mapped file.

Writes a quantised folder of a 70B Llama shape with random weights (nf4 with double quantisation,
about 36 GB), then, in a fresh process, maps it as `graft train` does, adapts all linear layers with
rank 16 and takes training steps of 1 x 128 tokens that recompute their layers. Reported for each
step: seconds, bytes read from the disk, how long the model waited for them, and the memory that is
not page cache (RssAnon), of which 6 GB are allowed.

    python benchmarks/larger_than_memory.py                     needs about 40 GB of disk
    python benchmarks/larger_than_memory.py --layers 2          2 of the 80 layers
    python benchmarks/larger_than_memory.py --shape tiny        a smoke test
    python benchmarks/larger_than_memory.py --folder F --keep   writes F; later runs take it

The first step is a warm-up: the cache is cold, and the loss looks at the model once more.
A model that fits into memory is not read ahead; --read-ahead does it all the same.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import resource
import shutil
import tempfile
import threading
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from _common import ROOT, write_csv
from _shapes import ALPHA, RANK, SHAPES, LlamaShape, step_work
from _timing import ChildError, Limits, OtherLoad, load_text, measure_limits, print_table, run_child

LARGE = {**SHAPES, "70b": LlamaShape(8192, 80, 28672, 64, 8)}
MEMORY_LIMIT = 6e9
"""Bytes of resident memory other than the page cache."""
SAMPLE_SECONDS = 0.05
LEARNING_RATE = 1e-4


def main() -> None:
    arguments = _arguments()
    if arguments.child is not None:
        print(json.dumps(_child(json.loads(arguments.child))))
        return
    if not Path("/proc/self/io").is_file():
        print("skipped: reads Linux's /proc")
        return
    shape = LARGE[arguments.shape]
    if arguments.layers is not None:
        shape = replace(shape, layers=arguments.layers)
    folder = Path(arguments.folder) if arguments.folder else _temporary_folder()
    ours = not folder.exists() or not any(folder.iterdir())
    try:
        if ours:
            _write(folder, shape)
        else:
            _check(folder, shape)
        _run(arguments, folder, shape)
    finally:
        if ours and not arguments.keep:
            shutil.rmtree(folder, ignore_errors=True)


def _arguments() -> argparse.Namespace:
    lines = __doc__.splitlines()
    parser = argparse.ArgumentParser(description=lines[0])
    parser.add_argument("--shape", choices=list(LARGE), default="70b")
    parser.add_argument("--layers", type=int, help="decoder layers, other than the shape's")
    parser.add_argument("--tokens", default="1x128", metavar="BATCHxLENGTH")
    parser.add_argument(
        "--checkpointing", default="layers", choices=("none", "products", "half", "layers")
    )
    parser.add_argument("--steps", type=int, default=1, help="measured steps")
    parser.add_argument("--warm-up", type=int, default=1, help="steps before the measured ones")
    parser.add_argument("--folder", help="where to write; default: a temporary one in build/")
    parser.add_argument("--keep", action="store_true", help="leave the folder there at the end")
    parser.add_argument("--read-ahead", action="store_true", help="also if the model fits")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args()


def _temporary_folder() -> Path:
    (ROOT / "build").mkdir(exist_ok=True)
    return Path(tempfile.mkdtemp(prefix="larger-than-memory-", dir=ROOT / "build"))


def _check(folder: Path, shape: LlamaShape) -> None:
    """End the script unless the folder holds what an earlier run wrote for the shape."""
    from graft.model.folder import QUANTISATION_FILE

    if not (folder / QUANTISATION_FILE).is_file():
        raise SystemExit(f"{folder} is neither empty nor a whole quantised folder")
    config = json.loads((folder / "config.json").read_text())
    found = config["num_hidden_layers"], config["hidden_size"]
    if found != (shape.layers, shape.hidden):
        raise SystemExit(f"{folder} has {found[0]} layers of width {found[1]}: another shape")
    print(f"{folder} is there already")


def _write(folder: Path, shape: LlamaShape) -> None:
    """Write the folder in a process of its own; end the script where there is no room."""
    from _packed_folder import packed_bytes

    size = packed_bytes(shape, _weight_format())
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < 1.05 * size + 1e9:
        print(f"skipped: {size / 1e9:.1f} GB are to be written, {free / 1e9:.1f} GB are free")
        raise SystemExit(0)
    begin = time.perf_counter()
    run_child(__file__, {"write": str(folder), "shape": asdict(shape)})
    seconds = time.perf_counter() - begin
    files = len(list(folder.glob("*.safetensors")))
    print(f"wrote {size / 1e9:.2f} GB in {files} files in {seconds:.0f} s", flush=True)


def _weight_format() -> Any:
    from graft.formats.registry import make_format

    return make_format("nf4", {"double_quant": True})


def _child(task: dict[str, Any]) -> Any:
    """Do one of the measuring processes' tasks."""
    if "write" in task:
        from _packed_folder import write_packed_folder

        write_packed_folder(Path(task["write"]), LlamaShape(**task["shape"]), _weight_format())
        return None
    if "disk" in task:
        return _disk_rate(Path(task["disk"]))
    if "step" in task:
        return _measure(**task["step"])
    return asdict(measure_limits())


# The run ------------------------------------------------------------------------------------------


def _run(arguments: argparse.Namespace, folder: Path, shape: LlamaShape) -> None:
    limits = Limits(**run_child(__file__, {"limits": True}))
    largest = max(folder.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    disk = run_child(__file__, {"disk": str(largest)})
    step = {
        "folder": str(folder),
        "tokens": arguments.tokens,
        "checkpointing": arguments.checkpointing,
        "steps": arguments.warm_up + arguments.steps,
        "read_ahead": arguments.read_ahead,
    }
    try:
        found = run_child(__file__, {"step": step})
    except ChildError as error:
        raise SystemExit(f"the step failed: {error}") from error
    _report(arguments, shape, limits, disk, found)


def _report(
    arguments: argparse.Namespace,
    shape: LlamaShape,
    limits: Limits,
    disk: float | None,
    found: dict[str, Any],
) -> None:
    batch, length = (int(part) for part in arguments.tokens.split("x"))
    recomputes = arguments.checkpointing == "layers"
    operations, _ = step_work(shape, batch, length, "qlora", recomputes)
    arithmetic = operations / limits.bfloat16
    rows: list[dict[str, object]] = []
    for number, lap in enumerate(found["laps"]):
        alone = None if disk is None else lap["read"] / disk
        rows.append(
            {
                "step": number + 1,
                "warm-up": number < arguments.warm_up,
                "s": f"{lap['seconds']:.2f}",
                "arithmetic floor s": f"{arithmetic:.2f}",
                "read GB": f"{lap['read'] / 1e9:.3f}",
                "disk GB/s": f"{lap['read'] / lap['seconds'] / 1e9:.2f}",
                "disk alone s": "" if alone is None else f"{alone:.2f}",
                "waited s": f"{lap['waited']:.2f}",
                "major faults": lap["major_faults"],
                "CPU": f"{lap['cpu'] / lap['seconds'] / found['threads']:.0%}",
                "other load": load_text(lap["other"]),
            }
        )
    fits = "ok" if found["anonymous"] <= MEMORY_LIMIT else "miss"
    print(
        f"\n{arguments.shape}, {shape.layers} layers, {arguments.tokens} tokens, checkpointing "
        f"{arguments.checkpointing}, {found['threads']} threads; {limits.describe()}\n"
        f"disk, read past the cache by one thread: {_rate(disk)}\n"
        f"weights {found['mapped'] / 1e9:.2f} GB mapped, {found['available'] / 1e9:.2f} GB of "
        f"memory available: {'read ahead' if found['read_ahead'] else 'not read ahead'}\n"
        f"loaded in {found['load_seconds']:.1f} s, {found['load_read'] / 1e6:.0f} MB read\n"
        f"peak of memory that is not page cache {found['anonymous'] / 1e9:.2f} GB (at most "
        f"{MEMORY_LIMIT / 1e9:.0f}: {fits}); peak with the cache that is mapped "
        f"{found['peak'] / 1e9:.2f} GB; loss {found['loss']:.4f}\n"
    )
    print_table(rows)
    common = {name: f"{found[name]:.4g}" for name in ("anonymous", "peak", "mapped", "available")}
    common |= {"shape": arguments.shape, "layers": str(shape.layers), "disk": str(disk)}
    name = f"larger-than-memory-{arguments.shape}-{shape.layers}"
    print(f"wrote {write_csv(name, [row | common for row in rows])}")


def _rate(disk: float | None) -> str:
    return "not measurable here" if disk is None else f"{disk / 1e9:.2f} GB/s"


# In processes of their own ------------------------------------------------------------------------


def _disk_rate(file: Path, most: int = 4 << 30, piece: int = 8 << 20) -> float | None:
    """Return bytes per second of reading a file past the cache; None where that is not possible."""
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_DIRECT)
    except OSError:
        return None
    with mmap.mmap(-1, piece) as buffer:  # O_DIRECT wants aligned memory
        begin, done = time.perf_counter(), 0
        while done < most and (count := os.readv(descriptor, [buffer])):
            done += count
        seconds = time.perf_counter() - begin
    os.close(descriptor)
    return done / seconds


@dataclass
class _Mark:
    """Where the process stands."""

    seconds: float
    cpu: float
    read: int
    major_faults: int
    waited: float

    @staticmethod
    def now(waited: float) -> _Mark:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        cpu = usage.ru_utime + usage.ru_stime
        return _Mark(time.perf_counter(), cpu, _read_bytes(), usage.ru_majflt, waited)

    def since(self, before: _Mark) -> dict[str, float]:
        then = asdict(before)
        return {name: value - then[name] for name, value in asdict(self).items()}


def _read_bytes() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))


class _AnonymousPeak(threading.Thread):
    """Samples the memory of this process that is no page cache, until it is stopped."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.bytes = 0
        self._end = threading.Event()

    def run(self) -> None:
        while not self._end.wait(SAMPLE_SECONDS):
            self.bytes = max(self.bytes, _status("RssAnon"))

    def stop(self) -> int:
        self._end.set()
        self.join()
        return self.bytes


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def _measure(
    folder: str, tokens: str, checkpointing: Any, steps: int, read_ahead: bool
) -> dict[str, Any]:
    """Load, adapt and train as `graft.finetune` does with a quantised folder."""
    import torch

    from graft.adapters.attach import adapter_parameters, attach_adapter, frozen_layers
    from graft.adapters.config import AdapterConfig
    from graft.data.encode import Example
    from graft.model.load import load_model
    from graft.model.running.checkpointing import enable_checkpointing
    from graft.model.running.memory import free_bytes, reuse_freed_memory
    from graft.model.running.pointwise import use_own_pointwise
    from graft.model.running.prefetch import prefetch_layers
    from graft.model.targets import select_targets
    from graft.objectives.base import LossResult
    from graft.objectives.next_token import NEXT_TOKEN
    from graft.optimizers.adamw import ADAMW
    from graft.train.config import LoopConfig
    from graft.train.loop import train
    from graft.train.metrics import Metrics
    from graft.train.task import TrainingTask

    torch.manual_seed(0)
    memory = _AnonymousPeak()
    memory.start()
    start = _Mark.now(0.0)
    model = load_model(folder, dtype="bfloat16", device="cpu").model
    loading = _Mark.now(0.0).since(start)
    mapped = sum(layer.storage_bytes for _, layer in frozen_layers(model))
    enable_checkpointing(model, checkpointing)
    config = AdapterConfig(method="lora", rank=RANK, alpha=ALPHA)
    attach_adapter(model, select_targets(model, ()), config)
    use_own_pointwise(model)
    batch, length = (int(part) for part in tokens.split("x"))
    ids = torch.randint(model.config.vocab_size, (batch, length)).tolist()
    predicted = [False] + [True] * (length - 1)
    laps: list[dict[str, float]] = []
    reuse_freed_memory()
    available = free_bytes(torch.device("cpu")) or 0
    with (
        tempfile.TemporaryDirectory() as out,
        prefetch_layers(model, 0 if read_ahead else available) as prefetch,
    ):
        mark, load = _Mark.now(0.0), OtherLoad()

        def on_metrics(metrics: Metrics) -> None:
            nonlocal mark, load
            now = _Mark.now(0.0 if prefetch is None else prefetch.waited_seconds)
            if "step_seconds" in metrics:
                laps.append({**now.since(mark), "other": load.cores()})
            mark, load = now, OtherLoad()

        task = TrainingTask(
            model=model,
            parameters=adapter_parameters(model, "default"),
            examples=[Example(row, predicted, "random") for row in ids],
            objective=NEXT_TOKEN,
            evaluate=lambda: LossResult(0.0, 1),
            optimizer=ADAMW,
            learning_rate=LEARNING_RATE,
            steps=steps,
            folder=Path(out),
        )
        loss = train(task, LoopConfig(out=out, batch_size=batch), on_metrics)["loss"]
    return {
        "laps": laps,
        "loss": loss,
        "anonymous": memory.stop(),
        "peak": _status("VmHWM"),
        "mapped": mapped,
        "available": available,
        "read_ahead": prefetch is not None,
        "threads": torch.get_num_threads(),
        "load_seconds": loading["seconds"],
        "load_read": loading["read"],
    }


if __name__ == "__main__":
    main()
