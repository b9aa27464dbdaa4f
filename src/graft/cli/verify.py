"""What `graft verify` shows."""

from __future__ import annotations

import json
from dataclasses import asdict

from rich.console import Console

from graft.errors import raise_problems


def show_certificate(
    model: str, file: str, *, data: str | None, requantize: bool, as_json: bool
) -> None:
    """Verify, print the certificate, and raise GraftError where a bound is missed."""
    from graft.api.verify import Certificate, verify
    from graft.cli.progress import TerminalEvents

    with TerminalEvents(Console(stderr=True)) as events:
        found: Certificate = verify(model, file, data=data, requantize=requantize, events=events)
    if as_json:
        print(json.dumps(asdict(found) | {"passed": found.passed}, indent=2))
    else:
        for name, value in _lines(found).items():
            print(f"{name:<24}{value}")
    raise_problems(found.problems, f"{found.file} is not verified")


def _lines(found: object) -> dict[str, str]:
    from graft.api.verify import Certificate

    assert isinstance(found, Certificate)
    differing = ", ".join(found.differing_files)
    gap = f", the first other token where our two best logits are {found.largest_gap:.2g} apart"
    return {
        "file": f"{found.file} ({found.target})",
        "size": f"{found.bytes:,} bytes, {found.bits_per_weight:.2f} bits per weight in all",
        "weights, tokenizer": f"differ: {differing}" if differing else "equal, byte for byte",
        "KL": f"{found.mean_kl:.2e} nats over {found.positions:,} positions",
        "same next token": f"{found.top1_agreement:.2%}",
        "largest difference": f"{found.logit_difference:.1e} of the largest logit",
        "perplexity": f"{found.runtime_perplexity:.4f}, trained {found.perplexity:.4f}",
        "greedy texts": f"{found.equal_texts} of {found.texts} equal"
        + (gap if found.equal_texts < found.texts else ""),
        "tokens of texts": "equal" if found.same_tokens else "differ",
        "chat template": "equal" if found.same_template else "differs",
        "stop token": "equal" if found.same_stop_tokens else "differs",
        "verdict": "the file is the trained model" if found.passed else "not verified",
    }
