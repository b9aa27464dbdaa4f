"""The tour: the bundled base and data through the whole pipeline, scored at every station."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from graft.api.config import QuantizeConfig, TrainConfig
from graft.api.evaluate import evaluate_model, generate
from graft.api.events import Events
from graft.api.export import export_model
from graft.api.finetune import finetune
from graft.api.merge import merge
from graft.api.quantize import quantize
from graft.api.run.folder import PromptStyle, load_any
from graft.errors import GraftError
from graft.evaluate.scores import attribute_coverage
from graft.export.registry import TARGETS
from graft.files.write import sweep
from graft.model.load import LoadedModel

ASSETS = Path(__file__).parent / "assets"
BASE = ASSETS / "base"
TRAINING = ASSETS / "data" / "train.jsonl"
HELD_OUT = ASSETS / "data" / "heldout.jsonl"
STYLE = PromptStyle("prompt", "\n")
_SAMPLED_ROWS = 24
_MAX_NEW_TOKENS = 96
_DTYPE: Literal["float32"] = "float32"
"""One precision at every station, so that equal weights give equal figures."""


@dataclass(frozen=True)
class Station:
    """One line of the demo's table."""

    name: str
    loss: float
    """Held-out loss in nats per target token."""
    share: float
    """Share of the attributes that the generated descriptions mention."""
    sample: str
    """The description of the first held-out product."""


@dataclass(frozen=True)
class DemoResult:
    """What the demo made and measured."""

    prompt: str
    stations: tuple[Station, ...]
    files: dict[str, Path]
    seconds: float


def run_demo(out: Path, events: Events | None = None, steps: int = 320) -> DemoResult:
    """Quantise the bundled base, fine-tune it with QA-LoRA, merge, export and compare.

    Writes out/base (INT4), out/run, out/merged and out/model.gguf. A demo that was stopped goes on
    with what is there. Raises GraftError when `out` holds a whole one, or anything else.
    """
    events = events or Events()
    begin = time.perf_counter()
    base, run, merged = out / "base", out / "run", out / "merged"
    file = out / "model.gguf"
    _check_folder(out, {base, run, merged, TARGETS["gguf"].card_path(file)})
    prompts = _prompts(_SAMPLED_ROWS)
    if not base.exists():
        quantize(QuantizeConfig(model=str(BASE), format="int", out=str(base)), events)
    stations = [_station("before (INT4 base)", load_any(base, _DTYPE), prompts, events)]
    config = TrainConfig(
        model=str(BASE),
        data=str(TRAINING),
        eval_data=str(HELD_OUT),
        method="qalora",
        dtype=_DTYPE,
        steps=steps,
        eval_every=80,
        out=str(run),
        resume=run.exists(),
    )
    finetune(config, events)
    stations.append(_station("after QA-LoRA", load_any(run, _DTYPE), prompts, events))
    if not merged.exists():
        events.note(merge(run, merged, events=events).summary())
    stations.append(_station("merged, still INT4", load_any(merged, _DTYPE), prompts, events))
    export_model(run, "gguf", file, events=events)
    exported = load_any(file, _DTYPE, tokenizer=str(merged))
    stations.append(_station("read back from the GGUF", exported, prompts, events))
    files = {"run": run, "report": run / "report.md", "merged model": merged, "GGUF": file}
    return DemoResult(prompts[0], tuple(stations), files, time.perf_counter() - begin)


def _check_folder(out: Path, parts: set[Path]) -> None:
    """Raise GraftError unless the folder is new, or holds parts of a demo that did not end."""
    if out.is_dir():
        sweep(out)
    if out.exists() and not (out.is_dir() and parts.issuperset(out.iterdir())):
        raise GraftError(f"{out} exists already; choose another --out or remove it")


def _prompts(count: int) -> list[str]:
    lines = HELD_OUT.read_text(encoding="utf-8").splitlines()[:count]
    return [json.loads(line)["prompt"] for line in lines]


def _station(name: str, loaded: LoadedModel, prompts: Sequence[str], events: Events) -> Station:
    loss = evaluate_model(loaded, str(HELD_OUT))["loss"]
    texts = []
    for done, prompt in enumerate(prompts, start=1):
        texts.append(generate(loaded, prompt, style=STYLE, max_new_tokens=_MAX_NEW_TOKENS))
        events.progress(f"writing descriptions: {name}", done, len(prompts))
    share = attribute_coverage(prompts, texts)
    assert share is not None  # every prompt of the demo's is a sheet of attributes
    return Station(name, loss, share, texts[0].strip())
