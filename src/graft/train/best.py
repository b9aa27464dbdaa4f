"""The best evaluation of a training: its parameters are kept, and patience counts from it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from graft.errors import GraftError
from graft.files.digest import check_digest
from graft.files.read import read_typed
from graft.files.write import new_folder, remove_folder, write_json
from graft.model.save import save_tensors
from graft.model.weight_files import WeightFiles

BEST = "best"
_TENSORS = "parameters.safetensors"
_STATE = "state.json"


@dataclass(frozen=True)
class Best:
    """Which evaluation was the best so far; a checkpoint holds it."""

    step: int
    loss: float
    """Held-out."""
    improved: float
    """The loss that the next improvement is measured against."""
    waited: int = 0
    """Evaluations since that one, without an improvement by more than the least one."""


@dataclass(frozen=True)
class _Kept:
    """What lies beside the parameters of a step."""

    step: int
    sha256: str


class BestParameters:
    """Keeps what was trained at the best evaluation so far, in best/step-N of a run's folder.

    An older best stays as long as a checkpoint needs it, so that a run that goes on from any of
    them ends as the unbroken one. The last step's are not written: they are there.
    """

    def __init__(
        self,
        folder: Path,
        parameters: Mapping[str, nn.Parameter],
        *,
        writes: bool = True,
        first: int = 1,
        patience: int | None = None,
        min_improvement: float = 0.0,
    ) -> None:
        """Begin without any.

        writes: whether parameters are kept, or only figures. first: the first step that counts.
        patience: evaluations without an improvement after which it is `exhausted`.
        """
        self.folder, self.parameters, self.writes = folder, parameters, writes
        self.first, self.patience, self.min_improvement = first, patience, min_improvement
        self.state: Best | None = None

    @property
    def exhausted(self) -> bool:
        """Whether there were as many evaluations without an improvement as patience allows."""
        waited = 0 if self.state is None else self.state.waited
        return self.patience is not None and waited >= self.patience

    def evaluated(self, step: int, loss: float, last: bool) -> None:
        """Take note of an evaluation; last: no step follows."""
        if step < self.first or (self.state is None and not math.isfinite(loss)):
            return
        before = self.state or Best(step, math.inf, math.inf)
        better, improves = loss < before.loss, loss < before.improved - self.min_improvement
        if better and self.writes and not last:
            self._write(step)
        self.state = Best(
            step=step if better else before.step,
            loss=loss if better else before.loss,
            improved=loss if improves else before.improved,
            waited=0 if improves else before.waited + 1,
        )

    def restore(self, state: Best | None, step: int, last: bool = False) -> str | None:
        """Go on from a checkpoint of a step; return what to say where its best is not there.

        What was kept after that step goes. The best may be the step itself, which was the last one
        then. last: no step follows now either.
        """
        for later in self._steps():
            if later > step:
                remove_folder(self._path(later))
        self.state = state
        if state is None or not self.writes:
            return None
        if state.step == step:
            if not last and step not in self._steps():
                self._write(step)
        elif state.step not in self._steps():
            self.state = None
            return (
                f"the parameters of step {state.step}, the best so far, are not in {self.folder}; "
                "from here on the best of what follows is kept"
            )
        return None

    def sweep(self, checkpoints: Sequence[int]) -> None:
        """Remove what neither this run needs nor one that goes on from one of the checkpoints.

        Each best is better than those before it, so a checkpoint needs the last one up to its step.
        """
        steps = self._steps()
        needed = {max((step for step in steps if step <= at), default=0) for at in checkpoints}
        for step in steps[:-1]:
            if step not in needed:
                remove_folder(self._path(step))

    def recall(self, done: int) -> int:
        """Put the best parameters in place, after `done` steps, and return their step.

        Raises GraftError when the file is damaged.
        """
        state = self.state
        if state is None or not self.writes or state.step == done:
            return done
        path = self._path(state.step)
        try:
            self._read(path, state.step)
        except (GraftError, OSError) as error:
            raise GraftError(
                f"the best parameters cannot be read: {error}; go on with --resume --keep last to "
                "have those of the last step"
            ) from error
        return state.step

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def _steps(self) -> list[int]:
        """Return the steps whose parameters are there, the oldest first."""
        names = [path.name.removeprefix("step-") for path in self.folder.glob("step-*")]
        return sorted(int(name) for name in names if name.isdecimal())

    def _write(self, step: int) -> None:
        path = self._path(step)
        remove_folder(path)
        with new_folder(path) as part:
            digest = save_tensors(dict(self.parameters), part / _TENSORS)
            write_json(part / _STATE, asdict(_Kept(step, digest)))

    def _read(self, path: Path, step: int) -> None:
        kept = read_typed(path / _STATE, _Kept)
        if kept.step != step:
            raise GraftError(f"{path / _STATE} says step {kept.step}")
        check_digest(path / _TENSORS, kept.sha256)
        with WeightFiles(path, single_file=_TENSORS) as files:
            found = {name: (files.shape(name), files.dtype(name)) for name in files}
            if found != {name: _kind(parameter) for name, parameter in self.parameters.items()}:
                raise GraftError(f"{path} holds other parameters than this run trains")
            with torch.no_grad():
                for name, parameter in self.parameters.items():
                    parameter.copy_(files.read(name))


def _kind(tensor: Tensor) -> tuple[tuple[int, ...], torch.dtype]:
    return tuple(tensor.shape), tensor.dtype
