"""Where and in what precision: the tables of choices."""

from __future__ import annotations

import pytest
import torch

from graft.errors import GraftError
from graft.model import devices
from graft.model.devices import computes_bfloat16, resolve_device, resolve_dtype

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("cuda", "mps", "expected"),
    [
        (False, False, "cpu"),
        (True, False, "cuda"),
        (False, True, "mps"),
        (True, True, "cuda"),
    ],
)
def test_auto_takes_the_fastest_there_is(cuda, mps, expected, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert resolve_device("auto") == torch.device(expected)
    assert resolve_device("cpu") == CPU


@pytest.mark.parametrize("name", ["cuda", "mps"])
def test_a_device_that_is_not_here(name, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(GraftError, match=f"'{name}' is not available here; there is: cpu"):
        resolve_device(name)


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize(
    ("name", "source", "slow_choice", "fast_choice"),
    [
        ("auto", torch.float32, torch.float32, torch.float32),
        ("auto", torch.float64, torch.float32, torch.float32),
        ("auto", torch.bfloat16, torch.float32, torch.bfloat16),
        ("auto", torch.float16, torch.float32, torch.bfloat16),
        ("float32", torch.bfloat16, torch.float32, torch.float32),
        ("bfloat16", torch.float32, torch.bfloat16, torch.bfloat16),
    ],
)
def test_compute_dtype(name, source, slow_choice, fast_choice, fast, monkeypatch) -> None:
    monkeypatch.setattr(devices, "computes_bfloat16", lambda device: fast)
    assert resolve_dtype(name, source, CPU) == (fast_choice if fast else slow_choice)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"avx2", "avx512f"}, False),
        ({"avx512_bf16"}, True),
        ({"amx_bf16", "amx_tile"}, True),
        (set(), False),
    ],
)
def test_bfloat16_on_a_cpu_needs_its_instructions(flags, expected, monkeypatch) -> None:
    monkeypatch.setattr(devices, "_cpu_flags", lambda: frozenset(flags))
    assert computes_bfloat16(CPU) is expected
    assert computes_bfloat16(torch.device("mps")) is False
