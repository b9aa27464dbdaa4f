"""What the registry keeps of a format."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from graft.formats.base import WeightFormat


def _plainly(weight_format: WeightFormat, settings: Mapping[str, str]) -> dict[str, Any]:
    options = weight_format.options()
    kept = {setting: options[option] for setting, option in settings.items() if option in options}
    return {"format": weight_format.name, **kept}


@dataclass(frozen=True)
class FormatEntry:
    """How a format is made, and which settings of a run it takes."""

    make: Callable[..., WeightFormat]
    """Takes the options that `WeightFormat.options` gives."""
    settings: Mapping[str, str] = field(default_factory=dict)
    """The fields of `FormatConfig` that mean something to it, each with the option that it sets."""
    as_settings: Callable[[Any, Mapping[str, str]], dict[str, Any]] = _plainly
    """The settings that ask for a format, from the format and `settings`."""
