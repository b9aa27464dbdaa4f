"""Several forked processes that answer requests side by side; the replies keep the order."""

from __future__ import annotations

import os
import select
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import BinaryIO, Generic, TypeVar

from graft.data.worker import Forked

_AHEAD = 4
"""Requests for each process that are asked before the reply to an earlier one has come."""
_PATIENCE = 600
"""Seconds without any reply after which a process is taken for one that hangs."""
_LENGTH = 8
"""Bytes of a number that says how many bytes follow."""
_MOST = 2**31
"""Bytes of the longest reply that is read."""

Asked = TypeVar("Asked")


def cores() -> int:
    """Return how many processes can compute at a time."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class Pool(Generic[Asked]):
    """Processes forked from this one, which have what it had then."""

    def __init__(
        self,
        answer: Callable[[bytes], bytes],
        as_bytes: Callable[[Asked], bytes | None],
        begin: Callable[[], None],
        count: int,
    ) -> None:
        """Fork; `begin` is called there first, and `answer` for each request.

        as_bytes: what of a request is sent; of None there is no reply. Where the system lets fork
        fewer processes than `count`, there are fewer, or none.
        """

        def serve(asked: BinaryIO, answers: BinaryIO) -> None:
            begin()
            while request := _read(asked):
                _write(answers, answer(request))

        self._as_bytes = as_bytes
        self._idle: list[Forked] = []
        with suppress(OSError):
            while len(self._idle) < count:
                self._idle.append(Forked(serve))
        self._most = _AHEAD * count
        self._busy: dict[int, tuple[Forked, int]] = {}
        """Who is at which request, by the descriptor that the reply comes from."""
        self._replies: dict[int, bytes | None] = {}
        """Those that came before an earlier one."""

    def replies(self, requests: Iterable[Asked]) -> Iterator[tuple[Asked, bytes | None]]:
        """Yield each request with its reply, in order.

        The reply is None where there is nobody left to ask: a process is not replaced that was
        ended at a request. Whoever asked then does the work.
        """
        asked: dict[int, Asked] = {}
        first = 0
        for number, request in enumerate(requests):
            asked[number] = request
            self._ask(number, self._as_bytes(request))
            while first in self._replies or number - first >= self._most:
                yield asked.pop(first), self._reply(first)
                first += 1
        for number in sorted(asked):
            yield asked.pop(number), self._reply(number)

    def end(self) -> None:
        """End the processes."""
        for process in [*self._idle, *(process for process, _ in self._busy.values())]:
            process.end()
        self._idle.clear()
        self._busy.clear()

    def _ask(self, number: int, content: bytes | None) -> None:
        if content is None:
            self._replies[number] = None
            return
        while self._busy and not self._idle:
            self._collect()
        if not self._idle:
            self._replies[number] = None
            return
        process = self._idle.pop()
        self._busy[process.replies.fileno()] = process, number
        with suppress(BrokenPipeError):  # it has ended, which shows in its reply
            _write(process.requests, content)

    def _reply(self, number: int) -> bytes | None:
        while number not in self._replies:
            self._collect()
        return self._replies.pop(number)

    def _collect(self) -> None:
        """Wait for replies, and take them."""
        for place in self._ready():
            process, number = self._busy.pop(place)
            reply = _read(process.replies)
            self._replies[number] = reply or None
            if reply:
                self._idle.append(process)
            else:
                process.end()

    def _ready(self) -> list[int]:
        """Return the descriptors that a reply comes from; all of them where none came in time."""
        poll = select.poll()
        for place in self._busy:
            poll.register(place, select.POLLIN | select.POLLHUP)
        # Second by second: when all of graft was stopped meanwhile, that counts as one.
        for _ in range(_PATIENCE):
            if found := poll.poll(1000):
                return [place for place, _ in found]
        for process, _ in self._busy.values():
            process.kill()
        return list(self._busy)


def _write(file: BinaryIO, content: bytes) -> None:
    file.write(len(content).to_bytes(_LENGTH, "little"))
    file.write(content)
    file.flush()


def _read(file: BinaryIO) -> bytes:
    """Return what was written; nothing where it ends before."""
    length = int.from_bytes(file.read(_LENGTH), "little")
    content = file.read(min(length, _MOST))
    return content if len(content) == length else b""
