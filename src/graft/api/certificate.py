"""What `graft verify` found, in figures and in words: what was compared with what."""

from __future__ import annotations

import dataclasses
from dataclasses import asdict, dataclass
from typing import Literal

from graft.evaluate.fidelity import Fidelity
from graft.export.config import ExportTarget
from graft.text import listed, quoted

MAX_KL, MAX_PERPLEXITY, MAX_LOGIT = 1e-3, 0.005, 2e-3
"""The bounds: nats per position; change of the perplexity, where the runtime rounds activations;
largest difference of a logit as a share of the largest logit, where it does not."""
CardState = Literal["as exported", "changed", "missing"]


@dataclass(frozen=True)
class TokenizerResult:
    """Whether another program's tokenizer cuts the texts as the model's own does."""

    name: str
    other: str | None
    """The first text that it cuts otherwise; None: none."""
    special: bool
    """Special tokens around a text were compared too."""
    bound: bool
    """The file is not verified where it does not; otherwise that is told alone."""


@dataclass(frozen=True)
class Certificate:
    """What a file was found to be."""

    model: str
    file: str
    target: ExportTarget
    trained: str
    """The model that it was compared with."""
    runtime: str
    """The program that computed the file's logits, its version and what it computes in."""
    rounds_activations: bool
    """llama.cpp does, to 8 bits, and MLX to the 16 bits of a checkpoint that has no more."""
    bytes: int
    bits_per_weight: float
    """Of the whole file, tokenizer included, per parameter of the model."""
    files: int
    """That were compared byte for byte."""
    differing_files: tuple[str, ...]
    """Files that are not, byte for byte, what the export writes now; of a .gguf file itself.
    People edit model cards and add to them, so *.md files are not among these."""
    text: str
    """What it was compared on."""
    fidelity: Fidelity
    """Of the runtime's logits to those of the trained model, on held-out text."""
    equal_texts: int
    """Golden prompts whose greedy continuation is the same to the last token."""
    texts: int
    new_tokens: int
    """Of each of these continuations."""
    largest_gap: float
    """Of our two best logits, where a greedy continuation first goes another way; 0.0: nowhere."""
    tokenizers: tuple[TokenizerResult, ...]
    """Of the programs that run the file, on the held-out texts and on those of a probe."""
    same_template: bool
    same_stop_tokens: bool
    card: CardState = "as exported"
    """Of the model card, which is told and is no bound."""
    untried: tuple[str, ...] = ()
    """What could not be compared here, or is outside the runtime that was asked."""
    problems: tuple[str, ...] = ()
    """The bounds that are missed, in words; none: the file is the trained model."""
    compared: tuple[str, ...] = ()
    """What was compared with what, a sentence each, and how that went."""
    not_compared: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether every bound is met."""
        return not self.problems

    @property
    def same_tokens(self) -> bool:
        """Whether every text is cut into the same ids, by the tokenizers that must."""
        return all(one.other is None for one in self.tokenizers if one.bound)

    def as_json(self) -> dict[str, object]:
        """Return everything, for a file and for --json."""
        return asdict(self) | {"same_tokens": self.same_tokens, "passed": self.passed}


def in_words(found: Certificate) -> Certificate:
    """Return the certificate with its problems and its sentences."""
    return dataclasses.replace(
        found,
        problems=tuple(problems_of(found)),
        compared=tuple(_compared(found)),
        not_compared=tuple(_not_compared(found)),
    )


def problems_of(found: Certificate) -> list[str]:
    """Return the bounds that are missed."""
    problems = [f"{name} is not what the export writes now" for name in found.differing_files]
    fidelity = found.fidelity
    if not fidelity.mean_kl <= MAX_KL:
        problems.append(f"KL is {fidelity.mean_kl:.2e} nats; the bound is {MAX_KL:.0e}")
    if found.rounds_activations:
        change = abs(fidelity.other_perplexity / fidelity.perplexity - 1)
        if not change <= MAX_PERPLEXITY:
            problems.append(
                f"perplexity changes by {change:.2%}; the bound is {MAX_PERPLEXITY:.1%}"
            )
    elif not fidelity.logit_difference <= MAX_LOGIT:
        problems.append(
            f"a logit differs by {fidelity.logit_difference:.1e} of the largest; the bound is "
            f"{MAX_LOGIT:.0e}"
        )
    problems += [
        f"{one.name} cuts {quoted(one.other, 60)} into other tokens"
        for one in found.tokenizers
        if one.bound and one.other is not None
    ]
    same = {
        "the chat template is another one": found.same_template,
        "the token that ends an answer is another one": found.same_stop_tokens,
    }
    return problems + [problem for problem, holds in same.items() if not holds]


def _compared(found: Certificate) -> list[str]:
    fidelity = found.fidelity
    differing = f"differ in {listed(found.differing_files)}" if found.differing_files else "equal"
    many = "the file" if found.files == 1 else f"the {found.files} files"
    difference = f"the largest difference is {fidelity.logit_difference:.1e} of the largest logit"
    perplexity = f"perplexity is {fidelity.other_perplexity:.4f}, trained {fidelity.perplexity:.4f}"
    if found.rounds_activations:
        perplexity += f" (bound: a change of {MAX_PERPLEXITY:.1%})"
    else:
        difference += f" (bound {MAX_LOGIT:.0e})"
    greedy = f"{found.equal_texts} of {found.texts} equal"
    if found.equal_texts < found.texts:
        greedy += (
            "; at the first other token our two best logits are at most "
            f"{found.largest_gap:.2g} apart"
        )
    return [
        f"files: every byte of {many} with what an export of {found.model} writes now: {differing}",
        f"logits: of the file in {found.runtime}, with those of {found.trained} in graft, in "
        f"float32, on {found.text}: {difference}; KL is {fidelity.mean_kl:.2e} nats (bound "
        f"{MAX_KL:.0e}); {perplexity}; the same next token at {fidelity.top1_agreement:.2%} of "
        f"{fidelity.positions:,} targets",
        f"greedy texts: {found.new_tokens} tokens after each of {found.texts} prompts of it, by "
        f"the same two: {greedy} (no bound)",
        *(_tokens(one) for one in found.tokenizers),
        f"chat template: the text of it in the file with the model's: "
        f"{'equal' if found.same_template else 'another'}",
        f"stop token: the file's with the tokenizer's: "
        f"{'equal' if found.same_stop_tokens else 'another'}",
    ]


def _tokens(one: TokenizerResult) -> str:
    result = "equal" if one.other is None else f"other ones for {quoted(one.other, 60)}"
    if not one.bound:
        result += " (no bound)"
    special = "" if one.special else ", without special tokens"
    return (
        f"tokens: by {one.name} with those by the model's own tokenizer{special}, of the same "
        f"texts and a probe of words, numbers, code, scripts and emoji: {result}"
    )


def _not_compared(found: Certificate) -> list[str]:
    card = {
        "as exported": "which people may edit; it is as exported",
        "changed": "which people may edit; it has changed",
        "missing": "which people may take away; there is none",
    }
    return [
        *found.untried,
        "what other programs make of the chat template, and sampling",
        f"the model card, {card[found.card]}",
    ]
