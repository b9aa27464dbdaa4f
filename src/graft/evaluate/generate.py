"""Generation, greedy or sampled, of one text or of several at once, whole or streamed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    RepetitionPenaltyLogitsProcessor,
)
from transformers.generation.streamers import TextStreamer

from graft.errors import GraftError
from graft.model.folder import GENERATION_FILE
from graft.model.running.decode import Decoder, texts_together, why_not_native
from graft.understood import tokenizing, understood

OnText = Callable[[str], None]
OnDone = Callable[[int], None]
"""Called with how many texts have ended."""

_SET_HERE = ("max_length", "max_new_tokens", "do_sample", "temperature", "top_k", "top_p")
_WITHOUT_EFFECT = (
    *("transformers_version", "_from_model_config", "use_cache", "cache_implementation"),
    *("output_attentions", "output_hidden_states", "output_scores", "output_logits"),
    *("bos_token_id", "pad_token_id", "early_stopping", "length_penalty"),
)
_HEEDED = ("eos_token_id", "repetition_penalty")
_NEUTRAL = {"num_beams": 1, "num_return_sequences": 1}


class _Words:
    """A tokenizer for a stream: what it raises is one error."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer

    def decode(self, ids: Any, **options: Any) -> str:
        with tokenizing():
            text = self._tokenizer.decode(ids, **options)
        assert isinstance(text, str)
        return text


class _Stream(TextStreamer):
    def __init__(self, words: _Words, on_text: OnText) -> None:
        super().__init__(words, skip_prompt=True, skip_special_tokens=True)  # type: ignore[arg-type]
        self.on_text = on_text
        self.refused: Exception | None = None
        """What the one who is told the text raised, which is no fault of the model's folder."""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        try:
            self.on_text(text)
        except Exception as error:
            self.refused = error
            raise


def generate_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: list[int],
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
    fast: bool = False,
    on_text: OnText | None = None,
) -> str:
    """Return the continuation of a tokenised prompt; temperature 0 is greedy.

    Generation ends at the end-of-sequence token, after max_new_tokens, or where the model's
    position limit ends. A model that `graft.model.running.decode` knows is decoded by it, any
    other by transformers. `fast` is `DecodingConfig.fast_decode`. Raises GraftError when the prompt
    leaves no room, for a temperature or a number of tokens that cannot be, and where a model cannot
    be decoded fast.
    """
    _check_options(temperature, max_new_tokens)
    room = _room(model, prompt_ids, max_new_tokens)
    words = _Words(tokenizer)
    stream = None if on_text is None else _Stream(words, on_text)
    natively = decodes_natively(model, len(prompt_ids) + room)
    if fast and not natively:
        reason = why_not_native(model, len(prompt_ids) + room)
        raise GraftError(
            f"--fast-decode: {reason or f'{GENERATION_FILE} asks for what graft leaves to others'}"
        )
    if natively:
        new = []
        if stream is not None:
            stream.put(torch.tensor(prompt_ids))  # which it skips
        for _, token, _ in _decoded(model, [prompt_ids], [room], temperature, seed, fast):
            new.append(token)
            if stream is not None:
                stream.put(torch.tensor([token]))
        if stream is not None:
            stream.end()
    else:
        new = _generated(model, tokenizer, prompt_ids, room, temperature, seed, stream)
    return words.decode(new, skip_special_tokens=True)


def generate_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
    on_done: OnDone | None = None,
) -> list[str]:
    """Return the continuation of each prompt, as `generate_text` gives it for that prompt alone.

    A model that `graft.model.running.decode` knows continues several at once: a text that has ended
    makes room for the next. Its logits do not depend on the texts beside it. A text that is too
    long for it (a sliding window) is continued by transformers, as it is alone.
    """
    _check_options(temperature, max_new_tokens)
    rooms = [_room(model, prompt, max_new_tokens) for prompt in prompts]
    sizes = [len(ids) + room for ids, room in zip(prompts, rooms, strict=True)]
    fit = {size: decodes_natively(model, size) for size in {*sizes}}
    together = [number for number, size in enumerate(sizes) if fit[size]]
    new: list[list[int]] = [[] for _ in prompts]
    done = 0
    if together:
        chosen = [prompts[number] for number in together], [rooms[number] for number in together]
        for place, token, ended in _decoded(model, *chosen, temperature, seed):
            new[together[place]].append(token)
            done += ended
            if ended and on_done is not None:
                on_done(done)
    for number, (ids, room) in enumerate(zip(prompts, rooms, strict=True)):
        if not fit[sizes[number]]:
            new[number] = _generated(model, tokenizer, ids, room, temperature, seed, None)
            done += 1
            if on_done is not None:
                on_done(done)
    words = _Words(tokenizer)
    return [words.decode(ids, skip_special_tokens=True) for ids in new]


def _check_options(temperature: float, max_new_tokens: int) -> None:
    if not 0 <= temperature < math.inf:
        raise GraftError(f"--temperature is {temperature}; expected 0 or more")
    if max_new_tokens < 1:
        raise GraftError(f"--max-new-tokens is {max_new_tokens}; expected more than 0")


def _room(model: PreTrainedModel, prompt_ids: list[int], max_new_tokens: int) -> int:
    """Return how many tokens may follow a prompt."""
    limit = getattr(model.config, "max_position_embeddings", None)
    room = max_new_tokens if limit is None else min(max_new_tokens, limit - len(prompt_ids))
    if not prompt_ids:
        raise GraftError("the prompt is empty; give at least one token")
    if room < 1:
        raise GraftError(f"the prompt has {len(prompt_ids)} tokens; the model takes {limit}")
    return room


def decodes_natively(model: PreTrainedModel, positions: int) -> bool:
    """Return whether texts of that many positions are decoded without transformers' own loop.

    So it is if the kernels know the model, and its generation config asks for nothing that this
    module does not do.
    """
    known = (*_SET_HERE, *_WITHOUT_EFFECT, *_HEEDED)
    asked = model.generation_config.to_dict().items()
    unknown = [
        name
        for name, value in asked
        if name not in known and value not in (None, False, _NEUTRAL.get(name))
    ]
    return not unknown and why_not_native(model, positions) is None


class _Text:
    """A text that is being continued: its tokens, how many it may have, its own randomness."""

    def __init__(self, number: int, prompt_ids: list[int], room: int, seed: int) -> None:
        self.number, self.tokens, self.most = number, list(prompt_ids), len(prompt_ids) + room
        self.random = torch.Generator().manual_seed(seed)

    def choose(self, scores: Tensor, temperature: float) -> int:
        if temperature == 0:
            return int(scores.argmax(-1))
        probabilities = (scores / temperature).softmax(-1)
        return int(torch.multinomial(probabilities, num_samples=1, generator=self.random))


def _decoded(
    model: PreTrainedModel,
    prompts: Sequence[list[int]],
    rooms: Sequence[int],
    temperature: float,
    seed: int,
    fast: bool = False,
) -> Iterator[tuple[int, int, bool]]:
    """Yield (prompt's number, token, whether it is the last), as transformers' `generate` chooses.

    Texts go on together; one that ends leaves its place to the next prompt.
    """
    end = _end_tokens(model.generation_config)
    penalty = model.generation_config.repetition_penalty
    texts = [_Text(*one, seed) for one in zip(range(len(prompts)), prompts, rooms, strict=True)]
    longest = max(text.most for text in texts)
    places = range(min(texts_together(model, longest), len(texts)))
    decoder = Decoder(model, longest, len(places), fast)
    waiting, going = texts[::-1], dict[int, _Text]()
    while waiting or going:
        free = [place for place in places if place not in going][: len(waiting)]
        begun = {place: waiting.pop() for place in free}
        decoder.start({place: torch.tensor(text.tokens) for place, text in begun.items()})
        going |= begun
        logits = decoder.step({place: text.tokens[-1] for place, text in going.items()})
        for scores, (place, text) in zip(logits.split(1), [*going.items()], strict=True):
            if penalty is not None and penalty != 1.0:
                with _asked_for(model):
                    penalise = RepetitionPenaltyLogitsProcessor(penalty)
                    scores = penalise(torch.tensor([text.tokens]), scores)
            text.tokens.append(text.choose(scores, temperature))
            ended = text.tokens[-1] in end or len(text.tokens) == text.most
            if ended:
                del going[place]
            yield text.number, text.tokens[-1], ended


def _end_tokens(config: GenerationConfig) -> list[int]:
    eos = config.eos_token_id
    if eos is None:
        return []
    return eos if isinstance(eos, list) else [eos]


def _generated(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: list[int],
    room: int,
    temperature: float,
    seed: int,
    stream: _Stream | None,
) -> list[int]:
    """Return the new tokens of transformers' `generate`."""
    if temperature > 0:
        torch.manual_seed(seed)
    ids = torch.tensor([prompt_ids], device=model.device)
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_p": 1.0, "top_k": 0}
    pad = tokenizer.pad_token_id
    if pad is None:
        pad = next(iter(_end_tokens(model.generation_config)), 0)
    try:
        with torch.no_grad(), _asked_for(model):
            # generate comes from a mixin that the type checker does not follow.
            out = model.generate(  # type: ignore[operator]
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=room,
                pad_token_id=pad,
                streamer=stream,
                **sampling,
            )
            new: list[int] = out[0, len(prompt_ids) :].tolist()
    except GraftError:
        if stream is not None and stream.refused is not None:
            raise stream.refused from None
        raise
    return new


def _asked_for(model: PreTrainedModel) -> AbstractContextManager[None]:
    """Raise GraftError for whatever transformers raises on what a generation config asks for."""
    return understood(
        Path(model.name_or_path or "") / GENERATION_FILE,
        "asks for what transformers cannot generate",
    )
