"""Generated texts against references: exact match, BLEU, ROUGE-L and attribute coverage."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec

from graft.errors import GraftError

_BRACKETED = re.compile(r"\s*([^\[\],|]+)\[([^\[\]]+)\]\s*")


@dataclass(frozen=True)
class TextScores:
    """How well generated texts meet their references."""

    texts: int
    exact_match: float
    """Share in [0, 1] of the texts that equal their reference, white space at the ends aside."""
    bleu: float | None
    """Corpus BLEU in [0, 100] with sacrebleu's defaults: 4-grams, tokenizer 13a, with case."""
    rouge_l: float | None
    """Mean F1 in [0, 1] of the longest common subsequence of words, without case or stemming. This
    and BLEU are None where the packages that compute them are not installed."""
    coverage: float | None
    """`attribute_coverage` in [0, 1]; None when no prompt lists attributes."""


def missing_scorers() -> list[str]:
    """Return the packages for BLEU and ROUGE-L that are not installed."""
    needed = {"sacrebleu": "sacrebleu", "rouge_score": "rouge-score"}
    return [package for module, package in needed.items() if find_spec(module) is None]


def why_no_scorers() -> str:
    """Return what is missing for BLEU and ROUGE-L and how to install it."""
    return (
        f"they need {' and '.join(missing_scorers())}, not installed here: "
        "pip install 'graft-llm[eval]'"
    )


def score_texts(
    prompts: Sequence[str], texts: Sequence[str], references: Sequence[str]
) -> TextScores:
    """Score each text against the reference of the same position (BLEU: arXiv 1804.08771).

    Raises GraftError when there is nothing to score.
    """
    if not texts:
        raise GraftError("there are no texts to score")
    given = [text.strip() for text in texts]
    wanted = [reference.strip() for reference in references]
    equal = sum(text == reference for text, reference in zip(given, wanted, strict=True))
    bleu, rouge_l = (None, None) if missing_scorers() else _bleu_and_rouge_l(given, wanted)
    coverage = attribute_coverage(prompts, texts)
    return TextScores(len(given), equal / len(given), bleu, rouge_l, coverage)


def _bleu_and_rouge_l(texts: Sequence[str], references: Sequence[str]) -> tuple[float, float]:
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu import corpus_bleu

    score = RougeScorer(["rougeL"]).score
    pairs = zip(texts, references, strict=True)
    rouge_l = [score(reference, text)["rougeL"].fmeasure for text, reference in pairs]
    return corpus_bleu(list(texts), [list(references)]).score, sum(rouge_l) / len(rouge_l)


def attributes(prompt: str) -> list[str]:
    """Return the values of a prompt that is a list of attributes, in order, else nothing.

    Such a prompt holds two or more fields, and nothing else: 'key: value' separated by '|' or by
    line breaks ('name: Bel Arc | category: lamp'), or 'key[value]' separated by commas
    ('name[Bel Arc], category[lamp]').
    """
    if "[" in prompt and prompt.rstrip().endswith("]"):
        matches = [_BRACKETED.fullmatch(field) for field in re.split(r"(?<=\])\s*,", prompt)]
        fields = [match.groups() if match else ("", "") for match in matches]
    else:
        parts = [part.partition(":") for part in re.split(r"[|\n]", prompt) if part.strip()]
        fields = [(key, value) for key, _, value in parts]
    whole = len(fields) > 1 and all(key.strip() and value.strip() for key, value in fields)
    return [value.strip() for _, value in fields] if whole else []


def share_mentioned(prompt: str, text: str) -> float | None:
    """Return the share in [0, 1] of the prompt's values that the text holds word for word.

    A value counts when it stands in the text as whole words, upper and lower case being equal: '5
    kg' is not in '1.5 kg'. A paraphrase does not count, nor does 'yes' that the text puts in other
    words. None when the prompt lists no attributes.
    """
    values = attributes(prompt)
    if not values:
        return None
    found = sum(
        re.search(rf"(?<!\w)(?<!\d[.,]){re.escape(value)}(?!\w|[.,]\d)", text, re.IGNORECASE)
        is not None
        for value in values
    )
    return found / len(values)


def attribute_coverage(prompts: Sequence[str], texts: Sequence[str]) -> float | None:
    """Return the mean of `share_mentioned` over the prompts that list attributes; None: none do."""
    shares = [share_mentioned(prompt, text) for prompt, text in zip(prompts, texts, strict=True)]
    counted = [share for share in shares if share is not None]
    return sum(counted) / len(counted) if counted else None
