"""What every test may rely on: fixed seeds, two threads, no network, the shared inputs."""

from __future__ import annotations

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported, so set before it is

import hypothesis
import pytest
import torch

SHARED = Path(__file__).resolve().parents[2] / "shared"

hypothesis.settings.register_profile("graft", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("graft")
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def _shared(kind: str) -> Path:
    folder = SHARED / kind
    if not folder.is_dir():
        pytest.skip(f"needs the shared {kind} in {folder}, beside the checkout")
    return folder


@pytest.fixture(scope="session")
def shared_models() -> Path:
    """The folder of base models beside the checkout."""
    return _shared("models")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of data sets beside the checkout."""
    return _shared("data")
