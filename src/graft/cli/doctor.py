"""What `graft doctor` shows."""

from __future__ import annotations

from typing import Any

from graft.api.doctor import Diagnosis


def show_diagnosis(diagnosis: Diagnosis) -> None:
    """Print each section with its facts; what is not known, or not so, is a dash."""
    for section, facts in diagnosis.items():
        print(section)
        width = max(len(_label(name)) for name in facts)
        for name, value in facts.items():
            print(f"  {_label(name):<{width}}  {_text(name, value)}")
        print()


def _label(name: str) -> str:
    return name.removesuffix(" bytes").removesuffix(",")


def _text(name: str, value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return ", ".join(f"{_label(key)} {_text(key, part)}" for key, part in value.items())
    if isinstance(value, list):
        return " ".join(str(part) for part in value)
    return f"{value / 2**30:,.1f} GiB" if name.endswith(" bytes") else str(value)
