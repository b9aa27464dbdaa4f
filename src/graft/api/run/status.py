"""How a run stands: status.json, written when it begins, at each checkpoint and at its end.

A run that was killed still says that it is running; no process owns its folder then.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from graft.api.run.layout import STATUS
from graft.errors import GraftError
from graft.files.lock import is_owned
from graft.files.read import read_typed
from graft.files.write import write_json
from graft.text import printable
from graft.train.stop import StoppedError

State = Literal["running", "interrupted", "failed", "finished"]
_LONGEST = 500
"""Characters of an error that are kept."""


@dataclass(frozen=True)
class Part:
    """One call that worked on a run."""

    since: str
    seconds: float
    """Until its end, or until its last checkpoint where it was killed."""
    first_step: int
    last_step: int


@dataclass(frozen=True)
class RunStatus:
    """What status.json holds; times are of ISO 8601, in UTC."""

    state: State
    step: int
    """Steps that --resume goes on from, or that a finished run has."""
    steps: int
    """Steps that it is to have."""
    since: str
    until: str | None = None
    """When it ended; None while it runs."""
    error: str | None = None
    """Why it failed, in short."""
    failed_rows: tuple[str, ...] = ()
    """Where the rows stand whose loss or gradient was not finite: 'file:line'."""
    parts: tuple[Part, ...] = ()

    @property
    def seconds(self) -> float:
        """The time of all parts."""
        return sum(part.seconds for part in self.parts)

    def words(self) -> str:
        """Return what has become of the run, that no process owns, as in 'a run that ...'."""
        place = f"step {self.step} of {self.steps}"
        match self.state:
            case "running":
                return f"was killed, with its last checkpoint at {place}"
            case "interrupted":
                return f"was interrupted at {place} ({self.until})"
            case "failed":
                return f"failed, with its last checkpoint at {place}: {printable(self.error or '')}"
        return f"finished {self.step} steps ({self.until})"


def read_status(run: Path) -> RunStatus | None:
    """Return a run's status; None where there is none, as in folders of earlier versions.

    Raises GraftError when it is damaged.
    """
    return read_typed(run / STATUS, RunStatus) if (run / STATUS).is_file() else None


def resume_command(run: str | Path, trust_remote_code: bool = False) -> str:
    """Return the command that goes on with a run."""
    trust = " --trust-remote-code" if trust_remote_code else ""
    return f"graft train --resume --out {shlex.quote(str(run))}{trust}"


def unfinished(run: Path) -> str:
    """Return what a message says of a run that has no result: its status, and how to go on."""
    return f"{run} is a run that {_words(run)}; go on with: {resume_command(run)}"


def taken(run: Path) -> str:
    """Return what a message says of a run that lies where a new one was to be made."""
    return (
        f"{run} exists already, a run that {_words(run)}; go on with: {resume_command(run)}, or "
        "choose another --out"
    )


def _words(run: Path) -> str:
    if is_owned(run):
        return "is being worked on by another process"
    with suppress(GraftError):  # without a status it can be gone on with all the same
        status = read_status(run)
        if status is not None:
            return status.words()
    return "says nothing of how it stands"


class StatusFile:
    """Keeps a run's status.json true while this process works on it."""

    def __init__(self, run: Path, steps: int, begin: float, anew: bool) -> None:
        """Go on with the status that is there, or begin one; `begin` is of time.perf_counter."""
        self.run, self.steps, self.begin = run, steps, begin
        before = None
        if not anew:
            with suppress(GraftError):  # a damaged one costs the time of the parts before
                before = read_status(run)
        self.before = () if before is None else before.parts
        self.since = _now() if before is None else before.since
        self.part_since = _now()
        self.first_step = self.step = 0

    @property
    def seconds(self) -> float:
        """The time of all parts until now."""
        return self._status("running").seconds

    def begins(self, done: int) -> None:
        """Write that a part begins, after so many steps."""
        self.first_step, self.step = done + 1, done
        self._write("running")

    def saved(self, step: int) -> None:
        """Write that there is a checkpoint."""
        self.step = step
        self._write("running")

    def finished(self, step: int) -> None:
        """Write that the result is there, after so many steps."""
        self.step = step
        self._write("finished")

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Write how the block ended when it did not come to its end."""
        try:
            yield
        except Exception as error:
            state: State = "interrupted" if isinstance(error, StoppedError) else "failed"
            self._ended(state, error, getattr(error, "rows", ()))
            raise
        except BaseException as error:
            self._ended("interrupted", error)
            raise

    def _ended(self, state: State, error: BaseException, rows: Sequence[str] = ()) -> None:
        text = str(error) if isinstance(error, GraftError) else f"{type(error).__name__}: {error}"
        with suppress(GraftError):  # what ended it is told, and may be why this cannot be written
            if self.run.is_dir():  # and not taken away, as nothing had begun
                self._write(state, text[:_LONGEST] if state == "failed" else None, rows)

    def _write(self, state: State, error: str | None = None, rows: Sequence[str] = ()) -> None:
        write_json(self.run / STATUS, asdict(self._status(state, error, rows)))

    def _status(
        self, state: State, error: str | None = None, rows: Sequence[str] = ()
    ) -> RunStatus:
        seconds = time.perf_counter() - self.begin
        part = Part(self.part_since, seconds, self.first_step, self.step)
        return RunStatus(
            state=state,
            step=self.step,
            steps=self.steps,
            since=self.since,
            until=None if state == "running" else _now(),
            error=error,
            failed_rows=tuple(rows),
            parts=(*self.before, part),
        )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
