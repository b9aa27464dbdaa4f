"""Transformers, by graft's own way of loading a folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from torch import Tensor

from graft.export.runtimes import FolderRuntime
from graft.model.load import load_model


class Transformers(FolderRuntime):
    """Transformers, computing in float32 on the processor."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._model = load_model(str(path), dtype="float32", device="cpu").model

    @property
    def program(self) -> str:
        """See `Runtime`."""
        return f"Transformers {transformers.__version__}, loaded by graft, in float32"

    @torch.no_grad()
    def logits(self, ids: Sequence[int]) -> Tensor:
        """See `Runtime`."""
        return self._model(torch.tensor([list(ids)])).logits[0].float()
