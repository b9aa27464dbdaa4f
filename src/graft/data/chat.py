"""Conversations, as a chat template renders them, and what of them is trained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from graft.data.conversations.dressing import forms_of
from graft.data.conversations.messages import Conversation, read_conversation
from graft.data.conversations.named import check_chosen
from graft.data.conversations.skeleton import skeleton_of
from graft.data.conversations.traces import find_traces, structure
from graft.data.conversations.turns import FEW_ANSWERS, Found, Misplaced, Place, Render, find_places
from graft.data.shapes.base import Rendered, Tokenizer, text_problem
from graft.data.templates import Renderer, render_within_bounds
from graft.errors import GraftError, raise_problems
from graft.text import listed, quoted

DEFAULT_CHAT_TEMPLATE = (
    "{% if tools %}{{ '### tools:\\n' }}"
    "{% for tool in tools %}{{ (tool | tojson) + '\\n' }}{% endfor %}"
    "{{ '\\n' }}{% endif %}"
    "{% for message in messages %}"
    "{{ '### ' + message['role'] + ':\\n' }}"
    "{% if message['content'] %}{{ message['content'] }}{% endif %}"
    "{% if message['tool_calls'] %}{% for call in message['tool_calls'] %}"
    "{% if message['content'] or not loop.first %}{{ '\\n' }}{% endif %}"
    "{{ '<tool_call>\\n{\"name\": ' + (call['function']['name'] | tojson) }}"
    "{{ ', \"arguments\": ' + (call['function']['arguments'] | tojson) + '}\\n</tool_call>' }}"
    "{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{{ '\\n\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant:\\n' }}{% endif %}"
)
"""Chat template of a tokenizer that has none; ship it with the model that was trained on it."""

_SHORTENED = (
    "an answer before the last is trained without what the chat template writes before the last "
    "answer alone, such as thoughts; where each should be trained with it, make it the last of a "
    "row of its own"
)
_ENDLESS = (
    "an answer before the last is trained without its end, because the chat template writes "
    "another once more messages follow; the last one is trained with it"
)
_OTHER_PROMPT = (
    "an answer is not trained, because the chat template renders what stands before it otherwise "
    "once more messages follow, and so it would be trained on another prompt than it is asked; "
    "where it should be trained, make it the last of a row of its own"
)


def chat_prompt(messages: Sequence[Mapping[str, Any]], tokenizer: Tokenizer) -> str:
    """Return messages as the chat template renders them, and its opening of an answer.

    Raises GraftError when they are no messages or the template refuses them.
    """
    return chat_opening(messages, tokenizer).text


def chat_opening(
    given: Mapping[str, Any] | Sequence[Mapping[str, Any]], tokenizer: Tokenizer
) -> Rendered:
    """Return the prompt of a conversation, with training's seams: both ends of each answer.

    given: messages, or the fields of a row of them, which may have tools. Raises GraftError as
    `chat_prompt` does.
    """
    fields = given if isinstance(given, Mapping) else {"messages": given}
    found, problems = read_conversation(fields)
    raise_problems(problems, "prompt")
    return _rendered(found, tokenizer, asks=True)


def render_chat(fields: Mapping[str, Any], tokenizer: Tokenizer) -> Rendered:
    """Render a row up to its last trained answer; spans hold answers with their end-of-turn token.

    Each begins where the template, given the messages before it, asks for an answer. Raises
    GraftError when the template does not let all of this be true of any answer.
    """
    found, problems = read_conversation(fields)
    raise_problems(problems, "row")
    return _rendered(found, tokenizer, asks=False)


def _rendered(found: Conversation, tokenizer: Tokenizer, asks: bool) -> Rendered:
    check_chosen(tokenizer)
    template = DEFAULT_CHAT_TEMPLATE if tokenizer.chat_template is None else None
    request = [found.messages, found.trains, found.tools, found.variables, asks]
    text, spans, seams, remarks = render_within_bounds(tokenizer, template, _work, request)
    return Rendered(
        text,
        tuple((start, end) for start, end in spans),
        seams=tuple(seams),
        remarks=(*found.remarks, *remarks),
    )


def _work(renderer: Renderer, request: Any) -> tuple[str, list[Any], list[int], list[str]]:
    """Render a conversation; it is a function of the request and of the template alone."""
    messages, trains, tools, variables, asks = request
    size = sum(len(message.get("content", "")) + 200 for message in messages)
    renderer.begin(size)
    if not asks:
        last = max(index for index, trained in enumerate(trains) if trained)
        messages, trains = messages[: last + 1], trains[: last + 1]
    forms = forms_of(renderer, any("tool_calls" in message for message in messages))
    for form in forms:
        dressed = form.dressed(messages)
        try:
            text = renderer.render(dressed, ask=asks, tools=tools, variables=variables)
            break
        except GraftError:
            if form == forms[-1]:
                raise
    _check_text(text, messages, tools, variables)

    def render(some: Sequence[Mapping[str, Any]], ask: bool) -> str:
        return renderer.render(some, ask=ask, tools=tools, variables=variables)

    def render_marked(
        some: Sequence[Mapping[str, Any]], ask: bool, other_tools: Any, others: Any
    ) -> str:
        return renderer.render(form.dressed(some), ask=ask, tools=other_tools, variables=others)

    # White space after the last turn's end would only stand between it and the EOS token.
    text = text if asks else text.rstrip()
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    key = structure(messages), bool(tools), repr(variables), form
    places = _places(renderer, render, dressed, text, turns, asks, key)
    if asks:
        return text, [], _seams(places), []
    traces = find_traces(renderer.known, key, render_marked, messages, tools, variables)
    for index in sorted(traces.mute):
        if trains[index]:
            keys = " and ".join(repr(key) for key in messages[index] if key != "role")
            raise GraftError(
                f"message {index + 1}: the chat template renders nothing of its {keys}, so an "
                "empty answer would be trained; choose a template that does (--chat-template), or "
                "remove the row"
            )
    remarks = list(traces.remarks)
    if variables and not any("chat_template_kwargs" in remark for remark in remarks):
        remarks.append(
            f"'chat_template_kwargs' sets {listed(map(repr, variables))}, which graft generate and "
            "graft chat do not"
        )
    spans, more = _spans({turn: places[turn] for turn in turns if trains[turn]})
    seams = _seams({turn: places[turn] for turn in turns if not trains[turn]})
    # Behind an answer that turned out to be untrained no end of sequence is trained either.
    text = text[: spans[-1][1]]
    return text, spans, [place for place in seams if place <= len(text)], [*remarks, *more]


def _places(
    renderer: Renderer,
    render: Render,
    messages: Sequence[Mapping[str, Any]],
    text: str,
    turns: Sequence[int],
    asks: bool,
    key: object,
) -> Found:
    if 1 < len(turns) <= FEW_ANSWERS:
        skeleton = skeleton_of(renderer.known, key, render, messages, turns, asks, renderer.eos)
        found = None
        if skeleton is not None:
            found = skeleton.places(render, messages, text, turns, asks)
        if found is not None:
            return found
    return find_places(render, messages, text, turns, asks, renderer.eos)


def _spans(places: Mapping[int, Place | Misplaced]) -> tuple[list[tuple[int, int]], list[str]]:
    """Return the places of trained answers, and what is to be said of them."""
    found = [place for place in places.values() if isinstance(place, Place)]
    remarks = []
    for place in places.values():
        if isinstance(place, Misplaced) and not (place.other_prompt and found):
            raise GraftError(place.reason)
    if len(found) < len(places):
        remarks.append(_OTHER_PROMPT)
    if any(place.shortened for place in found):
        remarks.append(_SHORTENED)
    if any(place.endless for place in found):
        remarks.append(_ENDLESS)
    return [(place.start, place.end) for place in found], remarks


def _seams(places: Mapping[int, Place | Misplaced]) -> list[int]:
    found = [place for place in places.values() if isinstance(place, Place)]
    return [end for place in found for end in (place.start, place.end)]


def _check_text(text: str, *values: Any) -> None:
    """Raise GraftError when a rendered text is none that a tokenizer can read."""
    problem = text_problem(text)
    if problem is None:
        return
    for name, value in zip(("message", "tool", "chat_template_kwargs"), values, strict=True):
        for path, one in _texts(value, name):
            if wrong := text_problem(one):
                raise GraftError(f"{path} {wrong}; the chat template renders it")
    raise GraftError(f"what the chat template renders {problem}")


def _texts(value: object, path: str) -> Iterator[tuple[str, str]]:
    """Yield every text in a value, keys too, and where it stands."""
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, Mapping):
        for key, one in value.items():
            yield f"{path}: the key {quoted(key, 40)}", str(key)
            yield from _texts(one, f"{path}: {quoted(key, 40)}"[:200])
    elif isinstance(value, list):
        for number, one in enumerate(value, start=1):
            yield from _texts(one, f"{path} {number}")
