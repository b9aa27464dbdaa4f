"""Generation, greedy or sampled, of one text or of several at once, whole or streamed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import TextStreamer

from graft.errors import GraftError, raise_problems
from graft.evaluate.sampling import GREEDY, Sampling
from graft.evaluate.stopping import Stops
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

    def text(self, ids: Sequence[int]) -> str:
        """Return what a reader is shown of some tokens."""
        return self.decode([*ids], skip_special_tokens=True)

    @property
    def special(self) -> dict[str, int]:
        """The special tokens, which have no such text."""
        added = self._tokenizer.added_tokens_decoder
        return {token.content: number for number, token in added.items() if token.special}


class _Ends(StoppingCriteria):
    """Ends a text where one of some strings stands in it, or is the token that came last."""

    def __init__(self, words: _Words, strings: Sequence[str]) -> None:
        special = words.special if strings else {}
        self.stops = Stops(strings, words.text, special.values())
        self._tokens = {special[one] for one in strings if one in special}
        self.after = 0
        """How many tokens stand before the text, where transformers asks."""

    def reached(self, new: Sequence[int]) -> bool:
        """Return whether the last of the new tokens ends the text."""
        return bool(new) and (new[-1] in self._tokens or self.stops.reached(new))

    def __call__(self, input_ids: Any, scores: Any, **options: Any) -> Any:
        ended = self.reached(input_ids[0, self.after :].tolist())
        return torch.full((len(input_ids),), ended, device=input_ids.device)


class _Left(LogitsProcessor):
    """Leaves the tokens among which `Sampling` chooses."""

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        return self._sampling.left(scores)


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
    max_length: int | None = None,
    sampling: Sampling = GREEDY,
    seed: int = 0,
    stop: Sequence[str] = (),
    on_text: OnText | None = None,
) -> str:
    """Return the continuation of a tokenised prompt.

    Generation ends at the end-of-sequence token, before the first of the texts `stop`, after
    max_new_tokens, where prompt and continuation have max_length tokens, or where the model's
    position limit ends. A model that `graft.model.running.decode` knows is decoded by it, any
    other by transformers; the tokens are chosen by `sampling` either way. Raises GraftError when
    the prompt leaves no room, and for a sampling or a number of tokens that cannot be.
    """
    _check_options(sampling, max_new_tokens, stop)
    room = _room(model, prompt_ids, max_new_tokens, max_length)
    words = _Words(tokenizer)
    ends = _Ends(words, stop)
    held = None if on_text is None or not stop else ends.stops.held(on_text)
    stream = None if on_text is None else _Stream(words, held or on_text)
    natively = decodes_natively(model, len(prompt_ids) + room)
    if natively:
        new: list[int] = []
        if stream is not None:
            stream.put(torch.tensor(prompt_ids))  # which it skips
        for _, token, _ in _decoded(model, [prompt_ids], [room], sampling, seed):
            new.append(token)
            if stream is not None:
                stream.put(torch.tensor([token]))
            if ends.reached(new):
                break
        if stream is not None:
            stream.end()
    else:
        new = _generated(model, tokenizer, prompt_ids, room, sampling, seed, stream, ends)
    if held is not None:
        held.end()
    return ends.stops.cut(words.text(new))


def generate_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int = 128,
    sampling: Sampling = GREEDY,
    seed: int = 0,
    on_done: OnDone | None = None,
) -> list[str]:
    """Return the continuation of each prompt, as `generate_text` gives it for that prompt alone.

    A model that `graft.model.running.decode` knows continues several at once: a text that has ended
    makes room for the next. Its logits do not depend on the texts beside it. A text that is too
    long for it (a sliding window) is continued by transformers, as it is alone.
    """
    _check_options(sampling, max_new_tokens)
    rooms = [_room(model, prompt, max_new_tokens) for prompt in prompts]
    sizes = [len(ids) + room for ids, room in zip(prompts, rooms, strict=True)]
    fit = {size: decodes_natively(model, size) for size in {*sizes}}
    together = [number for number, size in enumerate(sizes) if fit[size]]
    new: list[list[int]] = [[] for _ in prompts]
    done = 0
    if together:
        chosen = [prompts[number] for number in together], [rooms[number] for number in together]
        for place, token, ended in _decoded(model, *chosen, sampling, seed):
            new[together[place]].append(token)
            done += ended
            if ended and on_done is not None:
                on_done(done)
    for number, (ids, room) in enumerate(zip(prompts, rooms, strict=True)):
        if not fit[sizes[number]]:
            new[number] = _generated(model, tokenizer, ids, room, sampling, seed)
            done += 1
            if on_done is not None:
                on_done(done)
    words = _Words(tokenizer)
    return [words.text(ids) for ids in new]


def _check_options(sampling: Sampling, max_new_tokens: int, stop: Sequence[str] = ()) -> None:
    problems = sampling.problems()
    if max_new_tokens < 1:
        problems.append(f"--max-new-tokens is {max_new_tokens}; expected more than 0")
    if "" in stop:
        problems.append("--stop is an empty text, before which nothing stands; leave it out")
    raise_problems(problems, "generation")


def _room(
    model: PreTrainedModel,
    prompt_ids: list[int],
    max_new_tokens: int,
    max_length: int | None = None,
) -> int:
    """Return how many tokens may follow a prompt."""
    limit = getattr(model.config, "max_position_embeddings", None)
    if max_length is not None and (limit is None or max_length < limit):
        limit = max_length
        if prompt_ids and limit <= len(prompt_ids):
            raise GraftError(
                f"the prompt has {len(prompt_ids)} tokens, and --max-length {max_length} counts "
                "them too; give more"
            )
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

    def choose(self, scores: Tensor, sampling: Sampling) -> int:
        return int(sampling.choose(scores, self.random))


def _decoded(
    model: PreTrainedModel,
    prompts: Sequence[list[int]],
    rooms: Sequence[int],
    sampling: Sampling,
    seed: int,
) -> Iterator[tuple[int, int, bool]]:
    """Yield (prompt's number, token, whether it is the last), as transformers' `generate` chooses.

    Texts go on together; one that ends leaves its place to the next prompt.
    """
    end = _end_tokens(model.generation_config)
    penalty = model.generation_config.repetition_penalty
    texts = [_Text(*one, seed) for one in zip(range(len(prompts)), prompts, rooms, strict=True)]
    longest = max(text.most for text in texts)
    places = range(min(texts_together(model, longest), len(texts)))
    decoder = Decoder(model, longest, len(places))
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
            text.tokens.append(text.choose(scores, sampling))
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
    sampling: Sampling,
    seed: int,
    stream: _Stream | None = None,
    ends: _Ends | None = None,
) -> list[int]:
    """Return the new tokens of transformers' `generate`."""
    ids = torch.tensor([prompt_ids], device=model.device)
    options: dict[str, Any] = {"do_sample": False}
    if sampling.temperature > 0:
        torch.manual_seed(seed)
        options = {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0}
        options["logits_processor"] = LogitsProcessorList([_Left(sampling)])
    if ends is not None:
        ends.after = len(prompt_ids)
        options["stopping_criteria"] = StoppingCriteriaList([ends])
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
                **options,
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
