"""ONNX Runtime."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from graft.export.onnx.write import GRAPH
from graft.export.runtimes import GraphRuntime, loading


class OnnxRuntime(GraphRuntime):
    """ONNX Runtime on the processor."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        import onnxruntime
        from onnxruntime.capi import onnxruntime_pybind11_state as errors

        file = str(path / GRAPH)
        refused = (errors.Fail, errors.InvalidProtobuf, errors.InvalidGraph)
        with loading(path, "onnxruntime", *refused, errors.InvalidArgument, errors.NoModel):
            self._session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])

    def logits(self, ids: Sequence[int]) -> Tensor:
        """See `Runtime`."""
        return torch.from_numpy(self._session.run(["logits"], self.feeds(ids))[0][0])
