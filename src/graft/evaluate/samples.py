"""Samples: what a model says to held-out prompts while it is trained."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from graft.data.encode import EncodedData
from graft.data.examples import Example
from graft.data.shapes.registry import SHAPES
from graft.errors import GraftError
from graft.evaluate.generate import generate_texts
from graft.understood import tokenizing

NEW_TOKENS = 64
"""The most that a sample shows."""


def sampled_rows(held_out: EncodedData, count: int, limit: int | None) -> list[Example]:
    """Return the first held-out rows with a prompt and room after it; fewer where there are fewer.

    Raises GraftError when rows of that kind have no prompts, or none of them leaves room.
    """
    if not count:
        return []
    if not SHAPES[held_out.kind].has_prompts:
        raise GraftError(
            f"--samples {count}: {held_out.kind} rows have no prompt to continue; give rows with "
            "prompt and completion, or leave the flag out"
        )
    prompts = held_out.facts.prompts
    fits = prompts > 0 if limit is None else (prompts > 0) & (prompts < limit)
    rows = [held_out.examples[number] for number in np.flatnonzero(fits)[:count].tolist()]
    if not rows:
        raise GraftError(f"--samples {count}: no held-out row has a prompt that leaves room")
    return rows


def prompt_length(example: Example) -> int:
    """Return how many tokens stand before the first that is trained."""
    return example.targets.index(True)


def continuations(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Example]
) -> list[dict[str, str]]:
    """Return each row's prompt, its greedy continuation (`text`) and the row's own (`reference`).

    Changes neither the model nor its mode nor random states.
    """
    was_training = model.training
    model.eval()
    prompts = [row.input_ids[: prompt_length(row)] for row in rows]
    texts = generate_texts(model, tokenizer, prompts, max_new_tokens=NEW_TOKENS)
    found = []
    for row, text in zip(rows, texts, strict=True):
        begin = prompt_length(row)
        end = next((i for i in range(begin, len(row.targets)) if not row.targets[i]), None)
        answer = row.input_ids[begin:end][:NEW_TOKENS]
        prompt, reference = _words(tokenizer, row.input_ids[:begin]), _words(tokenizer, answer)
        found.append(dict(prompt=prompt, text=text, reference=reference))
    model.train(was_training)
    return found


def _words(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    with tokenizing():
        text = tokenizer.decode(ids, skip_special_tokens=True)
    assert isinstance(text, str)
    return text
