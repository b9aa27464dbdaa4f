"""OpenVINO."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from graft.export.openvino.write import GRAPH
from graft.export.runtimes import GraphRuntime, loading


class OpenVino(GraphRuntime):
    """OpenVINO, computing in float32 on every processor."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        import openvino

        settings = {"INFERENCE_PRECISION_HINT": "f32"}
        with loading(path, "openvino", RuntimeError):
            self._compiled = openvino.Core().compile_model(str(path / GRAPH), "CPU", settings)

    def logits(self, ids: Sequence[int]) -> Tensor:
        """See `Runtime`."""
        return torch.from_numpy(self._compiled(self.feeds(ids))["logits"][0].copy())
