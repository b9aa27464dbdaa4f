"""What `graft verify` shows."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

from rich.console import Console

from graft.errors import raise_problems

if TYPE_CHECKING:
    from graft.api.verify import Certificate


def show_certificate(
    model: str, file: str, *, data: str | None, requantize: bool, as_json: bool
) -> None:
    """Verify, print the certificate, and raise GraftError where a bound is missed."""
    from graft.api.verify import verify
    from graft.cli.progress import TerminalEvents

    with TerminalEvents(Console(stderr=True)) as events:
        found = verify(model, file, data=data, requantize=requantize, events=events)
    if as_json:
        print(json.dumps(asdict(found) | {"passed": found.passed}, indent=2))
    else:
        for name, value in _lines(found).items():
            print(f"{name:<24}{value}")
    raise_problems(found.problems, f"{found.file} is not verified")


def _lines(found: Certificate) -> dict[str, str]:
    fidelity = found.fidelity
    differing = ", ".join(found.differing_files)
    gap = f", the first other token where our two best logits are {found.largest_gap:.2g} apart"
    return {
        "file": f"{found.file} ({found.target})",
        "size": f"{found.bytes:,} bytes, {found.bits_per_weight:.2f} bits per weight in all",
        "weights, tokenizer": f"differ: {differing}" if differing else "equal, byte for byte",
        "model card": found.card,
        "KL": f"{fidelity.mean_kl:.2e} nats over {fidelity.positions:,} targets",
        "same next token": f"{fidelity.top1_agreement:.2%}",
        "largest difference": f"{fidelity.logit_difference:.1e} of the largest logit",
        "perplexity": f"{fidelity.other_perplexity:.4f}, trained {fidelity.perplexity:.4f}",
        "greedy texts": f"{found.equal_texts} of {found.texts} equal"
        + (gap if found.equal_texts < found.texts else ""),
        "tokens of texts": "equal" if found.same_tokens else "differ",
        "chat template": "equal" if found.same_template else "differs",
        "stop token": "equal" if found.same_stop_tokens else "differs",
        "verdict": "the file is the trained model" if found.passed else "not verified",
    }
