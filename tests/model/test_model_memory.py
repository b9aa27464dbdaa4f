"""The peak that is counted anew."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from graft.model.running.memory import forget_peak, peak_bytes

CPU = torch.device("cpu")


@pytest.mark.skipif(not Path("/proc/self/clear_refs").is_file(), reason="only Linux can forget")
def test_the_peak_is_counted_from_when_it_was_forgotten() -> None:
    size = 200 * 2**20
    forget_peak(CPU)
    before = peak_bytes(CPU)
    buffer = torch.ones(size, dtype=torch.uint8)
    assert peak_bytes(CPU) > before + 0.9 * size
    del buffer
    assert peak_bytes(CPU) > before + 0.9 * size, "it does not fall by itself"
    forget_peak(CPU)
    assert peak_bytes(CPU) < before + 0.5 * size
