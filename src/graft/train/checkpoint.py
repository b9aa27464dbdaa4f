"""Checkpoints: everything that a run needs to go on bit for bit, without pickle."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from graft.errors import GraftError, raise_problems
from graft.files.read import open_regular, read_json, typed, unread
from graft.files.write import new_folder, remove_folder, write_json
from graft.model.save import save_tensors
from graft.model.weight_files import WeightFiles
from graft.optimizers.base import OptimizerKind, StateSpec
from graft.train.best import Best
from graft.train.metrics import read_metrics

CHECKPOINT_VERSION = 1
KEPT = 2
"""Checkpoints that are kept; older ones are removed."""

_TENSORS = "state.safetensors"
_STATE = "state.json"
_STATE_DIGEST = "state_sha256"
_RNG, _CUDA_RNG = "rng", "rng.cuda"


@dataclass(frozen=True)
class Position:
    """Where a run stands."""

    step: int
    """Optimizer steps done."""
    sampler: dict[str, int]
    """The data position."""
    metrics: dict[str, float] = field(default_factory=dict)
    """The last metrics; none in checkpoints of earlier versions."""
    best: Best | None = None
    """The best evaluation so far."""
    evaluated: int | None = None
    """The step of the last evaluation that all this knows of; None in those of earlier versions."""


@dataclass(frozen=True)
class _State:
    """What state.json holds."""

    version: int
    step: int
    sampler: dict[str, int]
    metrics: dict[str, float] = field(default_factory=dict)
    best: Best | None = None
    evaluated: int | None = None
    sha256: str | None = None
    """Of the tensors' file; None in checkpoints of earlier versions."""
    state_sha256: str | None = None
    """Of all the fields above, see `_state_digest`; None in those of earlier versions."""


class _VersionError(GraftError):
    """A checkpoint of another version of graft, which is whole but of no use to this one."""


def random_state() -> dict[str, Tensor]:
    """Return the state of the random numbers, by the names that a checkpoint has for it."""
    tensors = {_RNG: torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors[_CUDA_RNG] = torch.cuda.get_rng_state()
    return tensors


def save_checkpoint(
    folder: Path,
    position: Position,
    random: Mapping[str, Tensor],
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    kind: OptimizerKind,
) -> Path:
    """Write checkpoints/step-N, and return it: weights, optimizer and random states, position.

    The newest KEPT up to this step stay; those of later steps, which a run that fell back to an
    older one has left behind, go.
    """
    tensors: dict[str, Tensor] = dict(random)
    for name, parameter in parameters.items():
        tensors[f"parameter.{name}"] = parameter
        for key, value in kind.saved(optimizer.state[parameter]).items():
            tensors[f"optimizer.{key}.{name}"] = value
    path = folder / f"step-{position.step:08d}"
    remove_folder(path)
    with new_folder(path) as part:
        digest = save_tensors(tensors, part / _TENSORS)
        _write_state(part, position, digest)
    keep_newest(path)
    return path


def note_evaluation(folder: Path, position: Position) -> None:
    """Give the checkpoint of a step, at one stroke, what an evaluation has found at it since."""
    path = folder / f"step-{position.step:08d}"
    _write_state(path, position, _read_state(path).sha256)


def _write_state(path: Path, position: Position, digest: str | None) -> None:
    state = asdict(_State(CHECKPOINT_VERSION, **vars(position), sha256=digest))
    write_json(path / _STATE, state | {_STATE_DIGEST: _state_digest(state)})


def _state_digest(state: Mapping[str, Any]) -> str:
    """Return the SHA-256 of what state.json says beside it."""
    said = {name: value for name, value in state.items() if name != _STATE_DIGEST}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def keep_newest(path: Path) -> None:
    """Remove what is left beside a checkpoint and the KEPT - 1 before it."""
    found = checkpoints(path.parent)
    for old in [*found[: max(0, found.index(path) + 1 - KEPT)], *found[found.index(path) + 1 :]]:
        remove_folder(old)


def checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints, oldest first, whether they are whole or not."""
    return sorted(
        (path for path in folder.glob("step-*") if path.name.removeprefix("step-").isdecimal()),
        key=_step_of,
    )


def checkpoint_steps(folder: Path) -> list[int]:
    """Return the steps of the checkpoints, oldest first, whether they are whole or not."""
    return [_step_of(path) for path in checkpoints(folder)]


def newest_whole(folder: Path, up_to: int | None = None) -> tuple[Path | None, list[str]]:
    """Return the newest checkpoint that is whole, and why each newer one is not.

    up_to: the last step of which one can be used. Raises GraftError for one that cannot be read for
    another reason than damage, or that another version of graft wrote.
    """
    damaged: list[str] = []
    for path in reversed(checkpoints(folder)):
        if up_to is not None and _step_of(path) > up_to:
            damaged.append(f"{path}: its base is gone")
            continue
        problem = _damage(path)
        if problem is None:
            return path, damaged
        damaged.append(problem)
    return None, damaged


def read_position(path: Path) -> Position:
    """Return where a checkpoint stands; raises GraftError when it is damaged."""
    state = _read_state(path)
    return Position(state.step, state.sampler, state.metrics, state.best, state.evaluated)


def parameter_shapes(path: Path, ending: str) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a checkpoint's parameters whose names end so, by the name before it."""
    with WeightFiles(path, single_file=_TENSORS) as files:
        return {
            key.removeprefix("parameter.").removesuffix(ending): files.shape(key)
            for key in files
            if key.startswith("parameter.") and key.endswith(ending)
        }


def load_checkpoint(
    path: Path,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    kind: OptimizerKind,
) -> None:
    """Restore parameters, optimizer and random state in place.

    Every tensor is held against what the run expects first, by name, shape and dtype. Raises
    GraftError with all that do not fit, and then nothing is changed.
    """
    trained = {name: p for name, p in parameters.items() if p.requires_grad}
    with WeightFiles(path, single_file=_TENSORS) as files:
        problems = _misfits(files, parameters, trained, kind)
        raise_problems(
            problems[:20],
            f"{path} does not belong to this run, as it is configured (remove it to go on without)",
        )
        random = {name: files.read(name).clone() for name in (_RNG, _CUDA_RNG) if name in files}
        try:
            torch.Generator().set_state(random[_RNG])
        except RuntimeError as error:
            raise GraftError(f"{path}: {_RNG} is no state of random numbers: {error}") from error
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(files.read(f"parameter.{name}"))
            for name, parameter in trained.items():  # others have no state yet
                saved = {
                    state: files.read(f"optimizer.{state}.{name}").clone() for state in kind.states
                }
                optimizer.state[parameter].update(kind.restored(saved, parameter, optimizer))
    torch.set_rng_state(random[_RNG])
    if _CUDA_RNG in random and torch.cuda.is_available():
        torch.cuda.set_rng_state(random[_CUDA_RNG])


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _read_state(path: Path) -> _State:
    state = read_json(path / _STATE)
    version = state.get("version")
    if isinstance(version, int) and version != CHECKPOINT_VERSION:
        raise _VersionError(
            f"{path} has version {version}, and this version of graft reads {CHECKPOINT_VERSION}; "
            "go on with the one that wrote it, or remove it"
        )
    read = typed(state, _State, path / _STATE)
    if read.state_sha256 not in (None, _state_digest(state)):
        raise GraftError(f"{path / _STATE} is not what was written (its SHA-256 is another)")
    return read


def _damage(path: Path) -> str | None:
    """Return in which way a checkpoint is damaged, or None for one that is whole."""
    try:
        state = _read_state(path)
        if state.step != _step_of(path) or state.step < 1:
            return f"{path / _STATE} says step {state.step}"
        if state.sha256 not in (None, _sha256(path / _TENSORS)):
            return f"{path / _TENSORS} is not what was written (its SHA-256 is another)"
        WeightFiles(path, single_file=_TENSORS)
    except _VersionError:
        raise
    except GraftError as error:
        if (cause := unread(error)) is not None:
            raise GraftError(_unread(path, cause)) from error  # it may be whole all the same
        return str(error)
    return None


def _sha256(path: Path) -> str:
    try:
        with open_regular(path) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise GraftError(f"{path} cannot be read: {error.strerror}") from error


def _unread(path: Path, error: OSError) -> str:
    return (
        f"{path} cannot be read: {error.strerror or error}; try again, or remove it to go on from "
        "an older one"
    )


def _misfits(
    files: WeightFiles,
    parameters: Mapping[str, Tensor],
    trained: Mapping[str, Tensor],
    kind: OptimizerKind,
) -> list[str]:
    """Return every tensor that is missing, one too many, or of another shape or dtype."""
    expected = {f"parameter.{name}": _spec(parameter) for name, parameter in parameters.items()}
    for name, parameter in trained.items():
        for state, spec in kind.specs(parameter).items():
            expected[f"optimizer.{state}.{name}"] = spec
    expected |= {name: _spec(tensor) for name, tensor in random_state().items()}
    problems = []
    for name, spec in expected.items():
        if name not in files:
            if name != _CUDA_RNG:  # one that was trained on a CPU may go on on a GPU
                problems.append(_missing(name, kind))
        elif (found := StateSpec(files.shape(name), files.dtype(name))) != spec:
            problems.append(f"{name}: the checkpoint has {_words(found)}, the run {_words(spec)}")
    others = set(files).difference(expected, {_CUDA_RNG})
    return problems + [f"{name} is nothing that the run has" for name in sorted(others)]


def _missing(name: str, kind: OptimizerKind) -> str:
    for state in kind.states:
        if name.startswith(f"optimizer.{state}."):
            parameter = name.removeprefix(f"optimizer.{state}.")
            return f"{parameter}: the checkpoint has no state {state!r}, which {kind.name} needs"
    return f"{name}: the checkpoint has none"


def _spec(tensor: Tensor) -> StateSpec:
    return StateSpec(tuple(tensor.shape), tensor.dtype)


def _words(spec: StateSpec) -> str:
    return f"{str(spec.dtype).removeprefix('torch.')} {list(spec.shape)}"


def kept_metrics(
    file: Path, position: Position, note: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Return the metrics up to a checkpoint, with what it knows itself where they are lost."""
    step, best = position.step, position.best
    known = step if position.evaluated is None else position.evaluated
    kept = [
        entry
        for entry in read_metrics(file)
        if entry["step"] <= (step if "loss" in entry else known)
    ]
    if not any(entry["step"] == step and "loss" in entry for entry in kept):
        note(
            f"{file} is damaged: of the steps up to {step} it has lost some, and the report is "
            "without them"
        )
    evaluations = {} if best is None else {best.step: best.loss}
    if position.evaluated is not None and "eval_loss" in position.metrics:
        evaluations[position.evaluated] = position.metrics["eval_loss"]
    there = {entry["step"] for entry in kept if "eval_loss" in entry}
    kept += [{"step": at, "eval_loss": loss} for at, loss in evaluations.items() if at not in there]
    return sorted(kept, key=lambda entry: entry["step"])
