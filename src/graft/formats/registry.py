"""The formats by name, and how a name and its options become a format."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from graft.errors import GraftError, did_you_mean
from graft.formats.base import WeightFormat
from graft.formats.codebook import CodebookFormat
from graft.formats.dense import DenseFormat
from graft.formats.int8 import Int8Format
from graft.formats.int_group import IntGroupFormat
from graft.formats.latent import LatentFormat

FORMATS: dict[str, Callable[..., WeightFormat]] = {
    "dense": DenseFormat,
    "nf4": lambda **options: CodebookFormat(name="nf4", **options),
    "fp4": lambda **options: CodebookFormat(name="fp4", **options),
    "int8": Int8Format,
    "int": IntGroupFormat,
    "latent": LatentFormat,
}


def make_format(name: str, options: Mapping[str, Any] | None = None) -> WeightFormat:
    """Return the format `name` with its options.

    Raises GraftError for an unknown name or for options that the format refuses.
    """
    if name not in FORMATS:
        raise GraftError(f"unknown weight format {name!r}{did_you_mean(name, FORMATS)}")
    try:
        return FORMATS[name](**(options or {}))
    except (TypeError, ValueError) as error:
        raise GraftError(f"weight format {name!r}: {error}") from error


def describe_format(weight_format: WeightFormat) -> dict[str, Any]:
    """Return {'format': name, options ...}: what `parse_format` reads back."""
    return {"format": weight_format.name, **weight_format.options()}


def parse_format(description: Mapping[str, Any]) -> WeightFormat:
    """Return the format that `describe_format` described."""
    options = {key: value for key, value in description.items() if key != "format"}
    return make_format(description["format"], options)
