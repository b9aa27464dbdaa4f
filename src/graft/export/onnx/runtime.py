"""ONNX Runtime."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from graft.export.onnx.write import GRAPH
from graft.export.runtimes import FolderRuntime, ItsTokenizer, inputs, loading
from graft.model.folder import read_config
from graft.model.gguf.layout import head_dim
from graft.text import reason

_GENAI = "onnxruntime_genai"


class OnnxRuntime(FolderRuntime):
    """ONNX Runtime on the processor."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._path = path
        self._start_genai()
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

    @property
    def program(self) -> str:
        """See `Runtime`."""
        import onnxruntime

        return f"ONNX Runtime {onnxruntime.__version__} on the processor, in float32"

    @property
    def tokenizers(self) -> tuple[ItsTokenizer, ...]:
        """See `Runtime`."""
        return (*super().tokenizers, *self._genai)

    @property
    def untried(self) -> tuple[str, ...]:
        """See `Runtime`."""
        return self._untried

    def _start_genai(self) -> None:
        """Open the folder's tokenizer in ONNX Runtime GenAI, which is beside this runtime."""
        self._genai: tuple[ItsTokenizer, ...] = ()
        self._untried: tuple[str, ...] = ()
        if find_spec(_GENAI) is None:
            why = "is not installed: pip install onnxruntime-genai"
        else:
            import onnxruntime_genai as genai

            try:
                words = genai.Tokenizer(str(self._path))
            except RuntimeError as error:
                why = f"does not take it: {reason(error)}"
            else:
                name = f"ONNX Runtime GenAI {genai.__version__}, from the folder"
                self._genai = (ItsTokenizer(name, words.encode, special=False, bound=False),)
                return
        self._untried = (f"the tokens by ONNX Runtime GenAI, which {why}",)

    def logits(self, ids: Sequence[int]) -> Tensor:
        """See `Runtime`."""
        return torch.from_numpy(self._session.run(["logits"], self._empty | inputs(ids))[0][0])
