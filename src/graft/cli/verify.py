"""`graft verify`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from graft.cli.command import Command
from graft.cli.fields import Positional
from graft.cli.show import show, show_json
from graft.errors import raise_problems
from graft.model.config import TrustConfig

if TYPE_CHECKING:
    from graft.api.verify import Certificate


@dataclass(frozen=True, kw_only=True)
class VerifyArguments(TrustConfig):
    """The exported file, and what it was exported from."""

    model: Positional
    """The run or model folder that was exported."""
    file: Positional
    """The file or folder that `graft export` wrote, to any target that runs by itself."""
    data: str | None = None
    """Held-out examples to compare on; by default those of the run."""
    requantize: bool = False
    """Whether the export was asked to round a lora or qlora run."""
    json: bool = False
    """Print one JSON object instead of text."""


def verify(arguments: VerifyArguments) -> None:
    """Load an exported file in its own runtime, and compare it with the model that was trained.

    Raises GraftError where a bound is missed.
    """
    from graft.api.verify import verify as run
    from graft.cli.progress import progress

    with progress() as events:
        found = run(
            arguments.model,
            arguments.file,
            data=arguments.data,
            requantize=arguments.requantize,
            trust_remote_code=arguments.trust_remote_code,
            events=events,
        )
    if arguments.json:
        show_json(asdict(found) | {"passed": found.passed})
    else:
        for name, value in _lines(found).items():
            show(f"{name:<24}{value}")
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


COMMAND = Command(arguments=VerifyArguments, run=verify)
