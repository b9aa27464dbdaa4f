"""How long a command takes until it does what it is for, measured by its whole process.

`graft generate` until the first token, on a model folder of the 1.1B shape in INT4 (0.8 GB, in the
page cache) and on a small model; `graft train` until its first step on a small model; the others
until they end. Beside them Python, PyTorch and Transformers alone, and, where PEFT is installed,
Transformers until the first token and PEFT until the first step. Each is a process of its own, in
turns; the numbers are medians.

    python benchmarks/start.py [--shape 1.1b] [--rounds 5] [--small stories260k]
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import _peers
from _common import e2e_rows, shared, write_csv, write_jsonl
from _packed_folder import write_packed_folder
from _shapes import GROUP_SIZE, SHAPES
from _timing import OtherLoad, load_text, print_table

from graft.formats.registry import parse_format

GRAFT = ("-m", "graft.cli.main")
TARGETS = {"graft generate": 4.0, "graft plan": 3.0, "graft train": 8.0}
"""Seconds."""
POLL = 0.005
"""Seconds between two looks at whether a step is done."""

_FIRST_TOKEN = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
streamer = TextStreamer(tokenizer, skip_prompt=True)
model.generate(**tokenizer("hello", return_tensors="pt"), max_new_tokens=1, streamer=streamer)
"""

_FIRST_STEP = """
import json, sys, torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
tokenizer.pad_token = tokenizer.eos_token
model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
rows = [json.loads(line) for line in open(sys.argv[2])]
texts = [row["prompt"] + "\\n" + row["completion"] for row in rows]
encoded = tokenizer(texts, truncation=True, max_length=512)["input_ids"]
batch = tokenizer.pad({"input_ids": encoded[:16]}, return_tensors="pt")
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
model(**batch, labels=batch["input_ids"]).loss.backward()
optimizer.step()
print("done", flush=True)
"""


@dataclass(frozen=True)
class Case:
    """A process, and the moment in it that is waited for."""

    name: str
    what: str
    words: tuple[str, ...]
    until: str = "end"
    """end; or output: the first byte on stdout; or the file of a run's metrics: its first step."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=list(SHAPES), default="1.1b")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--small", default="stories260k", help="model of ../shared/models")
    parser.add_argument("--folder", type=Path, help="where the large model lies, or is written")
    arguments = parser.parse_args()
    small = shared("models", arguments.small)
    with tempfile.TemporaryDirectory(prefix="graft-start-") as temporary:
        here = Path(temporary)
        large = arguments.folder or here / "large"
        if not (large / "graft.json").is_file():
            weights = parse_format({"format": "int", "bits": 4, "group_size": GROUP_SIZE})
            write_packed_folder(large, SHAPES[arguments.shape], weights)
        rows = write_jsonl(here / "rows.jsonl", e2e_rows("train")[:1000])
        cases = _cases(large, arguments.shape, small, rows, here)
        measured: dict[Case, list[tuple[float, float, float]]] = {case: [] for case in cases}
        for turn in range(arguments.rounds + 1):  # the first fills the page cache
            for case in cases:
                found = _measure(case, here / f"run{turn}")
                if turn:
                    measured[case].append(found)
    _report(measured)


def _cases(large: Path, shape: str, small: Path, rows: Path, here: Path) -> list[Case]:
    packed, kind = f"{shape} INT4", small.name
    prompt = ("--prompt", "hello", "--max-new-tokens", "4")
    run, data = "{run}", str(rows)
    train = ("--model", str(small), "--data", data, "--out", run, "--steps", "2")
    merge = ("merge", str(here / "run0"), "--out", "{run}-merged")
    export = ("export", str(here / "run0"), "--to", "gguf", "--out", "{run}.gguf")
    cases = [
        Case("python", "nothing", ("-c", "pass")),
        Case("python", "import torch", ("-c", "import torch")),
        Case("python", "import transformers", ("-c", "import transformers")),
        Case("python", "its models", ("-c", "from transformers import PreTrainedModel")),
        Case("graft --help", "", (*GRAFT, "--help")),
        Case("graft doctor", "", (*GRAFT, "doctor")),
        Case("graft plan", packed, (*GRAFT, "plan", "--model", str(large))),
        Case("graft generate", packed, (*GRAFT, "generate", str(large), *prompt), "output"),
        Case("graft generate", kind, (*GRAFT, "generate", str(small), *prompt), "output"),
        Case("graft train", kind, (*GRAFT, "train", *train), "{run}/metrics.jsonl"),
        Case("graft eval", kind, (*GRAFT, "eval", str(small), "--data", data), "end"),
        Case("graft data", kind, (*GRAFT, "data", str(small), data, "--rows", "1")),
        Case("graft merge", kind, (*GRAFT, *merge)),
        Case("graft export", kind, (*GRAFT, *export)),
    ]
    reason = _peers.missing("peft")
    if reason is not None:
        print(f"skipped PEFT: {reason}")
        return cases
    return [
        *cases,
        Case("transformers generate", kind, ("-c", _FIRST_TOKEN, str(small)), "output"),
        Case("PEFT train", kind, ("-c", _FIRST_STEP, str(small), data), "output"),
    ]


def _measure(case: Case, run: Path) -> tuple[float, float, float]:
    """Return seconds until the case's moment, processor seconds until its end, others' load.

    Raises RuntimeError when the process fails.
    """
    words = [word.format(run=run) if "{run}" in word else word for word in case.words]
    load, before = OtherLoad(), resource.getrusage(resource.RUSAGE_CHILDREN)
    begin = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *words], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert process.stdout is not None
    if case.until == "output":
        os.read(process.stdout.fileno(), 1)
    elif case.until != "end":
        metrics = Path(case.until.format(run=run))
        while process.poll() is None and not _has_stepped(metrics):
            time.sleep(POLL)
    else:
        process.stdout.read()
        process.wait()
    seconds = time.perf_counter() - begin
    process.stdout.read()
    if process.wait():
        raise RuntimeError(f"{case.name} ended with status {process.returncode}: {words}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    span = time.perf_counter() - begin
    return seconds, used, max(0.0, load.cores() - used / span)


def _has_stepped(metrics: Path) -> bool:
    if not metrics.is_file():
        return False
    lines = metrics.read_text(encoding="utf-8").splitlines(keepends=True)
    return any(json.loads(line).get("step") for line in lines if line.endswith("\n"))


def _report(measured: dict[Case, list[tuple[float, float, float]]]) -> None:
    rows: list[dict[str, object]] = []
    for case, found in measured.items():
        seconds = [one[0] for one in found]
        target = TARGETS.get(case.name)
        moment = {"end": "its end", "output": "first token"}.get(case.until, "first step")
        rows.append(
            {
                "process": case.name,
                "on": case.what,
                "until": "first step" if case.name == "PEFT train" else moment,
                "seconds": f"{statistics.median(seconds):.2f}",
                "min": f"{min(seconds):.2f}",
                "processor s": f"{statistics.median(one[1] for one in found):.2f}",
                "target": "" if target is None else f"{target:.0f}",
                "other load": load_text(max(one[2] for one in found)),
            }
        )
    print_table(rows)
    met = all(
        statistics.median(one[0] for one in found) <= TARGETS.get(case.name, float("inf"))
        for case, found in measured.items()
    )
    print("every target met: " + ("yes" if met else "no"))
    print(f"wrote {write_csv('start', rows)}")


if __name__ == "__main__":
    main()
