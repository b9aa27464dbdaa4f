"""Proving that an exported file is the model that was trained, in the runtime it is for."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from itertools import islice, zip_longest
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from graft.adapters.attach import adapter_names
from graft.api.certificate import CardState, Certificate, TokenizerResult, in_words
from graft.api.events import Events
from graft.api.export import bytes_on_disk, export_model, merge_for_export
from graft.api.run.folder import is_run, load_any, read_run_config
from graft.data.config import DataConfig
from graft.data.examples import Example, sequences_of
from graft.data.load import load_examples, load_train_and_eval, resolve_max_length
from graft.errors import GraftError
from graft.evaluate.fidelity import Fidelity, FidelitySum
from graft.export.base import Target
from graft.export.probe import PROBE, other_ids
from graft.export.registry import target_of
from graft.export.runtimes import Runtime
from graft.files.write import scratch_folder, write_json
from graft.model.load import LoadedModel
from graft.model.subject import build_skeleton
from graft.objectives.registry import OBJECTIVES
from graft.understood import tokenizing

ROWS, TOKENS = 40, 128
"""Held-out rows that are scored, and tokens of each."""
PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 20, 16, 64
"""Golden prompts: held-out rows up to their first target, of so many tokens at least, continued
greedily."""
_CHUNK = 1 << 20


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
    source, rows, texts = _held_out(Path(model), loaded, data)
    compared = _differing(model, path, target, requantize, trust_remote_code, events)
    trained = f"{model}, its adapter not merged," if adapter_names(loaded.model) else str(model)
    if requantize:  # what was rounded is the model that the file is to be
        trained = f"{model}, rounded to INT4 as its export,"
        merge_for_export(loaded, target.name, requantize, events)
    runtime = target.start(path, TOKENS + NEW_TOKENS)
    fidelity = _fidelity(loaded, runtime, rows, events)
    gaps = _gaps(loaded, runtime, rows, events)
    tokenizer, size = loaded.tokenizer, bytes_on_disk(path)
    parameters = build_skeleton(loaded.model.config, trust_remote_code).num_parameters()
    total = sum(len(row.input_ids) for row in rows)
    found = in_words(
        Certificate(
            model=str(model),
            file=str(path),
            target=target.name,
            trained=trained,
            runtime=runtime.program,
            rounds_activations=target.rounds_activations(loaded),
            bytes=size,
            bits_per_weight=round(8 * size / parameters, 3),
            files=compared.files,
            differing_files=tuple(compared.differing),
            text=f"{len(rows)} {source}, {total:,} tokens, {TOKENS} of a row at most",
            fidelity=fidelity,
            equal_texts=sum(gap is None for gap in gaps),
            texts=len(gaps),
            new_tokens=NEW_TOKENS,
            largest_gap=max((gap for gap in gaps if gap is not None), default=0.0),
            tokenizers=_tokenizers(loaded, runtime, texts),
            same_template=runtime.chat_template == tokenizer.chat_template,
            same_stop_tokens=tokenizer.eos_token_id is None
            or tokenizer.eos_token_id in runtime.stop_ids,
            card=compared.card,
            untried=(*compared.untried, *runtime.untried),
        )
    )
    write_json(path.with_name(path.name + ".verify.json"), found.as_json())
    return found


def _held_out(
    model: Path, loaded: LoadedModel, data: str | None
) -> tuple[str, list[Example], list[str]]:
    """Return what they are, held-out rows with their targets, cut, and the texts that those decode
    to."""
    limit = getattr(loaded.model.config, "max_position_embeddings", None)
    source = "held-out rows of the run" if data is None else f"rows of {Path(data).name}"
    if data is not None:
        config = DataConfig(data=data, eos=False)
        encoded = load_examples(data, loaded.tokenizer, config, resolve_max_length(config, limit))
    elif is_run(model):
        run = read_run_config(model)
        if not run.data:
            raise GraftError(f"{model} was adopted, so it has no held-out rows; give --data")
        holds = OBJECTIVES[run.objective].holds
        _, encoded = load_train_and_eval(run, loaded.tokenizer, limit, run.seed, holds=holds)
    else:
        raise GraftError(f"{model} is no run, so it has no held-out rows; give --data")
    length = min(TOKENS, limit or TOKENS)
    cut = (
        dataclasses.replace(row, input_ids=row.input_ids[:length], targets=row.targets[:length])
        for row in (sequences_of(example)[0] for example in encoded.examples)
    )
    rows = list(islice((row for row in cut if any(row.targets)), ROWS))
    if not rows:
        raise GraftError(
            f"no held-out row has a target within its first {length} tokens; give other --data"
        )
    decode = loaded.tokenizer.decode
    with tokenizing():
        texts = [str(decode(row.input_ids, skip_special_tokens=True)) for row in rows]
    return source, rows, texts


def _tokenizers(
    loaded: LoadedModel, runtime: Runtime, texts: Sequence[str]
) -> tuple[TokenizerResult, ...]:
    """Compare each of the runtime's tokenizers with the model's own."""
    return tuple(
        TokenizerResult(
            one.name,
            other_ids((*texts, *PROBE), loaded.tokenizer, one.encode, one.special),
            one.special,
            one.bound,
        )
        for one in runtime.tokenizers
    )


def _prompt(row: Example) -> list[int]:
    return row.input_ids[: max(row.targets.index(True), PROMPT_TOKENS)]


class _Compared(NamedTuple):
    """How files compare with those of a fresh export."""

    files: int
    differing: list[str]
    card: CardState
    untried: tuple[str, ...]


def _differing(
    model: str | Path,
    path: Path,
    target: Target,
    requantize: bool,
    trust_remote_code: bool,
    events: Events,
) -> _Compared:
    """Compare the files with those of a fresh export, which is written beside them."""
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
            return _Compared(1, [] if _equal(fresh, path) else [path.name], card, ())
        names = {
            str(file.relative_to(top))
            for top in (fresh, path)
            for file in top.rglob("*")
            if file.is_file() and file.suffix != ".md"
        }
        optional = target.optional_files()
        untried = sorted(name for name in names if name in optional)
        names -= optional.keys()
        differing = sorted(name for name in names if not _equal(fresh / name, path / name))
        told = tuple(f"{name}: {optional[name]}" for name in untried)
        return _Compared(len(names), differing, card, told)


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
