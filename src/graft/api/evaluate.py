"""Scoring and sampling any model that graft can load."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from graft.api.run.folder import PromptStyle, load_any, prompt_style
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
) -> dict[str, Any]:
    """Return loss, perplexity and counts of a model on a file of examples, masked as in training.

    chat_template: as `graft train` takes it; it becomes the tokenizer's.

    {"loss": nats per target token, "perplexity", "target_tokens", "rows", "cut_rows"}.
    """
    if batch_size < 1:
        raise GraftError(f"--batch-size is {batch_size}; expected more than 0")
    if isinstance(model, LoadedModel):
        loaded = model
    else:
        loaded = load_any(model, dtype, device, trust_remote_code=trust_remote_code)
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
    encoded = load_examples(data, loaded.tokenizer, config, length)
    check_tokens(loaded.model, loaded.tokenizer, encoded.examples)
    result = evaluate_loss(loaded.model, encoded.examples, batch_size)
    return {
        "loss": result.loss,
        "perplexity": result.perplexity,
        "target_tokens": result.targets,
        "rows": len(encoded.examples),
        "cut_rows": encoded.cut_rows,
    }


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
