"""Which decoder layer a module is in, from its name alone."""

from __future__ import annotations

from collections.abc import Iterable


def decoder_layer_of(name: str) -> str | None:
    """Return the decoder layer that a module is or is in; None outside of all.

    It is the name up to its first number: model.layers.3, transformer.h.3.
    """
    parts = name.split(".")
    number = next((index for index, part in enumerate(parts) if part.isdecimal()), None)
    return None if number is None else ".".join(parts[: number + 1])


def by_decoder_layer(names: Iterable[str]) -> dict[str, list[str]]:
    """Group names by decoder layer, in their order; one outside of all is a group by itself."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(decoder_layer_of(name) or name, []).append(name)
    return groups
