"""`graft verify`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from graft.cli.command import Command
from graft.cli.fields import Positional
from graft.cli.show import show, show_json
from graft.errors import raise_problems
from graft.model.config import TrustConfig

if TYPE_CHECKING:
    from graft.api.certificate import Certificate


@dataclass(frozen=True, kw_only=True)
class VerifyArguments(TrustConfig):
    """The exported file, and what it was exported from."""

    model: Positional
    """The run or model folder that was exported."""
    file: Positional
    """The file or folder that `graft export` wrote, to any target that runs by itself."""
    data: str | None = None
    """Held-out examples to compare on; by default those of the run."""
    requantize: bool = False
    """Whether the export was asked to round a lora or qlora run."""
    json: bool = False
    """Print one JSON object instead of text."""


def verify(arguments: VerifyArguments) -> None:
    """Load an exported file in its own runtime, and compare it with the model that was trained.

    Raises GraftError where a bound is missed.
    """
    from graft.api.verify import verify as run
    from graft.cli.progress import progress

    with progress() as events:
        found = run(
            arguments.model,
            arguments.file,
            data=arguments.data,
            requantize=arguments.requantize,
            trust_remote_code=arguments.trust_remote_code,
            events=events,
        )
    if arguments.json:
        show_json(found.as_json())
    else:
        for name, value in _lines(found):
            show(f"{name:<16}{value}")
    raise_problems(found.problems, f"{found.file} is not verified")


def _lines(found: Certificate) -> Iterator[tuple[str, str]]:
    yield "file", f"{found.file} ({found.target})"
    yield "size", f"{found.bytes:,} bytes, {found.bits_per_weight:.2f} bits per weight in all"
    for sentence in found.compared:
        what, _, rest = sentence.partition(": ")
        yield what, rest
    for name in found.not_compared:
        yield "not compared", name
    yield "verdict", "the file is the trained model" if found.passed else "not verified"


COMMAND = Command(arguments=VerifyArguments, run=verify)
