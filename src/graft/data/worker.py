"""A process of its own that answers requests, each within a share of time and memory.

It is forked from this one, that it may have what this one has loaded. The system ends it at its
share. A `Worker` serves one request after the other, each at 0.1 ms above its work.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import select
import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from graft.errors import GraftError

PATIENCE = 10
"""Processor time may take so many times as long by the clock."""


class EndedError(Exception):
    """The process was ended, as it went beyond its share."""


class Forked:
    """A forked process with a pipe in each direction, which ends when there is nobody to answer."""

    def __init__(self, serve: Callable[[BinaryIO, BinaryIO], None]) -> None:
        """Fork, and call `serve` there with the requests and the replies; raises OSError."""
        self._owner = os.getpid()
        ends: list[int] = []
        try:
            ends += [*os.pipe(), *os.pipe()]
            with warnings.catch_warnings():
                # Other threads hold no lock that the process needs; see also PATIENCE.
                warnings.simplefilter("ignore", DeprecationWarning)
                self.process = os.fork()
        except OSError:
            for end in ends:
                os.close(end)
            raise
        if self.process == 0:
            _be(serve, ends[0], ends[3])
        os.close(ends[0])
        os.close(ends[3])
        self.requests: BinaryIO = os.fdopen(ends[1], "wb")
        self.replies: BinaryIO = os.fdopen(ends[2], "rb")

    def kill(self) -> None:
        """End the process at once; nothing more can be read than what it has written."""
        if self._owner == os.getpid():
            self._owner = 0
            with suppress(ProcessLookupError, ChildProcessError):
                os.kill(self.process, signal.SIGKILL)
                os.waitpid(self.process, 0)

    def end(self) -> None:
        """End the process, and close what leads there."""
        with suppress(BrokenPipeError):
            self.requests.close()
        self.replies.close()
        self.kill()


def _be(serve: Callable[[BinaryIO, BinaryIO], None], requests: int, replies: int) -> NoReturn:
    """Be the forked process."""
    try:
        # Nothing of the other process is written to, or kept open and locked.
        os.dup2(requests, 0)
        os.dup2(replies, 1)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        os.closerange(3, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
        with os.fdopen(0, "rb") as asked, os.fdopen(1, "wb") as answers:
            serve(asked, answers)
    finally:
        os._exit(0)


class Worker(Forked):
    """A forked process within a share; a line of JSON is a request or a reply."""

    def __init__(self, answer: Callable[[Any], Any], seconds: int, memory: int) -> None:
        """Fork; `answer` gets a request as JSON has it, and returns what JSON knows.

        seconds: processor time for a request. memory: bytes besides what the process has. Raises
        GraftError where no process can be forked.
        """
        self._seconds = seconds

        def serve(asked: BinaryIO, answers: BinaryIO) -> None:
            limit_this_process(memory)
            for line in asked:
                with timed(seconds):
                    reply = answer(json.loads(line))
                    answers.write(json.dumps(reply).encode() + b"\n")
                    answers.flush()

        try:
            super().__init__(serve)
        except OSError as error:
            raise GraftError(
                f"the chat template cannot be rendered in a process of its own: {error.strerror}"
            ) from error

    def ask(self, request: bytes) -> Any:
        """Return the reply to a line of JSON; raises EndedError when the process was ended."""
        with suppress(BrokenPipeError):
            self.requests.write(request + b"\n")
            self.requests.flush()
            if self._waited() and (line := self.replies.readline()):
                return json.loads(line)
        raise EndedError

    def _waited(self) -> bool:
        """Return whether a reply came in time."""
        poll = select.poll()
        poll.register(self.replies.fileno(), select.POLLIN | select.POLLHUP)
        # Second by second: when all of graft was stopped meanwhile, that counts as one.
        return any(poll.poll(1000) for _ in range(PATIENCE * self._seconds))


def limit_this_process(memory: int) -> None:
    """Let the system end this process at its share: `memory` in bytes besides what it has now.

    An interrupt is left to the process that forked it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGPROF):
        signal.signal(number, signal.SIG_DFL)
    gc.freeze()  # what it shares is not looked through, which would copy it
    with suppress(OSError, ValueError):  # where the system does not say, or does not know limits
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + memory
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


@contextmanager
def timed(seconds: int) -> Iterator[None]:
    """Let the system end this process when the block takes more processor time than that."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
