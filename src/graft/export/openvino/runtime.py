"""OpenVINO."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from graft.export.openvino.tokenizers import DETOKENIZER, PACKAGE, TOKENIZER, OpenVinoTokenizer
from graft.export.openvino.write import GRAPH
from graft.export.runtimes import FolderRuntime, ItsTokenizer, inputs, loading


class OpenVino(FolderRuntime):
    """OpenVINO, computing in float32 on every processor."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._path = path
        self._has_own_tokenizer = (path / TOKENIZER).is_file()
        import openvino

        settings = {"INFERENCE_PRECISION_HINT": "f32"}
        with loading(path, "openvino", RuntimeError):
            compiled = openvino.Core().compile_model(str(path / GRAPH), "CPU", settings)
        self._request = compiled.create_infer_request()

    @property
    def program(self) -> str:
        """See `Runtime`."""
        import openvino

        version = openvino.__version__.partition("-")[0]
        return f"OpenVINO {version} on the processor, in float32 (INFERENCE_PRECISION_HINT=f32)"

    @property
    def tokenizers(self) -> tuple[ItsTokenizer, ...]:
        """See `Runtime`."""
        if not self._has_own_tokenizer or find_spec(PACKAGE) is None:
            return super().tokenizers
        files = (self._path / name for name in (TOKENIZER, DETOKENIZER))
        with loading(self._path, PACKAGE, RuntimeError):
            own = OpenVinoTokenizer(*map(str, files))
        name = "OpenVINO, from openvino_tokenizer.xml"
        return (*super().tokenizers, ItsTokenizer(name, own.encode))

    @property
    def untried(self) -> tuple[str, ...]:
        """See `Runtime`."""
        told = ["OpenVINO without the hint, which computes in bf16 on processors that have it"]
        if not self._has_own_tokenizer:
            told.append("OpenVINO's own tokenizer, which the folder has not")
        elif find_spec(PACKAGE) is None:
            told.append(f"{TOKENIZER}: openvino-tokenizers, which runs it, is not installed")
        return tuple(told)

    def logits(self, ids: Sequence[int]) -> Tensor:
        """See `Runtime`."""
        self._request.reset_state()  # of an earlier text
        feeds = inputs(ids) | {"beam_idx": np.zeros(1, np.int32)}
        return torch.from_numpy(self._request.infer(feeds)["logits"][0].copy())
