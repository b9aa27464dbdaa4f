"""Tokens that a tokenizer knows and a model does not, told before the model is run on them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from graft.errors import raise_problems
from graft.text import quoted

_TOLD = 20


def check_tokens(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Iterable[tuple[str, Sequence[int]]],
) -> None:
    """Raise GraftError with every token id that the model has no embedding for.

    rows: where each row stands, and its token ids. The model may be on the meta device.
    """
    embedding: nn.Module = model.get_input_embeddings()
    count = next(embedding.parameters()).shape[0]
    found: dict[int, str] = {}
    for where, ids in rows:
        if max(ids, default=0) >= count:
            for token in ids:
                if token >= count:
                    found.setdefault(token, where)
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
