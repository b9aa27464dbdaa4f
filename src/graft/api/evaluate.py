"""Scoring and sampling any model that graft can load."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from graft.api.run.folder import (
    PromptStyle,
    is_run,
    load_any,
    prompt_style,
    read_run_config,
)
from graft.api.run.reference import model_before, with_reference
from graft.data.config import DataConfig
from graft.data.conversations.named import choose_template
from graft.data.encode import encode_chat, encode_prompt
from graft.data.examples import Example
from graft.data.load import load_examples, resolve_max_length
from graft.errors import GraftError
from graft.evaluate.generate import OnText, generate_text
from graft.evaluate.loss import evaluate_loss
from graft.evaluate.sampling import Sampling
from graft.model.load import LoadedModel
from graft.model.tokens import check_tokens
from graft.objectives.base import Objective
from graft.objectives.registry import DEFAULT_OBJECTIVE, OBJECTIVES

Before = Callable[[], LoadedModel] | None


def evaluate_model(
    model: str | Path | LoadedModel,
    data: str,
    *,
    columns: Sequence[str] = (),
    data_format: str | None = None,
    max_length: int | None = None,
    eos: bool = True,
    separator: str = "\n",
    chat_template: str | None = None,
    batch_size: int = 16,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    objective: Objective | None = None,
    before: Before = None,
) -> dict[str, Any]:
    """Return loss, perplexity and counts of a model on a file of examples, masked as in training.

    chat_template: as `graft train` takes it; it becomes the tokenizer's. objective: what is
    measured, by default the next token's loss; a run's own is `run_objective`'s, which one that
    compares with the model before training needs `before` for, to load that.

    {"loss": nats per target token, "perplexity", "target_tokens", "rows", "cut_rows"}, or with
    another objective its own count in the place of the two in the middle, and what it measures.
    """
    if batch_size < 1:
        raise GraftError(f"--batch-size is {batch_size}; expected more than 0")
    if isinstance(model, LoadedModel):
        loaded = model
    else:
        if objective is None:
            objective, before = run_objective(Path(model))
        loaded = load_any(model, dtype, device, trust_remote_code=trust_remote_code)
    objective = objective or OBJECTIVES[DEFAULT_OBJECTIVE]
    config = DataConfig(
        data=data,
        columns=tuple(columns),
        data_format=data_format,
        max_length=max_length,
        eos=eos,
        separator=separator,
    )
    choose_template(loaded.tokenizer, chat_template)
    limit = getattr(loaded.model.config, "max_position_embeddings", None)
    length = resolve_max_length(config, limit)
    encoded = load_examples(data, loaded.tokenizer, config, length, holds=objective.holds)
    encoded = objective.arranged(encoded, length)
    check_tokens(loaded.model, loaded.tokenizer, encoded.examples)
    rows: Sequence[Example] = encoded.examples
    if objective.needs_reference:
        if before is None:
            raise GraftError(
                f"{objective.name} compares with the model before training; give the run itself"
            )
        rows = with_reference(rows, before(), batch_size)
    result = evaluate_loss(loaded.model, rows, batch_size, objective)
    found = objective.evaluation(result)
    return {
        "loss": found.pop("eval_loss"),
        **{name.removeprefix("eval_"): value for name, value in found.items()},
        "rows": len(encoded.examples),
        "cut_rows": encoded.cut_rows,
    }


def run_objective(run: Path, name: str | None = None) -> tuple[Objective, Before]:
    """Return what a run learnt, or the objective of that name, and what loads its model as it was.

    Of one that needs a teacher the next token's loss is what can be measured without.
    """
    if not is_run(run):
        if name is not None and OBJECTIVES[name].needs_reference:
            raise GraftError(f"{run} is no run, so nothing says what it was before its training")
        return OBJECTIVES[name or DEFAULT_OBJECTIVE], None
    config = read_run_config(run)
    asked = OBJECTIVES[name or config.objective]
    if asked.needs_teacher:
        asked = OBJECTIVES[DEFAULT_OBJECTIVE]
    if name in (None, config.objective):
        asked = asked.configured(config)
    return asked, lambda: model_before(run, config)


def generate(
    model: str | Path | LoadedModel,
    prompt: str | Sequence[Mapping[str, str]],
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    stop: Sequence[str] = (),
    max_length: int | None = None,
    style: PromptStyle | None = None,
    on_text: OnText | None = None,
) -> str:
    """Return the model's continuation of a prompt, or its answer to a list of messages.

    With no `style`, a prompt to a run's folder is dressed as the run's training rows were
    (separator, template); to any other model it goes as it is. Messages go through the chat
    template. What chooses the tokens and ends the text: see
    `graft.evaluate.config.DecodingConfig`.
    """
    if isinstance(model, LoadedModel):
        loaded, style = model, style or PromptStyle()
    else:
        loaded, style = load_any(model), style or prompt_style(Path(model))
    if isinstance(prompt, str):
        ids = encode_prompt(style.kind, prompt, loaded.tokenizer, style.separator)
    else:
        ids = encode_chat(list(prompt), loaded.tokenizer)
    check_tokens(loaded.model, loaded.tokenizer, [Example(ids, [False] * len(ids), "the prompt")])
    return generate_text(
        loaded.model,
        loaded.tokenizer,
        ids,
        max_new_tokens=max_new_tokens,
        sampling=Sampling(temperature, top_k, top_p),
        seed=seed,
        stop=stop,
        max_length=max_length,
        on_text=on_text,
    )
