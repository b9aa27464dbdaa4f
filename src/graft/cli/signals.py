"""What the command line does on SIGINT (Ctrl-C), SIGTERM and SIGHUP."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from graft.train.stop import Stop, StoppedError

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_LEFT_ALONE = (signal.SIG_IGN, None)
"""Handlers of a signal that is to be ignored, and of one that Python does not know."""
_AGAIN = b"\nstopping after this batch, with a checkpoint; Ctrl-C again stops at once\n"


class Ended(KeyboardInterrupt):  # noqa: N818  (as what it is one of)
    """A signal has ended the command; temporary files are gone."""

    def __init__(self, number: int, message: str = "") -> None:
        by_hand = number == signal.SIGINT
        super().__init__(
            message or ("interrupted" if by_hand else f"ended by {signal.Signals(number).name}")
        )
        self.status = 128 + number
        """The command's exit status."""


@contextmanager
def ending() -> Iterator[None]:
    """End the block by an exception on each of the signals, so that it can clean up."""

    def handle(number: int, frame: FrameType | None) -> None:
        raise Ended(number)

    with _handling(handle):
        yield


@contextmanager
def stopping() -> Iterator[Stop]:
    """Yield what a training stops at: the first signal asks it, where it heeds that.

    A second Ctrl-C ends it at once. Where nothing heeds it a signal ends the block as `ending`
    does.
    """
    stop, numbers = Stop(), list[int]()

    def handle(number: int, frame: FrameType | None) -> None:
        if not stop.heeded or (numbers and number == signal.SIGINT):
            raise Ended(number)
        if not numbers:
            stop.ask()
            if number == signal.SIGINT:
                with suppress(OSError):
                    os.write(2, _AGAIN)
        numbers.append(number)

    with _handling(handle):
        try:
            yield stop
        except StoppedError as stopped:
            raise Ended(numbers[0], str(stopped)) from stopped


@contextmanager
def _handling(handle: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Handle the signals while the block runs, but for those that nohup, say, has ignored."""
    if threading.current_thread() is not threading.main_thread():  # which alone gets them
        yield
        return
    terminals = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]

    def handled(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP:  # the terminal is gone, and writing to it fails from now on
            for descriptor in terminals:
                os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
        handle(number, frame)

    before = {number: signal.getsignal(number) for number in _SIGNALS}
    before = {number: former for number, former in before.items() if former not in _LEFT_ALONE}
    for number in before:
        signal.signal(number, handled)
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, former)
