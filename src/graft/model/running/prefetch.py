"""Reading a model that is larger than memory ahead of the layers that need it.

The packed weights of a quantised folder are mapped, so the kernel can drop their pages and read
them again. Left alone it reads when a kernel touches a page, while the arithmetic stands still, and
it guesses wrongly what may go. Both are known here: the decoder layers take their turns, forward
and then backward.
"""

from __future__ import annotations

import bisect
import ctypes
import mmap
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from graft.model.decoder_layers import decoder_layer_of

AHEAD = 2
"""Layers that are read while another one computes."""

SHARE = 0.6
"""Of the available memory; layers that take more are read ahead and let go."""

_PIECE = 128 * 2**10
"""One call reads no more than the device's read-ahead, whose default this is."""

_WILLNEED, _COLD, _POPULATE_READ = 3, 20, 22  # of madvise, in Linux's mman-common.h

_MAPS = Path("/proc/self/maps")


@contextmanager
def prefetch_layers(model: PreTrainedModel, available: int) -> Iterator[LayerPrefetch | None]:
    """Read the decoder layers ahead while the block runs, if they are mapped and memory is short.

    That is, if more than 60 % of the `available` bytes would be taken by their pages; else, and on
    systems other than Linux, nothing is done and the block gets None. The numbers are the same.

    The weights of a layer whose turn is over are the first to go, in the order of the turns: after
    a forward pass the last layers are still there for the backward pass, which leaves the first
    ones to the next forward pass.
    """
    names = [name for name, _ in model.named_modules() if decoder_layer_of(name) == name]
    layers = [model.get_submodule(name) for name in names]
    ranges = _mapped_ranges(layers)
    if sum(end - begin for layer in ranges for begin, end in layer) <= SHARE * available:
        yield None
        return
    prefetch = LayerPrefetch(ranges)
    hooks = []
    for number, layer in enumerate(layers):
        hooks.append(layer.register_forward_pre_hook(partial(_forward_begins, prefetch, number)))
        hooks.append(layer.register_forward_hook(partial(_forward_ended, prefetch, number)))
    prefetch.start()
    try:
        yield prefetch
    finally:
        for hook in hooks:
            hook.remove()
        prefetch.stop()


class LayerPrefetch:
    """A thread that reads layers before their turn and marks those after it as first to go."""

    def __init__(self, ranges: Sequence[Sequence[tuple[int, int]]]) -> None:
        self.ranges = ranges
        """Addresses [begin, end) of each layer's mapped weights."""
        self.waited_seconds = 0.0
        """Time that the model waited for a layer that was not there yet."""
        self.turn: tuple[int, int] | None = None
        """The layer whose turn it is, and +1 in a forward pass, -1 in a backward one."""
        self._wanted: list[int] = []
        self._passed: list[int] = []
        self._ready: set[int] = set()
        self._running = True
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="graft-prefetch", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread; waits for the layer that it is reading."""
        with self._changed:
            self._running = False
            self._changed.notify_all()
        self._thread.join()

    def begin(self, layer: int, direction: int) -> None:
        """Begin a layer's turn: wait until its weights are there, and have the next ones read."""
        with self._changed:
            last, _ = self.turn or (layer, direction)
            self.turn = layer, direction
            if last != layer:
                self._passed.append(last)
                self._ready.discard(last)
            self._wanted = self._order(layer, direction)
            self._changed.notify_all()
            begin = time.perf_counter()
            while self._running and layer not in self._ready:
                self._changed.wait()
            self.waited_seconds += time.perf_counter() - begin

    def _order(self, layer: int, direction: int) -> list[int]:
        """Return the layers to read from now on."""
        order = [layer + step * direction for step in range(AHEAD + 1)]
        if not torch.is_grad_enabled():  # no backward pass follows: it begins at the front again
            order = [number % len(self.ranges) for number in order]
        return [number for number in order if 0 <= number < len(self.ranges)]

    def _work(self) -> None:
        try:
            while True:
                with self._changed:
                    while self._running and not self._passed and self._next() is None:
                        self._changed.wait()
                    if not self._running:
                        return
                    passed, self._passed = self._passed, []
                    wanted = self._next()
                for layer in passed:
                    self._advise(layer, _COLD)
                if wanted is not None:
                    self._read(wanted)
                    with self._changed:
                        self._ready.add(wanted)
                        self._changed.notify_all()
        finally:
            with self._changed:  # whatever happened, nobody waits for ever
                self._running = False
                self._changed.notify_all()

    def _next(self) -> int | None:
        return next((layer for layer in self._wanted if layer not in self._ready), None)

    def _read(self, layer: int) -> None:
        """Ask for all pages, so that many reads are under way at once; then wait for them."""
        for begin, end in self.ranges[layer]:
            for piece in range(begin, end, _PIECE):
                _madvise(piece, min(piece + _PIECE, end), _WILLNEED)
        self._advise(layer, _POPULATE_READ)

    def _advise(self, layer: int, advice: int) -> None:
        for begin, end in self.ranges[layer]:
            _madvise(begin, end, advice)


def _forward_begins(prefetch: LayerPrefetch, layer: int, *_: object) -> None:
    # A layer whose turn it is already may be recomputing for its backward pass.
    if prefetch.turn is None or prefetch.turn[0] != layer:
        prefetch.begin(layer, 1)


def _forward_ended(prefetch: LayerPrefetch, layer: int, *call: Any) -> None:
    """Have the backward turn begin with the gradient of the layer's output."""
    output = call[-1][0] if isinstance(call[-1], tuple) else call[-1]
    if output.requires_grad:
        output.register_hook(lambda _: prefetch.begin(layer, -1))


def _mapped_ranges(layers: Sequence[nn.Module]) -> list[list[tuple[int, int]]]:
    """Return for each layer the page-aligned addresses of its parameters that files are mapped to.

    Empty on systems other than Linux.
    """
    files = _mapped_files()
    ranges = []
    for layer in layers:
        found: list[tuple[int, int]] = []
        places = [(p.data_ptr(), p.nbytes) for p in layer.parameters() if p.device.type == "cpu"]
        for begin, size in sorted(places):
            number = bisect.bisect_right(files, (begin, sys.maxsize)) - 1
            if number < 0 or begin + size > files[number][1] or not size:
                continue
            first, last = begin & -mmap.PAGESIZE, -(-(begin + size) // mmap.PAGESIZE)
            span = (first, last * mmap.PAGESIZE)
            if found and span[0] <= found[-1][1]:
                span = (found.pop()[0], span[1])
            found.append(span)
        ranges.append(found)
    return ranges


def _mapped_files() -> list[tuple[int, int]]:
    """Return the addresses [begin, end) of this process's mappings of files, in order."""
    if sys.platform != "linux":
        return []
    found = []
    for line in _MAPS.read_text(encoding="utf-8", errors="replace").splitlines():
        span, _, _, _, inode, *_ = line.split()
        if inode != "0":
            begin, _, end = span.partition("-")
            found.append((int(begin, 16), int(end, 16)))
    return found


def _madvise(begin: int, end: int, advice: int) -> None:
    """Advise the kernel; one that is too old for an advice refuses it, which changes no result."""
    _libc_madvise()(begin, end - begin, advice)


@cache
def _libc_madvise() -> Any:
    function = ctypes.CDLL(None).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function
