"""Tokens that a tokenizer knows and a model does not, told before the model is run on them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from graft.data.examples import Example
from graft.data.storage.store import facts_of
from graft.errors import raise_problems
from graft.text import listed, quoted

_TOLD = 20
_LOOKED_AT = 1000
"""Examples in each of which there is such a token."""


def tokens_beyond(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the tokens that the model has no embedding for, in the order of their numbers."""
    count = _embeddings(model)
    if len(tokenizer) <= count:
        return []
    numbers = {index: token for token, index in tokenizer.get_vocab().items() if index >= count}
    return [numbers[index] for index in sorted(numbers)]


def beyond_notes(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """Return a line on the tokens that the model has no embedding for, where there are any."""
    beyond = tokens_beyond(model, tokenizer)
    if not beyond:
        return ()
    return (
        f"the model has no embedding for the tokens {listed(map(repr, beyond), 4)} of its "
        "tokenizer: a text that holds one cannot be computed, nor a batch that is filled up by it",
    )


def _embeddings(model: PreTrainedModel) -> int:
    embedding: nn.Module = model.get_input_embeddings()
    return int(next(embedding.parameters()).shape[0])


def check_tokens(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *data: Sequence[Example],
) -> None:
    """Raise GraftError with every token id of the examples that the model has no embedding for.

    The model may be on the meta device.
    """
    count = _embeddings(model)
    found: dict[int, str] = {}
    for examples in data:
        for number in np.flatnonzero(facts_of(examples).largest >= count)[:_LOOKED_AT].tolist():
            example = examples[number]
            for token in example.input_ids:
                if token >= count:
                    found.setdefault(token, example.where)
    spelt = tokenizer.convert_ids_to_tokens(list(found))
    problems = [
        f"{where}: token {quoted(text)} has the number {token}"
        for (token, where), text in zip(found.items(), spelt, strict=True)
    ]
    raise_problems(
        problems[:_TOLD],
        f"the tokenizer has tokens for which the model, with {count:,} rows of embeddings, has "
        "none; take the tokenizer that belongs to it (is a special token in tokenizer_config.json "
        "a new one?), or enlarge the model with resize_token_embeddings",
    )
