"""Chat templates, rendered within bounds: a template is a program, and may come from anywhere.

Jinja's sandbox keeps a template from files and from Python, not from taking all time or memory: a
loop that writes nothing, a text that doubles itself, a number to the power of another. So a
process of its own renders, forked from this one that it may have the tokenizer: what it renders is
what `apply_chat_template` returns, to the letter. The system ends it at its share of time and
memory. It serves one conversation after the other, each at 0.1 ms above the rendering.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import resource
import select
import signal
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from jinja2 import TemplateError

from graft.data.shapes.base import Tokenizer
from graft.errors import GraftError
from graft.files.bounds import VARIABLE, bound
from graft.text import printable

TEMPLATE_SECONDS = 5
"""Most processor time for a conversation, all its beginnings together."""
TEMPLATE_BYTES = 512 * 2**20
"""Most memory for it, besides what the process has."""
TEMPLATE_TEXT = 16 * 2**20
"""Characters that any conversation may become, all its beginnings together."""
TEMPLATE_GROWTH = 100
"""Characters that a character of a longer conversation may become."""

_PATIENCE = 10
"""Processor time may take so many times as long by the clock."""


def render_template(
    tokenizer: Tokenizer,
    template: object,
    messages: Sequence[Mapping[str, Any]],
    beginnings: Sequence[tuple[int, bool]],
) -> list[str]:
    """Render beginnings of a conversation: (number of messages, whether to ask for an answer).

    template: what `apply_chat_template` is given, None for the tokenizer's own.
    Raises GraftError when the template refuses the messages, fails, or goes beyond a bound.
    """
    with _LOCK:
        worker = _worker(tokenizer, template)
        try:
            request = json.dumps([messages, beginnings], default=placeholder)
        except (TypeError, ValueError, RecursionError) as error:
            raise GraftError(f"the messages are no JSON: {error}") from error
        reply = worker.ask(request.encode())
    if isinstance(reply, str):
        raise GraftError(f"the chat template {printable(reply)}")
    return reply


@contextmanager
def rendering() -> Iterator[None]:
    """End the process that renders when the block ends, with the memory that it shares."""
    try:
        yield
    finally:
        _end()


_LOCK = threading.Lock()
_CURRENT: list[_Worker] = []
_EXHAUSTED: dict[tuple[str, int], str] = {}
"""Templates that went beyond a bound, and what was said: once is enough."""


def _worker(tokenizer: Tokenizer, template: object) -> _Worker:
    """Return the process that renders for this tokenizer, as it is now."""
    state = (os.getpid(), tokenizer.chat_template, template, dict(tokenizer.special_tokens_map))
    if _CURRENT and (_CURRENT[0].tokenizer is not tokenizer or _CURRENT[0].state != state):
        _end()
    if not _CURRENT:
        _CURRENT.append(_Worker(tokenizer, template, state))
    return _CURRENT[0]


@atexit.register
def _end() -> None:
    while _CURRENT:
        _CURRENT.pop().end()


class _Worker:
    """The forked process, and a pipe in each direction; a line of JSON is a request or a reply."""

    def __init__(self, tokenizer: Tokenizer, template: object, state: tuple[object, ...]) -> None:
        self.tokenizer = tokenizer
        self.state = state
        self._owner = os.getpid()
        self._seconds = max(bound(TEMPLATE_SECONDS), 1)
        self._key = (repr(template or tokenizer.chat_template), self._seconds)
        ends: list[int] = []
        try:
            ends += [*os.pipe(), *os.pipe()]
            with warnings.catch_warnings():
                # Other threads hold no lock that rendering needs; see also _PATIENCE.
                warnings.simplefilter("ignore", DeprecationWarning)
                self._process = os.fork()
        except OSError as error:
            for end in ends:
                os.close(end)
            raise GraftError(
                f"the chat template cannot be rendered in a process of its own: {error.strerror}"
            ) from error
        if self._process == 0:
            _serve(tokenizer, template, ends[0], ends[3], self._seconds)
        os.close(ends[0])
        os.close(ends[3])
        self._requests: BinaryIO = os.fdopen(ends[1], "wb")
        self._replies: BinaryIO = os.fdopen(ends[2], "rb")

    def ask(self, request: bytes) -> list[str] | str:
        """Return the rendered texts, or what is wrong."""
        if self._key in _EXHAUSTED:
            return f"was not tried again, as it {_EXHAUSTED[self._key]}"
        with suppress(BrokenPipeError):
            self._requests.write(request + b"\n")
            self._requests.flush()
            if self._waited() and (line := self._replies.readline()):
                reply: list[str] | str = json.loads(line)
                return reply
        _end()
        problem = (
            f"takes more than {self._seconds} s of processor time or "
            f"{bound(TEMPLATE_BYTES) >> 20} MiB for these messages"
        )
        _EXHAUSTED[self._key] = problem
        return f"{problem}; mend the template, or set {VARIABLE}=10"

    def _waited(self) -> bool:
        """Return whether a reply came in time."""
        poll = select.poll()
        poll.register(self._replies.fileno(), select.POLLIN | select.POLLHUP)
        # Second by second: when all of graft was stopped meanwhile, that counts as one.
        return any(poll.poll(1000) for _ in range(_PATIENCE * self._seconds))

    def end(self) -> None:
        """End the process."""
        with suppress(BrokenPipeError):
            self._requests.close()
        self._replies.close()
        if self._owner == os.getpid():
            with suppress(ProcessLookupError, ChildProcessError):
                os.kill(self._process, signal.SIGKILL)
                os.waitpid(self._process, 0)


def _serve(
    tokenizer: Tokenizer, template: object, requests: int, replies: int, seconds: int
) -> NoReturn:
    """Be the forked process: render until there are no more requests."""
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGPROF):
            signal.signal(number, signal.SIG_DFL)
        # Nothing of the other process is written to, or kept open and locked.
        os.dup2(requests, 0)
        os.dup2(replies, 1)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        os.closerange(3, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
        gc.disable()
        _limit_memory()
        with os.fdopen(0, "rb") as asked, os.fdopen(1, "wb") as answers:
            for line in asked:
                signal.setitimer(signal.ITIMER_PROF, seconds)
                reply = _rendered(tokenizer, template, line)
                answers.write(json.dumps(reply).encode() + b"\n")
                answers.flush()
                signal.setitimer(signal.ITIMER_PROF, 0)
    finally:
        os._exit(0)


def _limit_memory() -> None:
    with suppress(OSError, ValueError):  # where the system does not say, or does not know limits
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + bound(TEMPLATE_BYTES)
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


def _rendered(tokenizer: Tokenizer, template: object, request: bytes) -> list[str] | str:
    """Return the texts that a request asks for, or what is wrong."""
    most = max(bound(TEMPLATE_TEXT), bound(TEMPLATE_GROWTH) * len(request))
    texts: list[str] = []
    try:
        messages, beginnings = json.loads(request)
        for end, generation in beginnings:
            text: str = tokenizer.apply_chat_template(
                messages[:end],
                chat_template=template,
                tokenize=False,
                add_generation_prompt=generation,
            )
            texts.append(text)
            if sum(map(len, texts)) > most:
                return (
                    f"writes more than {most:,} characters for these messages; mend the template, "
                    f"or set {VARIABLE}=10"
                )
    except TemplateError as error:
        return f"refuses the messages: {str(error)[:1000]}"
    # A template may raise whatever Python can; a problem of transformers' own is told as well.
    except Exception as error:
        return f"fails on the messages: {type(error).__name__}: {str(error)[:1000]}"
    return texts


def placeholder(value: object) -> str:
    """Return what transformers shows a template instead of a value that JSON does not know."""
    return f"<{type(value).__name__}>"
