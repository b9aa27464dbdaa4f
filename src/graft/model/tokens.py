"""Whether a tokenizer belongs to a model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from graft.errors import raise_problems
from graft.text import quoted


def check_tokens(
    texts: Iterable[tuple[str, Sequence[int]]],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    where: object,
) -> None:
    """Raise GraftError with every token that the model has no embedding for.

    texts: where each comes from, and its tokens. where: of the tokenizer, for the message.
    """
    count = next(model.get_input_embeddings().parameters()).shape[0]
    found: dict[int, str] = {}
    for place, ids in texts:
        if max(ids, default=0) >= count:
            for token in ids:
                if token >= count:
                    found.setdefault(token, place)
    spelt = tokenizer.convert_ids_to_tokens(list(found))
    problems = [
        f"{place}: token {quoted(text)} has the number {token}"
        for (token, place), text in zip(found.items(), spelt, strict=True)
    ]
    raise_problems(
        problems[:20],
        f"the tokenizer of {where} has tokens for which the model, with {count:,} rows of "
        "embeddings, has none; take the tokenizer that belongs to it (is a special token in "
        "tokenizer_config.json a new one?), or enlarge the model with resize_token_embeddings",
    )
