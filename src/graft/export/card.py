"""A model card: facts in, Markdown with Hugging Face's front matter out.

Nothing in it comes from the machine or the hour of the export, so that equal models get equal
cards. The front matter is described at https://huggingface.co/docs/hub/model-cards.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from graft.errors import GraftError
from graft.export.registry import TARGETS
from graft.files.read import parse_yaml, read_text
from graft.text import markdown, printable

CARD_BYTES = 2**20
"""Most bytes of a card that is read for its front matter."""

GRAFT_TAG = "graft"
"""A tag of every card that is written here."""


@dataclass(frozen=True)
class CardFacts:
    """What a card says; whatever is not known is left out of it."""

    target: str
    """The name of what was exported to."""
    file: str
    """Name of the file or folder that was written."""
    title: str
    base_model: str | None = None
    """Hub id of the base."""
    license: Mapping[str, str] = field(default_factory=dict)
    """license, license_name and license_link, as the hub names them."""
    tags: Sequence[str] = ()
    tables: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Sections of a name and a value in each line; an empty one is left out."""
    notes: Sequence[str] = ()


def model_card(facts: CardFacts) -> str:
    """Return the card's text."""
    sections = [f"# {markdown(facts.title)}"]
    named = facts.license.get("license_name") or facts.license.get("license")
    unnamed = "The licence is not stated here: see the base before you publish this."
    sections.append(f"Licence: {markdown(named)}." if named else unnamed)
    sections += [_table(heading, rows) for heading, rows in facts.tables.items() if rows]
    sections.append("## How to run it\n\n" + _how_to_run(facts))
    if facts.notes:
        lines = "\n".join(f"- {markdown(note)}" for note in facts.notes)
        sections.append(f"## Notes\n\n{lines}")
    return f"---\n{_front_matter(facts)}---\n\n" + "\n\n".join(sections) + "\n"


def front_matter(card: Path) -> dict[str, object]:
    """Return the front matter of a card; empty where there is no card, or none that is YAML."""
    try:
        found = re.match(r"---\r?\n(.*?)\r?\n---\s*(\n|$)", read_text(card, CARD_BYTES), re.DOTALL)
        value = parse_yaml(found.group(1), card) if found else None
    except GraftError:
        return {}
    return value if isinstance(value, dict) else {}


def license_of(card: Path) -> dict[str, str]:
    """Return license, license_name and license_link as a card names them, as far as it does."""
    names = ("license", "license_name", "license_link")
    found = front_matter(card)
    return {name: value for name in names if isinstance(value := found.get(name), str)}


def _front_matter(facts: CardFacts) -> str:
    fields: dict[str, object] = {} if facts.base_model is None else {"base_model": facts.base_model}
    fields |= facts.license
    fields["library_name"] = TARGETS[facts.target].library or facts.target
    fields["pipeline_tag"] = "text-generation"
    fields["tags"] = [GRAFT_TAG, *facts.tags]
    return yaml.safe_dump(fields, sort_keys=False, allow_unicode=True, width=10**6)


def _table(heading: str, rows: Mapping[str, str]) -> str:
    lines = "\n".join(f"| {markdown(name)} | {markdown(value)} |" for name, value in rows.items())
    return f"## {markdown(heading)}\n\n| | |\n|---|---|\n{lines}"


def _how_to_run(facts: CardFacts) -> str:
    usage = TARGETS[facts.target].usage(facts.file, facts.base_model)
    words, language, commands = map(printable, usage)
    longest = max((len(run) for run in re.findall("`+", commands)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{words}\n\n{fence}{language}\n{commands}\n{fence}"
