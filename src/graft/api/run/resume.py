"""Going on with a run: with the settings and inputs that it was begun with, from what is whole."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from graft.adapters.registry import METHODS, method_of, settings_of
from graft.adapters.starts.registry import STARTS
from graft.api.config import TrainConfig, as_plain
from graft.api.events import Events
from graft.api.run.base import base_is_whole
from graft.api.run.folder import (
    PromptStyle,
    fingerprint_tokenizer,
    fingerprint_weights,
    is_run,
    read_base_reference,
    read_run_config,
    write_base_reference,
    write_prompt_style,
)
from graft.api.run.layout import (
    ADAPTER,
    BASE,
    BASE_REFERENCE,
    CHECKPOINTS,
    CONFIG,
    FAILED_BATCH,
    INPUTS,
    METRICS,
    MODEL,
    PARTS,
    PLOTS,
    REPORT,
    REPORT_TEXT,
    SKIPPED,
    START,
    STATUS,
    WATCHED,
)
from graft.api.run.prepare import Prepared
from graft.api.run.report import RunReport
from graft.api.run.status import read_status
from graft.data.sources.places import fingerprint
from graft.errors import GraftError, raise_problems
from graft.files.lock import LOCK, owned
from graft.files.read import passing_damage, read_bytes, read_typed, read_yaml
from graft.files.write import new_folder, remove_folder, sweep, write_json, write_text, write_yaml
from graft.model.adapter_files import check_adapter_file
from graft.model.peft_files import PEFT_WEIGHTS
from graft.model.weight_files import WeightFiles
from graft.text import printable, quoted
from graft.train.checkpoint import newest_whole, read_position

_RESULTS = (ADAPTER, MODEL, REPORT, REPORT_TEXT, PLOTS)

_MAY_CHANGE = (
    *("export", "eval_every", "eval_epochs", "save_every", "save_minutes", "checkpoints"),
    *("keep", "patience", "min_improvement", "samples", "track"),
    *("checkpointing", "device", "trust_remote_code", "cache"),
)
"""Settings that a resumed run need not share with the part before."""
_LOOKED_AT = ("out", "resume", "steps", "epochs")
"""Settings that are compared by more than their value."""
_FINGERPRINTED = ("data", "eval_data", "model")
"""Settings that are compared by the content of what they name, where it is known."""


@dataclass(frozen=True)
class RunInputs:
    """What a run was begun with, by its SHA-256."""

    data: str
    eval_data: str | None
    model: str
    """See `fingerprint_weights`."""
    tokenizer: dict[str, str] | None = None
    """See `fingerprint_tokenizer`; None in those of earlier versions."""
    teacher: str | None = None
    """See `fingerprint_weights`; None without a teacher, and in those of earlier versions."""


@dataclass(frozen=True)
class Resumed:
    """A run's folder as it is found."""

    config: TrainConfig
    """The settings to go on with."""
    stored: TrainConfig | None
    """Those of the part before; None where they are lost, and those that were given hold."""
    checkpoint: Path | None
    """What to go on from; None begins anew."""
    step: int
    """Steps done there."""
    dense_steps: int | None
    """After which step the weights were rounded, if they were; see `Prepared`."""
    unrounded: int = 0
    """Steps done there, where the method rounds the weights and has not yet."""


@contextmanager
def owned_run(run: Path) -> Iterator[None]:
    """Own the folder of a run or of a comparison, and clear away what killed writers left there.

    Runs that lie in it are left to whoever owns them.
    """
    with owned(run):
        for folder, inner, _ in os.walk(run):
            sweep(Path(folder))
            inner[:] = [name for name in inner if not is_run(Path(folder, name))]
        yield


def begin_run(run: Path, prepared: Prepared) -> None:
    """Make a run's folder whole: resolved configuration, prompt style, inputs, status."""
    with new_folder(run) as part:
        _write_beginning(part, prepared)


def read_stored(run: Path) -> TrainConfig | None:
    """Return the settings of the run in a folder, or None where they are lost or damaged.

    Raises GraftError when they are those of another version of graft.
    """
    if not (run / CONFIG).is_file():
        return None
    read_bytes(run / CONFIG)  # that it cannot be read is no damage
    try:
        read_yaml(run / CONFIG)
    except GraftError:
        return None
    return read_run_config(run)


def merged_settings(config: TrainConfig, stored: TrainConfig, run: Path) -> TrainConfig:
    """Return the settings to go on with; raises GraftError with those that contradict the run's."""
    if not stored.data:
        raise GraftError(f"--resume: {run} was adopted, not trained, and has nothing to go on from")
    looked_at = (*_LOOKED_AT, *_FINGERPRINTED) if _read_inputs(run) else _LOOKED_AT
    wanted, begun = (dataclasses.replace(one, **_method_fields(one)) for one in (config, stored))
    problems = [
        f"{field.name} is {quoted(given)}, the run was begun with {quoted(before)}"
        for field in dataclasses.fields(TrainConfig)
        if field.name not in (*_MAY_CHANGE, *looked_at)
        and (given := getattr(wanted, field.name)) is not None
        and (field.name, given) != ("batching", "auto")
        and given != (before := getattr(begun, field.name))
    ]
    steps, epochs = config.steps, config.epochs
    if epochs is not None and steps not in (None, stored.steps):
        problems.append("steps and epochs are both given; give one of them")
    raise_problems(problems, "--resume goes on with the same settings")
    if stored.steps is None:
        raise GraftError(f"{run / CONFIG} says no steps; it is not the file that graft wrote")
    changes = {name: getattr(config, name) for name in _MAY_CHANGE}
    changes["export"] = tuple(dict.fromkeys((*stored.export, *config.export)))
    changed = {name: value for name, value in changes.items() if value not in (None, "auto")}
    # One of the two takes the other's place.
    if config.eval_epochs not in (None, stored.eval_epochs):
        changed["eval_every"] = None
    elif config.eval_every not in (None, stored.eval_every):
        changed["eval_epochs"] = None
    return dataclasses.replace(
        stored,
        **changed,
        model=config.model,
        data=config.data,
        eval_data=config.eval_data or stored.eval_data,
        steps=None if epochs is not None else steps or stored.steps,
        epochs=epochs,
        out=config.out,
        resume=True,
    )


def _method_fields(config: TrainConfig) -> dict[str, Any]:
    """Return the fields that say the method, in the one way of several that there may be."""
    return {} if METHODS.problem(config.method) else settings_of(method_of(config))


def find_place(config: TrainConfig, stored: TrainConfig, run: Path, events: Events) -> Resumed:
    """Return where the run goes on: from its newest checkpoint that is whole, or else anew.

    config: what `merged_settings` gave. Raises GraftError when what it has cannot be read.
    """
    assert stored.steps is not None, "merged_settings checks it"
    dense = method_of(stored).dense_steps(stored, stored.steps)
    whole = base_is_whole(run)
    if not whole and (run / BASE).is_dir():
        events.note(f"{run / BASE} is damaged, and is made anew")
    rounded_base = whole or not dense
    checkpoint, damaged = newest_whole(run / CHECKPOINTS, None if rounded_base else dense)
    for problem in damaged:
        events.note(f"a checkpoint cannot be used: {problem}")
    if checkpoint is None:
        if has_finished(run):
            raise GraftError(
                f"{run} has finished, and has no checkpoint to go on from; use it as it is, or "
                "train anew with another --out"
            )
        events.note(f"{run} has no checkpoint to go on from: the run is begun anew")
        return Resumed(config, stored, None, 0, None)
    step = read_position(checkpoint).step
    events.note(f"going on from {checkpoint}")
    if step <= dense:
        return Resumed(config, stored, checkpoint, step, None, unrounded=step)
    return Resumed(config, stored, checkpoint, step, dense)


def lost_run(config: TrainConfig, run: Path, events: Events) -> Resumed:
    """Return how to begin anew in a folder without a configuration; raises GraftError where it
    holds what is no part of a run."""
    others = sorted(path.name for path in run.iterdir() if path.name not in (*PARTS, LOCK))
    if others:
        raise GraftError(
            f"--resume: {run} is no run folder (it has no {CONFIG}, but {others[0]}); choose "
            "another --out"
        )
    events.note(f"{run} has no {CONFIG} that can be read: the run is begun anew")
    return Resumed(config, None, None, 0, None)


def has_finished(run: Path) -> bool:
    """Return whether a run has its result, its report, and all that belongs to them."""
    return _has_result(run) and _says_finished(run)


def finished_report(run: Path, keep: str, steps: int | None) -> RunReport | None:
    """Return the report of a run that has finished so many steps, result and all, or None.

    One that ended early may have been given more patience, and one that kept other parameters has
    another result: both are taken up again.
    """
    if not has_finished(run):
        return None
    with passing_damage():  # from an earlier version, say: it is made anew where that can be
        report = read_typed(run / REPORT, RunReport)
        whole = report.steps == report.steps_done == steps and report.keep == keep
        return report if whole else None
    return None


def settle(run: Path, prepared: Prepared, resumed: Resumed, events: Events) -> None:
    """Make the folder that of the part that begins; before that, raise what speaks against it.

    At every moment of it the run can be resumed again.
    """
    stored, step = resumed.stored, resumed.step
    _check_inputs(run, prepared)
    if prepared.steps < step:
        raise GraftError(
            f"--resume: {run} has done {step} steps; {prepared.steps} are fewer. Give more, or "
            "train anew with another --out"
        )
    if prepared.dense_steps >= prepared.steps:
        raise GraftError(
            f"--resume: {run} has done {step} steps before its weights are rounded, and of "
            f"{prepared.steps} none would be left after that. Give more, or train anew with "
            "another --out"
        )
    if stored is not None and step and prepared.steps != stored.steps:
        events.note(
            f"{prepared.steps} steps instead of {stored.steps}: from step {step + 1} on the "
            "learning rate follows the schedule of all of them"
        )
    if resumed.checkpoint is None:
        # Where the settings are lost, nothing says with which the base was made.
        _clear(run, keep_base=stored is not None and _serves_again(run, prepared))
        _write_beginning(run, prepared)
        return
    if prepared.dense_steps and step <= prepared.dense_steps:  # it is rounded again, from there on
        for name in (*_RESULTS, BASE_REFERENCE, BASE):
            remove_folder(run / name)
    base = prepared.subject.folder
    stays = (run / BASE_REFERENCE).is_file() and not (run / BASE).is_dir()
    if _read_inputs(run) and stays:
        # The same weights, perhaps in another place.
        write_base_reference(run, base, read_base_reference(run).parted)
    _write_beginning(run, prepared)


def as_settings(config: TrainConfig) -> dict[str, object]:
    """Return what config.yaml holds of a resolved configuration."""
    settings = as_plain(config)
    del settings["resume"]
    return settings


def _write_beginning(folder: Path, prepared: Prepared) -> None:
    """Write what a run begins with, its configuration last: with that it is a run's folder."""
    config = prepared.config
    chosen = config.chat_template and prepared.subject.tokenizer.chat_template
    style = PromptStyle(prepared.training.kind, config.separator, chosen)
    write_prompt_style(folder, style)
    write_json(folder / INPUTS, asdict(_inputs(prepared)))
    both = (prepared.training.skipped, prepared.held_out.skipped)
    if skipped := "".join(dict.fromkeys(one.lines() for one in both if one is not None)):
        write_text(folder / SKIPPED, skipped)
    write_yaml(folder / CONFIG, as_settings(config))


def _inputs(prepared: Prepared) -> RunInputs:
    config, teacher = prepared.config, prepared.teacher
    return RunInputs(
        data=fingerprint(config.data),
        eval_data=None if config.eval_data is None else fingerprint(config.eval_data),
        model=fingerprint_weights(prepared.subject.folder),
        tokenizer=fingerprint_tokenizer(prepared.subject.folder),
        teacher=None if teacher is None else fingerprint_weights(teacher.folder),
    )


def _read_inputs(run: Path) -> RunInputs | None:
    """Return what a run was begun with; None where that is lost, or was never written."""
    if (run / INPUTS).is_file():
        with passing_damage():
            return read_typed(run / INPUTS, RunInputs)
    return None


def _check_inputs(run: Path, prepared: Prepared) -> None:
    """Raise GraftError with every input that is not what the run was begun with."""
    if (before := _read_inputs(run)) is None:
        return
    now, config = _inputs(prepared), prepared.config
    problems = [
        _another(name, getattr(config, name), getattr(before, name), getattr(now, name))
        for name in _FINGERPRINTED
        if getattr(before, name) != getattr(now, name)
    ]
    if before.teacher is not None and before.teacher != now.teacher:
        problems.append(_another("teacher", str(config.teacher), before.teacher, now.teacher))
    if before.tokenizer is not None and now.tokenizer is not None:
        differing = before.tokenizer.items() ^ now.tokenizer.items()
        if names := ", ".join(sorted({printable(name) for name, _ in differing})):
            its = f"{config.model} has not the tokenizer that the run was begun with"
            problems.append(f"{its}: {names} changed")
    raise_problems(problems, _SAME.format(run=run))


def check_finished_inputs(run: Path, config: TrainConfig) -> None:
    """Raise GraftError when the data of a run that has finished are there, and are others now."""
    if (before := _read_inputs(run)) is None:
        return
    problems = []
    for name in ("data", "eval_data"):
        path, then = getattr(config, name), getattr(before, name)
        if path is None or then is None or not Path(path).exists():
            continue
        if (now := fingerprint(path)) != then:
            problems.append(_another(name, path, then, now))
    raise_problems(problems, _SAME.format(run=run))


_SAME = "--resume: {run} goes on with the same inputs, or is begun in another --out"


def _another(name: str, path: str, then: str | None, now: str | None) -> str:
    return (
        f"{path} is not the {name.replace('_', '-')} that the run was begun with: its SHA-256 is "
        f"{now or 'none'}, and was {then or 'none'}"
    )


def _serves_again(run: Path, prepared: Prepared) -> bool:
    """Return whether the base that is there is the one that the run would begin with."""
    begins_rounded = not prepared.dense_steps and not STARTS[prepared.config.init].changes_base
    return begins_rounded and base_is_whole(run)


def _clear(run: Path, keep_base: bool) -> None:
    bases = () if keep_base else (BASE_REFERENCE, BASE)
    for name in (*_RESULTS, START, *bases, METRICS, STATUS, CHECKPOINTS, FAILED_BATCH, *WATCHED):
        remove_folder(run / name)


def _has_result(run: Path) -> bool:
    """Return whether what was trained lies there, in files that can be read."""
    with passing_damage():
        if (run / MODEL).is_dir():
            WeightFiles(run / MODEL)
        else:
            check_adapter_file(run / ADAPTER)
            WeightFiles(run / ADAPTER, single_file=PEFT_WEIGHTS)
        return True
    return False


def _says_finished(run: Path) -> bool:
    with passing_damage():
        status = read_status(run)
        if status is not None:
            return status.state == "finished"
    return (run / REPORT).is_file()  # where no status is left
