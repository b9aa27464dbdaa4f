"""OpenVINO."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from graft.export.openvino.write import GRAPH
from graft.export.runtimes import FolderRuntime, inputs, loading


class OpenVino(FolderRuntime):
    """OpenVINO, computing in float32 on every processor."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        import openvino

        settings = {"INFERENCE_PRECISION_HINT": "f32"}
        with loading(path, "openvino", RuntimeError):
            compiled = openvino.Core().compile_model(str(path / GRAPH), "CPU", settings)
        self._request = compiled.create_infer_request()

    def logits(self, ids: Sequence[int]) -> Tensor:
        """See `Runtime`."""
        self._request.reset_state()  # of an earlier text
        feeds = inputs(ids) | {"beam_idx": np.zeros(1, np.int32)}
        return torch.from_numpy(self._request.infer(feeds)["logits"][0].copy())
