"""`graft doctor`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from graft.cli.command import Command
from graft.cli.show import show, show_json


@dataclass(frozen=True, kw_only=True)
class DoctorArguments:
    """How to say it."""

    json: bool = False
    """Print one JSON object instead of text."""


def doctor(arguments: DoctorArguments) -> None:
    """Say which kernels compute here and why the others do not; processor, memory, versions."""
    from graft.api.doctor import diagnose

    diagnosis = diagnose()
    if arguments.json:
        show_json(diagnosis)
        return
    for section, facts in diagnosis.items():
        show(section)
        width = max(len(_label(name)) for name in facts)
        for name, value in facts.items():
            show(f"  {_label(name):<{width}}  {_text(name, value)}")
        show()


def _label(name: str) -> str:
    return name.removesuffix(" bytes").removesuffix(",")


def _text(name: str, value: Any) -> str:
    """Return a fact as text; what is not known, or not so, is a dash."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return ", ".join(f"{_label(key)} {_text(key, part)}" for key, part in value.items())
    if isinstance(value, list):
        return " ".join(str(part) for part in value)
    return f"{value / 2**30:,.1f} GiB" if name.endswith(" bytes") else str(value)


COMMAND = Command(arguments=DoctorArguments, run=doctor)
