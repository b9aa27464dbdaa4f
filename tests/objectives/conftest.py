"""Rows of preferences for a tiny model."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def preferences(tmp_path_factory) -> Path:
    """Rows of prompt, chosen and rejected, of which the chosen ones are told by their words."""
    chance = random.Random(0)
    words = "stone river light morning window garden paper silver".split()
    lines = []
    for number in range(48):
        prompt = f"{number} {chance.choice(words)}:"
        good, bad = chance.choice(words), chance.choice(words)
        lines.append(
            json.dumps(
                {
                    "prompt": prompt,
                    "chosen": f"yes, {good}",
                    "rejected": f"no, not {bad}" + " at all" * (number % 3),
                }
            )
        )
    path = tmp_path_factory.mktemp("preferences") / "rows.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def labelled(preferences, tmp_path_factory) -> Path:
    """The same answers, each a row with a label."""
    lines = []
    for number, line in enumerate(preferences.read_text(encoding="utf-8").splitlines()):
        row = json.loads(line)
        wanted = number % 3 != 0
        completion = row["chosen" if wanted else "rejected"]
        lines.append(
            json.dumps({"prompt": row["prompt"], "completion": completion, "label": wanted})
        )
    path = tmp_path_factory.mktemp("labelled") / "rows.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
