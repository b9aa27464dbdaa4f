"""Regular expressions match as `re` does, and never for longer than their bound."""

from __future__ import annotations

import re
import sys
import time

import pytest

from graft import patterns as module
from graft.errors import GraftError
from graft.patterns import match_names

NAMES = [
    f"model.layers.{number}.{part}"
    for number in range(12)
    for part in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj")
]
HONEST = [
    "model.layers.3.mlp.up_proj",
    "mlp.up_proj",
    r"model\.layers\.1\..*",
    r".*layers\.([0-4]|1[01])\..*(q|v)_proj",
    r"(?!.*mlp).*",
    r"(?i).*UP_PROJ",
    "^model.layers.2.mlp.up_proj$",
    "",
]


@pytest.mark.parametrize("few", [True, False])
def test_names_match_as_re_matches_them(few, monkeypatch) -> None:
    monkeypatch.setattr(module, "_DIRECT", 10**9 if few else 0)
    found = match_names(HONEST, NAMES)
    assert [one.problem for one in found] == [None] * len(HONEST)
    for pattern, one in zip(HONEST, found, strict=True):
        assert one.names == [name for name in NAMES if re.fullmatch(pattern, name)]
    assert sum(bool(one.names) for one in found) == 6


def test_suffixes_match_as_peft_matches_them() -> None:
    patterns = ["mlp.up_proj", "up_proj", "proj", r"layers\.[12]\.mlp\..*", "^mlp.up_proj"]
    for pattern, one in zip(patterns, match_names(patterns, NAMES, suffixes=True), strict=True):
        expected = [name for name in NAMES if re.match(rf"(.*\.)?({pattern})$", name)]
        assert one.names == expected and one.problem is None


@pytest.mark.parametrize("pattern", ["([", "(?P<a>.)(?P<a>.)", "a{99999999999999}", "(" * 5000])
def test_no_regular_expression_is_told(pattern) -> None:
    (found,) = match_names([pattern], NAMES)
    assert not found.names and "is no valid regular expression" in str(found.problem)


@pytest.mark.parametrize(
    "pattern",
    [
        r"(([a-z_.]|[0-9]|\w)*)*x!",
        "(?:a|a|[a-z]|.)*" * 3 + "!",
        "(?:){4294967290}",  # repeats of nothing take memory: each is remembered
    ],
)
def test_a_pattern_that_would_never_end_is_refused(pattern, monkeypatch) -> None:
    monkeypatch.setenv("GRAFT_BOUNDS", "0.25")
    begin = time.monotonic()
    good, bad, after = match_names([r".*q_proj", pattern, r".*v_proj"], NAMES)
    assert time.monotonic() - begin < 8
    assert len(good.names) == 12
    assert "to match; write it without repeats" in str(bad.problem)
    assert "was not tried" in str(after.problem)


def test_a_pattern_has_a_greatest_length() -> None:
    (found,) = match_names(["a" * 10_001], NAMES)
    assert "10,001 characters" in str(found.problem)


def test_where_no_process_can_be_started_it_is_told(monkeypatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(GraftError, match="Python cannot be started in a process of its own: No"):
        match_names([".*"], NAMES)
    assert match_names(["mlp.up_proj"], NAMES)[0].problem is None
