"""ONNX Runtime."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from graft.export.onnx.write import GRAPH
from graft.export.runtimes import FolderRuntime, inputs, loading
from graft.model.folder import read_config
from graft.model.gguf.layout import head_dim


class OnnxRuntime(FolderRuntime):
    """ONNX Runtime on the processor."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        import onnxruntime
        from onnxruntime.capi import onnxruntime_pybind11_state as errors

        file = str(path / GRAPH)
        refused = (errors.Fail, errors.InvalidProtobuf, errors.InvalidGraph)
        with loading(path, "onnxruntime", *refused, errors.InvalidArgument, errors.NoModel):
            self._session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        config = read_config(path)
        empty = np.zeros((1, config.num_key_value_heads, 0, head_dim(config)), np.float32)
        self._empty = {
            f"past_key_values.{layer}.{kind}": empty
            for layer in range(config.num_hidden_layers)
            for kind in ("key", "value")
        }

    def logits(self, ids: Sequence[int]) -> Tensor:
        """See `Runtime`."""
        return torch.from_numpy(self._session.run(["logits"], self._empty | inputs(ids))[0][0])
