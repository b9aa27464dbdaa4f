"""Chat templates, rendered within bounds: a template is a program, and may come from anywhere.

Jinja's sandbox keeps a template from files and from Python, not from taking all time or memory: a
loop that writes nothing, a text that doubles itself, a number to the power of another. So a
process of its own renders (`worker.py`), forked from this one that it may have the tokenizer: what
it renders is what `apply_chat_template` returns, to the letter. A process that may itself be ended
says so (`rendering_here`), and renders by itself.
"""

from __future__ import annotations

import atexit
import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from jinja2 import TemplateError

from graft.data.shapes.base import Tokenizer
from graft.data.worker import EndedError, Worker, limit_this_process, timed
from graft.errors import GraftError
from graft.files.bounds import VARIABLE, bound
from graft.text import printable

TEMPLATE_SECONDS = 5
"""Most processor time for a conversation, all its renderings together."""
TEMPLATE_BYTES = 512 * 2**20
"""Most memory for it, besides what the process has."""
TEMPLATE_TEXT = 16 * 2**20
"""Characters that any conversation may become, all its renderings together."""
TEMPLATE_GROWTH = 100
"""Characters that a character of a longer conversation may become."""


class Renderer:
    """A tokenizer's chat template, in a process that may be ended at its share.

    What it renders follows from its arguments, the template and the special tokens alone.
    """

    def __init__(self, tokenizer: Tokenizer, template: object) -> None:
        """template: what `apply_chat_template` is given, None for the tokenizer's own."""
        self._tokenizer = tokenizer
        self._template = template
        self._most = self._left = 0
        self.eos = str(tokenizer.special_tokens_map.get("eos_token") or "")
        self.known: dict[Any, Any] = {}
        """What callers have found out of the template, to ask it once."""

    def begin(self, size: int) -> None:
        """Begin a conversation of so many characters, which bounds what may be written for it."""
        self._most = self._left = max(bound(TEMPLATE_TEXT), bound(TEMPLATE_GROWTH) * size)
        if len(self.known) > _MOST_KNOWN:
            self.known.clear()

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        ask: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """Return messages as the template renders them; `ask` adds its opening of an answer.

        tools: JSON schemas. variables: further names that the template may read. Raises GraftError
        when the template refuses the messages, fails, or writes beyond a bound.
        """
        try:
            text: str = self._tokenizer.apply_chat_template(
                messages,  # type: ignore[arg-type]
                tools=tools or None,
                chat_template=self._template,
                tokenize=False,
                add_generation_prompt=ask,
                **(variables or {}),
            )
        except TemplateError as error:
            raise _wrong(f"refuses the messages: {str(error)[:1000]}") from error
        # A template may raise whatever Python can; a problem of transformers' own is told as well.
        except Exception as error:
            kind = type(error).__name__
            raise _wrong(f"fails on the messages: {kind}: {str(error)[:1000]}") from error
        self._left -= len(text)
        if self._left < 0:
            raise _wrong(
                f"writes more than {self._most:,} characters for these messages; mend the "
                f"template, or set {VARIABLE}=10"
            )
        return text


_MOST_KNOWN = 5000

Work = Callable[[Renderer, Any], Any]
"""What is done with a renderer in a process that may be ended: what JSON knows, in and out."""


def render_within_bounds(
    tokenizer: Tokenizer, template: object, work: Work, request: object
) -> Any:
    """Return what `work` returns for a renderer and a request, done within the bounds.

    template: what `apply_chat_template` is given, None for the tokenizer's own. work: a function
    of a module, which is pure. Raises GraftError when it does, or goes beyond a bound.
    """
    with _LOCK:
        if _HERE:
            return _answered_here(tokenizer, template, work, request)
        try:
            line = json.dumps(request, default=placeholder).encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise GraftError(f"the messages are no JSON: {error}") from error
        worker = _apart(tokenizer, template, work)
        reply, problem = worker.ask(line)
    if problem is not None:
        raise GraftError(problem)
    return reply


@contextmanager
def rendering() -> Iterator[None]:
    """End the process that renders when the block ends, with the memory that it shares."""
    try:
        yield
    finally:
        _end()


def rendering_here() -> None:
    """Render in this process from now on, which the system then ends at a template's share.

    It is for a process that was forked for nothing else. Whoever waits for it says `beyond()` of
    the conversation at which it ended.
    """
    _end()
    limit_this_process(bound(TEMPLATE_BYTES))
    _HERE.append(os.getpid())


def beyond() -> str:
    """Return what is said of a conversation at which the process that rendered it was ended."""
    return f"the chat template {_too_much()}; mend the template, or set {VARIABLE}=10"


def placeholder(value: object) -> str:
    """Return what transformers shows a template instead of a value that JSON does not know."""
    return f"<{type(value).__name__}>"


_LOCK = threading.Lock()
_APART: list[_Apart] = []
_HERE: list[int] = []
"""The process that renders by itself, or nothing."""
_RENDERERS: list[tuple[tuple[object, ...], Renderer]] = []
"""The renderer of a process that renders by itself."""
_EXHAUSTED: dict[tuple[str, int], str] = {}
"""Templates that went beyond a bound, and what was said: once is enough."""


def _wrong(problem: str) -> GraftError:
    return GraftError(f"the chat template {printable(problem)}")


def _seconds() -> int:
    return max(bound(TEMPLATE_SECONDS), 1)


def _too_much() -> str:
    return (
        f"takes more than {_seconds()} s of processor time or "
        f"{bound(TEMPLATE_BYTES) >> 20} MiB for these messages"
    )


def _state(tokenizer: Tokenizer, template: object) -> tuple[object, ...]:
    """Return all that a rendering depends on besides what it renders."""
    return (tokenizer.chat_template, template, dict(tokenizer.special_tokens_map))


def _answered_here(tokenizer: Tokenizer, template: object, work: Work, request: object) -> Any:
    state = _state(tokenizer, template)
    if not _RENDERERS or _RENDERERS[0][0] != state:
        _RENDERERS[:] = [(state, Renderer(tokenizer, template))]
    with timed(_seconds()):
        reply, problem = _answer(_RENDERERS[0][1], work, request)
    if problem is not None:
        raise GraftError(problem)
    return reply


def _answer(renderer: Renderer, work: Work, request: Any) -> tuple[Any, str | None]:
    """Return what the work returns, or what is wrong."""
    try:
        return work(renderer, request), None
    except GraftError as error:
        return None, str(error)
    except RecursionError:
        return None, "the messages are nested too deeply"


def _apart(tokenizer: Tokenizer, template: object, work: Work) -> _Apart:
    """Return the process that renders for this tokenizer, as it is now."""
    state = (os.getpid(), work, _seconds(), *_state(tokenizer, template))
    if _APART and (_APART[0].tokenizer is not tokenizer or _APART[0].state != state):
        _end()
    if not _APART:
        _APART.append(_Apart(tokenizer, template, work, state))
    return _APART[0]


@atexit.register
def _end() -> None:
    while _APART:
        _APART.pop().worker.end()


class _Apart:
    """A process that renders, and what it was forked with."""

    def __init__(
        self, tokenizer: Tokenizer, template: object, work: Work, state: tuple[object, ...]
    ) -> None:
        self.tokenizer = tokenizer
        self.state = state
        self._key = (repr(template or tokenizer.chat_template), _seconds())
        renderer = Renderer(tokenizer, template)
        self.worker = Worker(
            lambda request: _answer(renderer, work, request), _seconds(), bound(TEMPLATE_BYTES)
        )

    def ask(self, request: bytes) -> tuple[Any, str | None]:
        """Return the reply, or what is wrong."""
        if self._key in _EXHAUSTED:
            return None, f"the chat template was not tried again, as it {_EXHAUSTED[self._key]}"
        try:
            reply, problem = self.worker.ask(request)
        except EndedError:
            _end()
            _EXHAUSTED[self._key] = _too_much()
            return None, beyond()
        return reply, problem
