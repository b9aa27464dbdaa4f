"""A name that is no folder is a hub id, with an owner or without, and the cache is the hub's."""

from __future__ import annotations

import shutil
import socket
import time
from pathlib import Path

import pytest
from huggingface_hub import constants

from graft.errors import GraftError
from graft.model import hub
from graft.model.folder import find_folder, find_text_folder
from graft.model.subject import open_subject


@pytest.fixture
def cache(tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub's cache that holds the tiny base as gpt2 and as someone/small."""
    for name in ("models--gpt2", "models--someone--small"):
        commit = "0" * 40
        shutil.copytree(tiny_base, tmp_path / name / "snapshots" / commit)
        (tmp_path / name / "refs").mkdir()
        (tmp_path / name / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("name", ["gpt2", "someone/small"])
def test_a_name_with_or_without_an_owner_is_a_hub_id(name: str, cache: Path) -> None:
    for config_alone in (True, False):
        folder = find_folder(name, config_alone)
        assert folder.is_relative_to(cache) and (folder / "config.json").is_file()
    assert open_subject(name).tokenizer("red")["input_ids"]


@pytest.mark.parametrize("name", ["gpt3", "someone/else"])
def test_what_was_tried_is_told_in_two_lines(name: str, cache: Path) -> None:
    with pytest.raises(GraftError) as error:
        find_folder(name)
    tried, how = str(error.value).splitlines()
    assert f"no folder '{name}'" in tried and str(cache) in tried and "HF_HUB_OFFLINE" in tried
    assert "config.json" in how and "owner/name" in how and "gpt2" in how


@pytest.mark.parametrize("name", ["./gpt2", "/gpt2", "~/gpt2", "a/b/c", "gpt2.gguf", "a b", "-x"])
def test_what_can_be_no_hub_id_is_not_asked_for(name: str, cache: Path) -> None:
    with pytest.raises(GraftError, match="no folder .*no hub id"):
        find_folder(name)


def test_without_a_network_nothing_is_waited_for(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(*_: object) -> None:
        raise socket.gaierror("Name or service not known")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "getproxies", dict)
    monkeypatch.setattr(hub.socket, "getaddrinfo", unknown)
    assert find_folder("gpt2").is_relative_to(cache)
    begin = time.monotonic()
    with pytest.raises(GraftError, match="no network"):
        find_folder("gpt3")
    assert time.monotonic() - begin < 1.0


def test_of_a_tokenizer_no_weights_are_fetched(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    def fetch(model: str, *, allow_patterns: list[str], **_: object) -> str:
        asked.append(allow_patterns)
        return str(cache)

    monkeypatch.setattr(hub, "snapshot_download", fetch)
    find_text_folder("gpt2")
    find_folder("gpt2")
    assert not any("safetensors" in pattern for pattern in asked[0])
    assert any("safetensors" in pattern for pattern in asked[1])
