"""Everything that can be checked before the first training, and the comparison's folder.

OUT/: settings.json, data/ (the split, where --eval-data is not given), runs/NAME/, deployed/NAME/
(while they are scored, or with --keep), results/NAME.json, compare.json, compare.html.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from graft.api.checks import (
    check_solver,
    check_train_config,
    chosen_solver,
    format_description,
)
from graft.api.config import as_plain
from graft.api.run.folder import fingerprint_weights
from graft.comparison.config import CompareConfig
from graft.comparison.contenders import (
    Entry,
    Training,
    entries,
    learning_rates,
    parse_contenders,
    trainings,
)
from graft.data.conversations.named import choose_template
from graft.data.encode import EncodedData, encode_prompt
from graft.data.examples import Example
from graft.data.load import load_train_and_eval
from graft.data.rows import Reading, Row, read_rows
from graft.data.shapes.registry import SHAPES
from graft.data.sources.places import fingerprint
from graft.data.storage.store import facts_of, places_of
from graft.data.templates import placeholder
from graft.errors import GraftError, Problems
from graft.evaluate.scores import missing_scorers, why_no_scorers
from graft.files.read import read_json
from graft.files.write import write_json, write_text
from graft.formats.registry import parse_format
from graft.model.running.checkpointing import check_checkpointing
from graft.model.subject import Subject, open_subject
from graft.model.targets import select_targets
from graft.model.tokens import check_tokens
from graft.text import printable, quoted
from graft.train.schedule import steps_to_train

SETTINGS = "settings.json"
_MAY_CHANGE = ("contenders", "bits", "seeds", "keep", "out", "cache")
_PROMPTS = 32
_SPLIT_SEED = 0
_DEPLOYED = "int"
"""The format that +SOLVER quantises a dense merge to."""


@dataclass(frozen=True)
class Prompt:
    """A held-out prompt to continue."""

    text: str
    """As the row has it, without template or separator."""
    ids: list[int]
    reference: str


@dataclass(frozen=True)
class Prepared:
    """What is known before any weight is read."""

    config: CompareConfig
    """With `data` and `eval_data` as the trainings read them."""
    folder: Path
    """The base model's."""
    entries: list[Entry]
    trainings: list[Training]
    training: EncodedData
    held_out: EncodedData
    steps: int
    prompts: list[Prompt]

    @property
    def out(self) -> Path:
        """The comparison's folder."""
        return Path(self.config.out)


def prepare(config: CompareConfig) -> Prepared:
    """Check everything that can be checked without weights, and make the comparison's folder.

    Raises GraftError with all problems at once, and then nothing has been written.
    """
    problems = Problems()
    wanted = _wanted(config, problems)
    base = _read_base(config, problems)
    data = None if base is None else _read_data(config, base, problems)
    out = Path(config.out)
    with problems.collecting():
        _check_folder(out)
    settings: dict[str, Any] = {}
    if base is not None and data is not None:
        settings = _settings(config, base.folder)
        if data.prompts:
            settings["BLEU and ROUGE-L are scored"] = not missing_scorers()
        with problems.collecting():
            _check_settings(out, settings)
    problems.raise_all("nothing was started")
    assert base is not None and data is not None
    config = _make_folder(config, settings, data)
    runs = trainings(wanted)
    rows = len(data.training.examples)
    return Prepared(
        config=config,
        folder=base.folder,
        entries=wanted,
        trainings=runs,
        training=data.training,
        held_out=data.held_out,
        steps=steps_to_train(runs[0].config(config, config.out), rows) if runs else 0,
        prompts=data.prompts,
    )


def _wanted(config: CompareConfig, problems: Problems) -> list[Entry]:
    """Return the models to deploy, after checking the settings of every training and format."""
    wanted: list[Entry] = []
    problems.found += _bad_numbers(config)
    with problems.collecting():
        learning_rates(config.learning_rates)
    with problems.collecting():
        wanted = entries(parse_contenders(config.contenders), config.bits, config.seeds)
    if not problems.found:
        found = Problems()
        descriptions = [int_format(entry.bits, config) for entry in wanted if entry.bits]
        for training in trainings(wanted):
            run = training.config(config, config.out)
            with found.collecting():
                check_train_config(run)
            with found.collecting():
                description = format_description(run, run.method)
                check_solver(chosen_solver(run, run.method, run.bits), description)
                descriptions += [] if description is None else [description]
        for description in descriptions:
            with found.collecting():
                parse_format(description)
        problems.found += dict.fromkeys(found.found)  # the same for every contender: once
    return wanted


def _read_base(config: CompareConfig, problems: Problems) -> Subject | None:
    with problems.collecting():
        base = open_subject(config.model, config.trust_remote_code)
        _ = base.tokenizer  # one that cannot be read is a problem of the base
        with problems.collecting():
            select_targets(base.skeleton, config.targets)
            check_checkpointing(base.skeleton, config.checkpointing)
        if base.formats:
            problems.found.append(
                f"{base.folder} is quantised already; a comparison quantises in several ways, so "
                "give the unquantised model"
            )
        return base
    return None


@dataclass(frozen=True)
class _Data:
    training: EncodedData
    held_out: EncodedData
    prompts: list[Prompt]


def _read_data(config: CompareConfig, base: Subject, problems: Problems) -> _Data | None:
    with problems.collecting():
        choose_template(base.tokenizer, config.chat_template)
        training, held_out = load_train_and_eval(
            config, base.tokenizer, base.position_limit, _SPLIT_SEED
        )
        check_tokens(base.skeleton, base.tokenizer, training.examples, held_out.examples)
        _check_split(config, training, held_out)
        data = _Data(training, held_out, _prompts(config, held_out, base.tokenizer))
        if config.generate and missing_scorers():  # asked for by name, not by default
            problems.found.append(
                f"--generate {config.generate}: the continuations are scored by BLEU and ROUGE-L; "
                f"{why_no_scorers()}; or leave --generate out to go without these two"
            )
        return data
    return None


def _bad_numbers(config: CompareConfig) -> list[str]:
    least = {"seeds": 1, "batch_size": 1, "max_new_tokens": 1, "generate": 0, "calibration_rows": 1}
    problems = []
    for name, minimum in least.items():
        value = getattr(config, name)
        if value is not None and value < minimum:
            flag = name.replace("_", "-")
            problems.append(f"--{flag} is {value}; expected {minimum} or more")
    if not config.bits:
        problems.append("--bits names no width; give one at least, such as 4")
    return problems


def int_format(bits: int, config: CompareConfig) -> dict[str, Any]:
    """Return the description of the format that deployed models are quantised to."""
    return {"format": _DEPLOYED, "bits": bits, "group_size": config.group_size}


# The held-out prompts -----------------------------------------------------------------------------


def _prompts(
    config: CompareConfig, held_out: EncodedData, tokenizer: PreTrainedTokenizerBase
) -> list[Prompt]:
    """Return the prompts of the first held-out rows; raises GraftError when rows have none."""
    kind, shape = held_out.kind, SHAPES[held_out.kind]
    count = config.generate
    if count is None:
        count = _PROMPTS if shape.continued_by_default else 0
    if count and not shape.has_prompts:
        raise GraftError(
            f"--generate {count}: {kind} rows have no prompt to continue; give rows with prompt "
            "and completion, or leave the flag out"
        )
    rows = _rows(config, held_out.examples[:count])
    return [_prompt(kind, row.fields, tokenizer, config.separator) for row in rows]


def _prompt(
    kind: str, fields: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, separator: str
) -> Prompt:
    row = SHAPES[kind].continuation(fields)
    return Prompt(row.text, encode_prompt(kind, row.fields, tokenizer, separator), row.reference)


def _rows(config: CompareConfig, examples: Sequence[Example]) -> list[Row]:
    """Return the rows that the examples were encoded from."""
    path = config.eval_data or config.data
    rows = {row.where: row for row in read_rows(path, Reading.of(path, config)).rows}
    # A document has an example for each window, and is one row.
    begins = facts_of(examples).windows == 0
    places = zip(places_of(examples), begins, strict=True)
    return [rows[place] for place, begins_row in places if begins_row]


def _check_split(config: CompareConfig, training: EncodedData, held_out: EncodedData) -> None:
    """Raise GraftError where rows of --data cannot be written to one side of the split, whole."""
    parted = set(places_of(training.examples)) & set(places_of(held_out.examples))
    if config.eval_data is None and parted:
        raise GraftError(
            f"{min(parted)} is longer than all that is held out, so that a part of "
            "it would be; a comparison splits whole rows: give --eval-data, or shorter texts"
        )


# The folder ---------------------------------------------------------------------------------------


def _settings(config: CompareConfig, folder: Path) -> dict[str, Any]:
    """Return what every result depends on, as plain JSON values."""
    fields = {field.name for field in dataclasses.fields(CompareConfig)}.difference(_MAY_CHANGE)
    plain = {name: value for name, value in as_plain(config).items() if name in fields}
    files = {"data": config.data, "eval_data": config.eval_data}
    return {
        **plain,
        "the model's weights": fingerprint_weights(folder),
        **{f"the content of {name}": fingerprint(path) for name, path in files.items() if path},
    }


def _check_folder(out: Path) -> None:
    """Raise GraftError when `out` holds something that is no comparison."""
    if not out.exists() or (out / SETTINGS).is_file():
        return
    if out.is_dir() and all(path.name.startswith(".") for path in out.iterdir()):
        return  # nothing, or what a call has left that was killed at its very beginning
    raise GraftError(
        f"{out} exists already and is no comparison; choose another --out or remove it"
    )


def _check_settings(out: Path, settings: Mapping[str, Any]) -> None:
    """Raise GraftError when `out` holds a comparison with other settings."""
    if not (out / SETTINGS).is_file():
        return
    before, now = read_json(out / SETTINGS), json.loads(json.dumps(settings))
    changed = [
        f"{printable(name)[:100]} is {quoted(now.get(name))}, was {quoted(before.get(name))}"
        for name in dict.fromkeys([*before, *now])
        if now.get(name) != before.get(name)
    ]
    if changed:
        raise GraftError(
            f"{out} holds a comparison with other settings ({'; '.join(changed[:10])}); give "
            "the same ones to go on with it, or another --out"
        )


def _make_folder(config: CompareConfig, settings: Mapping[str, Any], data: _Data) -> CompareConfig:
    """Make the folder; return the configuration with the files that the trainings read.

    Without --eval-data the rows are split once and written out: every seed is then scored on the
    same rows, and nothing that calibrates on the training file sees them.
    """
    out = Path(config.out)
    write_json(out / SETTINGS, settings)
    if config.eval_data is None:
        train, held_out = out / "data" / "train.jsonl", out / "data" / "heldout.jsonl"
        _write_rows(train, _rows(config, data.training.examples))
        _write_rows(held_out, _rows(config, data.held_out.examples))
        # What is written has been read, chosen and weighted already.
        config = dataclasses.replace(
            config,
            data=str(train),
            eval_data=str(held_out),
            columns=(),
            data_format=None,
            deduplicate=False,
        )
    return config


def _write_rows(path: Path, rows: Iterable[Row]) -> None:
    lines = (
        json.dumps(dict(row.fields), ensure_ascii=False, default=placeholder) + "\n" for row in rows
    )
    # Half a surrogate pair, which has no UTF-8, as JSON spells it.
    write_text(path, "".join(lines).encode("utf-8", "backslashreplace").decode())
