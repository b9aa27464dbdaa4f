"""Models on the hub, and what to say of a name that is none there."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

from huggingface_hub import constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from graft.errors import GraftError
from graft.text import quoted, reason

_FILES = (".safetensors", ".gguf", ".bin", ".json", ".pt", ".pth")
"""Endings of names that are files and no models on the hub."""


def hub_id_of(model: str) -> str | None:
    """Return the hub id of a model that is given by one, or by its folder in a hub's cache.

    None for any other folder.
    """
    path = Path(model)
    if not path.is_dir():
        return model
    parts = path.resolve().parts
    for kept, within in zip(parts, parts[1:], strict=False):
        if kept.startswith("models--") and within == "snapshots":
            return kept.removeprefix("models--").replace("--", "/")
    return None


def base_name(model: str) -> str:
    """Return how an adapter names its base: by its hub id, else as it was given."""
    return hub_id_of(model) or model


def from_hub(model: str, fetched: Sequence[str]) -> Path:
    """Return the folder that holds the files of a hub id whose names match some pattern.

    They are downloaded unless the hub's cache has them. Raises GraftError when they are nowhere.
    """
    no_id = (
        f"there is no folder {quoted(model)}, and it is no hub id of form owner/name, or of a name "
        "alone"
    )
    if model.startswith((".", "/", "~")) or model.endswith(_FILES):
        raise GraftError(no_id)
    cached = constants.HF_HUB_OFFLINE or not _has_network()
    try:
        if len(fetched) == 1:
            return Path(hf_hub_download(model, fetched[0], local_files_only=cached)).parent
        return Path(snapshot_download(model, allow_patterns=[*fetched], local_files_only=cached))
    except HFValidationError as error:
        raise GraftError(no_id) from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise GraftError(
            f"there is no folder {quoted(model)} here, the hub's cache "
            f"({constants.HF_HUB_CACHE}) has no model of that id, and {_why_not(error, cached)}\n"
            "give the path of a folder with config.json, tokenizer and safetensors, or, where "
            "there is a network, the id of a model on the hub: owner/name, or gpt2"
        ) from error


def _has_network() -> bool:
    """Return whether the hub's name is known here: where it is not, asking takes half a minute."""
    if getproxies():  # who then know the name
        return True
    try:
        socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, None)
    except OSError:
        return False
    return True


def _why_not(error: Exception, cached: bool) -> str:
    """Return why the hub gave nothing."""
    if constants.HF_HUB_OFFLINE:
        return "the hub has it not or cannot be reached (HF_HUB_OFFLINE is set)"
    if cached:
        return "the hub has it not or cannot be reached (there is no network)"
    if isinstance(error, GatedRepoError):
        return "the hub wants its conditions accepted there, and a token (hf auth login)"
    if isinstance(error, RepositoryNotFoundError):
        return "the hub has none either, or none for you without a token (hf auth login)"
    return f"the hub has it not or cannot be reached: {reason(error)}"
