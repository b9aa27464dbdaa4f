"""Generation, greedy or sampled, whole or streamed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import TextStreamer

from graft.errors import GraftError

OnText = Callable[[str], None]


class _Stream(TextStreamer):
    def __init__(self, tokenizer: PreTrainedTokenizerBase, on_text: OnText) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.on_text = on_text

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.on_text(text)


def generate_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: list[int],
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
    on_text: OnText | None = None,
) -> str:
    """Return the continuation of a tokenised prompt; temperature 0 is greedy.

    Generation ends at the end-of-sequence token, after max_new_tokens, or where the model's
    position limit ends. Raises GraftError when the prompt leaves no room.
    """
    limit = getattr(model.config, "max_position_embeddings", None)
    room = max_new_tokens if limit is None else min(max_new_tokens, limit - len(prompt_ids))
    if not prompt_ids:
        raise GraftError("the prompt is empty; give at least one token")
    if room < 1:
        raise GraftError(f"the prompt has {len(prompt_ids)} tokens; the model takes {limit}")
    ids = torch.tensor([prompt_ids], device=model.device)
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        torch.manual_seed(seed)
        sampling = {"do_sample": True, "temperature": temperature, "top_p": 1.0, "top_k": 0}
    eos = model.generation_config.eos_token_id
    pad = tokenizer.pad_token_id
    if pad is None:
        pad = eos[0] if isinstance(eos, list) else eos
    with torch.no_grad():
        # generate comes from a mixin that the type checker does not follow.
        out = model.generate(  # type: ignore[operator]
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=room,
            pad_token_id=0 if pad is None else pad,
            streamer=None if on_text is None else _Stream(tokenizer, on_text),
            **sampling,
        )
    text = tokenizer.decode(out[0, len(prompt_ids) :], skip_special_tokens=True)
    assert isinstance(text, str)
    return text
