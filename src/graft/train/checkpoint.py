"""Checkpoints: everything that a run needs to go on bit for bit, without pickle."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from graft.errors import GraftError, raise_problems
from graft.files.read import read_json
from graft.files.write import new_folder, write_json
from graft.model.save import save_tensors
from graft.model.weight_files import WeightFiles
from graft.optimizers.base import OptimizerKind

CHECKPOINT_VERSION = 1
KEPT = 2
"""Checkpoints that are kept; older ones are removed."""


@dataclass
class Position:
    """Where a run stands."""

    step: int
    """Optimizer steps done."""
    sampler: dict[str, int]
    """The data position."""


def save_checkpoint(
    folder: Path,
    position: Position,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    kind: OptimizerKind,
) -> None:
    """Write checkpoints/step-N: weights, optimizer states, random state and data position."""
    tensors: dict[str, torch.Tensor] = {"rng": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["rng.cuda"] = torch.cuda.get_rng_state()
    for name, parameter in parameters.items():
        tensors[f"parameter.{name}"] = parameter
        for key, value in kind.saved(optimizer.state[parameter]).items():
            tensors[f"optimizer.{key}.{name}"] = value
    path = folder / f"step-{position.step:08d}"
    if path.exists():
        shutil.rmtree(path)
    with new_folder(path) as part:
        save_tensors(tensors, part / "state.safetensors")
        state = {"version": CHECKPOINT_VERSION, "step": position.step, "sampler": position.sampler}
        write_json(part / "state.json", state)
    for old in checkpoints(folder)[:-KEPT]:
        shutil.rmtree(old)


def checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints, oldest first."""
    return sorted(path for path in folder.glob("step-*") if (path / "state.json").is_file())


def checkpoint_step(path: Path) -> int:
    """Return the number of optimizer steps done at a checkpoint."""
    return int(read_json(path / "state.json")["step"])


def load_checkpoint(
    path: Path,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    kind: OptimizerKind,
) -> Position:
    """Restore parameters, optimizer and random state in place; return the position.

    Raises GraftError when the checkpoint is damaged or belongs to another model, method or
    optimizer.
    """
    state = read_json(path / "state.json")
    if state.get("version") != CHECKPOINT_VERSION:
        raise GraftError(f"{path} has version {state.get('version')!r}; start the run anew")
    with WeightFiles(path, single_file="state.safetensors") as files:
        problems = [
            f"{name}: the checkpoint has {_shape(files, name)}, the run {list(parameter.shape)}"
            for name, parameter in parameters.items()
            if _shape(files, name) != list(parameter.shape)
        ]
        trained = {name: p for name, p in parameters.items() if p.requires_grad}
        problems += [
            f"{name}: the checkpoint has no state {state!r}, which {kind.name} needs"
            for name in trained
            for state in kind.states
            if f"optimizer.{state}.{name}" not in files
        ]
        raise_problems(problems[:20], f"{path} does not belong to this run")
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(files.read(f"parameter.{name}"))
            for name, parameter in trained.items():  # others have no state yet
                saved = {
                    state: files.read(f"optimizer.{state}.{name}").clone() for state in kind.states
                }
                optimizer.state[parameter].update(kind.restored(saved, parameter, optimizer))
        torch.set_rng_state(files.read("rng").clone())
        if "rng.cuda" in files and torch.cuda.is_available():
            torch.cuda.set_rng_state(files.read("rng.cuda").clone())
    return Position(int(state["step"]), {key: int(n) for key, n in state["sampler"].items()})


def _shape(files: WeightFiles, name: str) -> list[int] | None:
    key = f"parameter.{name}"
    return list(files.shape(key)) if key in files else None
