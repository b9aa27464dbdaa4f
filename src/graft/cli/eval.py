"""`graft eval`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from graft.cli.command import Command
from graft.cli.fields import Positional
from graft.cli.show import show, show_json
from graft.data.config import ReadingConfig
from graft.evaluate.config import AdaptersConfig
from graft.layers.config import ActivationConfig
from graft.model.config import TrustConfig
from graft.objectives.registry import OBJECTIVES


@dataclass(frozen=True, kw_only=True)
class EvalArguments(ReadingConfig, ActivationConfig, AdaptersConfig, TrustConfig):
    """What to score, and on what."""

    model: Positional
    """A run, a model folder, a hub id, or a GGUF file that graft wrote."""
    data: str
    """File of examples."""
    max_length: int | None = None
    """Most tokens in a row; default: the model's limit, at most 1024."""
    eos: bool = True
    """Score the end-of-sequence token too."""
    separator: str = "\n"
    """Text between prompt and completion."""
    chat_template: str | None = None
    """Name of one of the tokenizer's chat templates, or a .jinja file."""
    objective: Annotated[str, OBJECTIVES] | None = None
    """What is measured; default: what a run learnt, and of any other model the next token."""
    batch_size: int = 16
    """Rows computed at once."""
    json: bool = False
    """Print one JSON object instead of text."""
    tokenizer: str | None = None
    """Folder of the tokenizer, for a GGUF file."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute precision."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to compute."""


def evaluate(arguments: EvalArguments) -> None:
    """Loss and perplexity of a model, masked as in training."""
    from graft.api.evaluate import evaluate_model, run_objective
    from graft.api.run.folder import round_inputs
    from graft.api.run.several import load_with_adapters

    objective, before = run_objective(Path(arguments.model), arguments.objective)
    loaded = load_with_adapters(
        arguments.model,
        arguments,
        arguments.dtype,
        arguments.device,
        arguments.tokenizer,
        arguments.trust_remote_code,
    )
    round_inputs(loaded, arguments.activations)
    for note in loaded.notes:
        show(note, error=True)
    result = evaluate_model(
        loaded,
        arguments.data,
        columns=arguments.columns,
        data_format=arguments.data_format,
        max_length=arguments.max_length,
        eos=arguments.eos,
        separator=arguments.separator,
        chat_template=arguments.chat_template,
        batch_size=arguments.batch_size,
        objective=objective,
        before=before,
    )
    if arguments.json:
        show_json(result, indent=None)
        return
    if "perplexity" not in result:
        words = [f"{objective.name} loss {result['loss']:.4f} {objective.unit}"]
        words += [
            f"{name.replace('_', ' ')} {value:.4f}"
            for name, value in result.items()
            if isinstance(value, float) and name != "loss"
        ]
        show(", ".join([*words, f"{result['rows']:,} rows ({result['cut_rows']:,} cut)"]))
        return
    show(
        f"loss {result['loss']:.4f}, perplexity {result['perplexity']:.4f} over "
        f"{result['target_tokens']:,} target tokens in {result['rows']:,} rows "
        f"({result['cut_rows']:,} cut)"
    )


COMMAND = Command(arguments=EvalArguments, run=evaluate, loads_models=True)
