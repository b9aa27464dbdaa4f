"""Proving that an exported file is the model that was trained, in the runtime it is for."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice, zip_longest
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from graft.api.events import Events
from graft.api.export import bytes_on_disk, export_model, merge_for_export
from graft.api.run.folder import is_run, load_any, read_run_config
from graft.data.config import DataConfig
from graft.data.examples import Example
from graft.data.load import load_examples, load_train_and_eval, resolve_max_length
from graft.errors import GraftError
from graft.evaluate.fidelity import Fidelity, FidelitySum
from graft.export.base import Target
from graft.export.config import ExportTarget
from graft.export.registry import target_of
from graft.export.runtimes import Runtime
from graft.files.write import scratch_folder, write_json
from graft.model.load import LoadedModel
from graft.model.subject import build_skeleton
from graft.understood import tokenizing

ROWS, TOKENS = 40, 128
"""Held-out rows that are scored, and tokens of each."""
PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 20, 16, 64
"""Golden prompts: held-out rows up to their first target, of so many tokens at least, continued
greedily."""
MAX_KL, MAX_PERPLEXITY, MAX_LOGIT = 1e-3, 0.005, 2e-3
"""The bounds: nats per position; change of the perplexity, where the runtime rounds activations;
largest difference of a logit as a share of the largest logit, where it does not."""
_CHUNK = 1 << 20
CardState = Literal["as exported", "changed", "missing"]


@dataclass(frozen=True)
class Certificate:
    """What a file was found to be."""

    model: str
    file: str
    target: ExportTarget
    rounds_activations: bool
    """llama.cpp does, to 8 bits, and MLX to the 16 bits of a checkpoint that has no more."""
    bytes: int
    bits_per_weight: float
    """Of the whole file, tokenizer included, per parameter of the model."""
    differing_files: tuple[str, ...]
    """Files that are not, byte for byte, what the export writes now; of a .gguf file itself.
    People edit model cards and add to them, so *.md files are not among these."""
    fidelity: Fidelity
    """Of the runtime's logits to those of the trained model, on held-out text."""
    equal_texts: int
    """Golden prompts whose greedy continuation is the same to the last token."""
    texts: int
    largest_gap: float
    """Of our two best logits, where a greedy continuation first goes another way; 0.0: nowhere."""
    same_tokens: bool
    """Every held-out text is cut into the same ids."""
    same_template: bool
    same_stop_tokens: bool
    problems: tuple[str, ...]
    """The bounds that are missed, in words; none: the file is the trained model."""
    card: CardState = "as exported"
    """Of the model card, which is told and is no bound."""

    @property
    def passed(self) -> bool:
        """Whether every bound is met."""
        return not self.problems


def verify(
    model: str | Path,
    file: str | Path,
    *,
    data: str | None = None,
    requantize: bool = False,
    trust_remote_code: bool = False,
    events: Events | None = None,
) -> Certificate:
    """Load an exported file in its own runtime, compare it with the trained model, and say so.

    The file is compared byte for byte with a fresh export of the model (weights, template and
    tokenizer), its logits on held-out text with those of the trained model, adapter still beside
    it and computing in float32, and its greedy continuations of golden prompts. FILE.verify.json
    holds the certificate.

    data: held-out examples; by default those of the run. requantize: as it was for the export.
    Raises GraftError when the file does not load, its runtime is not installed, or there is no
    text to compare on.
    """
    events = events or Events()
    path = Path(file).resolve()
    target = target_of(path)
    loaded = load_any(model, dtype="float32", trust_remote_code=trust_remote_code)
    rows, texts = _held_out(Path(model), loaded, data)
    differing, card = _differing(model, path, target, requantize, trust_remote_code, events)
    if requantize:  # what was rounded is the model that the file is to be
        merge_for_export(loaded, target.name, requantize, events)
    runtime = target.start(path, TOKENS + NEW_TOKENS)
    fidelity = _fidelity(loaded, runtime, rows, events)
    gaps = _gaps(loaded, runtime, rows, events)
    tokenizer, size = loaded.tokenizer, bytes_on_disk(path)
    parameters = build_skeleton(loaded.model.config, trust_remote_code).num_parameters()
    with tokenizing():
        same_tokens = all(runtime.encode(text) == tokenizer(text)["input_ids"] for text in texts)
    found = Certificate(
        model=str(model),
        file=str(path),
        target=target.name,
        rounds_activations=target.rounds_activations(loaded),
        bytes=size,
        bits_per_weight=round(8 * size / parameters, 3),
        differing_files=tuple(differing),
        fidelity=fidelity,
        equal_texts=sum(gap is None for gap in gaps),
        texts=len(gaps),
        largest_gap=max((gap for gap in gaps if gap is not None), default=0.0),
        same_tokens=same_tokens,
        same_template=runtime.chat_template == tokenizer.chat_template,
        same_stop_tokens=tokenizer.eos_token_id is None
        or tokenizer.eos_token_id in runtime.stop_ids,
        problems=(),
        card=card,
    )
    found = dataclasses.replace(found, problems=tuple(_problems(found)))
    write_json(path.with_name(path.name + ".verify.json"), asdict(found) | {"passed": found.passed})
    return found


def _held_out(
    model: Path, loaded: LoadedModel, data: str | None
) -> tuple[list[Example], list[str]]:
    """Return held-out rows with their targets, cut, and the texts that those decode to."""
    limit = getattr(loaded.model.config, "max_position_embeddings", None)
    if data is not None:
        config = DataConfig(data=data, eos=False)
        encoded = load_examples(data, loaded.tokenizer, config, resolve_max_length(config, limit))
    elif is_run(model):
        run = read_run_config(model)
        if not run.data:
            raise GraftError(f"{model} was adopted, so it has no held-out rows; give --data")
        _, encoded = load_train_and_eval(run, loaded.tokenizer, limit, run.seed)
    else:
        raise GraftError(f"{model} is no run, so it has no held-out rows; give --data")
    length = min(TOKENS, limit or TOKENS)
    cut = (
        dataclasses.replace(row, input_ids=row.input_ids[:length], targets=row.targets[:length])
        for row in encoded.examples
    )
    rows = list(islice((row for row in cut if any(row.targets)), ROWS))
    if not rows:
        raise GraftError(
            f"no held-out row has a target within its first {length} tokens; give other --data"
        )
    decode = loaded.tokenizer.decode
    with tokenizing():
        texts = [str(decode(row.input_ids, skip_special_tokens=True)) for row in rows]
    return rows, texts


def _prompt(row: Example) -> list[int]:
    return row.input_ids[: max(row.targets.index(True), PROMPT_TOKENS)]


def _differing(
    model: str | Path,
    path: Path,
    target: Target,
    requantize: bool,
    trust_remote_code: bool,
    events: Events,
) -> tuple[list[str], CardState]:
    """Return the files that differ from those of a fresh export, which is written beside them.

    And how the model card compares.
    """
    with scratch_folder(path.with_name(f"{path.name}.verify")) as folder:
        fresh = folder / path.name  # the file's name stands in a GGUF file
        export_model(
            model,
            target.name,
            fresh,
            requantize=requantize,
            trust_remote_code=trust_remote_code,
            events=events,
        )
        card: CardState = "missing"
        if target.card_path(path).is_file():
            same = _equal(target.card_path(fresh), target.card_path(path))
            card = "as exported" if same else "changed"
        if fresh.is_file():
            return [] if _equal(fresh, path) else [path.name], card
        names = {
            str(file.relative_to(top))
            for top in (fresh, path)
            for file in top.rglob("*")
            if file.is_file() and file.suffix != ".md"
        }
        return sorted(name for name in names if not _equal(fresh / name, path / name)), card


def _equal(one: Path, other: Path) -> bool:
    if not (one.is_file() and other.is_file()) or one.stat().st_size != other.stat().st_size:
        return False
    return all(mine == theirs for mine, theirs in zip_longest(_chunks(one), _chunks(other)))


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            yield chunk


def _fidelity(
    loaded: LoadedModel, runtime: Runtime, rows: Sequence[Example], events: Events
) -> Fidelity:
    total = FidelitySum()
    for done, row in enumerate(rows, start=1):
        total.add(row, _logits(loaded, row.input_ids), runtime.logits(row.input_ids))
        events.progress("scoring", done, len(rows))
    return total.result()


def _gaps(
    loaded: LoadedModel, runtime: Runtime, rows: Sequence[Example], events: Events
) -> list[float | None]:
    """Return what `_first_gap` finds for each golden prompt."""
    prompts = [prompt for prompt in map(_prompt, rows) if len(prompt) >= PROMPT_TOKENS][:PROMPTS]
    gaps = []
    for done, prompt in enumerate(prompts, start=1):
        gaps.append(_first_gap(loaded, runtime, prompt))
        events.progress("greedy continuations", done, len(prompts))
    return gaps


def _first_gap(loaded: LoadedModel, runtime: Runtime, prompt: list[int]) -> float | None:
    """Return the gap of our two best logits where their greedy text leaves ours; None: nowhere.

    Where each next token of our text is the one that they would choose, their text is ours.
    """
    ids = list(prompt)
    limit = getattr(loaded.model.config, "max_position_embeddings", None) or 2**31
    cache = None
    with torch.no_grad():
        for _ in range(min(NEW_TOKENS, limit - len(prompt))):
            step = torch.tensor([ids if cache is None else ids[-1:]], device=loaded.model.device)
            output = loaded.model(step, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            ids.append(int(output.logits[0, -1].argmax()))
    first = len(prompt) - 1
    theirs = runtime.logits(ids)[first:-1].argmax(-1)
    differs = (theirs != torch.tensor(ids[first + 1 :])).nonzero()
    if not len(differs):
        return None
    at = first + int(differs[0])
    best, second = _logits(loaded, ids)[at].topk(2).values.tolist()
    return float(best - second)


@torch.no_grad()
def _logits(loaded: LoadedModel, ids: list[int]) -> Tensor:
    batch = torch.tensor([ids], device=loaded.model.device)
    return loaded.model(batch, use_cache=False).logits[0].float().cpu()


def _problems(found: Certificate) -> list[str]:
    problems = [f"{name} is not what the export writes now" for name in found.differing_files]
    fidelity = found.fidelity
    if not fidelity.mean_kl <= MAX_KL:
        problems.append(f"KL is {fidelity.mean_kl:.2e} nats; the bound is {MAX_KL:.0e}")
    if found.rounds_activations:
        change = abs(fidelity.other_perplexity / fidelity.perplexity - 1)
        if not change <= MAX_PERPLEXITY:
            problems.append(
                f"perplexity changes by {change:.2%}; the bound is {MAX_PERPLEXITY:.1%}"
            )
    elif not fidelity.logit_difference <= MAX_LOGIT:
        problems.append(
            f"a logit differs by {fidelity.logit_difference:.1e} of the largest; the bound is "
            f"{MAX_LOGIT:.0e}"
        )
    same = {
        "some held-out text is cut into other tokens": found.same_tokens,
        "the chat template is another one": found.same_template,
        "the token that ends an answer is another one": found.same_stop_tokens,
    }
    return problems + [problem for problem, holds in same.items() if not holds]
