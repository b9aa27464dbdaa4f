"""SentencePiece's scores of tokens that make llama.cpp merge as a tokenizer.json says."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from tokenizers.models import BPE

from graft.understood import tokenizing

_BEYOND = 3
"""How much longer than two of the longest run the runs are that are tried."""


def scores_by_merge(
    vocabulary: Mapping[str, int], merges: Sequence[Sequence[str]], apart: Collection[str] = ()
) -> tuple[dict[int, float], list[str]]:
    """Return each token's score, minus the rank of the first merge that makes it, by id.

    BPE merges the pair of the lowest rank; SentencePiece the neighbours whose union has the
    highest score. They agree when every two tokens whose union is a token are a merge, and the
    merges that make one token follow each other; for runs of one letter, which Gemma's ranks mix,
    both are tried. apart: tokens that are cut out of a text before anything is merged.
    """
    ranks: dict[str, list[int]] = {}
    for rank, (left, right) in enumerate(merges):
        ranks.setdefault(left + right, []).append(rank)
    known = {(left, right) for left, right in merges}
    scores = {token: -float(ranks.get(token, [len(merges)])[0]) for token in vocabulary}
    differing = [
        token
        for token in vocabulary
        if token not in apart
        for cut in range(1, len(token))
        if token[:cut] in vocabulary
        and token[cut:] in vocabulary
        and (token[:cut], token[cut:]) not in known
    ]
    mixed = [token for token, found in ranks.items() if found[-1] - found[0] >= len(found)]
    runs = [token for token in mixed if len(set(token)) == 1]
    differing += [token for token in mixed if len(set(token)) > 1]
    differing += _differing_runs(runs, vocabulary, merges, scores)
    by_id = {index: scores[token] for token, index in vocabulary.items()}
    if not differing:
        return by_id, []
    return by_id, [
        f"its merges do not follow from scores of tokens, as SentencePiece's do: {len(differing)} "
        f"tokens ({differing[0]!r} ...) would be cut differently by llama.cpp"
    ]


def _differing_runs(
    runs: Sequence[str],
    vocabulary: Mapping[str, int],
    merges: Sequence[Sequence[str]],
    scores: Mapping[str, float],
) -> list[str]:
    """Return the runs of a letter, up to beyond twice the longest, that come out otherwise."""
    letters = {run[0] for run in runs}
    if not letters:
        return []
    own = {token: index for token, index in vocabulary.items() if {*token} <= letters}
    pairs = [(left, right) for left, right in merges if left + right in own]
    bpe = BPE(vocab=own, merges=pairs)
    longest = 2 * max(len(token) for token in own) + _BEYOND
    tried = [letter * count for letter in sorted(letters) for count in range(2, longest)]
    with tokenizing():
        return [
            run
            for run in tried
            if [token.value for token in bpe.tokenize(run)] != _joined(run, scores)
        ]


def _joined(text: str, scores: Mapping[str, float]) -> list[str]:
    """Return what SentencePiece makes: the best neighbours joined, of equal ones the first."""
    pieces = list(text)
    while True:
        pairs = [left + right for left, right in zip(pieces, pieces[1:], strict=False)]
        known = [(-scores[pair], at) for at, pair in enumerate(pairs) if pair in scores]
        if not known:
            return pieces
        _, at = min(known)
        pieces[at : at + 2] = [pairs[at]]
