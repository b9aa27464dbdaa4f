"""Forgetting: how far a training drifts from its base on text that it does not train."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from graft.data.batches import IGNORED, collate
from graft.data.examples import Example
from graft.errors import GraftError
from graft.files.read import read_text
from graft.model.running.loss import each_logits
from graft.model.save import save_tensors
from graft.model.weight_files import WeightFiles
from graft.understood import tokenizing

GENERAL_TEXT = Path(__file__).with_name("general_text.txt")
"""Everyday facts, arithmetic, code, letters and a dialogue, written for this."""

TOKENS = 2048
"""The most tokens of a general text that are read."""
WINDOW = 128
"""Tokens that the model sees at once."""
REFERENCE_BYTES = 32 * 2**20
"""The most that is kept of the base's probabilities: of a vocabulary of 32,000 words 524 positions,
evenly spread over the text."""
_TEXT_BYTES = 16 * 2**20


@dataclass(frozen=True)
class Reference:
    """What a model says of a general text before it is trained."""

    windows: Tensor
    """int64 [windows, tokens], padded on the right with -1."""
    positions: Tensor
    """int64: which of the predicted tokens the log-probabilities are of, counted over all."""
    log_probs: Tensor
    """float16 [positions, vocabulary]."""
    loss: float
    """Mean -log p of all predicted tokens, in nats."""

    @property
    def tokens(self) -> int:
        """How many tokens are predicted."""
        return int((self.windows[:, 1:] >= 0).sum())


@dataclass(frozen=True)
class Drift:
    """How far a model has moved from its reference on the general text."""

    kl: float
    """Mean over positions of KL(before || now) = sum of p (log p - log q), in nats per token."""
    perplexity_before: float
    perplexity: float
    tokens: int
    """That the perplexities are over."""
    positions: int
    """That the divergence is over."""


def general_windows(
    tokenizer: PreTrainedTokenizerBase,
    path: Path | None = None,
    *,
    limit: int | None = None,
    vocabulary: int | None = None,
) -> Tensor:
    """Return a general text as windows of tokens, each with the tokenizer's own first token.

    path: a UTF-8 file, by default the text that graft brings; limit: the most positions that the
    model takes; vocabulary: how many tokens it knows, windows with another are left out. Raises
    GraftError when the file cannot be read, or when no two tokens are left.
    """
    source = GENERAL_TEXT if path is None else path
    text = read_text(source, _TEXT_BYTES)[: 64 * TOKENS]
    with tokenizing():
        first, bare = (
            tokenizer(given, add_special_tokens=special, verbose=False)["input_ids"]
            for given, special in (("a", True), (text, False))
        )
    bos = [tokenizer.bos_token_id] if first[:1] == [tokenizer.bos_token_id] else []
    length = min(WINDOW, limit or WINDOW) - len(bos)
    rows = [
        bos + bare[begin : begin + length] for begin in range(0, min(len(bare), TOKENS), length)
    ]
    rows = [row for row in rows if len(row) > 1 and (not vocabulary or max(row) < vocabulary)]
    if not rows:
        raise GraftError(
            f"--general-text {source}: the text has no two tokens that the model knows; give a "
            "longer one"
        )
    windows = torch.full((len(rows), max(map(len, rows))), -1)
    for number, row in enumerate(rows):
        windows[number, : len(row)] = torch.tensor(row)
    return windows


def observe(model: PreTrainedModel, windows: Tensor, tokens_at_once: int = TOKENS) -> Reference:
    """Return what the model says of the windows; changes neither the model nor random states."""
    total = int((windows[:, 1:] >= 0).sum())
    positions = torch.empty(0, dtype=torch.long)
    loss, kept, begin = 0.0, list[Tensor](), 0
    for log_probs, targets in _predictions(model, windows, tokens_at_once):
        if not kept:
            most = max(1, REFERENCE_BYTES // (2 * log_probs.shape[1]))
            spread = torch.linspace(0, total - 1, min(total, most), dtype=torch.float64)
            positions = spread.round().long()
        loss -= float(log_probs.gather(1, targets[:, None]).double().sum())
        here = _inside(positions, begin, len(targets))
        kept.append(log_probs[here.to(log_probs.device)].half().cpu())
        begin += len(targets)
    return Reference(windows, positions, torch.cat(kept), loss / total)


def measure_drift(
    model: PreTrainedModel, reference: Reference, tokens_at_once: int = TOKENS
) -> Drift:
    """Return how far the model has moved from what it was at the reference.

    Raises GraftError when the reference is that of another model.
    """
    divergence, loss, begin, done = 0.0, 0.0, 0, 0
    for log_probs, targets in _predictions(model, reference.windows, tokens_at_once):
        loss -= float(log_probs.gather(1, targets[:, None]).double().sum())
        if log_probs.shape[1] != reference.log_probs.shape[1]:
            raise GraftError(
                f"the model knows {log_probs.shape[1]} tokens, and the one that the drift is "
                f"measured from {reference.log_probs.shape[1]}"
            )
        here = _inside(reference.positions, begin, len(targets))
        now = log_probs[here.to(log_probs.device)]
        # The rounding to float16 is no drift: a distribution sums to 1.
        before = reference.log_probs[done : done + len(here)].to(now.device).float().log_softmax(-1)
        part = before.exp() * (before - now)
        divergence += float(part.where(before > -math.inf, 0.0).double().sum())
        begin, done = begin + len(targets), done + len(here)
    tokens = reference.tokens
    return Drift(
        kl=divergence / len(reference.positions),
        perplexity_before=_exp(reference.loss),
        perplexity=_exp(loss / tokens),
        tokens=tokens,
        positions=len(reference.positions),
    )


def write_reference(path: Path, reference: Reference) -> None:
    """Write a reference to a safetensors file, whole or not at all."""
    tensors = {
        "log_probs": reference.log_probs,
        "loss": torch.tensor([reference.loss], dtype=torch.float64),
        "positions": reference.positions,
        "windows": reference.windows,
    }
    save_tensors(tensors, path)


def read_reference(path: Path) -> Reference:
    """Return the reference in a file; raises GraftError when it is damaged."""
    with WeightFiles(path.parent, single_file=path.name) as files:
        kinds = {
            "log_probs": (torch.float16, 2),
            "loss": (torch.float64, 1),
            "positions": (torch.int64, 1),
            "windows": (torch.int64, 2),
        }
        whole = all(
            name in files and (files.dtype(name), len(files.shape(name))) == kind
            for name, kind in kinds.items()
        )
        if whole:
            read = {name: files.read(name).clone() for name in kinds}
            windows, positions = read["windows"], read["positions"]
            total = int((windows[:, 1:] >= 0).sum())
            whole = (
                len(read["log_probs"]) == len(positions)
                and 0 < len(positions) <= total
                and read["loss"].numel() == 1
                and bool((positions.diff() > 0).all())
                and 0 <= int(positions[0]) <= int(positions[-1]) < total
                and -1 <= int(windows.min()) <= int(windows.max()) < read["log_probs"].shape[1]
                and bool((windows[:, 0] >= 0).all())
            )
    if not whole:
        raise GraftError(f"{path} is damaged; remove it, and drift is not reported")
    return Reference(windows, positions, read["log_probs"], read["loss"].item())


def _predictions(
    model: PreTrainedModel, windows: Tensor, tokens_at_once: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield log-probabilities float32 [positions, vocabulary] and the tokens that came, in order.

    The model is in evaluation mode meanwhile.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    examples = [_example(row[row >= 0].tolist()) for row in windows]
    rows = max(1, tokens_at_once // windows.shape[1])
    try:
        for part in _batches(examples, rows):
            batch = collate(part).to(device)
            targets = torch.nn.functional.pad(batch.labels[:, 1:], (0, 1), value=IGNORED).flatten()
            for chunk, logits in each_logits(model, batch.input_ids):
                asked = targets[chunk] != IGNORED
                if asked.any():
                    yield logits[asked].float().log_softmax(-1), targets[chunk][asked]
    finally:
        model.train(was_training)


def _batches(examples: Sequence[Example], rows: int) -> Iterator[Sequence[Example]]:
    for begin in range(0, len(examples), rows):
        yield examples[begin : begin + rows]


def _example(ids: list[int]) -> Example:
    return Example(ids, [False] + [True] * (len(ids) - 1), "general text")


def _inside(positions: Tensor, begin: int, count: int) -> Tensor:
    """Return those of the positions that lie in begin ... begin + count - 1, counted from it."""
    return positions[(positions >= begin) & (positions < begin + count)] - begin


def _exp(loss: float) -> float:
    """Return exp(loss), inf where that is too large."""
    return torch.tensor(loss, dtype=torch.float64).exp().item()
