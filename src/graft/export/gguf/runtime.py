"""llama.cpp by llama-cpp-python."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from graft.export.runtimes import ItsTokenizer, loading


class LlamaCpp:
    """llama.cpp, with its cache of keys and values in float32: that is no part of the file."""

    def __init__(self, path: Path, tokens: int) -> None:
        import llama_cpp

        with loading(path, "llama_cpp", ValueError, RuntimeError):
            self._engine = llama_cpp.Llama(
                str(path),
                n_ctx=tokens,
                logits_all=True,
                flash_attn=False,
                type_k=llama_cpp.GGML_TYPE_F32,
                type_v=llama_cpp.GGML_TYPE_F32,
                verbose=False,
            )

    def logits(self, ids: Sequence[int]) -> Tensor:
        """See `Runtime`."""
        self._engine.reset()
        self._engine.eval(list(ids))
        return torch.from_numpy(np.array(self._engine.scores[: len(ids)])).float()

    @property
    def program(self) -> str:
        """See `Runtime`."""
        import llama_cpp

        return (
            f"llama.cpp by llama-cpp-python {llama_cpp.__version__}, which rounds activations to 8 "
            "bits where weights are integers, its cache of keys and values in float32"
        )

    @property
    def tokenizers(self) -> tuple[ItsTokenizer, ...]:
        """See `Runtime`."""
        return (ItsTokenizer("llama.cpp, from the file", self._ids),)

    @property
    def untried(self) -> tuple[str, ...]:
        """See `Runtime`."""
        return ("llama.cpp with another cache (float16 by default) or on a GPU",)

    def _ids(self, text: str) -> list[int]:
        return list(self._engine.tokenize(text.encode(), add_bos=True, special=False))

    @property
    def chat_template(self) -> str | None:
        """See `Runtime`."""
        return self._engine.metadata.get("tokenizer.chat_template")

    @property
    def stop_ids(self) -> set[int]:
        """See `Runtime`."""
        return {self._engine.token_eos()} - {-1}
