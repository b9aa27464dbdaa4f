"""The formats by name, and how a name and its options become a format."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from graft.entries import Entries, Listed
from graft.errors import GraftError
from graft.text import quoted, reason

if TYPE_CHECKING:
    from graft.formats.base import WeightFormat
    from graft.formats.entry import FormatEntry

FORMATS: Entries[FormatEntry] = Entries(
    "weight format",
    {
        "dense": Listed("graft.formats.dense:DENSE", "the weights as they are"),
        "nf4": Listed("graft.formats.codebook:NF4", "4-bit NormalFloat, blocks of 64"),
        "fp4": Listed("graft.formats.codebook:FP4", "4-bit floats, blocks of 64"),
        "int8": Listed("graft.formats.int8:INT8", "8 bits, one scale per output row"),
        "int": Listed("graft.formats.int_group:INT", "group-wise integers with float offsets"),
        "latent": Listed(
            "graft.formats.latent:LATENT", "int, rounded anew from the weight kept beside it"
        ),
    },
)


AS_IT_IS = "dense"
"""The format of a weight that nothing quantises, and what no format asked for means."""


def make_format(name: str, options: Mapping[str, Any] | None = None) -> WeightFormat:
    """Return the format `name` with its options.

    Raises GraftError for an unknown name or for options that the format refuses.
    """
    make, options = FORMATS[name].make, options or {}
    try:
        kinds = {key: type(value) for key, value in make().options().items()}
        for key, value in options.items():
            if key in kinds and type(value) is not kinds[key]:  # to Python 4.0 is 4, and True is 1
                raise TypeError(f"{key} is {quoted(value)}; expected {kinds[key].__name__}")
        return make(**options)
    except (TypeError, ValueError, RecursionError) as error:
        raise GraftError(f"weight format {name!r}: {reason(error)}") from error


def describe_format(weight_format: WeightFormat) -> dict[str, Any]:
    """Return {'format': name, options ...}: what `parse_format` reads back."""
    return {"format": weight_format.name, **weight_format.options()}


def parse_format(description: Mapping[str, Any]) -> WeightFormat:
    """Return the format that `describe_format` described."""
    options = {key: value for key, value in description.items() if key != "format"}
    return make_format(description["format"], options)


def settings_of(weight_format: WeightFormat) -> dict[str, Any]:
    """Return the fields of `FormatConfig` that ask for a format."""
    entry = FORMATS[weight_format.name]
    return entry.as_settings(weight_format, entry.settings)
